"""What the remote sandboxes of one event loop share at one admin: the connections, and the signs
that they are still wanted.
"""

import asyncio
import contextlib
import weakref
from collections.abc import Callable

from envs.rock.errors import SandboxError
from envs.rock.wire.client import Client

KEEP_ALIVE_SECONDS = 30.0
_lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], "Line"]] = (
    weakref.WeakKeyDictionary()
)


class Line:
    """`take` one, and `release` it as often: the last one closes it."""

    def __init__(self, key: tuple[str, str]):
        self.client = Client(*key)
        self._key, self._holders = key, 0
        self._wanted: dict[
            str, Callable[[], None]
        ] = {}  # by the sandbox's id: whom to tell that it is gone
        self._signs: asyncio.Task | None = None

    @classmethod
    def take(cls, url: str, token: str) -> "Line":
        """In the event loop that will use it."""
        here = _lines.setdefault(asyncio.get_running_loop(), {})
        line = here.get((url, token)) or here.setdefault((url, token), cls((url, token)))
        line._holders += 1
        return line

    async def release(self) -> None:
        self._holders -= 1
        if self._holders:
            return
        _lines[asyncio.get_running_loop()].pop(self._key, None)
        if self._signs:
            self._signs.cancel()
        await self.client.close()

    def keep_alive(self, sandbox: str, gone: Callable[[], None]) -> None:
        """From now on the admin hears that it is wanted. gone: called once if the admin does not
        know it any more.
        """
        self._wanted[sandbox] = gone
        self._signs = self._signs or asyncio.ensure_future(self._give_signs())

    def let_go(self, sandbox: str) -> None:
        self._wanted.pop(sandbox, None)

    async def _give_signs(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if not self._wanted:
                continue
            with contextlib.suppress(SandboxError):  # the next one may get through
                answer = await self.client.call("keep_alive", {"ids": list(self._wanted)})
                for name in answer.get("unknown", []):
                    if gone := self._wanted.pop(name, None):
                        gone()
