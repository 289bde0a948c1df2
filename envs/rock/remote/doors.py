"""The client's half of a remote sandbox's doors: its handlers answer what the worker accepts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping

from envs.rock.doors import Door, OpenDoors
from envs.rock.errors import SandboxError
from envs.rock.remote.calls import Calls
from envs.rock.wire.client import Pipe, StreamPipe, relay
from envs.rock.wire.door_queue import ACCEPTED

WAITING_PIPES = 2  # to each door: one is there while another is opened
RETRY_SECONDS = 1.0


class RemoteDoors:
    """The doors of one remote sandbox; they belong to its event loop.

    Args:
      calls: to the sandbox.
      doors: by host name and port.
    """

    def __init__(self, calls: Calls, doors: Mapping[tuple[str, int], Door]) -> None:
        self._calls = calls
        self._open = OpenDoors(doors)
        self._tasks = {
            asyncio.ensure_future(self._answer(name, port))
            for name, port in doors
            for _ in range(WAITING_PIPES)
        }

    def close(self) -> None:
        """Stop answering and cut all connections."""
        for task in self._tasks:
            task.cancel()
        self._open.close()

    async def _answer(self, name: str, port: int) -> None:
        """Serve one connection after the other of a door, over broken connections to the admin."""
        request = {"sandbox": self._calls.sandbox, "door": f"{name}:{port}"}
        while self._calls.alive:
            try:
                pipe = await self._calls.client.connect(request)
            except SandboxError:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                is_accepted = await pipe.read() == ACCEPTED
            except BaseException:
                pipe.close()
                raise
            if is_accepted:
                self._serve(name, port, pipe)
            else:
                pipe.close()
                await asyncio.sleep(RETRY_SECONDS)

    def _serve(self, name: str, port: int, pipe: Pipe) -> None:
        ours, theirs = socket.socketpair()
        self._open.take(name, port, theirs)
        task = asyncio.ensure_future(_relay(ours, pipe))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _relay(ours: socket.socket, pipe: Pipe) -> None:
    with contextlib.closing(ours):
        reader, writer = await asyncio.open_connection(sock=ours)
        await relay(StreamPipe(reader, writer), pipe)
