"""Ports of a Docker sandbox that this host can reach."""

import asyncio
import contextlib

from envs.rock.config import Address
from envs.rock.docker import scripts
from envs.rock.docker.container import Container
from envs.rock.docker.streams import STDOUT, Exec
from envs.rock.errors import SandboxError
from envs.rock.transfer import PIECE_BYTES

MAX_CONNECTIONS = 16  # to one port at once: each takes a process from those reserved for us


class ExposedPorts:
    """Loopback addresses of this host that lead to ports of one container.

    Each connection is an exec that joins the container's loopback (by bash's /dev/tcp) to it, so a
    client that closes only its sending half is not noticed.
    """

    def __init__(self, container: Container):
        self._container = container
        self._servers: list[asyncio.Server] = []

    async def expose(self, port: int) -> Address:
        """Listen on a new address and forward to `port`.

        Raises:
          SandboxError: the image has no bash.
        """
        if not self._container.shell:
            raise SandboxError(
                f"image {self._container.config.image} has no bash, which forwarding a port needs"
            )
        free = asyncio.Semaphore(MAX_CONNECTIONS)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, SandboxError), contextlib.closing(writer):
                async with free:
                    await self._forward(port, reader, writer)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._servers.append(server)
        return Address(*server.sockets[0].getsockname())

    def close(self) -> None:
        """Stop listening."""
        for server in self._servers:
            server.close()

    async def _forward(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        exec_ = await self._container.enter(
            scripts.CONNECT,
            str(port),
            user=scripts.KEEPER,
            stdin=True,
            shell=f"{scripts.PLACE}/bash",
        )
        sending = asyncio.create_task(_send_all(reader, exec_))
        try:
            async for number, piece in exec_.frames():
                if number == STDOUT:
                    writer.write(piece)
                    await writer.drain()
        finally:
            sending.cancel()
            exec_.close()


async def _send_all(reader: asyncio.StreamReader, exec_: Exec) -> None:
    while piece := await reader.read(PIECE_BYTES):
        await exec_.send(piece, more=True)
