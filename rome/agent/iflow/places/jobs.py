"""A command that runs on its own, here or in a sandbox; what it writes goes to a file."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rome.agent.iflow.places.output import decode

# Returns the size of the output's file, and its end from a place on, at most so many bytes.
ReadEnd = Callable[[int, int], Awaitable[tuple[int, bytes]]]


class BackgroundJob:
    """A background command.

    Args:
      id: of it.
      command: that was started, for people.
      path: of the file with its output, where the tools work.
      end: waits for its end and returns its status; None where that is not known.
      kill: ends it and all that it started.
      read_end: reads the file.
    """

    def __init__(
        self,
        id: str,
        command: str,
        path: str,
        *,
        end: Awaitable[int | None],
        kill: Callable[[], Awaitable[None]],
        read_end: ReadEnd,
    ) -> None:
        self.id = id
        self.command = command
        self.path = path
        self._ended = asyncio.ensure_future(end)
        self._kill = kill
        self._read_end = read_end
        self._place = 0  # up to which the file was read
        self._was_killed = False

    @property
    def is_running(self) -> bool:
        """Return whether it still runs."""
        return not self._ended.done()

    @property
    def exit_code(self) -> int | None:
        """Return its status; None while it runs, or where it was killed."""
        return None if self._was_killed or self.is_running else self._ended.result()

    async def read(self, limit: int = 30_000) -> str:
        """Return the output since the last reading, at most so many characters of its end."""
        before = self._place
        self._place, data = await self._read_end(before, 4 * limit)
        text = decode(data)
        if self._place - before > len(data) or len(text) > limit:
            return f"[... more output before; the whole is in {self.path} ...]\n{text[-limit:]}"
        return text

    async def wait(self) -> int | None:
        """Wait for its end and return its `exit_code`."""
        await asyncio.shield(self._ended)
        return self.exit_code

    async def kill(self) -> None:
        """End it and all that it started."""
        self._was_killed = self._was_killed or self.is_running
        await self._kill()
        await self._ended
