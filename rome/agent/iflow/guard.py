"""Notices an agent that goes in circles: the same call again, or one failure after another.

The first time the model is told; where that does not help, the turn ends.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib

from rome.agent.iflow.events import ToolCall, ToolFinished
from rome.agent.iflow.limits import Limits
from rome.agent.messages import Call, canonical

WINDOW = 16  # calls that are looked back on, so that a circle of two calls is noticed too


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the guard noticed; `stops` says whether the turn ends."""

    text: str
    stops: bool


class Guard:
    """Watches the calls of one turn.

    Args:
      limits: when to say something; 0 is never.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._recent: collections.deque[bytes] = collections.deque(maxlen=WINDOW)
        self._failures = 0

    def observe(self, call: ToolCall, finished: ToolFinished) -> Finding | None:
        """Take a call with its result; return what is to be said about it."""
        has_failed = finished.status in ("error", "denied")
        self._failures = self._failures + 1 if has_failed else 0
        arguments = canonical(Call(call.id, call.name, call.arguments))
        parts = repr((call.name, arguments, finished.output))
        digest = hashlib.blake2b(parts.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._recent.append(digest)
        repeats = self._recent.count(digest)
        limits = self._limits
        return (
            _finding(
                repeats,
                limits.repeats_notice,
                limits.repeats_stop,
                f"the same call of {call.name} with the same result was made {repeats} times",
                "Its result will not change. Do something else, or say what you are missing.",
            )
            or self._failure_finding()
        )

    def observe_malformed(self) -> Finding | None:
        """Take an answer whose calls could not be read."""
        self._failures += 1
        return self._failure_finding()

    def _failure_finding(self) -> Finding | None:
        return _finding(
            self._failures,
            self._limits.failures_notice,
            self._limits.failures_stop,
            f"{self._failures} calls in a row failed",
            "Read the errors, and do it in another way, or say what stands in the way.",
        )


def _finding(count: int, notice: int, stop: int, what: str, advice: str) -> Finding | None:
    if stop and count >= stop:
        return Finding(what, True)
    if notice and count == notice:
        return Finding(f"{what[0].upper()}{what[1:]}. {advice}", False)
    return None
