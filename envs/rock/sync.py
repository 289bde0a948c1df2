"""Sandboxes for callers without an event loop.

    with SyncSandbox(SandboxConfig()) as sandbox:
        print(sandbox.execute("ls").stdout)

One background event loop in a daemon thread runs their coroutines.
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
TRANSFER_SECONDS = 3600.0  # for methods whose time depends on the amount of data, or on a job
LOOP_START_SECONDS = 10.0
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
    """Return the background loop, which starts on first use.

    A sandbox belongs to the loop that started it.
    """
    global _loop
    with _lock:
        if _loop is None or not _loop.is_running():
            _loop = asyncio.new_event_loop()
            running = threading.Event()
            _loop.call_soon(running.set)
            threading.Thread(target=_loop.run_forever, name="rock-sync", daemon=True).start()
            running.wait(LOOP_START_SECONDS)
        return _loop


def run(coroutine: Coroutine[object, object, T], timeout: float, what: str = "") -> T:
    """Run a coroutine on the background loop and return its result.

    Args:
      coroutine: what to run.
      timeout: seconds; then the coroutine is cancelled.
      what: subject of the error's message; without it, the name of the coroutine.

    Raises:
      TimeoutError: it did not end in time. The message says what did not.
    """
    future = asyncio.run_coroutine_threadsafe(coroutine, loop())
    try:
        return future.result(timeout)
    except TimeoutError as error:
        if str(error):  # the coroutine's own error, which says what it waited for
            raise
        subject = what or getattr(coroutine, "__qualname__", "a call")
        if future.done():
            raise TimeoutError(f"{subject} met a deadline that says nothing") from error
        future.cancel()
        raise TimeoutError(f"{subject} did not end within {timeout:g} s") from None


class _Facade:
    """An object whose coroutine methods are replaced by methods that wait.

    Jobs, sessions and sandboxes that they return are wrapped too.
    """

    def __init__(self, wrapped: Any, command_timeout: float):
        self._wrapped = wrapped
        self._command_timeout = command_timeout

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._wrapped, name)
        if name.startswith("_") or inspect.isasyncgenfunction(attribute):
            raise AttributeError(
                f"{type(self._wrapped).__name__}.{name} has no synchronous form; use the"
                " asynchronous Sandbox"
            )
        if inspect.iscoroutinefunction(attribute):
            return self._make_waiting(attribute)
        return attribute

    def _make_waiting(self, method: Callable) -> Callable:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            given = signature.bind(*args, **options).arguments.get("timeout")
            if method.__name__ in _SLOW:
                seconds = TRANSFER_SECONDS
            else:
                timeout = self._command_timeout if given is None else given
                seconds = timeout + GRACE_SECONDS
            return self._wrap(run(method(*args, **options), seconds))

        return call

    def _wrap(self, result: Any) -> Any:
        if isinstance(result, Sandbox):
            return SyncSandbox(result.config, _started=result)
        if isinstance(result, (Job, Session)):
            return _Facade(result, self._command_timeout)
        return result

    def __enter__(self) -> "_Facade":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # a session's


class SyncSandbox(_Facade):
    """A Sandbox whose methods wait; names, arguments, results and errors are the same.

    `read_stream` and `write_stream` have no synchronous form.
    """

    def __init__(
        self,
        config: SandboxConfig | None = None,
        snapshot: Snapshot | None = None,
        *,
        _started: Sandbox | None = None,
    ):
        """Prepare a sandbox; see Sandbox.

        Args:
          config: limits, isolation and backend; the defaults without one.
          snapshot: files to start from.
        """
        sandbox = _started or Sandbox(config, snapshot)
        super().__init__(sandbox, sandbox.config.timeout)

    def __enter__(self) -> "SyncSandbox":
        if not self.is_alive():
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
