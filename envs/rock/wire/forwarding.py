"""TCP connections between a sandbox and the outside: exposed ports and granted destinations."""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping

from envs.rock.config import Address, Denial
from envs.rock.doors import Door, OpenDoors
from envs.rock.errors import SandboxError

MAX_CONNECTIONS = 64  # of one sandbox at once, both directions together; doors apart
CONNECT_SECONDS = 20.0
PIECE_BYTES = 1 << 16


class Connections:
    """All forwarded connections of one sandbox; they run on the sandbox's event loop.

    Attributes:
      denials: granted names that turned out to lead to a private address. The guard in the sandbox
        cannot see this, since names are resolved outside.
    """

    def __init__(
        self,
        connect_inside: Callable[[int], Awaitable[socket.socket]],
        label: str,
        doors: Mapping[tuple[str, int], Door],
    ):
        """Prepare without any connection.

        Args:
          connect_inside: connects to a port on the sandbox's loopback; raises OSError or
            SandboxError if nothing listens there.
          label: of the sandbox, for its denials.
          doors: of the sandbox, by name and port.
        """
        self._connect_inside = connect_inside
        self._label = label
        self._doors = OpenDoors(doors)
        self._exposed_ports: list[asyncio.Server] = []
        self._relays: set[asyncio.Task] = set()
        self.denials: list[Denial] = []

    async def expose(self, port: int) -> Address:
        """Listen on a loopback address of this host and relay to a port of the sandbox."""

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._run(self._relay_inbound(port, reader, writer), writer.close)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._exposed_ports.append(server)
        return Address(*server.sockets[0].getsockname())

    def relay_outbound(
        self, name: str | None, address: str | None, port: int, inner: socket.socket
    ) -> None:
        """Connect a granted connection of the sandbox to its destination, or serve it at a door.

        Args:
          name: the host name that the sandbox asked for, if any.
          address: where to connect; None to resolve `name`.
          port: the destination's.
          inner: the sandbox's end; this takes it over.
        """
        if not self._doors.take(name, port, inner):
            self._run(self._relay_to(name, address, port, inner), inner.close)

    def close(self) -> None:
        """Stop listening and cut all connections."""
        for server in self._exposed_ports:
            server.close()
        for task in self._relays:
            task.cancel()
        self._doors.close()

    def _run(self, relay: Coroutine[object, object, None], refuse: Callable[[], None]) -> None:
        if len(self._relays) >= MAX_CONNECTIONS:
            relay.close()
            refuse()
            return
        task = asyncio.get_running_loop().create_task(relay)
        self._relays.add(task)
        task.add_done_callback(self._relays.discard)

    async def _relay_inbound(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # Where nothing listens inside, the caller sees its connection end.
        with contextlib.closing(writer), contextlib.suppress(OSError, SandboxError):
            inner = await self._connect_inside(port)
            inner_reader, inner_writer = await asyncio.open_connection(sock=inner)
            await _copy_both_ways(reader, writer, inner_reader, inner_writer)

    async def _relay_to(
        self, name: str | None, address: str | None, port: int, inner: socket.socket
    ) -> None:
        reader, writer = await asyncio.open_connection(sock=inner)
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.TimeoutError):
            place = address
            if not place and name:
                place = await self._public_address(name, port)
            if not place:
                return
            outer_reader, outer_writer = await asyncio.wait_for(
                asyncio.open_connection(place, port), CONNECT_SECONDS
            )
            await _copy_both_ways(reader, writer, outer_reader, outer_writer)

    async def _public_address(self, name: str, port: int) -> str | None:
        """Resolve a name; return None and record a denial if no public address is found.

        Private addresses are refused because the owner of a granted name could otherwise point it
        at our own network.
        """
        loop = asyncio.get_running_loop()
        found = await asyncio.wait_for(
            loop.getaddrinfo(name, port, type=socket.SOCK_STREAM), CONNECT_SECONDS
        )
        addresses = [str(where[0]) for *_, where in found]
        for address in addresses:
            if ipaddress.ip_address(address).is_global:
                return address
        destination = f"{name} ({addresses[0]}, private)"
        self.denials.append(Denial(time.time(), "tcp", destination, port, self._label))
        return None


async def _copy_both_ways(
    one_reader: asyncio.StreamReader,
    one_writer: asyncio.StreamWriter,
    other_reader: asyncio.StreamReader,
    other_writer: asyncio.StreamWriter,
) -> None:
    with contextlib.closing(other_writer):
        await asyncio.gather(_copy(one_reader, other_writer), _copy(other_reader, one_writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the reader's side closes, then half-close the writer's side."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
