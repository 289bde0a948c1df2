"""How fast the learner is: the seconds of the updates alone, and the work that was done in them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from rome.data.batch import Batch


class Work(NamedTuple):
    """What passes through the model in the updates of a step; padding is no work.

    Attributes:
      tokens: of all sequences, prompts included.
      squares: sum of the squares of the sequences' lengths, which attention takes its time by; of
        sequences that share their beginning, without what they share again.
      replayed: pairs of a token and a layer whose experts are replayed.
    """

    tokens: int
    squares: int
    replayed: int = 0


def count_work(batches: Iterable[Batch]) -> Work:
    """Count the work of passing these batches through the model; replayed routes are left out."""
    tokens = 0
    squares = 0
    for batch in batches:
        seen_N = np.asarray(batch.positions_BT)[np.asarray(batch.segments_BT) > 0].astype(np.int64)
        tokens += seen_N.size
        # a token at position p sees p + 1: over a line, that is half of its square
        squares += int((2 * seen_N + 1).sum())
    return Work(tokens, squares)


class UpdateSeconds:
    """Measures how long the updates of a step take, without waiting for them in this thread.

    They are handed to the devices and run behind the host. They begin when they are handed over, or
    later, when those of the step before have ended; they end when their result is there.

    Args:
      started: time.monotonic() when the first update was handed over.
      result: an array that the last update has computed.
      before: of the step before.
    """

    def __init__(self, started: float, result: Any, before: UpdateSeconds | None = None) -> None:
        self._started = started
        self._before = before
        self._ended = started
        self._thread = threading.Thread(target=self._wait_for, args=(result,), daemon=True)
        self._thread.start()

    def _wait_for(self, result: Any) -> None:
        with contextlib.suppress(Exception):  # whoever reads the result raises it
            jax.block_until_ready(result)
        self._ended = time.monotonic()

    def value(self) -> float:
        """Wait for the end of the updates, and return their seconds."""
        self._thread.join()
        if self._before is not None:
            self._started = max(self._started, self._before.ended())
            self._before = None  # or every step of a run would be kept
        return self._ended - self._started

    def ended(self) -> float:
        """Wait for the end of the updates, and return time.monotonic() of it."""
        self._thread.join()
        return self._ended
