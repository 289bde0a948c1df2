"""The limits of one turn of the agent, and what notices an agent that goes in circles.

Of the same call again, or one failure after another, the model is told the first time; where that
does not help, the turn ends.
"""

from __future__ import annotations

import collections
import dataclasses
import weakref

from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.events import NO_USAGE, ToolCall, ToolFinished, Usage
from rome.agent.messages import canonical

WINDOW = 16  # calls that are looked back on, so that a circle of two calls is noticed too
# Same calls with the same result, or failed calls in a row, after which the model is told, and
# after which the turn ends.
NOTICED = 5
STOPPED = 8


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one turn may use; 0 is no limit."""

    turns: int = 0  # answers of the model
    tokens: int = 0  # read and written by the model, over all its answers, sub-agents included
    seconds: float = 0.0  # from the user's message to the end
    price: float = 0.0  # in the currency of the configured prices, sub-agents included
    tool_seconds: float = 3600.0  # of one call; the time in which the user is asked does not count
    parallel: int = 8  # calls that run at the same time

    def reached(self, answers: int, usage: Usage) -> str:
        """Return which limit a turn has reached, for people; "" where the model may be asked."""
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
        return sum(turns, NO_USAGE)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the guard noticed; `stops` says whether the turn ends."""

    text: str
    stops: bool


class Guard:
    """Watches the calls of one turn."""

    def __init__(self) -> None:
        self._recent: collections.deque[int] = collections.deque(maxlen=WINDOW)
        self._failures = 0

    def observe(self, call: ToolCall, finished: ToolFinished) -> Finding | None:
        """Take a call with its result; return what is to be said about it."""
        has_failed = finished.status in ("error", "denied")
        self._failures = self._failures + 1 if has_failed else 0
        seen = hash((call.name, canonical(call), finished.output))
        self._recent.append(seen)
        repeats = self._recent.count(seen)
        what = f"the same call of {call.name} with the same result was made {repeats} times"
        advice = "Its result will not change. Do something else, or say what you are missing."
        return _finding(repeats, what, advice) or self._failure_finding()

    def observe_malformed(self) -> Finding | None:
        """Take an answer whose calls could not be read."""
        self._failures += 1
        return self._failure_finding()

    def _failure_finding(self) -> Finding | None:
        what = f"{self._failures} calls in a row failed"
        advice = "Read the errors, and do it in another way, or say what stands in the way."
        return _finding(self._failures, what, advice)


def _finding(count: int, what: str, advice: str) -> Finding | None:
    if count >= STOPPED:
        return Finding(what, True)
    if count == NOTICED:
        return Finding(f"{what[0].upper()}{what[1:]}. {advice}", False)
    return None
