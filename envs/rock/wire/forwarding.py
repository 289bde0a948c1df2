"""The outer ends of a sandbox's connections: doors through which this host reaches it, and the ways
out that its egress policy grants.
"""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine

from envs.rock.config import Address, Denial
from envs.rock.errors import SandboxError

MAX_CONNECTIONS = 64  # of one sandbox at once, in and out
CONNECT_SECONDS = 20.0
PIECE_BYTES = 1 << 16


class Ways:
    """All connections of one sandbox that lead in or out, on the event loop of the sandbox."""

    def __init__(self, connect_inside: Callable[[int], Awaitable[socket.socket]], label: str):
        """connect_inside: makes a connection to a port on the sandbox's loopback; OSError or
        SandboxError if nobody listens.
        """
        self._connect_inside, self._label = connect_inside, label
        self._doors: list[asyncio.Server] = []
        self._passing: set[asyncio.Task] = set()
        self.denials: list[
            Denial
        ] = []  # what the guard inside let through, and the resolver's answer forbids

    async def expose(self, port: int) -> Address:
        """A door on this host's loopback."""
        door = await asyncio.start_server(
            lambda reader, writer: self._keep(self._pass_in(port, reader, writer), writer.close),
            "127.0.0.1",
            0,
        )
        self._doors.append(door)
        return Address(*door.sockets[0].getsockname())

    def let_out(
        self, name: str | None, address: str | None, port: int, inner: socket.socket
    ) -> None:
        """Go on outside with a connection that the policy grants: to `address`, else to where
        `name` leads.
        """
        self._keep(self._pass_out(name, address, port, inner), inner.close)

    def close(self) -> None:
        for door in self._doors:
            door.close()
        for task in self._passing:
            task.cancel()

    def _keep(self, passing: Coroutine[object, object, None], refuse: Callable[[], None]) -> None:
        if len(self._passing) >= MAX_CONNECTIONS:
            passing.close()
            refuse()
            return
        task = asyncio.get_running_loop().create_task(passing)
        self._passing.add(task)
        task.add_done_callback(self._passing.discard)

    async def _pass_in(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with (
            contextlib.closing(writer),
            contextlib.suppress(OSError, SandboxError),
        ):  # nobody listens: the caller sees the end
            await _join(
                reader,
                writer,
                *await asyncio.open_connection(sock=await self._connect_inside(port)),
            )

    async def _pass_out(
        self, name: str | None, address: str | None, port: int, inner: socket.socket
    ) -> None:
        reader, writer = await asyncio.open_connection(sock=inner)
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError):
            place = address or await self._public_address(name, port)
            if place:
                await _join(
                    reader,
                    writer,
                    *await asyncio.wait_for(asyncio.open_connection(place, port), CONNECT_SECONDS),
                )

    async def _public_address(self, name: str, port: int) -> str | None:
        """Where a name leads.

        None, and a denial, where that is a private address: whoever owns a granted name must not
        reach our own network by it.
        """
        loop = asyncio.get_running_loop()
        found = await asyncio.wait_for(
            loop.getaddrinfo(name, port, type=socket.SOCK_STREAM), CONNECT_SECONDS
        )
        for *_, where in found:
            if ipaddress.ip_address(where[0]).is_global:
                return where[0]
        self.denials.append(
            Denial(time.time(), "tcp", f"{name} ({found[0][4][0]}, private)", port, self._label)
        )
        return None


async def _join(
    one_reader: asyncio.StreamReader,
    one_writer: asyncio.StreamWriter,
    other_reader: asyncio.StreamReader,
    other_writer: asyncio.StreamWriter,
) -> None:
    with contextlib.closing(other_writer):
        await asyncio.gather(_copy(one_reader, other_writer), _copy(other_reader, one_writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one ends, whose end is told to the other."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
