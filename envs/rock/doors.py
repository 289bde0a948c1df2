"""Doors of a sandbox: names inside, such as model:80, behind which this process answers.

    async def answer(reader, writer): ...
    SandboxConfig(doors={"model:80": Door.streams(answer)})
    SandboxConfig(doors={"model:80": Door.http(aiohttp.web.Server(handler))})

A door is no way out. The connection that a program in the sandbox has made is itself handed to the
door's handler: nothing listens on the host, nothing is connected to, and whoever calls at a door of
this config is a program of its sandbox, which no token has to prove.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

MAX_CONNECTIONS = 64  # of one door at once
MAX_REFUSALS = 64  # told at once that a door is busy; beyond them connections are reset
REFUSAL_SECONDS = 2.0
MAX_REFUSED_BYTES = 1 << 18  # of a refused request that are read before it is closed
PIECE_BYTES = 1 << 16
HTTP_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)

Handler = Callable[[socket.socket], Awaitable[None]]
StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Door:
    """What happens to the connections of one door.

    Attributes:
      handle: serves one connection, on the sandbox's event loop; it owns the socket and closes it.
        It is cancelled when the sandbox ends.
      busy: sent to the connections beyond `max_connections`, which then end; no bytes by default.
      max_connections: served at once.
    """

    handle: Handler
    busy: bytes = b""
    max_connections: int = MAX_CONNECTIONS

    @classmethod
    def streams(
        cls, answer: StreamHandler, busy: bytes = b"", max_connections: int = MAX_CONNECTIONS
    ) -> Door:
        """Return a door whose handler takes a reader and a writer, as asyncio.start_server's."""

        async def handle(connection: socket.socket) -> None:
            reader, writer = await asyncio.open_connection(sock=connection)
            with contextlib.closing(writer), contextlib.suppress(ConnectionError):
                await answer(reader, writer)

        return cls(handle, busy, max_connections)

    @classmethod
    def http(cls, make_protocol: Callable[[], Any], max_connections: int = MAX_CONNECTIONS) -> Door:
        """Return a door that an HTTP server answers; a busy one answers 503.

        Args:
          make_protocol: makes the asyncio protocol of one connection; an aiohttp.web.Server is one.
          max_connections: served at once.
        """

        async def handle(connection: socket.socket) -> None:
            loop = asyncio.get_running_loop()
            ended = loop.create_future()
            watched = _Watched(make_protocol(), ended)
            transport, _ = await loop.connect_accepted_socket(lambda: watched, connection)
            try:
                await ended
            finally:
                transport.abort()

        return cls(handle, HTTP_BUSY, max_connections)


class _Watched(asyncio.Protocol):
    """A protocol that says when its connection has ended."""

    def __init__(self, inner: Any, ended: asyncio.Future[None]) -> None:
        self._inner = inner
        self._ended = ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._inner.connection_lost(error)
        if not self._ended.done():
            self._ended.set_result(None)


class OpenDoors:
    """The doors of one running sandbox; they belong to its event loop.

    Args:
      doors: by host name and port.
    """

    def __init__(self, doors: Mapping[tuple[str, int], Door]) -> None:
        self._doors = doors
        self._served: dict[tuple[str, int], set[asyncio.Task[None]]] = {key: set() for key in doors}
        self._refused: set[asyncio.Task[None]] = set()

    def take(self, name: str | None, port: int, connection: socket.socket) -> bool:
        """Serve a connection of the sandbox; return False where it is not to a door.

        Args:
          name: the host name that the sandbox asked for, if any.
          port: the port.
          connection: the sandbox's end, which a door takes over.
        """
        key = (name or "", port)
        door = self._doors.get(key)
        if door is None:
            return False
        connection.setblocking(False)
        served = self._served[key]
        if len(served) < door.max_connections:
            self._run(_serve(door, connection), served)
        elif len(self._refused) < MAX_REFUSALS:
            self._run(_refuse(door.busy, connection), self._refused)
        else:
            connection.close()
        return True

    def close(self) -> None:
        """Cut all connections."""
        for tasks in (*self._served.values(), self._refused):
            for task in tasks:
                task.cancel()

    def _run(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve(door: Door, connection: socket.socket) -> None:
    """Let a door's handler serve a connection; its errors are its connection's end."""
    try:
        with contextlib.suppress(ConnectionError):
            await door.handle(connection)
    except Exception as error:
        context = {"message": "the handler of a sandbox's door failed", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
    finally:
        connection.close()


async def _refuse(busy: bytes, connection: socket.socket) -> None:
    """Tell a connection that the door is busy, and end it without a reset.

    What it sends is read for a while: a close with unread bytes would discard the answer.
    """
    loop = asyncio.get_running_loop()
    with connection, contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(REFUSAL_SECONDS):
            await loop.sock_sendall(connection, busy)
            connection.shutdown(socket.SHUT_WR)
            left = MAX_REFUSED_BYTES
            while left > 0 and (piece := await loop.sock_recv(connection, PIECE_BYTES)):
                left -= len(piece)
