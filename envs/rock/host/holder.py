"""The holder: one process for each sandbox, which owns its files and starts its commands.

It is forked from the zygote and serves the manager over one socket (messages.py): a request with
descriptors, then a reply. Time limits are kept here, so a manager that is busy compiling does not
stretch them. Nothing of the sandbox outlives its holder.
"""

import errno
import json
import os
import resource
import select
import signal
import socket
import time

from . import cgroups, files, linux
from .egress import Way
from .errors import AgentError
from .messages import MAX_MESSAGE, receive, send
from .process import Started
from .running import KILL_SECONDS, Running, RunningInSession, RunningProcess
from .session import LOOP, Session

# Limits at one time; the descriptors of all stay below linux.FIRST_PASSED_FD.
MAX_SESSIONS = 8
MAX_COMMANDS = 16
MAX_QUEUED_SIGNALS = 256
DISK_CHECK_SECONDS = 0.1
MAX_POLL_SECONDS = 24 * 3600.0  # the kernel counts milliseconds in 32 bits
CONNECT_SECONDS = 0.1
# Reasons of the host for which a copy of the files fails.
_FAULTS_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENFILE)
_KILLED = 128 + signal.SIGKILL
# Of granted connections that the manager has not taken yet; its socket holds three times as much.
MAX_UNREAD_BYTES = 1 << 16


class Holder:
    """One sandbox: its tier, its running commands and its sessions."""

    def __init__(self, channel: socket.socket, spec: dict, tier_type: type):
        """Open what must be opened under the zygote's user id and in its file tree.

        Args:
          channel: to the manager.
          spec: the zygote's description of the sandbox.
          tier_type: namespaces.Tier or fenced.Tier.
        """
        self._channel = channel
        self._spec = spec
        self._running: dict[int, Running] = {}  # by the descriptor that reports the end
        self._sessions: dict[int, Session] = {}  # by the shell's pidfd
        self._poller = select.poll()
        self._reported_denials = 0
        self._next_disk_check = 0.0
        self._has_acted = False  # whether a program has run here, which may have left something
        flags = os.O_WRONLY | os.O_CLOEXEC
        entries = [os.open(f"{path}/cgroup.procs", flags) for path in spec["cgroups"]]
        self._tier = tier_type(spec, entries)
        self._meters = cgroups.Meters(spec["cgroups"])

    def set_up(self) -> str:
        """Enter the tier and return the path of the workspace."""
        self._root = self._tier.set_up()
        # 1, not 0: a core_pattern that is a pipe ignores 0, and the host's crash handler would run.
        linux.lower_limit(resource.RLIMIT_CORE, 1)
        linux.lower_limit(resource.RLIMIT_FSIZE, self._spec["disk_bytes"])
        # Signals in a queue are counted to a user, who may have other sandboxes.
        linux.lower_limit(resource.RLIMIT_SIGPENDING, MAX_QUEUED_SIGNALS)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        # After the change of user ids, which clears it.
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._spec["zygote"]:
            raise OSError("the zygote died")
        return self._tier.workspace

    def serve(self) -> None:
        """Serve until the manager closes the socket or dies; nothing of the sandbox runs then."""
        self._poller.register(self._channel, select.POLLIN)
        guarded = self._tier.guard.descriptors() if self._tier.guard else ()
        for descriptor in guarded:
            self._poller.register(descriptor, select.POLLIN)
        alive = True
        while alive:
            events = self._poller.poll(self._milliseconds_to_next_check())
            # What an event is about is looked up before any event is handled: a request may end a
            # command and start one under the same number.
            ready = []
            for descriptor, _ in events:
                running = self._running.get(descriptor)
                session = self._sessions.get(descriptor)
                ready.append((descriptor, running, session))
            for descriptor, running, session in ready:
                if descriptor == self._channel.fileno():
                    alive = self._receive()
                elif descriptor in guarded:
                    self._hand_over(self._tier.guard.serve(descriptor))
                elif running and self._running.get(descriptor) is running:
                    self._handle_end(running)
                elif session and self._sessions.get(descriptor) is session:
                    self._handle_shell_end(session)
            self._check_limits()
        try:
            self._kill_everything()
        except AgentError:
            return  # the zygote inherits what is left, and kills it
        self._tier.close()

    def _milliseconds_to_next_check(self) -> int | None:
        if not self._running:
            return None
        deadline = min(running.deadline for running in self._running.values())
        seconds = max(0.0, deadline - time.monotonic())
        if self._tier.watches_disk:
            seconds = min(seconds, DISK_CHECK_SECONDS)
        return int(1000 * min(seconds, MAX_POLL_SECONDS)) + 1

    def _check_limits(self) -> None:
        now = time.monotonic()
        disk_full = self._is_disk_full(now)
        for running in list(self._running.values()):
            if disk_full and "disk" not in running.limits_hit:
                running.kill("disk")
            elif now < running.deadline:
                continue
            elif running.is_dying:
                self._give_up(running)
            else:
                running.kill(running.limits_hit[-1] if running.limits_hit else "timeout")

    def _is_disk_full(self, now: float) -> bool:
        """Return whether a watched disk exceeds its limits; False while no check is due."""
        if not self._running or not self._tier.watches_disk or now < self._next_disk_check:
            return False
        self._next_disk_check = now + DISK_CHECK_SECONDS
        size, inodes = self._tier.usage()
        return size > self._spec["disk_bytes"] or inodes > self._spec["inodes"]

    def _receive(self) -> bool:
        """Serve one request; return False when the manager is gone."""
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
            code = errno.errorcode.get(error.errno or 0, "EIO")
            is_agents = isinstance(error, AgentError)
            self._reply(request["id"], error=str(error), errno=code, agent=is_agents)
        except (ValueError, OverflowError) as error:
            # A request that cannot be served ends no sandbox.
            self._reply(request["id"], error=f"{request['op']}: {error}", errno="EINVAL")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _reply(self, identity: int, descriptors: tuple[int, ...] = (), **fields: object) -> None:
        try:
            send(self._channel, {"id": identity, **fields}, descriptors)
        except (BrokenPipeError, ConnectionError):
            return  # the manager is gone, which the next receive reports

    # -- commands

    def _serve_run(self, request: dict, descriptors: list[int]) -> None:
        if len(self._running) >= MAX_COMMANDS:
            raise AgentError(
                errno.EBUSY, f"{MAX_COMMANDS} commands are running; a sandbox runs no more at once"
            )
        out, err, text = descriptors
        command = os.pread(text, MAX_MESSAGE, 0).decode()
        arguments = ["/bin/bash", "-c", "--", command]
        events = self._meters.events()
        started = self._tier.start_agent(arguments, request["env"], out, err)
        self._watch(request, started, events)

    def _serve_verify(self, request: dict, descriptors: list[int]) -> None:
        """Run a verifier's script.

        All processes of the agent are killed before the script is within reach of any process of
        the sandbox.
        """
        self._kill_everything()
        out, err, script, content = descriptors
        verifier_files = {}
        offset = 0
        for name, size in request["files"]:
            verifier_files[name] = os.pread(content, size, offset)
            offset += size
        events = self._meters.events()
        started = self._tier.start_verifier(
            script, verifier_files, request["env"], out, err, request["keep"]
        )
        self._watch(request, started, events)

    def _watch(self, request: dict, started: Started, events: dict[str, int]) -> None:
        pidfd = os.pidfd_open(started.pid)
        self._add(RunningProcess(request["id"], pidfd, request["timeout"], events, started))

    def _serve_session(self, request: dict, descriptors: list[int]) -> None:
        if len(self._sessions) >= MAX_SESSIONS:
            raise AgentError(errno.EMFILE, f"a sandbox has at most {MAX_SESSIONS} sessions")
        out, err = descriptors
        session = Session(request["id"])
        arguments = ["/bin/bash", "--noprofile", "--norc", "-c", LOOP, "bash"]
        started = self._tier.start_agent(arguments, request["env"], out, err, session.pass_pipes)
        # A shell that could not be executed ends at once, and its first command reports that.
        session.started(started)
        self._has_acted = True
        self._sessions[session.pidfd] = session
        self._poller.register(session.pidfd, select.POLLIN)
        self._reply(request["id"], session=session.name)

    def _serve_tell(self, request: dict, descriptors: list[int]) -> None:
        """Give a session's shell a command."""
        session = self._find_session(request)
        if session.status in self._running:
            raise OSError(errno.EBUSY, "the session is running a command")
        events = self._meters.events()
        session.send(os.pread(descriptors[0], MAX_MESSAGE, 0))
        self._add(RunningInSession(request["id"], request["timeout"], events, session))

    def _serve_close_session(self, request: dict, descriptors: list[int]) -> None:
        session = self._find_session(request)
        linux.kill_trees(lambda: linux.descendants_of({session.pid}))
        _wait_for_end(session.pidfd)
        self._handle_shell_end(session)
        self._reply(request["id"])

    def _serve_interrupt(self, request: dict, descriptors: list[int]) -> None:
        """Send SIGINT to what a running command started; do nothing if it has ended."""
        for running in self._running.values():
            if running.identity == request["target"]:
                for pid in running.processes():
                    linux.signal_process(pid, signal.SIGINT)
        self._reply(request["id"])

    def _serve_end(self, request: dict, descriptors: list[int]) -> None:
        """Kill one running command and no other."""
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
        fields: dict[str, object] = {
            "disk_bytes": size,
            "inodes": inodes,
            "cpu_seconds": spent.ru_utime + spent.ru_stime,
            "commands": len(self._running),
            "sessions": len(self._sessions),
            "network_denials": self._count_denials(),
        }
        fields.update(self._meters.usage())
        self._reply(request["id"], (), **fields)

    def _find_session(self, request: dict) -> Session:
        for session in self._sessions.values():
            if session.name == request["session"]:
                return session
        raise OSError(errno.ESRCH, "the session's shell has ended")

    def _add(self, running: Running) -> None:
        if not self._running:
            # A new command has time to remove something from a full disk.
            self._next_disk_check = time.monotonic() + DISK_CHECK_SECONDS
        self._running[running.descriptor] = running
        self._poller.register(running.descriptor, select.POLLIN)

    def _handle_end(self, running: Running) -> None:
        """Handle an event of a command's descriptor."""
        if isinstance(running, RunningProcess):
            _, status = os.waitpid(running.started.pid, 0)
            self._remove(running)
            os.close(running.descriptor)
            started = running.started
            is_agents = self._has_acted and not started.is_machines
            self._has_acted = self._has_acted or not started.failure
            code = _exit_code(status)
            self._report_end(running, code, failure=started.failure, is_agents=is_agents)
        elif isinstance(running, RunningInSession):
            reported = running.session.read_status()
            if reported is None:
                if running.session.silent:  # wait for the shell's end or the time limit
                    self._poller.unregister(running.descriptor)
                return
            self._remove(running)
            self._report_end(running, reported)

    def _give_up(self, running: Running) -> None:
        """Report a command whose process was killed and does not end; it is collected later.

        Freeing the memory of a process can take long, and an agent can arrange that.
        """
        self._remove(running)
        if isinstance(running, RunningProcess):
            os.close(running.descriptor)
        self._report_end(running, _KILLED, survivors=1)

    def _remove(self, running: Running) -> None:
        del self._running[running.descriptor]
        try:
            self._poller.unregister(running.descriptor)
        except KeyError:
            return  # no report could come any more, see _handle_end

    def _handle_shell_end(self, session: Session) -> None:
        del self._sessions[session.pidfd]
        self._poller.unregister(session.pidfd)
        _, status = os.waitpid(session.pid, 0)
        if running := self._running.get(session.status):
            self._remove(running)
            self._report_end(running, _exit_code(status), shell_ended=True)
        elif not self._sessions and not self._running:
            self._tier.kill_leftovers()
        session.close()

    def _report_end(
        self,
        running: Running,
        code: int,
        *,
        failure: str = "",
        is_agents: bool = False,
        shell_ended: bool = False,
        survivors: int = 0,
    ) -> None:
        """Report a command's end to the manager.

        All that it left is killed first, unless a session or another command runs that may own it.

        Args:
          running: the command.
          code: its exit code.
          failure: why it did not run.
          is_agents: whether an earlier command can be the reason for that.
          shell_ended: whether its session's shell has ended with it.
          survivors: its processes that were killed and did not end.
        """
        seconds = time.monotonic() - running.began
        if not self._sessions and not self._running and not survivors:
            survivors = self._tier.kill_leftovers()
        self._tier.finished()
        limits = list(running.limits_hit)
        for name, count in self._meters.events().items():
            if count > running.events.get(name, 0):
                limits.append(name)
        if survivors:
            failure = _survived(survivors)
            is_agents = True
        denials = self._count_denials() or 0
        self._reply(
            running.identity,
            exit_code=code,
            seconds=seconds,
            limits=list(dict.fromkeys(limits)),
            failure=failure,
            agent=is_agents,
            shell_ended=shell_ended,
            denials=denials - self._reported_denials,
        )
        self._reported_denials = denials

    def _kill_everything(self) -> None:
        """Kill all commands, sessions and what they left.

        Raises:
          AgentError: a process survives; no verifier may start beside it.
        """
        for running in list(self._running.values()):
            if isinstance(running, RunningInSession):
                running.limits_hit.append("killed")  # its shell is killed below
            else:
                running.kill("killed")
                _wait_for_end(running.descriptor)
                self._handle_end(running)
        for session in list(self._sessions.values()):
            linux.signal_process(session.pid, signal.SIGKILL)
            _wait_for_end(session.pidfd)
            self._handle_shell_end(session)
        survivors = self._tier.kill_leftovers()
        if survivors:
            raise AgentError(_survived(survivors))

    # -- network

    def _serve_denials(self, request: dict, descriptors: list[int]) -> None:
        records = []
        if self._tier.guard:
            self._hand_over(self._tier.guard.catch_up())
            records = self._tier.guard.records
        self._reply(request["id"], denials=records)

    def _serve_connect(self, request: dict, descriptors: list[int]) -> None:
        """Connect to a port of the sandbox and pass the connection to the manager.

        The sandbox's loopback answers at once: with yes, no, or a full queue.
        """
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as inner:
            inner.settimeout(CONNECT_SECONDS)
            inner.connect(("127.0.0.1", request["port"]))
            self._reply(request["id"], (inner.fileno(),))

    def _hand_over(self, connections: list[tuple[Way, socket.socket]]) -> None:
        """Pass granted connections to the manager, which connects them to the outside.

        Those for which its socket has no room now are closed: an agent must not block or crash the
        holder by connections that a busy manager does not take.
        """
        for way, connection in connections:
            with connection:
                # The rest of the socket's buffer is kept for replies.
                if linux.unread_bytes(self._channel) < MAX_UNREAD_BYTES:
                    self._try_to_send(way, connection)

    def _try_to_send(self, way: Way, connection: socket.socket) -> None:
        message = {"id": 0, "way": way}
        try:
            send(self._channel, message, (connection.fileno(),), socket.MSG_DONTWAIT)
        except OSError:
            # Too many descriptors are in flight. If the manager is gone, the next receive says so.
            return

    def _count_denials(self) -> int | None:
        if self._tier.guard is None:
            return None
        self._hand_over(self._tier.guard.catch_up())
        return self._tier.guard.denials()

    # -- files

    def _serve_snapshot(self, request: dict, descriptors: list[int]) -> None:
        """Copy all files into the directory that came with the request."""
        if self._running:
            raise OSError(errno.EBUSY, "a command is running, which may be writing")
        try:
            self._tier.copy_to(descriptors[0])
        except OSError as error:
            if error.errno in _FAULTS_OF_THE_DISK:
                raise
            # The tree is as deep, or the names are as odd, as an agent made them.
            raise AgentError(error.errno, error.strerror) from error
        self._reply(request["id"])

    def _serve_open(self, request: dict, descriptors: list[int]) -> None:
        """Open a file or directory of the workspace for the manager."""
        with self._tier.as_owner():
            descriptor = files.open_for(
                request["purpose"], self._root, request["path"], request["mode"]
            )
        try:
            self._reply(request["id"], (descriptor,))
        finally:
            os.close(descriptor)


def _wait_for_end(pidfd: int) -> None:
    if not linux.wait_readable(pidfd, KILL_SECONDS):
        raise AgentError(f"a killed process did not end within {KILL_SECONDS:.0f} s")


def _survived(count: int) -> str:
    return f"{count} processes survived SIGKILL for {KILL_SECONDS:.0f} s"


def _exit_code(status: int) -> int:
    """Return an exit code as a shell reports it: 128 + the signal for a killed process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
