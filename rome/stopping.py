"""A wish to stop, and how a wait hears it.

Whoever waits asks `should_stop` every POLL_SECONDS, and leaves by raising Stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
ShouldStop = Callable[[], bool]
POLL_SECONDS = 0.25  # between two calls of should_stop
LEAVE_SECONDS = 1.0  # for what is cancelled to clean up after itself


class Stopped(Exception):
    """The user asked the run to stop while something was waited for.

    What had been finished until then is on disk.
    """


def never() -> bool:
    """Return False: nobody can ask to stop."""
    return False


def raise_if_stopped(should_stop: ShouldStop) -> None:
    """Raise Stopped where the user asked to stop."""
    if should_stop():
        raise Stopped


async def until_stopped(coroutine: Coroutine[Any, Any, T], should_stop: ShouldStop) -> T:
    """Await a coroutine and return its result, unless the user asks to stop before.

    It is cancelled then, as it is where this call is. One that does not end within LEAVE_SECONDS
    after that is left behind.

    Raises:
      Stopped: the user asked to stop.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        while True:
            await asyncio.wait([task], timeout=POLL_SECONDS)
            if task.done():
                return task.result()
            raise_if_stopped(should_stop)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=LEAVE_SECONDS)
