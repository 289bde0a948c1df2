"""What an embedded sandbox runs, seen from outside: a job (one command, perhaps in the background)
and a session (a shell that lives on).
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from envs.rock.config import CommandResult
from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError
from envs.rock.sandbox import Job, Session

if TYPE_CHECKING:
    from envs.rock.embedded.sandbox import EmbeddedSandbox

REPLY_GRACE = 30.0  # seconds beyond its own time limit in which a holder must answer
DRAINED_BYTES = (
    64 << 20
)  # what a command may write beyond max_output_bytes, unread, before it is killed
MAX_COMMAND_BYTES = 100_000  # one argument of a program can have 128 KiB


class EmbeddedJob(Job):
    def __init__(
        self,
        sandbox: "EmbeddedSandbox",
        identity: int,
        reply: asyncio.Future,
        outputs: "list[Output]",
        timeout: float,
    ):
        self._sandbox, self.identity, self._reply, self._outputs, self._timeout = (
            sandbox,
            identity,
            reply,
            outputs,
            timeout,
        )
        self._result: CommandResult | None = None

    @property
    def running(self) -> bool:
        return not self._reply.done()

    async def wait(self) -> CommandResult:
        if self._result is None:
            reply = await within(
                asyncio.shield(self._reply), self._timeout + REPLY_GRACE, "no answer to a command"
            )
            if self._result is None:  # else another waiter was first
                try:
                    self._result = result_of(reply, self._outputs)
                finally:
                    for output in self._outputs:
                        output.close()
        return self._result

    async def interrupt(self) -> None:
        await self._sandbox._request({"op": "interrupt", "target": self.identity}, (), REPLY_GRACE)

    async def kill(self) -> CommandResult:
        self._sandbox._end_unheard(self.identity)
        return await self.wait()


class EmbeddedSession(Session):
    def __init__(self, sandbox: "EmbeddedSandbox", name: int, outputs: "list[Output]"):
        self._sandbox, self._name, self._outputs = sandbox, name, outputs
        self._turn = asyncio.Lock()
        self._current: int | None = None

    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        if refusal := unspeakable(command):
            return CommandResult("", refusal, 126, False, False, 0.0)
        timeout = self._sandbox.config.timeout if timeout is None else timeout
        async with self._turn:
            self._check_open()
            with contextlib.ExitStack() as cleanup:
                text = memory_file(command.encode(errors="replace"), cleanup)
                self._current, answer = self._sandbox._send(
                    {"op": "tell", "session": self._name, "timeout": timeout}, (text,)
                )
            try:
                reply = await within(
                    answer, timeout + REPLY_GRACE, "no answer to a session's command"
                )
            except asyncio.CancelledError:
                self._sandbox._end_unheard(self._current)
                raise
            finally:
                self._current = None
            self.ended = bool(reply.get("shell_ended", "error" in reply))
            if "error" in reply:
                raise SandboxClosedError(f"{reply['error']}; create another session")
            return result_of(reply, self._outputs)

    async def interrupt(self) -> None:
        if self._current is not None:
            await self._sandbox._request(
                {"op": "interrupt", "target": self._current}, (), REPLY_GRACE
            )

    async def close(self) -> None:
        if not self.ended:
            self.ended = True
            with contextlib.suppress(SandboxClosedError):
                await self._sandbox._request(
                    {"op": "close_session", "session": self._name}, (), REPLY_GRACE
                )
        for output in self._outputs:
            output.close()

    def _check_open(self) -> None:
        if self.ended:
            raise SandboxClosedError("the session's shell has ended; create another session")

    def _flooded(self) -> None:
        if self._current is not None:
            self._sandbox._end_unheard(self._current)


class Output:
    """The reading end of one stream: keeps the first `limit` bytes of a command, reads on without
    keeping, reports a flood.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int):
        self._loop, self._limit = loop, limit
        self.on_flood: Callable[[], None] = lambda: None
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._data, self._dropped, self.flooded = bytearray(), 0, False
        loop.add_reader(self._read_end, self._read)

    def take(self) -> tuple[str, int, bool]:
        """(text, bytes that were cut, whether it was a flood) of what was written so far.

        Whoever wrote it may have ended: it is in the pipe.
        """
        while self._read_end is not None and self._dropped <= DRAINED_BYTES and self._read():
            pass
        taken = bytes(self._data).decode(errors="replace"), self._dropped, self.flooded
        self._data, self._dropped, self.flooded = bytearray(), 0, False
        return taken

    def _read(self) -> bool:
        try:
            piece = os.read(self._read_end, 1 << 16)
        except BlockingIOError:
            return False
        if not piece:
            self.close()
            return False
        kept = piece[: self._limit - len(self._data)]
        self._data += kept
        self._dropped += len(piece) - len(kept)
        if self._dropped > DRAINED_BYTES and not self.flooded:
            self.flooded = True
            self.on_flood()
        return True

    @property
    def closed(self) -> bool:
        return self._read_end is None

    def close_write_end(self) -> None:
        if self.write_end is not None:
            os.close(self.write_end)
            self.write_end = None

    def close(self) -> None:
        self.close_write_end()
        if self._read_end is not None:
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)
            self._read_end = None


def result_of(reply: dict, outputs: list[Output]) -> CommandResult:
    """A holder's last word on a command, with what was written.

    SandboxStartError for one that never began.
    """
    (stdout, cut_out, flood_out), (stderr, cut_err, flood_err) = (
        output.take() for output in outputs
    )
    if failure := reply.get("failure") or reply.get("error"):
        raise SandboxStartError(f"{failure} {stderr.strip()[-500:]}".strip())
    limits = tuple(
        "output" if name == "killed" and (flood_out or flood_err) else name
        for name in reply["limits"]
    )
    cut = (cut_out, cut_err)
    return CommandResult(
        stdout,
        stderr,
        reply["exit_code"],
        "timeout" in limits,
        any(cut),
        reply["seconds"],
        limits,
        reply["denials"],
        cut,
    )


async def within(future: asyncio.Future, seconds: float, what: str) -> dict:
    try:
        async with asyncio.timeout(
            seconds
        ):  # not wait_for, which loses a cancellation that comes with the answer
            return await future
    except TimeoutError:
        raise SandboxError(f"{what} within {seconds:.0f} s") from None


def unspeakable(command: str) -> str:
    """Why this command cannot be passed to a program at all; "" if it can."""
    if "\0" in command:
        return "bash: the command contains a NUL character\n"
    size = len(command.encode(errors="replace"))
    return (
        f"bash: the command has {size} bytes, the limit is {MAX_COMMAND_BYTES}; write a file in"
        " parts\n"
        if size > MAX_COMMAND_BYTES
        else ""
    )


def memory_file(content: bytes, cleanup: contextlib.ExitStack) -> int:
    """A descriptor to read `content` from, that was never a file anywhere."""
    descriptor = os.memfd_create("rock", os.MFD_CLOEXEC)
    cleanup.callback(os.close, descriptor)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
