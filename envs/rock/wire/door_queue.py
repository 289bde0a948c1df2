"""The worker's half of a remote sandbox's door: connections that wait until the client takes them.

The client keeps a few WebSockets open to each door. The connection that a program in the sandbox
makes becomes the pipe of one of them, which begins with one byte: so the client knows that somebody
is there, also where its own side speaks first.
"""

from __future__ import annotations

import asyncio
import socket

from envs.rock.doors import Door
from envs.rock.wire.client import StreamPipe

ACCEPTED = b"\1"  # the first message of a door's pipe


class DoorQueue:
    """The connections to one door that no client has taken yet.

    Attributes:
      door: puts connections into the queue; each counts as served until its pipe has ended.
    """

    def __init__(self) -> None:
        self.door = Door(self._handle)
        self._waiting: asyncio.Queue[AcceptedConnection] = asyncio.Queue()

    def accept(self) -> DoorPipe:
        """Return a pipe that becomes the next connection."""
        return DoorPipe(self._waiting)

    async def _handle(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        accepted = AcceptedConnection(StreamPipe(reader, writer))
        self._waiting.put_nowait(accepted)
        try:
            await accepted.ended.wait()
        finally:
            accepted.pipe.close()
            accepted.ended.set()


class AcceptedConnection:
    """A connection from the sandbox, and whether it has ended."""

    def __init__(self, pipe: StreamPipe) -> None:
        self.pipe = pipe
        self.ended = asyncio.Event()


class DoorPipe:
    """A pipe that waits for a connection; see Pipe."""

    def __init__(self, waiting: asyncio.Queue[AcceptedConnection]) -> None:
        self._waiting = waiting
        self._accepted: AcceptedConnection | None = None
        self._accepting: asyncio.Task[AcceptedConnection] | None = None
        self._is_given_up = False

    async def read(self) -> bytes:
        """Return ACCEPTED when a connection is there, then its bytes; b"" where nobody waits."""
        if self._accepted is not None:
            return await self._accepted.pipe.read()
        while not self._is_given_up:
            self._accepting = asyncio.ensure_future(self._waiting.get())
            await asyncio.wait({self._accepting})
            if self._accepting.cancelled():
                break
            accepted = self._accepting.result()
            if not accepted.ended.is_set():
                self._accepted = accepted
                return ACCEPTED
        return b""

    async def write(self, data: bytes) -> None:
        if self._accepted is not None:
            await self._accepted.pipe.write(data)

    async def write_eof(self) -> None:
        """End the client's direction; before a connection is there, the client has gone."""
        if self._accepted is None:
            self.close()
        else:
            await self._accepted.pipe.write_eof()

    def close(self) -> None:
        self._is_given_up = True
        if self._accepting is not None:
            self._accepting.cancel()
        if self._accepted is not None:
            self._accepted.ended.set()
