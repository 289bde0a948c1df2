"""What a sandbox of the Docker backend runs: a job (one exec) and a session (a bash that lives on
in an exec).

A job's exit code is the engine's word. A session's is the shell's: see inside.SESSION.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from envs.rock.backend import (
    MAX_DISCARDED_BYTES,
    Job,
    Session,
    reason_not_executable,
    refused_result,
)
from envs.rock.config import CommandResult
from envs.rock.docker.container import END_SECONDS, STDERR, STDOUT, Exec
from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError

if TYPE_CHECKING:
    from envs.rock.docker.sandbox import DockerBackend

KILLED = 137  # 128 + SIGKILL
SHELL_SECONDS = 2.0  # in which a shell must come back once all that its command started is dead
MARK_SECONDS = 2.0  # in which a session's output must have arrived after its command's end


class Capture:
    """One stream: the first `limit` bytes of a command, and how many there were."""

    def __init__(self, limit: int):
        self._limit, self._mark, self._tail, self._rest = limit, b"", b"", b""
        self.found = asyncio.Event()
        self._data, self.total = bytearray(), 0

    def feed(self, piece: bytes) -> None:
        if self.found.is_set():
            self._rest += piece[: self._limit]
            return
        self._data += piece[: max(0, self._limit - len(self._data))]
        self.total += len(piece)
        if self._mark:
            seen = self._tail + piece
            if (at := seen.find(self._mark)) >= 0:
                self._rest = seen[at + len(self._mark) :]
                self.total += at - len(seen)
                del self._data[self.total :]
                self.found.set()
        self._tail = (self._tail + piece)[-100:]

    def expect(self, mark: bytes) -> None:
        """The command's output goes as far as this word."""
        self._mark = mark

    def take(self) -> tuple[str, int]:
        """(text, bytes that were cut); what came after the mark is the beginning of the next
        command's.
        """
        text, cut, rest = (
            bytes(self._data).decode(errors="replace"),
            max(0, self.total - self._limit),
            self._rest,
        )
        self.__init__(self._limit)
        self.feed(rest)
        return text, cut


class DockerJob(Job):
    """One exec, followed to its end by a task of its own."""

    def __init__(
        self,
        exec_: Exec,
        timeout: float,
        limit: int,
        kill: Callable[[], Awaitable[None]],
        tidy: Callable[["DockerJob"], Awaitable[None]],
    ):
        self.exec, self._timeout, self._kill, self._tidy = exec_, timeout, kill, tidy
        self._captures = {STDOUT: Capture(limit), STDERR: Capture(limit)}
        self._verdict: asyncio.Future[str] = (
            asyncio.get_running_loop().create_future()
        )  # why it is to end: "timeout", "output" or "killed"
        self._task = asyncio.create_task(self._follow())
        self._task.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # nobody may be waiting

    @property
    def running(self) -> bool:
        return not self._task.done()

    async def wait(self) -> CommandResult:
        return await asyncio.shield(self._task)

    async def interrupt(self) -> None:
        if self.running and self.exec.pid > 0:
            await self.exec.container.ask(f"kill -s INT -- -{self.exec.pid} 2>/dev/null; :")

    async def kill(self) -> CommandResult:
        self.doom("killed")
        return await self.wait()

    def doom(self, reason: str) -> None:
        """It is to end, for this reason unless there was one before."""
        if not self._verdict.done():
            self._verdict.set_result(reason)

    async def _follow(self) -> CommandResult:
        container, began = self.exec.container, time.monotonic()
        kills = container.memory_kills
        ending = asyncio.create_task(self._end())
        try:
            await asyncio.wait(
                {ending, self._verdict}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if not ending.done():
                self.doom("timeout")
                await self._kill_until(ending)
            reason = self._verdict.result() if self._verdict.done() else ""
            code = ending.result() if not ending.exception() or not reason else KILLED
        finally:
            ending.cancel()
            self.exec.close()
            await self._tidy(self)
        seconds = time.monotonic() - began
        if code == KILLED and not reason:
            # which takes long enough for the news of a process that the memory limit killed to
            # come, by another way
            await container.check()
        limits = ((reason,) if reason else ()) + (
            ("memory",) if container.memory_kills > kills else ()
        )
        (stdout, cut_out), (stderr, cut_err) = (
            self._captures[STDOUT].take(),
            self._captures[STDERR].take(),
        )
        return CommandResult(
            stdout,
            stderr,
            KILLED if reason else code,
            reason == "timeout",
            bool(cut_out or cut_err),
            seconds,
            limits,
            await container.denials_since_last_told(),
            (cut_out, cut_err),
        )

    async def _end(self) -> int:
        """Read its streams to their end; its exit code."""
        async for number, piece in self.exec.frames():
            capture = self._captures.get(number, self._captures[STDERR])
            capture.feed(piece)
            if capture.total > MAX_DISCARDED_BYTES:
                self.doom("output")
        return await self.exec.exit_code(self._timeout + END_SECONDS)

    async def _kill_until(self, ending: asyncio.Task) -> None:
        """SandboxError, and the end of the whole container, if the job cannot be killed."""
        for seconds in (1.0, 1.0, END_SECONDS, END_SECONDS):
            with contextlib.suppress(SandboxClosedError):
                await self._kill()
            if (await asyncio.wait({ending}, timeout=seconds))[0]:
                return
        await self.exec.container.remove()
        raise SandboxError("a command could not be killed, so its container was")


class DockerSession(Session):
    """See Session and inside.SESSION. Cancelling a `run` closes the session."""

    def __init__(self, sandbox: "DockerBackend", shell: Exec, door: Exec):
        self._sandbox, self._shell, self._door = sandbox, shell, door
        self._turn = asyncio.Lock()
        self._captures = {
            STDOUT: Capture(sandbox.config.max_output_bytes),
            STDERR: Capture(sandbox.config.max_output_bytes),
        }
        self._said: asyncio.Queue[bytes] = asyncio.Queue()
        self._older = ""  # children of the shell that earlier commands left in the background
        self._verdict: asyncio.Future[str] | None = None
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._listen())]

    async def started(self) -> None:
        """Wait for the shell's first word. SandboxStartError if it does not come."""
        try:
            async with asyncio.timeout(self._sandbox.config.start_timeout):
                await self._said.get()
        except TimeoutError:
            await self.close()
            raise SandboxStartError("the session's shell did not come up") from None

    @property
    def running(self) -> bool:
        """Whether it has a command now."""
        return self._verdict is not None

    def doom(self, reason: str) -> None:
        """Its command is to end, for this reason unless there was one before."""
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(reason)

    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        if refusal := reason_not_executable(command):
            return refused_result(refusal)
        async with self._turn:
            if self.ended:
                raise SandboxClosedError("the session's shell has ended; create another session")
            began, kills = time.monotonic(), self._shell.container.memory_kills
            self._verdict = asyncio.get_running_loop().create_future()
            try:
                await self._shell.send(command.encode(errors="replace") + b"\0", more=True)
                code = await self._code(
                    self._sandbox.config.timeout if timeout is None else timeout
                )
                reason = self._verdict.result() if self._verdict.done() else ""
            except BaseException:
                await asyncio.shield(self.close())
                raise
            finally:
                self._verdict = None
            if not self.ended:
                await self._all_output()
            (stdout, cut_out), (stderr, cut_err) = (
                self._captures[number].take() for number in (STDOUT, STDERR)
            )
            limits = ((reason,) if reason else ()) + (
                ("memory",) if self._shell.container.memory_kills > kills else ()
            )
            return CommandResult(
                stdout,
                stderr,
                code,
                reason == "timeout",
                bool(cut_out or cut_err),
                time.monotonic() - began,
                limits,
                await self._shell.container.denials_since_last_told(),
                (cut_out, cut_err),
            )

    async def interrupt(self) -> None:
        if self.running:
            await self._signal("INT")

    async def close(self) -> None:
        if self.ended:
            return
        self.ended = True
        self.doom("killed")
        with contextlib.suppress(SandboxError):
            if self._shell.container.alive and not self._tasks[0].done():
                await self._sandbox.kill(self._shell)
                await asyncio.wait(
                    {self._tasks[0]}, timeout=END_SECONDS
                )  # a stream that nobody reads would make the engine wait
        await self._release()

    async def _code(self, timeout: float) -> int:
        """The exit code of the command that runs; at its time limit, or a flood, that of what is
        left of it.
        """
        status = asyncio.create_task(self._said.get())
        try:
            await asyncio.wait(
                {status, self._tasks[0], self._verdict},
                timeout=timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not status.done() and not self._tasks[0].done():
                self.doom("timeout")
                await self._signal("KILL")
                await asyncio.wait(
                    {status, self._tasks[0]},
                    timeout=SHELL_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            if status.done() and (word := status.result()):
                code, _, older = word.decode(errors="replace").partition(" ")
                self._older = older
                return (
                    KILLED
                    if self._verdict.done()
                    else int(code) & 0xFF
                    if code.isdigit()
                    else KILLED
                )
        finally:
            status.cancel()
        if not self._tasks[0].done() and not self._verdict.done():
            await asyncio.wait(
                {self._tasks[0]}, timeout=SHELL_SECONDS
            )  # the door closed first: the shell is about to end
        killed = not self._tasks[0].done() or self._verdict.done()
        if killed:
            await self.close()
            return KILLED
        self.ended = True
        code = await self._shell.exit_code()
        await self._release()
        return code

    async def _signal(self, name: str) -> None:
        """To all that the running command started, and not to the shell nor to what earlier
        commands left.
        """
        await self._shell.signal(name, whole=False, spared=self._older)

    async def _all_output(self) -> None:
        """Wait until what the command wrote has arrived: a new word, which the shell writes after
        it, ends both streams.
        """
        mark = f"<{secrets.token_hex(16)}>".encode()
        for capture in self._captures.values():
            capture.expect(mark)
        await self._shell.send(mark + b"\0", more=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MARK_SECONDS):
                await asyncio.gather(*(capture.found.wait() for capture in self._captures.values()))

    async def _release(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._shell.close()
        self._door.close()
        await self._sandbox.tidy(self)

    async def _read(self) -> None:
        """What the shell and its commands write, until the shell ends."""
        async for number, piece in self._shell.frames():
            capture = self._captures.get(number, self._captures[STDERR])
            capture.feed(piece)
            if capture.total > MAX_DISCARDED_BYTES:
                self.doom("output")

    async def _listen(self) -> None:
        """What the shell says of itself; an empty word when it can say no more."""
        heard = b""
        async for number, piece in self._door.frames():
            if number == STDOUT:
                *words, heard = (heard + piece).split(b"\0")
                for word in words:
                    self._said.put_nowait(word)
                if len(heard) > 1 << 16:
                    break
        self._said.put_nowait(b"")
