"""The limits of one turn of the agent, and what notices an agent that goes in circles.

Of the same call again, or one failure after another, the model is told the first time; where that
does not help, the turn ends.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import operator
import weakref

from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.events import NO_USAGE, ToolCall, ToolFinished, Usage
from rome.agent.messages import Call, canonical

WINDOW = 16  # calls that are looked back on, so that a circle of two calls is noticed too


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one turn may use; 0 is no limit.

    Attributes:
      turns: answers of the model.
      tokens: read and written by the model, over all its answers, sub-agents included.
      seconds: from the user's message to the end.
      price: in the currency of the configured prices, sub-agents included.
      tool_seconds: of one call; the time in which the user is asked does not count.
      parallel: calls that run at the same time.
      repeats_notice: same calls with the same result after which the model is told.
      repeats_stop: after which the turn ends.
      failures_notice: failed calls in a row after which the model is told.
      failures_stop: after which the turn ends.

    Raises:
      ValueError: one is negative, or `parallel` is 0.
    """

    turns: int = 0
    tokens: int = 0
    seconds: float = 0.0
    price: float = 0.0
    tool_seconds: float = 3600.0
    parallel: int = 8
    repeats_notice: int = 5
    repeats_stop: int = 8
    failures_notice: int = 5
    failures_stop: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise ValueError(f"limit {field.name} is {value}; give 0 (none) or more")
        if self.parallel < 1:
            raise ValueError("limit parallel is 0; give 1 or more")

    def reached(self, answers: int, usage: Usage) -> str:
        """Return which limit a turn has reached, for people; "" where the model may be asked.

        Args:
          answers: of the model so far.
          usage: of the turn so far, by all agents.
        """
        tokens = usage.prompt + usage.completion
        if self.turns and answers >= self.turns:
            return f"the limit of {self.turns} turns is reached"
        if self.tokens and tokens >= self.tokens:
            return f"the limit of {self.tokens} tokens is reached: {tokens} were used"
        if self.price and usage.price >= self.price:
            return (
                f"the limit of the price, {self.price:g}, is reached: {usage.price:.4g} was spent"
            )
        return ""


class Spent:
    """What the agents of a session use together, now that the main one plays a turn.

    Each looks at it before it asks its model, so that several sub-agents at once stay within the
    limits of the turn. What one has used that ended is in the usage of its parent.
    """

    def __init__(self) -> None:
        self._conversations: weakref.WeakSet[Conversation] = weakref.WeakSet()

    def add(self, conversation: Conversation) -> None:
        """Count an agent too."""
        self._conversations.add(conversation)

    def __call__(self) -> Usage:
        """Return the usage of the turns that are being played."""
        turns = (one.turn_usage for one in self._conversations if one.is_working)
        return functools.reduce(operator.add, turns, NO_USAGE)


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
