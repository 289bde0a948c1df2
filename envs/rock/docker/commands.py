"""Jobs and sessions of a Docker sandbox: a job is one exec, a session is a bash in an exec.

The engine reports a job's exit code. A session's shell reports the codes of its commands through a
channel of its own, see scripts.SESSION.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from envs.rock.backend import (
    MAX_DISCARDED_BYTES,
    Job,
    Session,
    choose_timeout,
    reason_not_executable,
    refused_result,
)
from envs.rock.config import CommandResult
from envs.rock.docker import scripts
from envs.rock.docker.capture import KILLED, Capture, to_result
from envs.rock.docker.container import END_SECONDS, Container
from envs.rock.docker.streams import STDERR, STDOUT, Exec
from envs.rock.errors import (
    AgentFault,
    SandboxClosedError,
    SandboxError,
    SandboxStartError,
    SessionEndedError,
)
from envs.rock.host.shell import Frame

SHELL_SECONDS = 2.0  # in which a shell must be ready again after its command was killed
MARK_SECONDS = 2.0  # in which a session's output must have arrived after its command's end
KILL_WAIT_SECONDS = (1.0, 1.0, END_SECONDS, END_SECONDS)  # after each attempt to kill a job
MAX_REPORT_PIECES = 16  # that wait to be read


class DockerJob(Job):
    """One exec, followed to its end by a task.

    Attributes:
      task: follows the command; its result is the command's.
    """

    def __init__(
        self,
        container: Container,
        exec_: Exec,
        *,
        timeout: float,
        max_output_bytes: int,
        kill: Callable[[], Awaitable[None]],
        on_end: Callable[["DockerJob"], Awaitable[None]] | None = None,
    ):
        """Follow a command that has just started.

        Args:
          container: where it runs.
          exec_: the command.
          timeout: seconds.
          max_output_bytes: kept of each stream.
          kill: kills the command and what it started.
          on_end: awaited with this job when the command has ended.
        """
        self._container = container
        self._exec = exec_
        self._timeout = timeout
        self._kill = kill
        self._on_end = on_end
        self._captures = {STDOUT: Capture(max_output_bytes), STDERR: Capture(max_output_bytes)}
        # Why it is to end: "timeout", "output" or "killed".
        self._verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._follow())
        self.task.add_done_callback(_retrieve_exception)

    @property
    def running(self) -> bool:
        return not self.task.done()

    async def wait(self) -> CommandResult:
        return await asyncio.shield(self.task)

    async def wait_or_kill(self) -> CommandResult:
        """Wait for the end; kill the command if the waiting task is cancelled."""
        try:
            return await self.wait()
        except asyncio.CancelledError:
            self.doom("killed")
            raise

    async def interrupt(self) -> None:
        if self.running and self._exec.pid > 0:
            await self._container.ask(f"kill -s INT -- -{self._exec.pid} 2>/dev/null; :")

    async def kill(self) -> CommandResult:
        self.doom("killed")
        return await self.wait()

    def doom(self, reason: str) -> None:
        """Let the command be killed; an earlier reason stays the reason."""
        if not self._verdict.done():
            self._verdict.set_result(reason)

    async def _follow(self) -> CommandResult:
        began = time.monotonic()
        kills_before = self._container.memory_kills
        reading = asyncio.create_task(self._read_to_end())
        ends: set[asyncio.Future[Any]] = {reading, self._verdict}
        try:
            await asyncio.wait(
                ends,
                timeout=self._timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not reading.done():
                self.doom("timeout")
                await self._kill_until(reading)
            reason = self._verdict.result() if self._verdict.done() else ""
            code = KILLED if reason and reading.exception() else reading.result()
        finally:
            reading.cancel()
            self._exec.close()
            if self._on_end is not None:
                await self._on_end(self)
        seconds = time.monotonic() - began
        if code == KILLED and not reason:
            # This takes long enough for the event of a memory kill to arrive on its own way.
            await self._container.check()
        return to_result(
            self._captures[STDOUT],
            self._captures[STDERR],
            code=KILLED if reason else code,
            reason=reason,
            out_of_memory=self._container.memory_kills > kills_before,
            seconds=seconds,
            denials=await self._container.denials_since_last_call(),
        )

    async def _read_to_end(self) -> int:
        """Read the streams to their end and return the exit code."""
        async for number, piece in self._exec.frames():
            capture = self._captures.get(number, self._captures[STDERR])
            capture.feed(piece)
            if capture.total > MAX_DISCARDED_BYTES:
                self.doom("output")
        return await self._exec.exit_code(self._timeout + END_SECONDS)

    async def _kill_until(self, reading: asyncio.Task) -> None:
        """Kill the command until its streams end.

        Raises:
          AgentFault: it cannot be killed; the whole container is removed then.
        """
        for seconds in KILL_WAIT_SECONDS:
            with contextlib.suppress(SandboxClosedError):
                await self._kill()
            done, _ = await asyncio.wait({reading}, timeout=seconds)
            if done:
                return
        await self._container.remove()
        raise AgentFault("a command could not be killed, so its container was")


class DockerSession(Session):
    """A shell in an exec. Cancelling a `run` closes the session."""

    def __init__(
        self,
        container: Container,
        shell: Exec,
        reporter: Exec,
        *,
        kill: Callable[[Exec], Awaitable[None]],
        on_end: Callable[["DockerSession"], Awaitable[None]],
    ):
        """Attach to a shell that has just started.

        Args:
          container: where it runs.
          shell: runs scripts.SESSION.
          reporter: runs scripts.DOOR, and passes on what the shell reports of its commands.
          kill: kills the shell and what it started.
          on_end: awaited with this session when the shell has ended.
        """
        config = container.config
        self._container = container
        self._shell = shell
        self._reporter = reporter
        self._kill = kill
        self._on_end = on_end
        self._default_timeout = config.timeout
        self._turn = asyncio.Lock()
        self._captures = {
            STDOUT: Capture(config.max_output_bytes),
            STDERR: Capture(config.max_output_bytes),
        }
        self._frame = Frame(scripts.SESSION_REPORTS, scripts.CHILDREN)
        # Of what the shell reports; b"" when no more can come.
        self._reports: asyncio.Queue[bytes] = asyncio.Queue(MAX_REPORT_PIECES)
        # Output is read while a command runs. What is written in between waits in the pipe.
        self._in_use = asyncio.Event()
        self._background = ""  # process ids that earlier commands left, which signals spare
        self._verdict: asyncio.Future[str] | None = None  # of the running command
        self._reading = asyncio.create_task(self._read_output())
        self._listening = asyncio.create_task(self._read_reports())

    async def wait_ready(self, timeout: float) -> None:
        """Wait for the shell's first report.

        Raises:
          SandboxStartError: it does not come within `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._reports.get()
        except TimeoutError:
            await self.close()
            raise SandboxStartError("the session's shell did not start") from None

    @property
    def running(self) -> bool:
        """Whether a command is running."""
        return self._verdict is not None

    def doom(self, reason: str) -> None:
        """Let the running command be killed; an earlier reason stays the reason."""
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(reason)

    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        if refusal := reason_not_executable(command):
            return refused_result(refusal)
        seconds = choose_timeout(timeout, self._default_timeout)
        async with self._turn:
            if self.ended:
                raise SessionEndedError("the session's shell has ended; create another session")
            began = time.monotonic()
            kills_before = self._container.memory_kills
            self._in_use.set()
            try:
                code, reason = await self._run(command, seconds)
                if not self.ended:
                    await self._wait_for_output()
            finally:
                self._in_use.clear()
            out_of_memory = self._container.memory_kills > kills_before
            seconds = time.monotonic() - began
            return to_result(
                self._captures[STDOUT],
                self._captures[STDERR],
                code=code,
                reason=reason,
                out_of_memory=out_of_memory,
                seconds=seconds,
                denials=await self._container.denials_since_last_call(),
            )

    async def interrupt(self) -> None:
        if self.running:
            await self._signal("INT")

    async def close(self) -> None:
        if self.ended:
            return
        self.ended = True
        self.doom("killed")
        self._in_use.set()
        with contextlib.suppress(SandboxError):
            if self._container.alive and not self._reading.done():
                await self._kill(self._shell)
                # The engine waits for a reader of the stream, so it is read to its end.
                await asyncio.wait({self._reading}, timeout=END_SECONDS)
        await self._release()

    async def _run(self, command: str, timeout: float) -> tuple[int, str]:
        """Run a command; return its exit code and the reason for which it was killed, if any."""
        verdict: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._verdict = verdict
        try:
            records = self._frame.records(command.encode(errors="replace"))
            await self._shell.send(records, more=True)
            code = await self._wait_for_code(verdict, timeout)
            reason = verdict.result() if verdict.done() else ""
        except BaseException:
            await asyncio.shield(self.close())
            raise
        finally:
            self._verdict = None
        return code, reason

    async def _wait_for_code(self, verdict: asyncio.Future[str], timeout: float) -> int:
        """Return the running command's exit code.

        At its time limit, or when it is doomed, what it started is killed first.
        """
        report = asyncio.create_task(self._next_report())
        ends: set[asyncio.Future[Any]] = {report, self._reading}
        try:
            await asyncio.wait(
                ends | {verdict}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not report.done() and not self._reading.done():
                self.doom("timeout")
                await self._signal("KILL")
                await asyncio.wait(ends, timeout=SHELL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            ended = report.result() if report.done() else None
            if ended is not None:
                code, children = ended
                self._background = children.decode(errors="replace")
                return KILLED if verdict.done() else code
        finally:
            report.cancel()
        return await self._code_of_shell(verdict)

    async def _next_report(self) -> tuple[int, bytes] | None:
        """Return the running command's exit code and the shell's children, None if none comes."""
        while piece := await self._reports.get():
            report = self._frame.receive(piece)
            if report is not None:
                return report
            if self._frame.overflowed:
                return None
        self._reports.put_nowait(b"")  # for whoever asks again
        return None

    async def _code_of_shell(self, verdict: asyncio.Future[str]) -> int:
        """Return the code of a shell that reports no more; end it if it does not end by itself."""
        if not self._reading.done() and not verdict.done():
            await asyncio.wait({self._reading}, timeout=SHELL_SECONDS)
        if not self._reading.done() or verdict.done():
            await self.close()
            return KILLED
        self.ended = True
        code = await self._shell.exit_code()
        await self._release()
        return code

    async def _signal(self, name: str) -> None:
        """Send a signal to what the running command started.

        The shell and the processes that earlier commands left get none.
        """
        await self._container.signal(self._shell, name, whole=False, spared=self._background)

    async def _wait_for_output(self) -> None:
        """Wait until what the command wrote has arrived.

        The shell writes a new mark after it, on both streams.
        """
        mark = f"<{secrets.token_hex(16)}>".encode()
        for capture in self._captures.values():
            capture.expect(mark)
        await self._shell.send(scripts.write_mark(mark), more=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MARK_SECONDS):
                await asyncio.gather(*(capture.found.wait() for capture in self._captures.values()))

    async def _release(self) -> None:
        self._reading.cancel()
        self._listening.cancel()
        self._shell.close()
        self._reporter.close()
        await self._on_end(self)

    async def _read_output(self) -> None:
        """Read what the shell and its commands write, until the shell ends."""
        async for number, piece in self._shell.frames():
            await self._in_use.wait()
            capture = self._captures.get(number, self._captures[STDERR])
            capture.feed(piece)
            if capture.total > MAX_DISCARDED_BYTES:
                self.doom("output")

    async def _read_reports(self) -> None:
        """Queue what the shell reports."""
        async for number, piece in self._reporter.frames():
            if number == STDOUT:
                await self._reports.put(piece)
        await self._reports.put(b"")


def _retrieve_exception(task: asyncio.Task) -> None:
    """Mark an exception as seen: asyncio would log it when nobody waits for the task."""
    if not task.cancelled():
        task.exception()
