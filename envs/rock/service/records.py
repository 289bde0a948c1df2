"""What the admin knows of one sandbox, from the request to its end."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from envs.rock.config import SandboxConfig
from envs.rock.service.fleet import Member, Resources

WAITING = ("queued", "starting")
ENDED = ("stopped", "failed")
State = Literal["queued", "starting", "running", "stopped", "failed"]


class StartRequest(NamedTuple):
    """What is to be started."""

    config: SandboxConfig  # with the worker's backend
    wire: dict[str, Any]  # the same, as it is sent to the worker
    need: Resources
    kind: str  # "backend:isolation"
    environment: str | None = None  # digest of an archive in the hub
    snapshot: str | None = None
    pinned: Member | None = None  # the worker that has the snapshot

    def can_run_on(self, member: Member) -> bool:
        """Return whether a worker could run this, were it empty enough."""
        return self.pinned in (None, member) and self.kind in member.kinds


class Record:
    """One sandbox: queued, starting, running, then stopped or failed with the error that says why.

    Args:
      name: the id of the sandbox.
      user: whose it is.
      request: what is to be started.
      arguments: the caller's start request; `experiment` and `auto_clear_seconds` are read.
      auto_clear: idle seconds after which it is removed, if `arguments` do not say.
    """

    def __init__(
        self,
        name: str,
        user: str,
        request: StartRequest,
        arguments: Mapping[str, Any],
        auto_clear: float,
    ):
        now = time.monotonic()
        self.name = name
        self.user = user
        self.request = request
        self.experiment: str = arguments.get("experiment", "")
        self.auto_clear: float = arguments.get("auto_clear_seconds", auto_clear)
        self.key: tuple[str, str] | None = None  # (user, the key of the start request)
        self.state: State = "queued"
        self.error: Exception | None = None
        self.member: Member | None = None
        self.holds_place = False  # on its member
        self.info: dict[str, Any] = {}
        self.created = now
        self.used = now
        self.left_queue = 0.0
        self.ended = 0.0
        self.busy = 0  # requests in progress
        self.tries = 0
        self.timer: asyncio.TimerHandle | None = None
        self.provisioning: asyncio.Task[None] | None = None
        self.own_snapshot: str | None = None  # made for this sandbox alone
        self._decided = asyncio.Event()

    @property
    def placed_on(self) -> Member:
        """The worker that runs it; only once it has left the queue."""
        if self.member is None:
            raise RuntimeError(f"sandbox {self.name} is {self.state} and on no worker")
        return self.member

    def failure(self) -> Exception:
        """Return the error that it ended with, without the traceback of an earlier raise."""
        if self.error is None:
            raise RuntimeError(f"sandbox {self.name} is {self.state} and has no error")
        return self.error.with_traceback(None)

    async def wait_until_decided(self, seconds: float | None) -> None:
        """Wait until it runs or has ended, for up to `seconds`; None: as long as its start takes.

        asyncio.wait_for would lose a cancellation that comes together with the decision, and the
        caller's leaving would go unnoticed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._decided.wait()

    def run(self, info: dict[str, Any]) -> None:
        """Note that it runs; `info` is the worker's description of it."""
        self.state = "running"
        self.info = info
        self.used = time.monotonic()
        self._decide()

    def end(self, state: State, error: Exception) -> None:
        """Note that it has ended."""
        self.state = state
        self.error = error
        self.ended = time.monotonic()
        self._decide()

    def hand_over(self, user: str, arguments: Mapping[str, Any], auto_clear: float) -> None:
        """Give a sandbox that was kept ready to a user; arguments as in the constructor."""
        self.user = user
        self.experiment = arguments.get("experiment", "")
        self.auto_clear = arguments.get("auto_clear_seconds", auto_clear)
        self.used = time.monotonic()

    def describe(self) -> dict[str, Any]:
        """Return the response that tells its state."""
        answer: dict[str, Any] = {"sandbox": self.name, "state": self.state}
        if self.state == "running":
            answer |= self.info
        return answer

    def _decide(self) -> None:
        self._decided.set()
        if self.timer:
            self.timer.cancel()
