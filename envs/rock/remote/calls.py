"""Requests for one remote sandbox, which survive broken connections and proxies without an answer.

A request that changes something carries a key, by which the service knows it when it comes again:
it is carried out once. It is waited for in rounds: a connection that breaks costs one round.
Requests that only look are sent again as they are.
"""

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
)
from typing import IO, Any, TypeVar

from envs.rock.errors import SandboxClosedError, SandboxError
from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.client import Client
from envs.rock.wire.errors import Disconnected
from envs.rock.wire.operations import GRACE_SECONDS, IN_SANDBOX

T = TypeVar("T")
ROUND_SECONDS = 20.0  # that one request waits at most
RETRY_SECONDS = 0.2
# A request that may be lost is sent again only while the service would still know its end
# (service.held.KEPT_SECONDS).
RESEND_SECONDS = 10.0
MAX_SPOOLED_BYTES = 8 << 20  # of a file that is sent, kept in memory
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
        """Send a request that only looks, until it is answered."""
        self.check_alive()
        request = {"sandbox": self.sandbox, **arguments}
        with self._noticing_end():
            return await retry_until(now() + RESEND_SECONDS, lambda: self.client.ask(op, request))

    async def change(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send a request that is carried out at once, and once."""
        return await self.run(op, arguments, 0.0)

    async def read(self, op: str, **arguments: Any) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file; where the connection breaks, the rest is asked for."""
        self.check_alive()
        received = 0
        deadline = now() + RESEND_SECONDS
        while True:
            request = {"sandbox": self.sandbox, **arguments}
            if received:
                request["offset"] = received
            try:
                with self._noticing_end():
                    async with contextlib.aclosing(self.client.read(op, request)) as pieces:
                        async for piece in pieces:
                            received += len(piece)
                            yield piece
                            deadline = now() + RESEND_SECONDS
                return
            except Disconnected:
                if now() > deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def read_archive(self, op: str, **arguments: Any) -> AsyncGenerator[bytes, None]:
        """Yield an archive once it is there whole.

        The service makes it anew for each request, so one that broke off cannot be continued.
        """
        self.check_alive()
        request = {"sandbox": self.sandbox, **arguments}
        with tempfile.SpooledTemporaryFile(MAX_SPOOLED_BYTES, prefix="rock-") as kept:

            async def receive() -> None:
                kept.seek(0)
                kept.truncate()
                with self._noticing_end():
                    async with contextlib.aclosing(self.client.read(op, request)) as pieces:
                        async for piece in pieces:
                            await asyncio.to_thread(kept.write, piece)

            await retry_until(now() + RESEND_SECONDS, receive)
            kept.seek(0)
            while piece := await asyncio.to_thread(kept.read, PIECE_BYTES):
                yield piece

    async def write(
        self, op: str, pieces: AsyncIterator[bytes], **arguments: Any
    ) -> dict[str, Any]:
        """Send bytes, again from the beginning where the connection breaks; they count once.

        What was read from `pieces` is kept for that in a file without a name.
        """
        self.check_alive()
        request = {"sandbox": self.sandbox, **arguments, "call": secrets.token_hex(8)}
        with tempfile.SpooledTemporaryFile(MAX_SPOOLED_BYTES, prefix="rock-") as kept:
            source = aiter(pieces)
            deadline = None
            while True:
                try:
                    with self._noticing_end():
                        return await self.client.write(op, request, _again(kept, source))
                except Disconnected:
                    deadline = deadline or now() + RESEND_SECONDS
                    if now() > deadline:
                        raise
                await asyncio.sleep(RETRY_SECONDS)

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
            request = {"sandbox": self.sandbox, "call": call}
            self.start(
                retry_until(now() + RESEND_SECONDS, lambda: self.client.call("cancel", request))
            )
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
            has_arrived = op in IN_SANDBOX  # what the admin does itself is asked for by itself
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


async def _again(kept: IO[bytes], source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what was kept of a source, then the rest of it, which is kept too."""
    kept.seek(0)
    while piece := await asyncio.to_thread(kept.read, PIECE_BYTES):
        yield piece
    async for piece in source:
        await asyncio.to_thread(kept.write, piece)
        yield piece


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
