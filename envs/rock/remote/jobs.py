"""Background commands and shells of a remote sandbox."""

import asyncio
import contextlib
from typing import Any

from envs.rock.backend import Job, Session, choose_timeout, reason_not_executable, refused_result
from envs.rock.config import CommandResult
from envs.rock.errors import SandboxClosedError, SandboxError, SessionEndedError
from envs.rock.remote.calls import ROUND_SECONDS, Calls, now, retry_until
from envs.rock.wire.codec import result_from_json
from envs.rock.wire.operations import GRACE_SECONDS


class RemoteJob(Job):
    """A command that runs in the background of a remote sandbox.

    Args:
      calls: the requests for its sandbox.
      name: its id at the service.
      timeout: its time limit in seconds.
    """

    def __init__(self, calls: Calls, name: str, timeout: float):
        self._calls = calls
        self._name = name
        self._timeout = timeout
        self._end = calls.start(self._await_end())

    async def _await_end(self) -> CommandResult:
        client = self._calls.client
        allowed = self._timeout + GRACE_SECONDS
        deadline = now() + allowed
        request = {"sandbox": self._calls.sandbox, "job": self._name, "wait": ROUND_SECONDS}
        while True:
            answer = await retry_until(deadline, lambda: client.call("wait", request))
            if answer is not None:
                return result_from_json(answer)
            if now() > deadline:
                raise SandboxError(f"no answer to a command within {allowed:.0f} s")

    @property
    def running(self) -> bool:
        return not self._end.done()

    async def wait(self) -> CommandResult:
        await asyncio.wait([self._end])
        if self._end.cancelled():
            raise SandboxClosedError("the sandbox was stopped before its job ended")
        return self._end.result()

    async def interrupt(self) -> None:
        await self._calls.change("interrupt", job=self._name)

    async def kill(self) -> CommandResult:
        if self.running:
            await self._calls.change("kill", job=self._name)
        return await self.wait()


class RemoteSession(Session):
    """A bash of a remote sandbox that keeps its state between commands.

    Args:
      calls: the requests for its sandbox.
      name: its id at the service.
      default_timeout: seconds for a command that names no limit.
    """

    def __init__(self, calls: Calls, name: str, default_timeout: float):
        self._calls = calls
        self._name = name
        self._default_timeout = default_timeout
        self._turn = asyncio.Lock()

    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        reason = reason_not_executable(command)
        if reason:
            return refused_result(reason)
        seconds = choose_timeout(timeout, self._default_timeout)
        request: dict[str, Any] = {
            "session": self._name,
            "command": command.encode(errors="replace").decode(),
            "timeout": seconds,
        }
        async with self._turn:
            if self.ended:
                raise SessionEndedError("the session's shell has ended; create another session")
            try:
                answer = await self._calls.run("run_in_session", request, seconds)
            except SandboxClosedError:
                self.ended = True
                raise
            self.ended = bool(answer.get("session_ended"))
            return result_from_json(answer)

    async def interrupt(self) -> None:
        if not self.ended:
            await self._calls.change("interrupt", session=self._name)

    async def close(self) -> None:
        if not self.ended:
            self.ended = True
            with contextlib.suppress(SandboxClosedError):
                await self._calls.change("close_session", session=self._name)
