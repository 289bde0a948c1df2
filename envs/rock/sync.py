"""Sandboxes for callers without an event loop: one background loop in a daemon thread runs their coroutines."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The background loop, started on first use. A sandbox belongs to the loop that started it."""
    global _loop
    with _lock:
        if _loop is None or not _loop.is_running():
            _loop = asyncio.new_event_loop()
            running = threading.Event()
            _loop.call_soon(running.set)
            threading.Thread(target=_loop.run_forever, name="rock-sync", daemon=True).start()
            running.wait(10)
        return _loop


def run(coroutine: Coroutine[object, object, T], timeout: float) -> T:
    """Run it on the background loop and wait; after `timeout` seconds it is cancelled and TimeoutError raised."""
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result(timeout)
    except TimeoutError:
        future.cancel()
        raise
