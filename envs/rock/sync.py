"""Sandboxes for callers without an event loop: one background loop in a daemon thread runs their
coroutines.

with SyncSandbox(SandboxConfig()) as sandbox:
    print(sandbox.execute("ls").stdout)
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from envs.rock.backend import Job, Session, Snapshot
from envs.rock.config import SandboxConfig
from envs.rock.sandbox import Sandbox

T = TypeVar("T")
GRACE_SECONDS = 60.0  # beyond the time that a call may take by its own arguments
TRANSFER_SECONDS = 3600.0  # of an upload, a download, a snapshot
_SLOW = (
    "upload",
    "download",
    "snapshot",
    "restore",
    "fork",
    "write_files",
    "write_file",
    "read_file",
    "wait",
    "kill",
)
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
    """Run it on the background loop and wait; after `timeout` seconds it is cancelled and
    TimeoutError raised.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result(timeout)
    except TimeoutError:
        future.cancel()
        raise


class _Facade:
    """What it wraps, with each coroutine method turned into one that waits.

    Jobs, sessions and sandboxes that come back are wrapped too.
    """

    def __init__(self, wrapped: Any, command_timeout: float):
        self._wrapped, self._command_timeout = wrapped, command_timeout

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._wrapped, name)
        if name.startswith("_") or inspect.isasyncgenfunction(attribute):
            raise AttributeError(
                f"{type(self._wrapped).__name__}.{name} has no synchronous form; use the"
                " asynchronous Sandbox"
            )
        return self._waiting(attribute) if inspect.iscoroutinefunction(attribute) else attribute

    def _waiting(self, method: Callable) -> Callable:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            given = signature.bind(*args, **options).arguments.get("timeout")
            allowed = (
                TRANSFER_SECONDS
                if method.__name__ in _SLOW
                else (self._command_timeout if given is None else given) + GRACE_SECONDS
            )
            return self._own(run(method(*args, **options), allowed))

        return call

    def _own(self, result: Any) -> Any:
        if isinstance(result, Sandbox):
            return SyncSandbox(result.config, _started=result)
        return (
            _Facade(result, self._command_timeout) if isinstance(result, (Job, Session)) else result
        )

    def __enter__(self) -> "_Facade":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # a session's


class SyncSandbox(_Facade):
    """A Sandbox whose methods wait: the same names, arguments, results and errors.

    Streams have no synchronous form.
    """

    def __init__(
        self,
        config: SandboxConfig | None = None,
        snapshot: Snapshot | None = None,
        *,
        _started: Sandbox | None = None,
    ):
        sandbox = _started or Sandbox(config, snapshot)
        super().__init__(sandbox, sandbox.config.timeout)

    def __enter__(self) -> "SyncSandbox":
        if not self.is_alive():
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
