"""The connection that all remote sandboxes of one event loop share to one admin."""

import asyncio
import contextlib
import weakref
from collections.abc import Callable

from envs.rock.errors import SandboxError
from envs.rock.wire.client import Client

KEEP_ALIVE_SECONDS = 30.0
_Key = tuple[str, str]  # URL and token of an admin
_connections: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[_Key, "AdminConnection"]
] = weakref.WeakKeyDictionary()


class AdminConnection:
    """One HTTP client for an event loop and an admin, with keep-alive requests.

    Each user calls `acquire` and, once done, `release`; the last release closes the client.
    """

    def __init__(self, key: _Key):
        url, token = key
        self.client = Client(url, token)
        self._key = key
        self._users = 0
        self._on_gone: dict[str, Callable[[], None]] = {}  # by the id of a sandbox in use
        self._keep_alives: asyncio.Task[None] | None = None

    @classmethod
    def acquire(cls, url: str, token: str) -> "AdminConnection":
        """Return the running event loop's connection to an admin, opened if there is none."""
        connections = _connections.setdefault(asyncio.get_running_loop(), {})
        key = (url, token)
        if key not in connections:
            connections[key] = cls(key)
        connection = connections[key]
        connection._users += 1
        return connection

    async def release(self) -> None:
        """Give the connection back; the last user's call closes it."""
        self._users -= 1
        if self._users:
            return
        _connections[asyncio.get_running_loop()].pop(self._key, None)
        if self._keep_alives:
            self._keep_alives.cancel()
        await self.client.close()

    def keep_alive(self, sandbox: str, on_gone: Callable[[], None]) -> None:
        """Tell the admin from now on that a sandbox is in use.

        Args:
          sandbox: the id of the sandbox.
          on_gone: called once if the admin does not know the sandbox any more.
        """
        self._on_gone[sandbox] = on_gone
        if self._keep_alives is None:
            self._keep_alives = asyncio.ensure_future(self._send_keep_alives())

    def forget(self, sandbox: str) -> None:
        """Stop telling the admin that a sandbox is in use."""
        self._on_gone.pop(sandbox, None)

    async def _send_keep_alives(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if not self._on_gone:
                continue
            with contextlib.suppress(SandboxError):  # the next one may get through
                answer = await self.client.ask("keep_alive", {"ids": list(self._on_gone)})
                for sandbox in answer.get("unknown", []):
                    on_gone = self._on_gone.pop(sandbox, None)
                    if on_gone:
                        on_gone()
