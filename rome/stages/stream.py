"""An endless stream of batches that goes on, after a stop, at the batch that was not trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rome.data.batch import Batch


class BatchStream:
    """Batches by step, with a position that belongs to a checkpoint.

    Every process of a job has a stream of its own rows, and they are drawn in step.

    Args:
      open_batches: returns the iterator of all batches from the first one on. It is called
        when the first batch is drawn, or a position is set.
    """

    def __init__(self, open_batches: Callable[[], Any]) -> None:
        self._open_batches = open_batches
        self._batches: Any = None
        # The step that a batch was drawn for last, and the position before that draw.
        self._drawn: tuple[int, dict[str, Any] | None] | None = None

    def draw(self, step: int) -> Batch:
        """Return the next batch, for the training of `step`."""
        before = self._position()
        if self._batches is None:
            self._batches = self._open_batches()
        batch = next(self._batches)
        self._drawn = step, before
        return batch

    def position(self, step: int) -> dict[str, Any] | None:
        """Return the position of a checkpoint of `step` as a JSON document; None: the beginning.

        Where the batch of `step` was drawn but the step was not trained, it is the position before
        that batch.
        """
        if self._drawn is not None and self._drawn[0] == step:
            return self._drawn[1]
        return self._position()

    def go_to(self, position: dict[str, Any] | None) -> None:
        """Go to what `position` returned. The next batch is the one after it."""
        self._batches = None
        self._drawn = None
        if position is not None:
            self._batches = self._open_batches()
            self._batches.set_state(position)

    def _position(self) -> dict[str, Any] | None:
        return None if self._batches is None else self._batches.get_state()
