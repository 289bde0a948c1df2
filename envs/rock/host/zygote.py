"""The zygote: one small process for each manager process, from which every sandbox is forked.

    manager (JAX, large) -- zygote (10 MB) -- holder (one a sandbox) -- command

Forking from here costs a millisecond whatever the manager's size. Every process dies with the one
before it: the zygote watches the manager, holders die with the zygote, commands with their holder.
The zygote also makes and removes what lies outside a sandbox (cgroups, directories, the user id it
runs under), and when it starts it cleans up after zygotes that were killed.
"""

import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time

from . import cgroups, fenced, linux, namespaces, seccomp, slots
from .holder import Holder
from .messages import receive, send
from .slots import REMOVE_SECONDS, RETRY_SECONDS, Slot, Snapshot

SLOW_RETRY_SECONDS = 1.0  # for what no manager waits for any more
COPY_BYTES = 1 << 24
INTERPRETERS = ("/usr/bin/python3", "/usr/local/bin/python3")
DESCRIPTORS_EACH = 3  # of this process for a sandbox: its lock, its channel, its holder


class _Living:
    """A sandbox that runs."""

    def __init__(self, pid: int, slot: Slot, channel: socket.socket):
        self.pid = pid  # of its holder
        self.slot = slot
        self.channel = channel  # to the manager


class _Ended:
    """A sandbox whose holder has ended and whose traces are being removed.

    The manager is told so after REMOVE_SECONDS at the latest; what is left then is tried on.
    """

    def __init__(self, slot: Slot, channel: socket.socket):
        self.slot = slot
        self.channel = channel
        self.deadline = time.monotonic() + REMOVE_SECONDS
        self.is_told = False

    def tell(self) -> None:
        """Close the channel, which tells the manager that the sandbox has ended."""
        self.channel.close()
        self.is_told = True


class Zygote:
    """Serves the manager's requests: to start sandboxes and to make and delete snapshots."""

    def __init__(self, control: socket.socket):
        self._control = control
        self._base = slots.state_directory(os.environ["TMPDIR"])
        self._next = os.getpid() % slots.SLOTS  # zygotes start their search in different places
        self._place, _ = cgroups.find()
        self._programs = {
            "verifier_bash": execute_only("/bin/bash"),
            "waiting_program": execute_only("/bin/cat"),
        }
        self._copies = slots.copies_directory(self._base, os.getpid())
        self._interpreters = copy_interpreters(self._copies)
        self._living: dict[int, _Living] = {}  # by the holder's pidfd
        self._ended: list[_Ended] = []
        self._snapshots: dict[str, Snapshot] = {}  # by path
        self._made = 0
        self._poller = select.poll()

    def serve(self, manager: int) -> None:
        """Serve until the manager closes the control socket or dies; then end every sandbox.

        Args:
          manager: its process id.
        """
        manager_fd = os.pidfd_open(manager)
        self._poller.register(self._control, select.POLLIN)
        self._poller.register(manager_fd, select.POLLIN)
        alive = True
        while alive:
            for descriptor, _ in self._poller.poll(self._milliseconds_to_next_try()):
                if descriptor in self._living:
                    self._handle_end(descriptor)
                elif descriptor == manager_fd:
                    alive = False
                else:
                    alive = self._serve_request() and alive
            self._clean_up()
        self._end_all()

    def _milliseconds_to_next_try(self) -> int | None:
        if not self._ended:
            return None
        is_awaited = any(not ended.is_told for ended in self._ended)
        return int(1000 * (RETRY_SECONDS if is_awaited else SLOW_RETRY_SECONDS))

    def _serve_request(self) -> bool:
        data, descriptors = receive(self._control)
        if not data:
            return False
        if not descriptors:  # this process had no free one: the manager finds the channel closed
            return True
        channel = socket.socket(fileno=descriptors[0])
        try:
            request = json.loads(data)
            getattr(self, f"_{request.pop('op')}")(request, channel)
        except OSError as error:
            send(channel, {"id": 0, "error": _explain(error)})
            channel.close()
        return True

    def _make_snapshot(self, request: dict, channel: socket.socket) -> None:
        """Make a directory for a copy of one sandbox's files, which its holder will fill."""
        living = self._find_living(request["of"])
        if living is None:
            raise OSError(f"there is no sandbox {request['of']}")
        slot = living.slot
        self._made += 1
        path = f"{self._base}/{slot.owner.number}.{self._made}.snapshot"
        slots.remove_tree(path)
        os.mkdir(path, 0o700)
        if os.geteuid() == 0 and not slot.fenced:
            os.chown(path, slot.uid, slot.uid)
        self._snapshots[path] = Snapshot(path, slot.owner)
        send(channel, {"id": 0, "path": path})
        channel.close()

    def _kill_holder(self, request: dict, channel: socket.socket) -> None:
        """Kill a holder that does not end by itself; what it ran is killed in `_clean_up`."""
        if living := self._find_living(request["of"]):
            os.kill(living.pid, signal.SIGKILL)
        send(channel, {"id": 0})
        channel.close()

    def _find_living(self, slot: int) -> _Living | None:
        for living in self._living.values():
            if living.slot.number == slot:
                return living
        return None

    def _forget_snapshot(self, request: dict, channel: socket.socket) -> None:
        if snapshot := self._snapshots.pop(request["path"], None):
            snapshot.release()
        send(channel, {"id": 0})
        channel.close()

    def _create(self, spec: dict, channel: socket.socket) -> None:
        """Fork a holder for a new sandbox."""
        if spec["snapshot"] is not None and spec["snapshot"] not in self._snapshots:
            raise OSError(
                f"the snapshot {spec['snapshot']} was deleted, or belongs to another process"
            )
        slot = self._claim_free_slot()
        mapping = None
        try:
            self._prepare_slot(slot, spec)
            spec |= self._describe(slot)
            slot.record()
            if spec["tier"] == "namespaces":
                mapping = namespaces.Mapping()
            pid = os.fork()
        except OSError:
            if mapping:
                mapping.close()
            slot.clean()
            raise
        if pid == 0:
            _run_holder(channel, spec | {"mapping": mapping})
        if mapping:
            mapping.serve(pid, spec["uid"], spec["gid"])
        pidfd = os.pidfd_open(pid)
        self._living[pidfd] = _Living(pid, slot, channel)
        self._poller.register(pidfd, select.POLLIN)

    def _prepare_slot(self, slot: Slot, spec: dict) -> None:
        """Make what a sandbox has outside itself."""
        if self._place:
            name = cgroups.group_name(slot.number, os.getpid())
            slot.cgroups = cgroups.create(
                self._place, name, spec["memory_bytes"], spec["pids"], spec["cpus"]
            )
        slot.fenced = spec["tier"] == "landlock"
        if slot.fenced:
            # It may be a dead owner's, whose lock file was cleaned away.
            slots.remove_tree(slot.directory)
            os.mkdir(slot.directory, 0o711)
        if spec["snapshot"]:
            slot.snapshot = self._snapshots[spec["snapshot"]].hold()
            if not slot.fenced:
                slot.owner = slot.snapshot.owner

    def _describe(self, slot: Slot) -> dict:
        """Return what a holder must know beside the manager's request."""
        is_root = os.geteuid() == 0
        return {
            "uid": slot.uid if is_root else os.geteuid(),
            "gid": slot.uid if is_root else os.getegid(),
            "own_uid": is_root,
            "directory": slot.directory,
            "slot": slot.number,
            "cgroups": slot.cgroups,
            "zygote": os.getpid(),
            "interpreters": self._interpreters,
            **self._programs,
        }

    def _claim_free_slot(self) -> Slot:
        # A cleaner of old temporary files may have removed them.
        slots.state_directory(os.environ["TMPDIR"])
        if not all(os.path.exists(copy) for _, copy in self._interpreters):
            self._interpreters = copy_interpreters(self._copies)
        for _ in range(slots.SLOTS):
            self._next = (self._next + 1) % slots.SLOTS
            if slot := slots.claim(self._base, self._next):
                return slot
        raise OSError(f"all {slots.SLOTS} sandbox slots of this machine are taken")

    def _handle_end(self, pidfd: int) -> None:
        """Collect a holder that has ended and mark its sandbox for cleaning up.

        The channel is closed after that, which tells the manager that nothing is left.
        """
        living = self._living.pop(pidfd)
        self._poller.unregister(pidfd)
        os.close(pidfd)
        os.waitpid(living.pid, 0)
        self._ended.append(_Ended(living.slot, living.channel))

    def _kill_orphans(self) -> bool:
        """Kill what killed holders left; return whether some of it is not gone yet.

        They are not waited for one by one, because an init ends after all others.
        """
        orphans = set(linux.children_of(os.getpid()))
        orphans -= {living.pid for living in self._living.values()}
        for orphan in orphans:
            linux.signal_process(orphan, signal.SIGKILL)
        remaining = 0
        for orphan in orphans:
            if not linux.collect(orphan):
                remaining += 1
        return remaining > 0

    def _clean_up(self) -> None:
        if not self._ended:
            return
        has_orphans = self._kill_orphans()
        waiting = []
        for ended in self._ended:
            is_clean = not has_orphans and ended.slot.clean()
            if is_clean or time.monotonic() > ended.deadline:
                ended.tell()
            if not is_clean:
                waiting.append(ended)
        self._ended = waiting

    def _end_all(self) -> None:
        for living in self._living.values():
            living.channel.shutdown(socket.SHUT_RDWR)  # holders then kill what they run and end
        deadline = time.monotonic() + REMOVE_SECONDS
        while self._living or self._ended:
            if time.monotonic() > deadline + REMOVE_SECONDS:
                break  # the next zygote sweeps what is left
            if time.monotonic() > deadline:
                for living in self._living.values():
                    os.kill(living.pid, signal.SIGKILL)
            for descriptor, _ in self._poller.poll(int(1000 * RETRY_SECONDS)):
                if descriptor in self._living:
                    self._handle_end(descriptor)
                else:
                    self._poller.unregister(descriptor)
            self._clean_up()
        for snapshot in self._snapshots.values():
            snapshot.release()
        slots.remove_tree(self._copies)


def copy_interpreters(directory: str) -> list[tuple[str, str]]:
    """Copy the system's Python to files that can be executed but not read.

    Verifiers get them in place of the programs, see namespaces.Tier.start_verifier. They are files
    because the kernel mounts no memory file.

    Returns:
      (program, copy) of each; nothing where `directory` is full or no program can be executed in
      it.
    """
    slots.remove_tree(directory)
    try:
        os.mkdir(directory, 0o711)
        if os.statvfs(directory).f_flag & os.ST_NOEXEC:
            return []
        return _copy_interpreters(directory)
    except OSError:
        slots.remove_tree(directory)
        return []


def _copy_interpreters(directory: str) -> list[tuple[str, str]]:
    copies: list[tuple[str, str]] = []
    for program in dict.fromkeys(map(os.path.realpath, INTERPRETERS)):
        if program.startswith("/usr/") and os.path.isfile(program):
            copy = f"{directory}/{len(copies)}"
            descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700)
            copy_program(program, descriptor)
            os.close(descriptor)
            copies.append((program, copy))
    return copies


def execute_only(program: str) -> int:
    """Return a descriptor of a program's copy that can be executed but not read.

    The kernel lets no process look into one that executes it.
    """
    descriptor = os.memfd_create(os.path.basename(program), os.MFD_CLOEXEC)
    copy_program(program, descriptor)
    return descriptor


def copy_program(program: str, descriptor: int) -> None:
    """Copy a program into an open file, and let that be executed but not read."""
    with open(program, "rb") as file:
        while os.sendfile(descriptor, file.fileno(), None, COPY_BYTES):
            pass
    os.fchmod(descriptor, 0o111)


def _explain(error: OSError) -> str:
    """Return what failed; with the remedy, where this process has too many files open."""
    if error.errno != errno.EMFILE:
        return str(error)
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"{error}: {open_files} open files are the hard limit, and each sandbox takes"
        f" {DESCRIPTORS_EACH}; raise it (ulimit -Hn) or run fewer sandboxes in one process"
    )


def _run_holder(channel: socket.socket, spec: dict) -> None:
    """Run a forked holder; never returns."""
    try:
        _close_others(channel, spec)
        # For the commands, which inherit it: the kernel's memory killer must not take the trainer,
        # the machine's largest process, first. With CAP_SYS_RESOURCE they cannot lower it again.
        linux.write_file("/proc/self/oom_score_adj", b"1000")
        tier = namespaces.Tier if spec["tier"] == "namespaces" else fenced.Tier
        try:
            holder = Holder(channel, spec, tier)
            workspace = holder.set_up()
        except OSError as error:
            send(channel, {"id": 0, "error": str(error)})
        else:
            ready = {
                "id": 0,
                "workspace": workspace,
                "cgroups": bool(spec["cgroups"]),
                "slot": spec["slot"],
            }
            send(channel, ready)
            holder.serve()
    except ConnectionError:
        pass  # the manager wants it no more
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _close_others(channel: socket.socket, spec: dict) -> None:
    """Close other sandboxes' sockets and locks, which the holder has inherited."""
    kept = [channel.fileno(), spec["verifier_bash"], spec["waiting_program"]]
    if spec["mapping"]:
        kept += spec["mapping"].descriptors()
    low = 3
    for descriptor in sorted(kept):
        os.closerange(low, descriptor)
        low = descriptor + 1
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.closerange(low, open_files)


def main(control_fd: int, manager: int) -> None:
    """Run the zygote.

    Args:
      control_fd: descriptor of the socket of requests.
      manager: the manager's process id.
    """
    # Ctrl-C is for the manager, which stops its sandboxes in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    os.umask(0o022)
    slots.sweep(slots.state_directory(os.environ["TMPDIR"]))
    seccomp.build(linux.ARCHITECTURE, network=True)  # cached for every holder
    gc.freeze()  # forks then share more pages
    Zygote(socket.socket(fileno=control_fd)).serve(manager)
