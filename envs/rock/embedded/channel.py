"""The connection of this process to one sandbox's holder (host/holder.py)."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from envs.rock.embedded.output import Output
from envs.rock.errors import AgentFault, SandboxClosedError, SandboxError
from envs.rock.host.messages import parse, receive, send

STOP_SECONDS = 30.0  # after which a holder that was told to end is killed
KILLED_SECONDS = 15.0  # in which the zygote removes what a killed one left
REPLY_GRACE_SECONDS = 30.0  # a holder must answer within this beyond a command's own time limit
_NO_REQUEST = -1  # the empty message, which says that the holder ended, has no number
_READY = 0  # the number of the message that a holder sends when the sandbox stands

Reply = dict[str, Any]
# Takes over a granted connection: name, address, port and the sandbox's end of it.
Relay = Callable[[str | None, str | None, int, socket.socket], None]


class HolderChannel:
    """Numbered requests to a holder and its replies, on one event loop."""

    def __init__(self, connection: socket.socket, max_output_bytes: int, relay: Relay):
        self._socket = connection
        self._max_output_bytes = max_output_bytes
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Reply] = self._loop.create_future()
        self._replies = {_READY: self._ready}
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._last_id = _READY
        self._outputs: list[Output] = []
        self._loop.add_reader(self._socket, self._receive)

    @property
    def alive(self) -> bool:
        """Whether the channel is open and the holder is not known to have ended."""
        return self._socket.fileno() >= 0 and not self._ended.done()

    async def wait_ready(self, timeout: float) -> Reply:
        """Wait for the holder's first message, which says whether the sandbox stands."""
        return await reply_within(self._ready, timeout, "the sandbox did not start")

    def send(self, request: dict, descriptors: tuple[int, ...] = ()) -> tuple[int, asyncio.Future]:
        """Send a request; return its number and the future of its reply.

        Raises:
          SandboxClosedError: the channel is closed or the holder is gone.
          SandboxError: called from another event loop than the sandbox's.
        """
        self.check_open()
        self._last_id += 1
        identity = self._last_id
        reply: asyncio.Future[Reply] = self._loop.create_future()
        reply.add_done_callback(_retrieve_exception)
        try:
            send(self._socket, request | {"id": identity}, descriptors)
        except OSError as error:
            raise SandboxClosedError(f"the sandbox's process is gone: {error}") from error
        self._replies[identity] = reply
        return identity, reply

    async def request(
        self,
        request: dict,
        descriptors: tuple[int, ...] = (),
        timeout: float = REPLY_GRACE_SECONDS,
    ) -> Reply:
        """Send a request and wait for its reply."""
        _, reply = self.send(request, descriptors)
        try:
            return await reply_within(reply, timeout, f"no answer to {request['op']}")
        except BaseException:
            _discard(reply)
            raise

    def kill_without_reply(self, identity: int) -> None:
        """Kill a command by its request's number without waiting for the reply."""
        with contextlib.suppress(SandboxClosedError):
            _, reply = self.send({"op": "end", "target": identity})
            reply.cancel()

    def open_output(self) -> Output:
        """Return a new output stream, which is closed with the channel at the latest."""
        output = Output(self._loop, self._max_output_bytes)
        self._outputs = [one for one in self._outputs if not one.closed]
        self._outputs.append(output)
        return output

    def check_open(self) -> None:
        """Raise SandboxClosedError or SandboxError if no request can be sent from here."""
        if not self.alive:
            raise not_running()
        if asyncio.get_running_loop() is not self._loop:
            raise SandboxError(
                "a sandbox is used from the event loop that started it; from elsewhere use"
                " envs.rock.sync.run"
            )

    async def shut_down(self, kill: Callable[[], Awaitable[None]]) -> None:
        """Ask the holder to end the sandbox, wait until nothing is left of it, and close.

        Args:
          kill: called when the holder does not end within STOP_SECONDS, to kill it.
        """
        if self._socket.fileno() < 0:
            return
        # The holder reads the end of the stream. Its own end closes when the sandbox is gone.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        try:
            try:
                await self._wait_for_end(STOP_SECONDS)
            except SandboxError:
                await kill()
                await self._wait_for_end(KILLED_SECONDS)
        finally:
            self.close()

    async def _wait_for_end(self, seconds: float) -> None:
        await reply_within(self._ended, seconds, "the sandbox did not end")

    def close(self) -> None:
        """Close the channel. Pending requests fail with SandboxClosedError."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        self._fail_pending()
        for output in self._outputs:
            output.close()

    def _receive(self) -> None:
        """Handle one message of the holder; the event loop calls this when one has arrived."""
        try:
            data, descriptors = receive(self._socket)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        reply: Reply = parse(data) | {"descriptors": descriptors}
        if "way" in reply:
            if descriptors:  # else this process had no free descriptor left
                name, address, port = reply["way"]
                self._relay(name, address, port, socket.socket(fileno=descriptors[0]))
            return
        waiting = self._replies.pop(reply.get("id", _NO_REQUEST), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if not data:
            self._loop.remove_reader(self._socket)
            self._fail_pending()

    def _fail_pending(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(
                    SandboxClosedError("the sandbox ended in the middle of a request")
                )
                # At once: callbacks do not run any more where the event loop is about to close.
                _retrieve_exception(reply)


def not_running() -> SandboxClosedError:
    """Return the error of a sandbox that does not run."""
    return SandboxClosedError(
        "the sandbox is not running: it was not started, was stopped, or its process died"
    )


def raise_error(reply: Reply, otherwise: type[SandboxError], what: str = "") -> None:
    """Raise the error that a holder reports, if it does.

    Args:
      reply: the holder's.
      otherwise: the type of an error that nothing in the sandbox can have caused.
      what: put before the holder's words.

    Raises:
      AgentFault: what ran in the sandbox can be the cause.
    """
    if "error" in reply:
        kind = AgentFault if reply.get("agent") else otherwise
        raise kind(f"{what}{reply['error']}")


async def reply_within(reply: asyncio.Future, seconds: float, what: str) -> Any:
    """Wait for a reply, which is not cancelled with the one who waits.

    Raises:
      SandboxError: "{what} within {seconds} s" if it does not come.
    """
    try:
        # Not wait_for, which loses a cancellation that arrives together with the reply.
        async with asyncio.timeout(seconds):
            return await asyncio.shield(reply)
    except TimeoutError:
        if reply.done() and not reply.cancelled():  # this loop was busy meanwhile, not the holder
            return reply.result()
        raise SandboxError(f"{what} within {seconds:.0f} s") from None


def _discard(reply: asyncio.Future[Reply]) -> None:
    """Give up a reply that nobody waits for, with the descriptors in it if it is there already."""
    if not reply.cancel() and not reply.cancelled() and reply.exception() is None:
        for descriptor in reply.result()["descriptors"]:
            os.close(descriptor)


def _retrieve_exception(reply: asyncio.Future) -> None:
    """Mark an exception as seen: asyncio would log it when nobody waits for the reply."""
    if not reply.cancelled():
        reply.exception()
