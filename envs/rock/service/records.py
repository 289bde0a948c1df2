"""What the admin knows of one sandbox, from the request to its end."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from envs.rock.config import SandboxConfig
from envs.rock.service.fleet import Member, Resources

AUTO_CLEAR_SECONDS = 300.0
_EPOCH = (
    time.time() - time.monotonic()
)  # one difference for all, so that a moment is told alike whenever it is asked for
WAITING, ENDED = ("queued", "starting"), ("stopped", "failed")


class Plan(NamedTuple):
    """What is to be started."""

    config: SandboxConfig  # with the worker's backend
    wire: dict[str, Any]  # the same, as it is sent
    need: Resources
    kind: str  # "backend:isolation"
    environment: str | None = None  # digest of an archive in the hub
    snapshot: str | None = None
    pinned: Member | None = None  # the worker that has the snapshot


class Record:
    """States: queued, starting, running, then stopped or failed, with the error that says why."""

    def __init__(
        self, name: str, user: str, plan: Plan, arguments: Mapping[str, Any], auto_clear: float
    ):
        self.name, self.user, self.plan = name, user, plan
        self.experiment: str = arguments.get("experiment", "")
        self.auto_clear: float = arguments.get("auto_clear_seconds", auto_clear)
        self.key: tuple[str, str] | None = None
        self.state, self.error = "queued", None
        self.member: Member | None = None
        self.holds_place = False  # on its member
        self.info: dict[str, Any] = {}
        self.created = self.used = time.monotonic()
        self.left_queue = self.ended = 0.0
        self.began = time.time()  # for people
        self.expires: float | None = None  # monotonic
        self.busy, self.tries = 0, 0
        self.timer: asyncio.TimerHandle | None = None
        self.provisioning: asyncio.Task | None = None
        self.own_snapshot: str | None = None  # made for it alone
        self.template = ""  # whose name it was asked for by
        self.metadata: dict[str, str] = {}
        self._decided = asyncio.Event()

    async def decided(self, seconds: float | None) -> None:
        """Wait until it runs or has ended, for that long; None: as long as its start may take."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(
                seconds
            ):  # not wait_for, which loses a cancellation that comes with the decision: its caller would have left unheard
                await self._decided.wait()

    def run(self, info: dict[str, Any]) -> None:
        self.state, self.info, self.used, self.began = (
            "running",
            info,
            time.monotonic(),
            time.time(),
        )
        self._decide()

    def end(self, state: str, error: Exception) -> None:
        self.state, self.error, self.ended = state, error, time.monotonic()
        self._decide()

    def hand_over(self, user: str, arguments: Mapping[str, Any], auto_clear: float) -> None:
        """One that was kept ready becomes a user's."""
        self.user, self.experiment, self.auto_clear = (
            user,
            arguments.get("experiment", ""),
            arguments.get("auto_clear_seconds", auto_clear),
        )
        self.used, self.began = time.monotonic(), time.time()

    def live(self, seconds: float) -> None:
        """It ends that long from now, used or not."""
        self.expires, self.auto_clear = time.monotonic() + seconds, float("inf")

    def ends_at(self) -> float:
        """Seconds since 1970, as far as is known now."""
        return _EPOCH + (self.expires if self.expires is not None else self.used + self.auto_clear)

    def describe(self) -> dict[str, Any]:
        return {"sandbox": self.name, "state": self.state} | (
            self.info if self.state == "running" else {}
        )

    def _decide(self) -> None:
        self._decided.set()
        if self.timer:
            self.timer.cancel()
