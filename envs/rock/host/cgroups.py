"""Memory, process and CPU limits of one sandbox, in cgroups version 1 or 2, below the group that
this process is in.

Nothing is moved but the sandbox's own processes, and the limits that the machine set on us stay
above theirs.
"""

import os
import signal

PERIOD_US = 100_000
NEEDED, WANTED = ("memory", "pids"), ("memory", "pids", "cpu")


class Place:
    """Where groups can be made: controller -> parent directory. In version 2 all share one."""

    def __init__(self, version: int, parents: dict[str, str]):
        self.version, self.parents = version, parents


def find() -> tuple[Place | None, str]:
    """Where memory and pids can be limited; None with the reason where they cannot."""
    mounts, own = _mounts(), _own_paths()
    if all(name in mounts for name in NEEDED):
        parents = {
            name: _own_directory(mounts[name], own.get(name, "/"))
            for name in WANTED
            if name in mounts
        }
        parents = {name: path for name, path in parents.items() if os.access(path, os.W_OK)}
        if all(name in parents for name in NEEDED):
            return Place(1, parents), ""
        return None, "the memory and pids cgroups (version 1) are not writable for this process"
    if "cgroup2" not in mounts:
        return None, "no cgroup file system with memory and pids controllers is mounted"
    own_directory = _own_directory(mounts["cgroup2"], own.get("", "/"))
    for parent in dict.fromkeys((own_directory, os.path.dirname(own_directory))):
        enabled = _enable(parent) if parent.startswith(mounts["cgroup2"][0]) else []
        if all(name in enabled for name in NEEDED):
            return Place(2, {name: parent for name in enabled}), ""
    return (
        None,
        (
            f"the cgroup {own_directory} (version 2) does not let this process limit memory and"
            " pids below it"
        ),
    )


def _mounts() -> dict[str, tuple[str, str]]:
    """Controller (or "cgroup2") -> (mount point, the group that is its root)."""
    found = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            fields = before.split()
            if kind == "cgroup2":
                found["cgroup2"] = (fields[4], fields[3])
            elif kind == "cgroup":
                found |= {
                    name: (fields[4], fields[3])
                    for name in options.strip().split(",")
                    if name in WANTED
                }
    return found


def _own_paths() -> dict[str, str]:
    """Controller -> this process's group; "" for version 2."""
    with open("/proc/self/cgroup") as file:
        lines = [line.rstrip("\n").split(":", 2) for line in file]
    return {name: path for _, names, path in lines for name in names.split(",")}


def _own_directory(mount: tuple[str, str], path: str) -> str:
    point, root = mount
    relative = os.path.relpath(path, root)
    directory = os.path.normpath(os.path.join(point, relative))
    return directory if not relative.startswith("..") and os.path.isdir(directory) else point


def _enable(parent: str) -> list[str]:
    """Version 2: the wanted controllers that children of `parent` can use, switched on where that
    is allowed.
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
            except (
                OSError
            ):  # EBUSY: `parent` itself holds processes; the caller tries the next place
                continue
            enabled.append(name)
    return [name for name in WANTED if name in enabled]


def _write(path: str, value: object) -> None:
    with open(path, "w") as file:
        file.write(str(value))


def create(place: Place, name: str, memory_bytes: int, pids: int, cpus: float) -> list[str]:
    """Make the group(s) of one sandbox with their limits set. All or nothing."""
    directories = [f"{parent}/{name}" for parent in dict.fromkeys(place.parents.values())]
    made = []
    try:
        for directory in directories:
            os.mkdir(directory)
            made.append(directory)
        where = {controller: f"{parent}/{name}" for controller, parent in place.parents.items()}
        _set_limits(place.version, where, memory_bytes, pids, cpus)
    except OSError:
        remove(made)
        raise
    return directories


def _set_limits(
    version: int, where: dict[str, str], memory_bytes: int, pids: int, cpus: float
) -> None:
    memory = where["memory"]
    if version == 1:
        _write(f"{memory}/memory.limit_in_bytes", memory_bytes)
        if os.path.exists(f"{memory}/memory.memsw.limit_in_bytes"):
            _write(
                f"{memory}/memory.memsw.limit_in_bytes", memory_bytes
            )  # memory and swap together: no swap
    else:
        _write(f"{memory}/memory.max", memory_bytes)
        if os.path.exists(f"{memory}/memory.swap.max"):
            _write(f"{memory}/memory.swap.max", 0)
    _write(f"{where['pids']}/pids.max", pids)
    if "cpu" in where:
        quota = max(1000, int(cpus * PERIOD_US))
        if version == 1:
            _write(f"{where['cpu']}/cpu.cfs_period_us", PERIOD_US)
            _write(f"{where['cpu']}/cpu.cfs_quota_us", quota)
        else:
            _write(f"{where['cpu']}/cpu.max", f"{quota} {PERIOD_US}")


_EVENTS = (
    ("memory.oom_control", b"oom_kill", "memory"),
    ("memory.events", b"oom_kill", "memory"),
    ("pids.events", b"max", "pids"),
)
_USAGE = (
    ("memory.usage_in_bytes", "memory_bytes"),
    ("memory.current", "memory_bytes"),
    ("pids.current", "pids"),
)


class Meters:
    """What a sandbox uses and how often its limits struck, through descriptors that stay valid when
    the files go out of sight.
    """

    def __init__(self, directories: list[str]):
        self._events = {
            label: (_open(f"{directory}/{name}"), key)
            for directory in directories
            for name, key, label in _EVENTS
            if os.path.exists(f"{directory}/{name}")
        }
        self._usage = {
            label: _open(f"{directory}/{name}")
            for directory in directories
            for name, label in _USAGE
            if os.path.exists(f"{directory}/{name}")
        }

    def events(self) -> dict[str, int]:
        """Limit -> how often it struck."""
        return {
            label: _counter(os.pread(descriptor, 4096, 0), key)
            for label, (descriptor, key) in self._events.items()
        }

    def usage(self) -> dict[str, int]:
        """memory_bytes and pids, as far as cgroups count them here."""
        return {
            label: int(os.pread(descriptor, 64, 0)) for label, descriptor in self._usage.items()
        }


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _counter(text: bytes, key: bytes) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.split()[0] == key), 0)


def remove(directories: list[str], kill: bool = False) -> list[str]:
    """Remove groups; with `kill` their processes first.

    What still holds dying processes is returned, to be tried again.
    """
    left = []
    for directory in directories:
        try:
            if kill:
                with open(f"{directory}/cgroup.procs") as file:
                    for pid in file.read().split():
                        os.kill(int(pid), signal.SIGKILL)
            os.rmdir(directory)
        except (FileNotFoundError, ProcessLookupError):
            if os.path.isdir(directory):
                left.append(directory)
        except OSError:
            left.append(directory)
    return left
