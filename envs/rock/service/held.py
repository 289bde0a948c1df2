"""One sandbox of a worker: its calls, jobs, sessions and ports, by the names that callers know."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from envs.rock.backend import Job, Session
from envs.rock.config import Address, CommandResult
from envs.rock.errors import SandboxClosedError, SandboxError
from envs.rock.sandbox import Sandbox
from envs.rock.service.background import mark_retrieved
from envs.rock.wire.door_queue import DoorQueue
from envs.rock.wire.errors import Refusal

MAX_CALLS = 64  # of one sandbox at once
MAX_KEPT_CALLS = 64  # that have ended, for callers whose connection broke
KEPT_SECONDS = 30.0  # that an ended call is kept
MAX_KEPT_JOBS = 64  # that have ended
ABANDONED_SECONDS = 90.0  # after which a call that no caller asks for is cancelled


class Call:
    """An operation that runs, and whose caller asks for its result in rounds."""

    def __init__(self, work: Awaitable[dict[str, Any]]):
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(mark_retrieved)
        self._waiting = 0
        self._asked = time.monotonic()

    @property
    def succeeded(self) -> bool:
        """Whether it has ended with a result."""
        ended = self.task.done() and not self.task.cancelled()
        return ended and self.task.exception() is None

    async def wait(self, seconds: float | None) -> dict[str, Any] | None:
        """Return the result, or None if there is none within `seconds` (None: no limit)."""
        self._waiting += 1
        try:
            await asyncio.wait([self.task], timeout=seconds)
        finally:
            self._waiting -= 1
            self._asked = time.monotonic()
        if not self.task.done():
            return None
        if self.task.cancelled():
            raise SandboxError("the call was given up")
        return self.task.result()

    def idle_seconds(self, now: float) -> float:
        """Return the time since a caller last asked for the result; 0 while one waits."""
        return 0.0 if self._waiting else now - self._asked


class _HeldJob(NamedTuple):
    job: Job
    end: asyncio.Future[CommandResult]


class HeldSandbox:
    """A sandbox, with its jobs, sessions and calls by the names that callers use."""

    def __init__(self, sandbox: Sandbox, doors: Mapping[str, DoorQueue]):
        self.sandbox = sandbox
        self._doors = doors
        self.sessions: dict[str, Session] = {}
        self.calls: dict[str, Call] = {}
        self.ports: dict[int, Address] = {}  # port in the sandbox -> where it is forwarded from
        self.restoring = False
        self._given_up: dict[str, None] = {}  # calls cancelled before they came, oldest first
        self._jobs: dict[str, _HeldJob] = {}
        self._names_given = 0

    def has_ended(self) -> bool:
        """Return whether the sandbox was started and has ended by itself."""
        was_started = self.sandbox.tier is not None
        return was_started and not self.restoring and not self.sandbox.is_alive()

    # -- jobs and sessions

    def add_job(self, job: Job) -> str:
        """Keep a job and return its name."""
        end = asyncio.ensure_future(job.wait())
        end.add_done_callback(mark_retrieved)
        name = self._next_name("job")
        self._jobs[name] = _HeldJob(job, end)
        return name

    def job(self, arguments: Mapping[str, Any]) -> _HeldJob:
        """Return the job that a request names; Refusal if there is none."""
        name = arguments.get("job")
        if name not in self._jobs:
            raise Refusal("not_found", f"there is no job {name!r}")
        return self._jobs[name]

    def add_session(self, session: Session) -> str:
        """Keep a session and return its name."""
        name = self._next_name("session")
        self.sessions[name] = session
        return name

    def session(self, arguments: Mapping[str, Any]) -> Session:
        """Return the session that a request names; SandboxClosedError if there is none."""
        name = arguments.get("session")
        if name not in self.sessions:
            raise SandboxClosedError(f"there is no session {name!r}; create another")
        return self.sessions[name]

    def door(self, name: str) -> DoorQueue:
        """Return the door of this name; Refusal if there is none."""
        if name not in self._doors:
            raise Refusal("not_found", f"the sandbox has no door {name!r}")
        return self._doors[name]

    def _next_name(self, kind: str) -> str:
        self._names_given += 1
        return f"{kind}{self._names_given}"

    # -- calls

    def join(self, key: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> Call:
        """Return the call of this key, begun with `work` if there is none.

        Raises:
          Refusal: MAX_CALLS are running, or the caller has cancelled it already.
        """
        if key in self._given_up:
            raise Refusal("conflict", f"the call {key!r} was cancelled before it came")
        if key not in self.calls:
            self.tidy()
            running = sum(not call.task.done() for call in self.calls.values())
            if running >= MAX_CALLS:
                raise Refusal("busy", f"{MAX_CALLS} calls of this sandbox are running")
            self.calls[key] = Call(work())
        return self.calls[key]

    async def restart(self, key: str, work: Callable[[], Awaitable[dict[str, Any]]]) -> Call:
        """Return the call of this key if it has succeeded; else give it up and begin it anew.

        For work that reads its request's body, of which every request brings its own.
        """
        earlier = self.calls.get(key)
        if earlier is not None and not earlier.succeeded:
            earlier.task.cancel()
            await asyncio.wait([earlier.task])
            del self.calls[key]
        return self.join(key, work)

    def call(self, key: str) -> Call:
        """Return the call of this key; Refusal if there is none."""
        if key not in self.calls:
            raise Refusal("not_found", f"there is no call {key!r}")
        return self.calls[key]

    def cancel(self, key: str) -> None:
        """Cancel the call of this key; one that comes later, on a slower connection, is refused."""
        call = self.calls.get(key)
        if call:
            call.task.cancel()
            return
        self._given_up[key] = None
        while len(self._given_up) > MAX_KEPT_CALLS:
            del self._given_up[next(iter(self._given_up))]

    async def cancel_all(self) -> None:
        """Cancel all calls and wait for their end."""
        tasks = [call.task for call in self.calls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def tidy(self) -> None:
        """Drop ended calls, jobs and sessions; cancel calls that no caller asks for any more."""
        self._tidy_calls(time.monotonic())
        ended_jobs = [name for name, held in self._jobs.items() if held.end.done()]
        for name in ended_jobs[:-MAX_KEPT_JOBS]:
            del self._jobs[name]
        ended_sessions = [name for name, session in self.sessions.items() if session.ended]
        for name in ended_sessions:
            del self.sessions[name]

    def _tidy_calls(self, now: float) -> None:
        ended = [name for name, call in self.calls.items() if call.task.done()]
        surplus = len(ended) - MAX_KEPT_CALLS
        for number, name in enumerate(ended):
            idle_seconds = self.calls[name].idle_seconds(now)
            if number < surplus or idle_seconds > KEPT_SECONDS:
                del self.calls[name]
        for call in self.calls.values():
            if call.idle_seconds(now) > ABANDONED_SECONDS:
                call.task.cancel()
