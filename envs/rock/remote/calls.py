"""Requests for one remote sandbox, which survive broken connections.

A request that takes long carries a key and is waited for in rounds, so that a connection that
breaks costs one round and never runs a command twice.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from envs.rock.errors import SandboxClosedError, SandboxError
from envs.rock.wire.client import Client
from envs.rock.wire.errors import Disconnected
from envs.rock.wire.operations import GRACE_SECONDS

T = TypeVar("T")
ROUND_SECONDS = 20.0  # that one request waits at most
RETRY_SECONDS = 0.2
# A request that may be lost is sent again only while the service would still know its end
# (service.held.KEPT_SECONDS).
RESEND_SECONDS = 10.0
_END_CODES = ("ended", "worker_lost", "unknown_sandbox")  # errors that mean: no such sandbox


class Calls:
    """The requests for one running sandbox, and whether it is still known to run.

    Args:
      client: the connection to its admin.
      sandbox: its id.
    """

    def __init__(self, client: Client, sandbox: str):
        self.client = client
        self.sandbox = sandbox
        self.alive = True
        self._background: set[asyncio.Task[Any]] = set()

    def mark_ended(self) -> None:
        """Note that the sandbox does not run any more."""
        self.alive = False

    def check_alive(self) -> None:
        """Raise SandboxClosedError if the sandbox does not run any more."""
        if not self.alive:
            raise SandboxClosedError("the sandbox is not running: it was stopped, or was lost")

    async def close(self) -> None:
        """Note the end and cancel all tasks of `start`."""
        self.alive = False
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that ends with the sandbox; an error that is never awaited is dropped."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send a request that is answered at once."""
        self.check_alive()
        with self._noticing_end():
            return await self.client.ask(op, {"sandbox": self.sandbox, **arguments})

    async def run(
        self,
        op: str,
        arguments: Mapping[str, Any],
        seconds: float,
        files: Mapping[str, bytes] | None = None,
    ) -> dict[str, Any]:
        """Send a request that takes up to `seconds`; when cancelled, cancel it at the service too.

        Args:
          op: a key of wire.operations.IN_SANDBOX that accepts `call`.
          arguments: members of the request.
          seconds: the request's own time limit.
          files: content by name, for an operation that takes files.

        Raises:
          SandboxError: the service reported an error, did not answer within GRACE_SECONDS beyond
            the limit, or the connection broke and it is unknown whether the request was carried
            out.
        """
        self.check_alive()
        call = secrets.token_hex(8)
        try:
            with self._noticing_end():
                return await self._run_in_rounds(op, arguments, seconds, files, call)
        except asyncio.CancelledError:
            self.start(self.client.call("cancel", {"sandbox": self.sandbox, "call": call}))
            raise

    async def _run_in_rounds(
        self,
        op: str,
        arguments: Mapping[str, Any],
        seconds: float,
        files: Mapping[str, bytes] | None,
        call: str,
    ) -> dict[str, Any]:
        sent = now()
        deadline = sent + seconds + GRACE_SECONDS
        one_round = {"sandbox": self.sandbox, "call": call, "wait": ROUND_SECONDS}
        has_arrived = False
        while now() < deadline:
            try:
                if has_arrived:
                    answer = await self.client.call("wait", one_round)
                else:
                    answer = await self.client.call(op, {**arguments, **one_round}, files)
            except Disconnected as error:
                if not has_arrived:
                    has_arrived = await self._has_arrived(one_round, deadline)
                if not has_arrived and now() > sent + RESEND_SECONDS:
                    raise SandboxError(
                        f"the connection broke under {op}, and whether it was carried out is not"
                        f" known: {error}"
                    ) from error
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if answer is not None:
                return answer
            has_arrived = True
        raise SandboxError(f"no answer to {op} within {seconds + GRACE_SECONDS:.0f} s")

    async def _has_arrived(self, one_round: Mapping[str, Any], deadline: float) -> bool:
        """Return whether the service knows the call of a request whose connection broke."""
        request = {**one_round, "wait": 0}
        try:
            await retry_until(deadline, lambda: self.client.call("wait", request))
        except SandboxError as error:
            if error.code != "not_found":
                raise
            return False
        return True

    @contextlib.contextmanager
    def _noticing_end(self) -> Iterator[None]:
        try:
            yield
        except SandboxClosedError as error:
            if error.code in _END_CODES:
                self.alive = False
            raise


async def retry_until(deadline: float, request: Callable[[], Awaitable[T]]) -> T:
    """Await `request()` until an answer comes; it may be carried out more than once.

    Raises:
      Disconnected: the last attempt's, when the deadline (see `now`) has passed.
    """
    while True:
        try:
            return await request()
        except Disconnected:
            if now() > deadline:
                raise
        await asyncio.sleep(RETRY_SECONDS)


def now() -> float:
    """Return the running event loop's time in seconds."""
    return asyncio.get_running_loop().time()
