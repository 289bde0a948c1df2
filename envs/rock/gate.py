"""A limit on how many starts run at the same time, across event loops and threads."""

import asyncio
import collections
import threading


class Gate:
    """At most `width` callers inside at a time, counted over all event loops and threads.

    Use it as an async context manager. Waiting callers enter in the order of their arrival.
    """

    def __init__(self, width: int):
        self._free = width
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
            if turn.done() and not turn.cancelled():
                self._leave()  # the place was ours already: pass it on
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                try:
                    turn.get_loop().call_soon_threadsafe(self._admit, turn)
                    return
                except RuntimeError:  # that loop is closed: its caller waits no more
                    continue
            self._free += 1

    def _admit(self, turn: asyncio.Future[None]) -> None:
        if turn.done():
            self._leave()
        else:
            turn.set_result(None)
