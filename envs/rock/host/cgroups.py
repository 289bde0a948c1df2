"""Memory, process and CPU limits of one sandbox, by cgroups of version 1 or 2.

The groups lie below the group that this process is in. Only the sandbox's own processes are moved,
so the limits that the machine set for this process also hold for them.
"""

import os
import signal

from . import linux

PERIOD_MICROSECONDS = 100_000
MIN_QUOTA_MICROSECONDS = 1000  # the kernel's minimum
# By version: the file of a group's weight for the scheduler, and what others have in it.
SHARES = {1: ("cpu.shares", 1024), 2: ("cpu.weight", 100)}
SHARE_DIVISOR = 4
NEEDED = ("memory", "pids")
WANTED = ("memory", "pids", "cpu")

Mount = tuple[str, str]  # (mount point, the group that is its root)


class Place:
    """Where groups can be made.

    Attributes:
      version: of cgroups, 1 or 2.
      parents: controller -> parent directory; in version 2 all have the same one.
    """

    def __init__(self, version: int, parents: dict[str, str]):
        self.version = version
        self.parents = parents


def find() -> tuple[Place | None, str]:
    """Find where memory and pids can be limited; return None and the reason if nowhere."""
    mounts = _mounts()
    groups = _own_groups()
    if all(name in mounts for name in NEEDED):
        return _find_version_1(mounts, groups)
    if "cgroup2" in mounts:
        return _find_version_2(mounts["cgroup2"], groups.get("", "/"))
    return None, "no cgroup file system with memory and pids controllers is mounted"


def _find_version_1(mounts: dict[str, Mount], groups: dict[str, str]) -> tuple[Place | None, str]:
    parents = {}
    for name in WANTED:
        if name in mounts:
            directory = _own_directory(mounts[name], groups.get(name, "/"))
            if os.access(directory, os.W_OK):
                parents[name] = directory
    if all(name in parents for name in NEEDED):
        return Place(1, parents), ""
    return None, "the memory and pids cgroups (version 1) are not writable for this process"


def _find_version_2(mount: Mount, group: str) -> tuple[Place | None, str]:
    point, _ = mount
    own = _own_directory(mount, group)
    for parent in dict.fromkeys((own, os.path.dirname(own))):
        enabled = _enable(parent) if parent.startswith(point) else []
        if all(name in enabled for name in NEEDED):
            return Place(2, dict.fromkeys(enabled, parent)), ""
    reason = (
        f"the cgroup {own} (version 2) does not let this process limit memory and pids below it"
    )
    return None, reason


def _mounts() -> dict[str, Mount]:
    """Return where each controller of version 1, and "cgroup2", is mounted."""
    found = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            fields = before.split()
            mount = (fields[4], fields[3])
            if kind == "cgroup2":
                found["cgroup2"] = mount
            elif kind == "cgroup":
                for name in options.strip().split(","):
                    if name in WANTED:
                        found[name] = mount
    return found


def _own_groups() -> dict[str, str]:
    """Return this process's group for each controller; "" stands for version 2."""
    groups = {}
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            for name in names.split(","):
                groups[name] = path
    return groups


def _own_directory(mount: Mount, group: str) -> str:
    point, root = mount
    relative = os.path.relpath(group, root)
    directory = os.path.normpath(os.path.join(point, relative))
    if relative.startswith("..") or not os.path.isdir(directory):
        return point
    return directory


def _enable(parent: str) -> list[str]:
    """Return the wanted controllers for children of a group of version 2.

    Those that are not switched on for children yet are switched on where that is allowed.
    """
    try:
        with open(f"{parent}/cgroup.controllers") as file:
            offered = file.read().split()
        with open(f"{parent}/cgroup.subtree_control") as file:
            enabled = file.read().split()
    except OSError:
        return []
    if not os.access(parent, os.W_OK) or not os.access(f"{parent}/cgroup.procs", os.W_OK):
        return []
    for name in WANTED:
        if name in offered and name not in enabled:
            try:
                _write(f"{parent}/cgroup.subtree_control", f"+{name}")
            except OSError:
                # EBUSY: the group itself holds processes; the caller tries the next one.
                continue
            enabled.append(name)
    return [name for name in WANTED if name in enabled]


def _write(path: str, value: object) -> None:
    linux.write_file(path, str(value).encode())


def create(place: Place, name: str, memory_bytes: int, pids: int, cpus: float) -> list[str]:
    """Make the groups of one sandbox, with their limits set, or none of them.

    Args:
      place: from `find`.
      name: of the groups.
      memory_bytes: of all processes together.
      pids: processes and threads together.
      cpus: processors' time a second.

    Returns:
      The directories of the groups.
    """
    directories = [f"{parent}/{name}" for parent in dict.fromkeys(place.parents.values())]
    made = []
    try:
        for directory in directories:
            os.mkdir(directory)
            made.append(directory)
        groups = {controller: f"{parent}/{name}" for controller, parent in place.parents.items()}
        _limit_memory(place.version, groups["memory"], memory_bytes)
        _write(f"{groups['pids']}/pids.max", pids)
        if "cpu" in groups:
            _limit_cpu(place.version, groups["cpu"], cpus)
    except OSError:
        remove(made)
        raise
    return directories


def _limit_memory(version: int, group: str, memory_bytes: int) -> None:
    """Limit memory and allow no swap."""
    if version == 1:
        _write(f"{group}/memory.limit_in_bytes", memory_bytes)
        memory_and_swap = f"{group}/memory.memsw.limit_in_bytes"
        if os.path.exists(memory_and_swap):
            _write(memory_and_swap, memory_bytes)
        # Buffers of sockets, UDP's too; version 2 counts them as memory.
        network_buffers = f"{group}/memory.kmem.tcp.limit_in_bytes"
        if os.path.exists(network_buffers):
            _write(network_buffers, memory_bytes)
    else:
        _write(f"{group}/memory.max", memory_bytes)
        if os.path.exists(f"{group}/memory.swap.max"):
            _write(f"{group}/memory.swap.max", 0)


def _limit_cpu(version: int, group: str, cpus: float) -> None:
    """Limit processor time; where others want it too, a sandbox weighs less than they do."""
    quota = max(MIN_QUOTA_MICROSECONDS, int(cpus * PERIOD_MICROSECONDS))
    name, default = SHARES[version]
    _write(f"{group}/{name}", default // SHARE_DIVISOR)
    if version == 1:
        _write(f"{group}/cpu.cfs_period_us", PERIOD_MICROSECONDS)
        _write(f"{group}/cpu.cfs_quota_us", quota)
    else:
        _write(f"{group}/cpu.max", f"{quota} {PERIOD_MICROSECONDS}")


# (file, key in it, name of the limit)
_EVENTS = (
    ("memory.oom_control", b"oom_kill", "memory"),
    ("memory.events", b"oom_kill", "memory"),
    ("pids.events", b"max", "pids"),
)
# (file, name of the value)
_USAGE = (
    ("memory.usage_in_bytes", "memory_bytes"),
    ("memory.current", "memory_bytes"),
    ("pids.current", "pids"),
)


class Meters:
    """What a sandbox uses and how often its limits struck.

    The files are opened at once: a holder cannot see them any more after it has entered its tier.
    """

    def __init__(self, directories: list[str]):
        self._events: dict[str, tuple[int, bytes]] = {}
        self._usage: dict[str, int] = {}
        for directory in directories:
            for file, key, name in _EVENTS:
                path = f"{directory}/{file}"
                if os.path.exists(path):
                    self._events[name] = (_open(path), key)
            for file, name in _USAGE:
                path = f"{directory}/{file}"
                if os.path.exists(path):
                    self._usage[name] = _open(path)

    def events(self) -> dict[str, int]:
        """Return how often each limit struck."""
        counts = {}
        for name, (descriptor, key) in self._events.items():
            counts[name] = _counter(os.pread(descriptor, 4096, 0), key)
        return counts

    def usage(self) -> dict[str, int]:
        """Return memory_bytes and pids, as far as cgroups count them here."""
        return {name: int(os.pread(descriptor, 64, 0)) for name, descriptor in self._usage.items()}


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _counter(text: bytes, key: bytes) -> int:
    """Return the number after a key in lines of "KEY NUMBER"; 0 without one."""
    for line in text.splitlines():
        name, number, *_ = line.split()
        if name == key:
            return int(number)
    return 0


def group_name(slot: int, zygote: int) -> str:
    """Return the name of a sandbox's groups.

    Args:
      slot: its number.
      zygote: the process id of the zygote that made it.
    """
    return f"rock-{slot}-{zygote}"


def find_abandoned(slot: int) -> list[str]:
    """Return the groups that zygotes made for a slot and that have died since."""
    place, _ = find()
    parents = dict.fromkeys(place.parents.values()) if place else {}
    found = []
    for parent in parents:
        for name in os.listdir(parent):
            zygote = name.removeprefix(group_name(slot, 0).removesuffix("0"))
            if zygote != name and zygote.isdecimal() and not linux.is_running(int(zygote)):
                found.append(f"{parent}/{name}")
    return found


def remove(directories: list[str], kill: bool = False) -> list[str]:
    """Remove groups, and kill their processes first if `kill`.

    Returns:
      Those that still hold dying processes, to be tried again.
    """
    left = []
    for directory in directories:
        try:
            if kill:
                _kill_members(directory)
            os.rmdir(directory)
        except (FileNotFoundError, ProcessLookupError):
            if os.path.isdir(directory):
                left.append(directory)
        except OSError:
            left.append(directory)
    return left


def _kill_members(directory: str) -> None:
    for pid in linux.read_file(f"{directory}/cgroup.procs").split():
        os.kill(int(pid), signal.SIGKILL)
