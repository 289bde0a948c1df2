"""An asyncio event loop in virtual time: waiting takes no time, and runs are repeatable.

Whenever no task can go on, the clock jumps to the next timer. A program that waits for nothing but
timers and itself therefore runs as fast as its code, with the same order of events every time.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar, TypeVarTuple

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` is virtual seconds since its creation.

    Timers fire one at a time, in the order of their times and, at the same time, in the order in
    which they were set; between two of them, every task continues as far as it can. Sockets, pipes
    and other threads cannot wake the loop.
    """

    _ready: collections.deque[asyncio.Handle]  # of the base class: callbacks that are due

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()
        super().__init__(_TimerSelector(self))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Set a timer. The base class keeps timers in a heap that is slow and not stable."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def fire_timers(self) -> None:
        """Jump to the next timer and call it, and so on until a task can continue.

        Raises:
          RuntimeError: there is none, so nothing will ever happen again.
        """
        while self._timers:
            when, _, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                self.now = max(self.now, when)
                handle._run()
            if self._ready:
                return
        raise RuntimeError(
            f"deadlock at {self.now:.3f} virtual seconds: every task waits, and no timer is set"
        )


class _TimerSelector(selectors.BaseSelector):
    """Fires a timer where another selector would sleep until a file is ready."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._files = selectors.SelectSelector()  # the loop's own pipe, which is never asked

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # no task can go on
            self._loop.fire_timers()
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._files.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._files.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._files.get_map()

    def close(self) -> None:
        self._files.close()


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in virtual time, as asyncio.run does in real time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


class Level:
    """A number that changes over time, such as episodes in play, and its time integral.

    Args:
      loop: the clock.
      value: the value at the beginning.
    """

    def __init__(self, loop: VirtualLoop, value: float = 0.0) -> None:
        self._loop = loop
        self._value = value
        self._integral = 0.0
        self._integrated_until = loop.now

    def add(self, change: float) -> None:
        """Change the value from now on."""
        self._integrate()
        self._value += change

    def integral(self) -> float:
        """Return the integral of the value over time, in value x seconds, since the last reset."""
        self._integrate()
        return self._integral

    def reset(self) -> None:
        """Start the integral anew, from now."""
        self._integral = 0.0
        self._integrated_until = self._loop.now

    def _integrate(self) -> None:
        now = self._loop.now
        self._integral += self._value * (now - self._integrated_until)
        self._integrated_until = now
