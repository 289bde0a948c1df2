"""One holder for each sandbox: owns its file tree, starts its commands, and outlives none of them.

It is forked from the zygote and speaks with the manager over one SOCK_SEQPACKET socket: a JSON request with descriptors, a JSON reply.
One command runs at a time. Time limits are kept here, so a manager that is busy compiling does not stretch them.
"""

import array
import contextlib
import errno
import json
import os
import resource
import select
import signal
import socket
import stat
import time
from collections.abc import Callable

from . import cgroups, linux

MAX_MESSAGE = 1 << 18
MAX_FDS = 8
KILL_SECONDS = 10.0
DISK_CHECK_SECONDS = 0.1


class Command:
    """The command that is running."""

    def __init__(self, identity: int, started, timeout: float, events: dict[str, int]):
        self.identity, self.started, self.events = identity, started, events
        self.pidfd = os.pidfd_open(started.pid)
        self.began = time.monotonic()
        self.deadline = self.began + timeout
        self.limits_hit: list[str] = []


class Holder:
    def __init__(self, channel: socket.socket, spec: dict, tier_type: type):
        self._channel, self._spec = channel, spec
        self._command: Command | None = None
        # Opened under the zygote's id and in its file tree: later this process has neither.
        self._tier = tier_type(spec, [os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC) for path in spec["cgroups"]])
        self._events = cgroups.Events(spec["cgroups"])

    def set_up(self) -> str:
        """Enter the tier; returns the path of the workspace."""
        self._root = self._tier.set_up()
        # CORE is 1, not 0: a core_pattern that is a pipe ignores 0, and the host's crash handler would run.
        for kind, value in ((resource.RLIMIT_CORE, 1), (resource.RLIMIT_FSIZE, self._spec["disk_bytes"]),
                            (resource.RLIMIT_NOFILE, self._spec["open_files"])):
            linux.lower_limit(kind, value)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of ids, which clears it
        if os.getppid() != self._spec["zygote"]:
            raise OSError("the zygote died")
        return self._tier.workspace

    def serve(self) -> None:
        """Until the manager closes the socket or dies. Nothing of the sandbox runs when this returns."""
        poller = select.poll()
        poller.register(self._channel, select.POLLIN)
        watched = None
        while True:
            current = self._command.pidfd if self._command else None
            if current != watched:
                if watched is not None:
                    poller.unregister(watched)
                if current is not None:
                    poller.register(current, select.POLLIN)
                watched = current
            ready = {descriptor for descriptor, _ in poller.poll(self._milliseconds_to_next_check())}
            if self._command and watched not in ready:
                self._check_limits()
            if watched is not None and watched in ready:
                poller.unregister(watched)
                watched = None
                self._finish()
            if self._channel.fileno() in ready and not self._receive():
                break
        self._kill_everything()
        self._tier.close()

    def _milliseconds_to_next_check(self) -> int | None:
        if self._command is None:
            return None
        seconds = max(0.0, self._command.deadline - time.monotonic())
        return int(1000 * (min(seconds, DISK_CHECK_SECONDS) if self._tier.watches_disk else seconds)) + 1

    def _check_limits(self) -> None:
        if time.monotonic() >= self._command.deadline:
            self._kill_command("timeout")
        elif self._tier.watches_disk:
            size, inodes = self._tier.usage()
            if size > self._spec["disk_bytes"] or inodes > self._spec["inodes"]:
                self._kill_command("disk")

    def _receive(self) -> bool:
        """Serve one request; False when the manager is gone."""
        try:
            data, descriptors = receive(self._channel)
        except ConnectionError:
            return False
        if not data:
            return False
        try:
            request = json.loads(data)
            getattr(self, f"_serve_{request['op']}")(request, descriptors)
        except OSError as error:
            self._reply(request["id"], error=str(error), errno=errno.errorcode.get(error.errno, "EIO"))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _reply(self, identity: int, descriptors: tuple[int, ...] = (), **fields: object) -> None:
        try:
            send(self._channel, {"id": identity, **fields}, descriptors)
        except (BrokenPipeError, ConnectionError):
            pass  # the manager is gone; the next receive says so

    def _serve_run(self, request: dict, descriptors: list[int]) -> None:
        out, err, text = descriptors
        command = os.pread(text, MAX_MESSAGE, 0).decode()
        self._start(request, lambda: self._tier.start_agent(command, request["env"], out, err))

    def _serve_verify(self, request: dict, descriptors: list[int]) -> None:
        """Grade: everything of the agent dies before the script is within reach of any process of the sandbox."""
        self._kill_everything()
        out, err, script, content = descriptors
        files, offset = {}, 0
        for name, size in request["files"]:
            files[name] = os.pread(content, size, offset)
            offset += size
        self._start(request, lambda: self._tier.start_verifier(script, files, request["env"], out, err))

    def _serve_kill(self, request: dict, descriptors: list[int]) -> None:
        self._kill_everything()
        self._reply(request["id"])

    def _serve_open(self, request: dict, descriptors: list[int]) -> None:
        """Open a regular file of the workspace for the manager, following no link out of it."""
        with self._tier.as_owner():
            descriptor = self._open(request)
        try:
            self._reply(request["id"], (descriptor,))
        finally:
            os.close(descriptor)

    def _open(self, request: dict) -> int:
        path, writing = request["path"], request["write"]
        flags = os.O_NONBLOCK | os.O_NOCTTY | (os.O_WRONLY | os.O_CREAT if writing else os.O_RDONLY)  # NONBLOCK: a FIFO must not hold us
        if writing:
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                self._make_directory("/".join(parts[:depth]))
        descriptor = linux.open_beneath(self._root, path, flags, 0o600 if writing else 0)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, f"{path} is not a regular file")
        if writing:
            os.ftruncate(descriptor, 0)
            os.fchmod(descriptor, request["mode"])
        return descriptor

    def _make_directory(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        directory = linux.open_beneath(self._root, parent or ".", os.O_PATH | os.O_DIRECTORY)
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
        except FileExistsError:
            pass  # if it is no directory, opening the file in it says so
        finally:
            os.close(directory)

    def _start(self, request: dict, start: Callable[[], object]) -> None:
        if self._command:
            raise OSError(errno.EBUSY, "a command is running")
        events = self._events.read()
        self._command = Command(request["id"], start(), request["timeout"], events)

    def _kill_command(self, reason: str) -> None:
        """The command's end is noticed, and told, in `serve`."""
        self._command.deadline = time.monotonic() + KILL_SECONDS
        self._command.limits_hit.append(reason)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._command.started.pid, signal.SIGKILL)  # what it started dies in `_finish`

    def _finish(self) -> None:
        """The first process of the command ended: reap it and all that it left, and tell the manager."""
        command, self._command = self._command, None
        _, raw = os.waitpid(command.started.pid, 0)
        seconds = time.monotonic() - command.began
        survivors = self._tier.kill_leftovers()
        self._tier.finished()
        events = self._events.read()
        struck = [name for name, count in events.items() if count > command.events.get(name, 0)]
        code = os.waitstatus_to_exitcode(raw)
        os.close(command.pidfd)
        failure = command.started.failure
        if survivors:
            failure = f"{survivors} processes survived SIGKILL for {KILL_SECONDS:.0f} s"
        self._reply(command.identity, exit_code=code if code >= 0 else 128 - code, seconds=seconds,
                    limits=list(dict.fromkeys(command.limits_hit + struck)), failure=failure)

    def _kill_everything(self) -> None:
        if self._command:
            self._kill_command("killed")
            if not select.select([self._command.pidfd], [], [], KILL_SECONDS)[0]:
                raise OSError(f"a killed process did not end within {KILL_SECONDS:.0f} s")
            self._finish()
        else:
            self._tier.kill_leftovers()


def send(channel: socket.socket, message: dict, descriptors: tuple[int, ...] = ()) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([json.dumps(message).encode()], ancillary)


def parse(data: bytes) -> dict:
    """A message's fields; the empty message is the other end's death."""
    return json.loads(data) if data else {"error": "the sandbox host process ended"}


def receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors (closed on exec); b"" at the end."""
    data, ancillary, _, _ = channel.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return data, list(descriptors)
