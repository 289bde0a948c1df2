"""The zygote: one small process for each manager process, from which every sandbox is forked.

    manager (JAX, large) -- zygote (10 MB) -- holder (one a sandbox) -- command

Forking from here costs a millisecond whatever the manager's size. Every link dies with the one
before it: the zygote watches the manager, holders die with the zygote, commands with their holder.
The zygote also makes and removes what lies outside a sandbox (cgroups, directories, the user id it
runs under), and at its start sweeps what a killed zygote left.
"""

import fcntl
import gc
import json
import os
import select
import signal
import socket
import stat
import sys
import time

from . import cgroups, fenced, linux, namespaces, seccomp
from .holder import Holder
from .messages import receive, send

# user ids of sandboxes when the manager is root: one each, far from any real user's
FIRST_ID = 200_000
SLOTS = 20_000
RECORD_BYTES = 4096
RETRY_SECONDS = 0.02
REMOVE_SECONDS = 10.0


class Slot:
    """A number that no other sandbox on this machine has while it lives, and the record of what to
    clean up after it.

    From it comes the user id that owns the sandbox's files. Snapshots of them, and sandboxes that
    start from those, have the same id: they hold the slot too, and the last one lets go of it.
    """

    def __init__(self, base: str, number: int, lock: int):
        self.base, self.number, self.lock = base, number, lock
        self.directory = f"{base}/{number}"
        self.cgroups: list[str] = []
        self.fenced = False
        self.owner = self  # whose user id the sandbox has
        self.snapshot: Snapshot | None = None  # that it started from
        self._holds = 1

    @property
    def uid(self) -> int:
        return FIRST_ID + self.owner.number

    def hold(self) -> "Slot":
        self._holds += 1
        return self

    def record(self) -> None:
        os.pwrite(
            self.lock,
            json.dumps({"zygote": os.getpid(), "fenced": self.fenced, "cgroups": self.cgroups})
            .encode()
            .ljust(RECORD_BYTES),
            0,
        )

    def clean(self) -> bool:
        """End and remove what the sandbox had outside itself; False while something still holds a
        part of it.
        """
        if self.fenced and os.geteuid() == 0:  # a pid namespace dies with its holder
            linux.kill_all_of(self.uid)
        self.cgroups = cgroups.remove(self.cgroups, kill=True)
        if self.cgroups or (self.fenced and not _remove_tree(self.directory)):
            return False
        if self.snapshot:
            self.snapshot.release()
        self.release()
        return True

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            try:
                os.unlink(f"{self.base}/{self.number}.lock")
            except FileNotFoundError:
                pass  # a cleaner of old temporary files came first
            os.close(self.lock)


class Snapshot:
    """A directory with a copy of one sandbox's files.

    It goes when it is deleted and no sandbox that started from it is left.
    """

    def __init__(self, path: str, owner: Slot):
        self.path, self.owner = path, owner.hold()
        self._holds = 1

    def hold(self) -> "Snapshot":
        self._holds += 1
        return self

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            _remove_tree(self.path)
            self.owner.release()


def _remove_tree(directory: str) -> bool:
    """Remove it whatever permissions the agent took from its directories.

    Links are removed, not followed.
    """
    # here, like nothing else: every sandbox is a fork of this process, and pays for what it has
    # loaded
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
    if os.path.isdir(directory):
        for path, names, _ in os.walk(directory):
            for name in names:
                if not os.path.islink(f"{path}/{name}"):
                    os.chmod(f"{path}/{name}", 0o700)
        shutil.rmtree(directory, ignore_errors=True)
    return not os.path.isdir(directory)


def state_directory() -> str:
    """Where slots lie.

    Made by this user alone: a directory that someone else put there is refused.
    """
    path = os.path.join(os.environ["TMPDIR"], f"rock-{os.getuid()}")
    try:
        os.mkdir(path, 0o711)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{path} belongs to someone else or is writable by others; remove it")
    return path


def _claim(base: str, number: int, create: bool) -> Slot | None:
    """The slot, if it is free (create) or its owner is dead (not create)."""
    path = f"{base}/{number}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (
            os.fstat(lock).st_ino == os.stat(path).st_ino
        ):  # else its owner unlinked it between open and flock
            return Slot(base, number, lock)
    except OSError:
        pass
    os.close(lock)
    return None


def sweep(base: str) -> None:
    """Clean up after zygotes that were killed."""
    for name in os.listdir(base):
        number, _, kind = name.partition(".")
        if kind.endswith("snapshot") and (slot := _claim(base, int(number), create=True)):
            _remove_tree(f"{base}/{name}")
            slot.clean()
    for name in os.listdir(base):
        if name.endswith(".lock") and (slot := _claim(base, int(name[:-5]), create=False)):
            record = json.loads(os.pread(slot.lock, RECORD_BYTES, 0) or "{}")
            slot.cgroups, slot.fenced = record.get("cgroups", []), record.get("fenced", False)
            deadline = time.monotonic() + REMOVE_SECONDS
            while not slot.clean() and time.monotonic() < deadline:
                time.sleep(RETRY_SECONDS)


class Zygote:
    def __init__(self, control: socket.socket):
        self._control = control
        self._base = state_directory()
        self._next = os.getpid() % SLOTS  # zygotes start their search in different places
        self._place, _ = cgroups.find()
        self._programs = {
            "verifier_bash": execute_only("/bin/bash"),
            "waiting_program": execute_only("/bin/cat"),
        }
        self._holders: dict[
            int, tuple[int, Slot, socket.socket]
        ] = {}  # pidfd -> (pid, slot, channel)
        self._dirty: list[tuple[float, Slot, socket.socket | None]] = []
        self._snapshots: dict[str, Snapshot] = {}
        self._made = 0
        self._poller = select.poll()

    def serve(self, manager: int) -> None:
        """Until the manager closes the control socket or dies; then every sandbox ends."""
        manager_fd = os.pidfd_open(manager)
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(manager_fd, select.POLLIN)
        alive = True
        while alive:
            for descriptor, _ in self._poller.poll(
                int(1000 * RETRY_SECONDS) if self._dirty else None
            ):
                if descriptor in self._holders:
                    self._bury(descriptor)
                elif descriptor == manager_fd:
                    alive = False
                else:
                    alive = self._serve_request() and alive
            self._clean_dirty()
        self._end()

    def _serve_request(self) -> bool:
        data, descriptors = receive(self._control)
        if not data:
            return False
        channel = socket.socket(fileno=descriptors[0])
        try:
            request = json.loads(data)
            getattr(self, f"_{request.pop('op')}")(request, channel)
        except OSError as error:
            send(channel, {"id": 0, "error": str(error)})
            channel.close()
        return True

    def _make_snapshot(self, request: dict, channel: socket.socket) -> None:
        """A directory for a copy of one sandbox's files, which its holder will fill."""
        slot = next(
            (slot for _, slot, _ in self._holders.values() if slot.number == request["of"]), None
        )
        if slot is None:
            raise OSError(f"there is no sandbox {request['of']}")
        self._made += 1
        path = f"{self._base}/{slot.owner.number}.{self._made}.snapshot"
        _remove_tree(path)
        os.mkdir(path, 0o700)
        if os.geteuid() == 0 and not slot.fenced:
            os.chown(path, slot.uid, slot.uid)
        self._snapshots[path] = Snapshot(path, slot.owner)
        send(channel, {"id": 0, "path": path})
        channel.close()

    def _forget_snapshot(self, request: dict, channel: socket.socket) -> None:
        if snapshot := self._snapshots.pop(request["path"], None):
            snapshot.release()
        send(channel, {"id": 0})
        channel.close()

    def _create(self, spec: dict, channel: socket.socket) -> None:
        if spec["snapshot"] is not None and spec["snapshot"] not in self._snapshots:
            raise OSError(
                f"the snapshot {spec['snapshot']} was deleted, or belongs to another process"
            )
        slot = self._free_slot()
        try:
            if self._place:
                slot.cgroups = cgroups.create(
                    self._place,
                    f"rock-{slot.number}-{os.getpid()}",
                    spec["memory_bytes"],
                    spec["pids"],
                    spec["cpus"],
                )
            slot.fenced = spec["tier"] == "landlock"
            if slot.fenced:
                _remove_tree(slot.directory)  # of a dead owner whose lock file was cleaned away
                os.mkdir(slot.directory, 0o711)
            if spec["snapshot"]:
                slot.snapshot = self._snapshots[spec["snapshot"]].hold()
                slot.owner = slot.owner if slot.fenced else slot.snapshot.owner
            root = os.geteuid() == 0
            identity = slot.uid if root else os.geteuid()
            spec |= {
                "uid": identity,
                "gid": identity if root else os.getegid(),
                "own_uid": root,
                "directory": slot.directory,
                "slot": slot.number,
                "cgroups": slot.cgroups,
                "zygote": os.getpid(),
                **self._programs,
            }
            slot.record()
            mapping = namespaces.Mapping() if spec["tier"] == "namespaces" else None
            pid = os.fork()
        except OSError:
            slot.clean()
            raise
        if pid == 0:
            _run_holder(channel, spec | {"mapping": mapping})
        if mapping:
            mapping.serve(pid, spec["uid"], spec["gid"])
        pidfd = os.pidfd_open(pid)
        self._holders[pidfd] = (pid, slot, channel)
        self._poller.register(pidfd, select.POLLIN)

    def _free_slot(self) -> Slot:
        state_directory()  # there again, if a cleaner of old temporary files took it
        for _ in range(SLOTS):
            self._next = (self._next + 1) % SLOTS
            if slot := _claim(self._base, self._next, create=True):
                return slot
        raise OSError(f"all {SLOTS} sandbox slots of this machine are taken")

    def _bury(self, pidfd: int) -> None:
        """A holder ended: clean up, and only then close the channel, which tells the manager that
        nothing is left.
        """
        pid, slot, channel = self._holders.pop(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)
        self._dirty.append((time.monotonic() + REMOVE_SECONDS, slot, channel))

    def _orphans(self) -> bool:
        """Whether a holder that was killed left processes that are not gone yet.

        Not waited for one by one: an init ends after all others.
        """
        orphans = set(linux.children_of(os.getpid())) - {
            holder for holder, _, _ in self._holders.values()
        }
        for orphan in orphans:
            linux.signal_process(orphan, signal.SIGKILL)
        return bool(orphans - {orphan for orphan in orphans if os.waitpid(orphan, os.WNOHANG)[0]})

    def _clean_dirty(self) -> None:
        if not self._dirty:
            return
        waiting, orphans = [], self._orphans()
        for deadline, slot, channel in self._dirty:
            if (not orphans and slot.clean()) or time.monotonic() > deadline:
                channel.close()
            else:
                waiting.append((deadline, slot, channel))
        self._dirty = waiting

    def _end(self) -> None:
        for _, _, channel in self._holders.values():
            channel.shutdown(socket.SHUT_RDWR)  # holders then kill what they run and leave
        deadline = time.monotonic() + REMOVE_SECONDS
        while self._holders or self._dirty:
            if time.monotonic() > deadline:
                for pid, _, _ in self._holders.values():
                    os.kill(pid, signal.SIGKILL)
            for descriptor, _ in self._poller.poll(int(1000 * RETRY_SECONDS)):
                if descriptor in self._holders:
                    self._bury(descriptor)
                else:
                    self._poller.unregister(descriptor)
            self._clean_dirty()
        for snapshot in self._snapshots.values():
            snapshot.release()


def execute_only(program: str) -> int:
    """A copy of it, as a descriptor, that can be executed and not read: the kernel lets nobody look
    into such a process.
    """
    descriptor = os.memfd_create(os.path.basename(program), os.MFD_CLOEXEC)
    with open(program, "rb") as file:
        while os.sendfile(descriptor, file.fileno(), None, 1 << 24):
            pass
    os.fchmod(descriptor, 0o111)
    return descriptor


def _run_holder(channel: socket.socket, spec: dict) -> None:
    """The life of a forked holder. Never returns."""
    try:
        low = 3
        for kept in sorted(
            (
                channel.fileno(),
                spec["verifier_bash"],
                spec["waiting_program"],
                *(spec["mapping"].descriptors() if spec["mapping"] else ()),
            )
        ):
            os.closerange(low, kept)  # other sandboxes' sockets and locks
            low = kept + 1
        os.closerange(low, 4096)
        tier = namespaces.Tier if spec["tier"] == "namespaces" else fenced.Tier
        try:
            holder = Holder(channel, spec, tier)
            workspace = holder.set_up()
        except OSError as error:
            send(channel, {"id": 0, "error": str(error)})
        else:
            send(
                channel,
                {
                    "id": 0,
                    "workspace": workspace,
                    "cgroups": bool(spec["cgroups"]),
                    "slot": spec["slot"],
                },
            )
            holder.serve()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def main(control_fd: int, manager: int) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the manager, which stops its sandboxes in order
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    os.umask(0o022)
    base = state_directory()
    sweep(base)
    seccomp.build(linux.ARCHITECTURE, network=True)  # kept for every holder
    gc.freeze()  # forks then share more pages
    Zygote(socket.socket(fileno=control_fd)).serve(manager)
