"""Calls of an environment's methods from the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from envs.gem.core import Env


async def call_env(env: Any, method: str, *arguments: Any) -> Any:
    """Call `reset`, `step` or `close` of an environment without blocking the event loop.

    The environment's own coroutine (`areset` and so on) is preferred; else the method runs in a
    thread. A method that is missing returns None.
    """
    if own := own_coroutine(env, method):
        return await own(env, *arguments)
    function = getattr(env, method, None)
    if function is None:
        return None
    return await run_in_thread(function, *arguments)


def own_coroutine(env: Any, method: str) -> Callable[..., Any] | None:
    """Return the coroutine function that the environment's class has for this method, or None."""
    twin = f"a{method}"
    own = getattr(type(env), twin, None)
    return None if own is None or own is getattr(Env, twin) else own


async def run_in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a daemon thread of its own.

    An environment that never returns then neither fills a thread pool nor keeps the process alive.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Any] = loop.create_future()

    def set_outcome(result: Any, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)

    def work() -> None:
        result = None
        error: BaseException | None = None
        try:
            result = function(*arguments)
        except StopIteration:  # a future cannot hold it
            error = RuntimeError("the environment raised StopIteration")
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no caller waits any more
            loop.call_soon_threadsafe(set_outcome, result, error)

    threading.Thread(target=work, name="gem-server-env", daemon=True).start()
    return await outcome
