"""One holder for each sandbox: owns its file tree, starts its commands, and outlives none of them.

It is forked from the zygote and speaks with the manager over one SOCK_SEQPACKET socket: a JSON
request with descriptors, a JSON reply. Time limits are kept here, so a manager that is busy
compiling does not stretch them.
"""

import errno
import json
import os
import resource
import select
import signal
import socket
import stat
import time

from . import cgroups, linux
from .egress import Way
from .messages import MAX_MESSAGE, receive, send
from .process import Started
from .session import LOOP, Session

MAX_SESSIONS, MAX_COMMANDS = 8, 16  # at once; their descriptors stay below linux.FIRST_PASSED_FD
KILL_SECONDS = 10.0
SHELL_GRACE = 1.0  # seconds in which a shell whose command was killed must say so
DISK_CHECK_SECONDS = 0.1
CONNECT_SECONDS = 0.1
MOST_UNREAD = (
    1 << 16
)  # bytes of connections that the manager has not taken yet; its socket holds three times as much


class Running:
    """A command that runs: a process of its own, or one that a session's shell was told."""

    def __init__(
        self,
        identity: int,
        descriptor: int,
        timeout: float,
        events: dict[str, int],
        started: Started | None,
        session: Session | None,
    ):
        self.identity, self.descriptor, self.started, self.session, self.events = (
            identity,
            descriptor,
            started,
            session,
            events,
        )
        self.began = time.monotonic()
        self.deadline = self.began + timeout
        self.limits_hit: list[str] = []

    def processes(self) -> set[int]:
        return (
            self.session.foreground() if self.session else linux.descendants_of({self.started.pid})
        )

    def kill(self, reason: str) -> None:
        """Its end is noticed, and told, in `serve`.

        A shell that does not survive its command's death by SHELL_GRACE dies at the second call.
        """
        again = reason in self.limits_hit
        self.limits_hit.append(reason)
        self.deadline = time.monotonic() + KILL_SECONDS
        if self.session is None:
            linux.signal_process(
                self.started.pid, signal.SIGKILL
            )  # what it started dies when it has ended
        elif again:
            linux.signal_process(self.session.pid, signal.SIGKILL)
        else:
            linux.kill_trees(self.processes)
            self.deadline = time.monotonic() + SHELL_GRACE


class Holder:
    def __init__(self, channel: socket.socket, spec: dict, tier_type: type):
        self._channel, self._spec = channel, spec
        self._running: dict[int, Running] = {}  # by the descriptor that tells the end
        self._sessions: dict[int, Session] = {}  # by the shell's pidfd
        self._poller = select.poll()
        self._denials_told = 0
        self._disk_check = 0.0  # when the watched disk is looked at next
        # Opened under the zygote's id and in its file tree: later this process has neither.
        self._tier = tier_type(
            spec,
            [
                os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
                for path in spec["cgroups"]
            ],
        )
        self._meters = cgroups.Meters(spec["cgroups"])

    def set_up(self) -> str:
        """Enter the tier; returns the path of the workspace."""
        self._root = self._tier.set_up()
        # CORE is 1, not 0: a core_pattern that is a pipe ignores 0, and the host's crash handler
        # would run.
        for kind, value in (
            (resource.RLIMIT_CORE, 1),
            (resource.RLIMIT_FSIZE, self._spec["disk_bytes"]),
            (resource.RLIMIT_NOFILE, self._spec["open_files"]),
        ):
            linux.lower_limit(kind, value)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        linux.prctl(
            linux.PR_SET_PDEATHSIG, signal.SIGKILL
        )  # after the change of ids, which clears it
        if os.getppid() != self._spec["zygote"]:
            raise OSError("the zygote died")
        return self._tier.workspace

    def serve(self) -> None:
        """Until the manager closes the socket or dies.

        Nothing of the sandbox runs when this returns.
        """
        self._poller.register(self._channel, select.POLLIN)
        guarded = self._tier.guard.descriptors() if self._tier.guard else ()
        for descriptor in guarded:
            self._poller.register(descriptor, select.POLLIN)
        alive = True
        while alive:
            ready = [
                descriptor
                for descriptor, _ in self._poller.poll(self._milliseconds_to_next_check())
            ]
            # What an event is about is looked up before any is served: a request may end a command
            # and start one under the same number.
            seen = [
                (descriptor, self._running.get(descriptor), self._sessions.get(descriptor))
                for descriptor in ready
            ]
            for descriptor, running, session in seen:
                if descriptor == self._channel.fileno():
                    alive = self._receive()
                elif descriptor in guarded:
                    self._let_out(self._tier.guard.serve(descriptor))
                elif running and self._running.get(descriptor) is running:
                    self._ended(running)
                elif session and self._sessions.get(descriptor) is session:
                    self._shell_ended(session)
            self._check_limits()
        self._kill_everything()
        self._tier.close()

    def _milliseconds_to_next_check(self) -> int | None:
        if not self._running:
            return None
        seconds = max(
            0.0, min(running.deadline for running in self._running.values()) - time.monotonic()
        )
        return (
            int(1000 * (min(seconds, DISK_CHECK_SECONDS) if self._tier.watches_disk else seconds))
            + 1
        )

    def _check_limits(self) -> None:
        now, reason = time.monotonic(), ""
        if self._running and self._tier.watches_disk and now >= self._disk_check:
            self._disk_check = now + DISK_CHECK_SECONDS
            size, inodes = self._tier.usage()
            reason = (
                "disk" if size > self._spec["disk_bytes"] or inodes > self._spec["inodes"] else ""
            )
        for running in list(self._running.values()):
            if reason and reason not in running.limits_hit:
                running.kill(reason)
            elif now >= running.deadline:
                running.kill(running.limits_hit[-1] if running.limits_hit else "timeout")

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
            self._reply(
                request["id"], error=str(error), errno=errno.errorcode.get(error.errno, "EIO")
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _reply(self, identity: int, descriptors: tuple[int, ...] = (), **fields: object) -> None:
        try:
            send(self._channel, {"id": identity, **fields}, descriptors)
        except (BrokenPipeError, ConnectionError):
            pass  # the manager is gone; the next receive says so

    # Commands

    def _serve_run(self, request: dict, descriptors: list[int]) -> None:
        if len(self._running) >= MAX_COMMANDS:
            raise OSError(
                errno.EBUSY, f"{MAX_COMMANDS} commands are running; a sandbox runs no more at once"
            )
        out, err, text = descriptors
        command = os.pread(text, MAX_MESSAGE, 0).decode()
        events = self._meters.events()
        self._watch(
            request,
            self._tier.start_agent(["/bin/bash", "-c", command], request["env"], out, err),
            events,
        )

    def _serve_verify(self, request: dict, descriptors: list[int]) -> None:
        """Grade: everything of the agent dies before the script is within reach of any process of
        the sandbox.
        """
        self._kill_everything()
        out, err, script, content = descriptors
        files, offset = {}, 0
        for name, size in request["files"]:
            files[name] = os.pread(content, size, offset)
            offset += size
        events = self._meters.events()
        self._watch(
            request,
            self._tier.start_verifier(script, files, request["env"], out, err, request["keep"]),
            events,
        )

    def _watch(self, request: dict, started: Started, events: dict[str, int]) -> None:
        self._add(
            Running(
                request["id"], os.pidfd_open(started.pid), request["timeout"], events, started, None
            )
        )

    def _serve_session(self, request: dict, descriptors: list[int]) -> None:
        if len(self._sessions) >= MAX_SESSIONS:
            raise OSError(errno.EMFILE, f"a sandbox has at most {MAX_SESSIONS} sessions")
        out, err = descriptors
        session = Session(request["id"])
        session.started(
            self._tier.start_agent(
                ["/bin/bash", "--noprofile", "--norc", "-c", LOOP, "bash"],
                request["env"],
                out,
                err,
                session.pass_pipes,
            )
        )
        # a shell that could not be executed ends at once, and its first command says so
        self._sessions[session.pidfd] = session
        self._poller.register(session.pidfd, select.POLLIN)
        self._reply(request["id"], session=session.name)

    def _serve_tell(self, request: dict, descriptors: list[int]) -> None:
        """Give a session's shell a command."""
        session = self._session(request)
        if session.status in self._running:
            raise OSError(errno.EBUSY, "the session is running a command")
        events = self._meters.events()
        session.send(os.pread(descriptors[0], MAX_MESSAGE, 0))
        self._add(Running(request["id"], session.status, request["timeout"], events, None, session))

    def _serve_close_session(self, request: dict, descriptors: list[int]) -> None:
        session = self._session(request)
        linux.kill_trees(lambda: linux.descendants_of({session.pid}))
        self._await(session.pidfd)
        self._shell_ended(session)
        self._reply(request["id"])

    def _serve_interrupt(self, request: dict, descriptors: list[int]) -> None:
        """SIGINT for what a running command started; nothing if it has ended."""
        for running in self._running.values():
            if running.identity == request["target"]:
                for pid in running.processes():
                    linux.signal_process(pid, signal.SIGINT)
        self._reply(request["id"])

    def _serve_end(self, request: dict, descriptors: list[int]) -> None:
        """Kill one running command and let the others be."""
        for running in list(self._running.values()):
            if running.identity == request["target"]:
                running.kill("killed")
        self._reply(request["id"])

    def _serve_kill(self, request: dict, descriptors: list[int]) -> None:
        self._kill_everything()
        self._reply(request["id"])

    def _serve_status(self, request: dict, descriptors: list[int]) -> None:
        size, inodes = self._tier.usage()
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._reply(
            request["id"],
            disk_bytes=size,
            inodes=inodes,
            cpu_seconds=spent.ru_utime + spent.ru_stime,
            commands=len(self._running),
            sessions=len(self._sessions),
            network_denials=self._denials(),
            **self._meters.usage(),
        )

    def _serve_denials(self, request: dict, descriptors: list[int]) -> None:
        if self._tier.guard:
            self._let_out(self._tier.guard.catch_up())
        self._reply(request["id"], denials=self._tier.guard.records if self._tier.guard else [])

    def _let_out(self, connections: list[tuple[Way, socket.socket]]) -> None:
        """Hand granted connections to the manager, which makes their outer ends.

        What it has no room for at this moment is closed: an agent must not hold us up, nor bring us
        down, by connections that a busy manager does not take.
        """
        for way, connection in connections:
            with connection:
                try:
                    if (
                        linux.unread_bytes(self._channel) < MOST_UNREAD
                    ):  # the rest is kept for answers
                        send(
                            self._channel,
                            {"id": 0, "way": way},
                            (connection.fileno(),),
                            socket.MSG_DONTWAIT,
                        )
                except OSError:
                    # too many descriptors on their way; a manager that is gone is noticed by the
                    # next receive
                    pass

    def _denials(self) -> int | None:
        if self._tier.guard is None:
            return None
        self._let_out(self._tier.guard.catch_up())
        return self._tier.guard.denials()

    def _serve_connect(self, request: dict, descriptors: list[int]) -> None:
        """A connection to something that listens in the sandbox: its loopback answers at once, with
        yes, no, or a full queue.
        """
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as inner:
            inner.settimeout(CONNECT_SECONDS)
            inner.connect(("127.0.0.1", request["port"]))
            self._reply(request["id"], (inner.fileno(),))

    def _session(self, request: dict) -> Session:
        for session in self._sessions.values():
            if session.name == request["session"]:
                return session
        raise OSError(errno.ESRCH, "the session's shell has ended")

    def _add(self, running: Running) -> None:
        if not self._running:
            self._disk_check = (
                time.monotonic() + DISK_CHECK_SECONDS
            )  # a full disk leaves a new command time to remove something
        self._running[running.descriptor] = running
        self._poller.register(running.descriptor, select.POLLIN)

    def _ended(self, running: Running) -> None:
        if running.session is None:
            _, raw = os.waitpid(running.started.pid, 0)
            self._remove(running)
            os.close(running.descriptor)
            self._tell_end(running, _exit_code(raw), False)
        elif (code := running.session.read_status()) is not None:
            self._remove(running)
            self._tell_end(running, code, False)
        else:
            self._poller.unregister(
                running.descriptor
            )  # closed, or nonsense: the shell's own end is awaited, or the time limit

    def _remove(self, running: Running) -> None:
        del self._running[running.descriptor]
        try:
            self._poller.unregister(running.descriptor)
        except KeyError:
            pass  # a shell that closed its status

    def _shell_ended(self, session: Session) -> None:
        del self._sessions[session.pidfd]
        self._poller.unregister(session.pidfd)
        _, raw = os.waitpid(session.pid, 0)
        if running := self._running.get(session.status):
            self._remove(running)
            self._tell_end(running, _exit_code(raw), True)
        elif not self._sessions and not self._running:
            self._tier.kill_leftovers()
        session.close()

    def _tell_end(self, running: Running, code: int, shell_ended: bool) -> None:
        """The command ended.

        All that it left dies with it, unless a session or another command is there that may own it.
        """
        seconds = time.monotonic() - running.began
        survivors = 0 if self._sessions or self._running else self._tier.kill_leftovers()
        self._tier.finished()
        struck = [
            name
            for name, count in self._meters.events().items()
            if count > running.events.get(name, 0)
        ]
        failure = running.started.failure if running.started else ""
        if survivors:
            failure = f"{survivors} processes survived SIGKILL for {KILL_SECONDS:.0f} s"
        denials = self._denials() or 0
        self._reply(
            running.identity,
            exit_code=code,
            seconds=seconds,
            limits=list(dict.fromkeys(running.limits_hit + struck)),
            failure=failure,
            shell_ended=shell_ended,
            denials=denials - self._denials_told,
        )
        self._denials_told = denials

    def _kill_everything(self) -> None:
        for running in list(self._running.values()):
            if running.session is None:
                running.kill("killed")
                self._await(running.descriptor)
                self._ended(running)
            else:
                running.limits_hit.append("killed")
        for session in list(self._sessions.values()):
            linux.signal_process(session.pid, signal.SIGKILL)
            self._await(session.pidfd)
            self._shell_ended(session)
        if survivors := self._tier.kill_leftovers():  # no verifier may start beside them
            raise OSError(f"{survivors} processes survived SIGKILL for {KILL_SECONDS:.0f} s")

    def _await(self, pidfd: int) -> None:
        if not select.select([pidfd], [], [], KILL_SECONDS)[0]:
            raise OSError(f"a killed process did not end within {KILL_SECONDS:.0f} s")

    # Files

    def _serve_snapshot(self, request: dict, descriptors: list[int]) -> None:
        """Copy all files into the directory that came with the request."""
        if self._running:
            raise OSError(errno.EBUSY, "a command is running, which may be writing")
        self._tier.copy_to(descriptors[0])
        self._reply(request["id"])

    def _serve_open(self, request: dict, descriptors: list[int]) -> None:
        """Open a regular file of the workspace for the manager, or a directory to list, following
        no link out of it.
        """
        with self._tier.as_owner():
            descriptor = self._open(request)
        try:
            self._reply(request["id"], (descriptor,))
        finally:
            os.close(descriptor)

    def _open(self, request: dict) -> int:
        path, writing = request["path"], request["purpose"] == "write"
        if request["purpose"] == "list":
            return linux.open_beneath(self._root, path, os.O_RDONLY | os.O_DIRECTORY)
        flags = (
            os.O_NONBLOCK | os.O_NOCTTY | (os.O_WRONLY | os.O_CREAT if writing else os.O_RDONLY)
        )  # NONBLOCK: a FIFO must not hold us
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


def _exit_code(raw: int) -> int:
    """As a shell says it: 128 + the signal for a process that was killed."""
    code = os.waitstatus_to_exitcode(raw)
    return code if code >= 0 else 128 - code
