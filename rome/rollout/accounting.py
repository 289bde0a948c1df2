"""Counts of training samples, from the start of an episode to the step that trains on it."""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import Any


@dataclasses.dataclass
class Accounting:
    """Counts of episodes: at every moment, started = trained + dropped + in_flight.

    All methods are thread-safe: the trainer and the rollouts count in different threads.

    Args:
      started: episodes that were started, replacements included.
      trained: episodes that a training step has used.
      dropped: episodes that will never be trained on, by reason.
      in_flight: episodes that are running, or finished and not yet trained on.
    """

    started: int = 0
    trained: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    in_flight: int = 0
    _lock: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def begin(self) -> None:
        """Count the start of one episode."""
        with self._lock:
            self.started += 1
            self.in_flight += 1

    def drop(self, reason: str, number: int = 1) -> None:
        """Move `number` episodes from in_flight to dropped."""
        if number == 0:
            return
        with self._lock:
            self.in_flight -= number
            self.dropped[reason] += number

    def train(self, number: int) -> None:
        """Move `number` episodes from in_flight to trained."""
        with self._lock:
            self.in_flight -= number
            self.trained += number

    def check(self) -> None:
        """Check that the counts add up.

        Raises:
          AssertionError: an episode was counted twice or not at all.
        """
        counts = self.to_json()
        known = counts["trained"] + sum(counts["dropped"].values()) + counts["in_flight"]
        if counts["started"] != known or counts["in_flight"] < 0:
            raise AssertionError(f"sample accounting does not add up: {counts}")

    def to_json(self) -> dict[str, Any]:
        """Return the counts as of one moment."""
        with self._lock:
            return {
                "started": self.started,
                "trained": self.trained,
                "dropped": dict(self.dropped),
                "in_flight": self.in_flight,
            }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Accounting:
        """Return the counts to resume from a checkpoint.

        Episodes that were in flight are taken out of `started`: the resumed run starts them again.
        """
        return cls(
            started=document["started"] - document["in_flight"],
            trained=document["trained"],
            dropped=collections.Counter(document["dropped"]),
        )
