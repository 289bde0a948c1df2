"""Jobs and sessions of an embedded sandbox."""

import asyncio
import contextlib
import functools

from envs.rock.backend import Job, Session, choose_timeout, reason_not_executable, refused_result
from envs.rock.config import CommandResult
from envs.rock.embedded.channel import (
    REPLY_GRACE_SECONDS,
    HolderChannel,
    Reply,
    raise_error,
    reply_within,
)
from envs.rock.embedded.output import Output, memory_file
from envs.rock.errors import (
    AgentFault,
    SandboxClosedError,
    SandboxStartError,
    SessionEndedError,
)

MAX_ERROR_CHARACTERS = 500  # of what a command that did not start wrote


class EmbeddedJob(Job):
    """A command in a process of its own."""

    def __init__(
        self,
        channel: HolderChannel,
        identity: int,
        reply: asyncio.Future[Reply],
        outputs: list[Output],
        timeout: float,
    ):
        self._channel = channel
        self._identity = identity
        self._reply = reply
        self._outputs = outputs
        self._timeout = timeout
        self._result: CommandResult | None = None

    @property
    def running(self) -> bool:
        return not self._reply.done()

    async def wait(self) -> CommandResult:
        if self._result is None:
            seconds = self._timeout + REPLY_GRACE_SECONDS
            reply = await reply_within(self._reply, seconds, "no answer to a command")
            if self._result is None:  # else another waiter was first
                self._result = self._take_result(reply)
        return self._result

    async def wait_or_kill(self) -> CommandResult:
        """Wait for the end; kill the command if the waiting task is cancelled."""
        try:
            return await self.wait()
        except asyncio.CancelledError:
            self._channel.kill_without_reply(self._identity)
            raise

    async def interrupt(self) -> None:
        if self.running:
            await self._channel.request({"op": "interrupt", "target": self._identity})

    async def kill(self) -> CommandResult:
        self._channel.kill_without_reply(self._identity)
        return await self.wait()

    def _take_result(self, reply: Reply) -> CommandResult:
        try:
            return _to_result(reply, self._outputs)
        finally:
            for output in self._outputs:
                output.close()


class EmbeddedSession(Session):
    """A shell that the holder keeps running and tells one command after the other."""

    def __init__(
        self, channel: HolderChannel, name: int, outputs: list[Output], default_timeout: float
    ):
        self._channel = channel
        self._name = name
        self._outputs = outputs
        self._default_timeout = default_timeout
        self._turn = asyncio.Lock()
        self._current: int | None = None  # the running command's request number
        # The reply to a command whose call was cancelled: the shell takes none before its end.
        self._dying: asyncio.Future[Reply] | None = None
        for output in outputs:
            output.on_flood = self._kill_current
            output.on_piece = self._tell_piece
            output.pause()  # until a command runs

    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        if refusal := reason_not_executable(command):
            return refused_result(refusal)
        seconds = choose_timeout(timeout, self._default_timeout)
        async with self._turn:
            await self._wait_for_cancelled()
            if self.ended:
                raise SessionEndedError("the session's shell has ended; create another session")
            reply = await self._tell(command, seconds)
            if "error" in reply:
                await self.close()  # the shell may still be there
                raise SessionEndedError(f"{reply['error']}; create another session")
            self.ended = bool(reply["shell_ended"])
            return _to_result(reply, self._outputs)

    async def interrupt(self) -> None:
        if self._current is not None:
            await self._channel.request({"op": "interrupt", "target": self._current})

    async def close(self) -> None:
        if not self.ended:
            self.ended = True
            with contextlib.suppress(SandboxClosedError):
                await self._channel.request({"op": "close_session", "session": self._name})
        for output in self._outputs:
            output.close()

    async def _wait_for_cancelled(self) -> None:
        """Wait for the end of a command whose call was cancelled, and drop what it wrote."""
        if self._dying is None or self.ended:
            return
        for output in self._outputs:
            output.resume()
        try:
            reply = await reply_within(
                self._dying, REPLY_GRACE_SECONDS, "no end of a session's cancelled command"
            )
        finally:
            for output in self._outputs:
                output.pause()
        self._dying = None
        self.ended = bool(reply.get("shell_ended", "error" in reply))
        for output in self._outputs:
            output.take()

    async def _tell(self, command: str, timeout: float) -> Reply:
        """Give the shell a command and wait for the holder's report of its end."""
        with contextlib.ExitStack() as cleanup:
            text = memory_file(command.encode(errors="replace"), cleanup)
            request = {"op": "tell", "session": self._name, "timeout": timeout}
            self._current, reply = self._channel.send(request, (text,))
        for output in self._outputs:
            output.resume()
        try:
            return await reply_within(
                reply, timeout + REPLY_GRACE_SECONDS, "no answer to a session's command"
            )
        except asyncio.CancelledError:
            self._kill_current()
            self._dying = reply
            raise
        finally:
            self._current = None
            for output in self._outputs:
                output.pause()

    def _tell_piece(self, piece: bytes) -> None:
        if self.on_output is not None:
            self.on_output(piece)

    def _kill_current(self) -> None:
        if self._current is not None:
            self._channel.kill_without_reply(self._current)


def start_job(
    channel: HolderChannel, request: dict, contents: list[bytes], timeout: float
) -> EmbeddedJob:
    """Start a command, or a verifier's script.

    Args:
      channel: to the sandbox's holder.
      request: "op" and its arguments.
      contents: what the holder reads: the command's text, or the script and its files.
      timeout: seconds.
    """
    with contextlib.ExitStack() as cleanup:
        inputs = [memory_file(content, cleanup) for content in contents]
        outputs = [channel.open_output(), channel.open_output()]
        identity, reply = channel.send(
            request | {"timeout": timeout}, (*write_ends(outputs), *inputs)
        )
    for output in outputs:
        output.close_write_end()
        output.on_flood = functools.partial(channel.kill_without_reply, identity)
    return EmbeddedJob(channel, identity, reply, outputs, timeout)


async def start_session(
    channel: HolderChannel, environment: dict[str, str], default_timeout: float
) -> EmbeddedSession:
    """Start a shell.

    Raises:
      AgentFault: too many sessions are open.
      SandboxStartError: the holder could not start the shell.
    """
    outputs = [channel.open_output(), channel.open_output()]
    identity, reply = channel.send({"op": "session", "env": environment}, write_ends(outputs))
    for output in outputs:
        output.close_write_end()
    try:
        answer = await reply_within(reply, REPLY_GRACE_SECONDS, "no answer to a session's start")
        raise_error(answer, SandboxStartError)
    except BaseException:
        # The holder may still start it, under the number of its request.
        with contextlib.suppress(SandboxClosedError):
            channel.send({"op": "close_session", "session": identity})
        for output in outputs:
            output.close()
        raise
    return EmbeddedSession(channel, answer["session"], outputs, default_timeout)


def write_ends(outputs: list[Output]) -> tuple[int, ...]:
    """Return the descriptors that a command writes to."""
    return tuple(output.write_end for output in outputs if output.write_end is not None)


def _to_result(reply: Reply, outputs: list[Output]) -> CommandResult:
    """Combine the holder's report of a command's end with what the command wrote.

    Raises:
      AgentFault: what ran earlier kept the command from beginning, or it could not be killed.
      SandboxStartError: the command never began, for another reason.
    """
    stdout, stderr = (output.take() for output in outputs)
    if failure := reply.get("failure") or reply.get("error"):
        written = stderr.text.strip()[-MAX_ERROR_CHARACTERS:]
        kind = AgentFault if reply.get("agent") else SandboxStartError
        raise kind(f"{failure} {written}".strip())
    limits = tuple(reply["limits"])
    if stdout.flooded or stderr.flooded:
        # The kill was ours: say what the reason was.
        limits = tuple("output" if name == "killed" else name for name in limits)
    cut = (stdout.dropped, stderr.dropped)
    return CommandResult(
        stdout=stdout.text,
        stderr=stderr.text,
        exit_code=reply["exit_code"],
        timed_out="timeout" in limits,
        truncated=any(cut),
        seconds=reply["seconds"],
        limits_hit=limits,
        network_denials=reply["denials"],
        cut=cut,
    )
