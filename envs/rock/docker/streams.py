"""Streams of the Docker engine: the input and output of one program in a container.

The event loop reads them itself; only opening one goes through the SDK.
"""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any

from envs.rock.docker.engine import CALL_SECONDS, Engine
from envs.rock.errors import SandboxClosedError

STDOUT, STDERR = 1, 2
READ_BYTES = 1 << 16
HEADER_BYTES = 8  # of a frame: the stream's number, three zeros, the length
MAX_POLL_SECONDS = 0.1

Frames = AsyncGenerator[tuple[int, bytes], None]


class Stream:
    """A hijacked HTTP connection of the engine.

    What is written to it is the standard input of a program; frames of the program's stdout and
    stderr come back.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, engine: Engine, call: Callable[[], Any]) -> "Stream":
        """Open a stream by a call of the SDK that returns a hijacked connection."""
        sock, early = await engine.call(functools.partial(_take_socket, call))
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        reader.feed_data(early)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def frames(self) -> Frames:
        """Yield (STDOUT or STDERR, bytes) until the end."""
        while True:
            try:
                header = await self._reader.readexactly(HEADER_BYTES)
                length = int.from_bytes(header[4:], "big")
                yield header[0], await self._reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return

    async def drain(self) -> None:
        """Read to the end and discard everything."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(READ_BYTES):
                pass

    async def send(self, data: bytes, more: bool = False) -> None:
        """Write to the program's input, and end it unless `more` will follow."""
        with contextlib.suppress(ConnectionError):
            self._writer.write(data)
            await self._writer.drain()
            if not more:
                self._writer.write_eof()

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


class Exec:
    """One program that was started in a container by an exec of the engine.

    Attributes:
      pid: its process id in the container: 0 until its first frame has arrived, -1 if the program
        did not report one.
    """

    def __init__(self, engine: Engine, name: str, stream: Stream, container_ended: asyncio.Future):
        self._engine = engine
        self._name = name
        self._stream = stream
        self._container_ended = container_ended
        self.pid = 0

    async def frames(self) -> Frames:
        """Yield (STDOUT or STDERR, bytes) until the end; the line with its pid is taken out."""
        first = b""
        async for number, piece in self._stream.frames():
            if not self.pid and number == STDOUT:
                first += piece
                line, newline, piece = first.partition(b"\n")
                if not newline:
                    continue
                self.pid = int(line) if line.isdigit() else -1
            if piece:
                yield number, piece

    async def send(self, data: bytes, more: bool = False) -> None:
        """Write to its standard input, and end it unless `more` will follow."""
        await self._stream.send(data, more)

    async def drain(self) -> None:
        """Read its output to the end and discard everything."""
        await self._stream.drain()

    async def exit_code(self, seconds: float = CALL_SECONDS) -> int:
        """Wait for the exit code, which the engine knows shortly after the streams have ended.

        Raises:
          SandboxClosedError: the container ended too.
          TimeoutError: it is still running after `seconds`.
        """
        inspect = self._engine.client.exec_inspect
        pause = 0.005
        async with asyncio.timeout(seconds):
            state = await self._engine.call(inspect, self._name)
            while state["Running"] or state["ExitCode"] is None:
                if self._container_ended.done():
                    raise SandboxClosedError("the sandbox ended before its command")
                await asyncio.sleep(pause)
                pause = min(MAX_POLL_SECONDS, 2 * pause)
                state = await self._engine.call(inspect, self._name)
        return state["ExitCode"]

    def close(self) -> None:
        """Close its streams; the program itself goes on."""
        self._stream.close()


def _take_socket(call: Callable[[], Any]) -> tuple[socket.socket, bytes]:
    """Return the socket of a hijacked connection, and the bytes that were read from it already.

    http.client reads the headers through a buffer, which may hold the first bytes of the stream.
    """
    raw = call()
    response = raw._response
    taken = socket.socket(fileno=os.dup(raw.fileno()))
    taken.setblocking(False)  # the flag belongs to the connection, so to both descriptors
    raw._sock.setblocking(False)
    buffered = response.raw._fp.fp
    early = buffered.read1(READ_BYTES) if buffered.peek(1) else b""
    response.close()
    return taken, early
