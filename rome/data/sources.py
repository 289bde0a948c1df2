"""Examples as an endless stream of batches whose position can be saved, split over processes.

order = endless_order([(trajectories, 1.0)], seed=0)
stream = sft_batches(order, rows=8, row_length=512, chunks_per_row=32)
batch = next(stream)
position = stream.get_state()  # JSON-serialisable; goes into the checkpoint
stream.set_state(position)  # the next batch is the one after `batch`

Row r of every batch comes from a stream of its own: examples r, r + B, r + 2 B, ... of one endless
order. So a process reads and tokenises only the examples of its own rows, and what a row holds does
not depend on how many processes there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grain
import grain.experimental
import numpy as np

from rome.data.batch import Batch
from rome.data.lines import Example, ExampleOptions, to_examples
from rome.data.packing import pack_stream, to_batch
from rome.data.trajectory import Trajectory

Item = TypeVar("Item", covariant=True)

ROWS_OPEN = 16  # rows that are filled at a time, of each row of a batch
READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # of each row of a batch


class RandomAccess(Protocol[Item]):
    """Items that can be counted and fetched by number: what grain reads from."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Return one item."""
        ...


class Each(grain.experimental.FlatMapTransform):
    """Replaces a list by its elements."""

    def flat_map(self, element: list[Example]) -> list[Example]:
        return element


class Batches:
    """An endless stream of batches; rows that other processes own are zeros.

    Args:
      open_row: (number) -> the stream of that row of every batch, in the form of `pack_stream`.
      rows: B, rows a batch.
      own: numbers of the rows that are needed here; None: all of them.
    """

    def __init__(
        self,
        open_row: Callable[[int], grain.IterDataset],
        rows: int,
        own: Sequence[int] | None = None,
    ) -> None:
        self._rows = rows
        self._own = list(range(rows) if own is None else own)
        self._streams = {number: iter(open_row(number)) for number in self._own}

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch[np.ndarray]:
        batch = to_batch([next(self._streams[number]) for number in self._own])
        # No likelihood reads it, and it is there or not by what the own rows hold.
        batch = batch._replace(lines_BC=None)
        if len(self._own) == self._rows:
            return batch
        return batch.map(self._spread)

    def _spread(self, field: np.ndarray) -> np.ndarray:
        """Return a field of all rows; the system gives memory to those that are written only."""
        spread = np.zeros((self._rows, *field.shape[1:]), field.dtype)
        spread[self._own] = field
        return spread

    def get_state(self) -> dict[str, Any]:
        """Return the position of each own row, by its number as text."""
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, position: Mapping[str, Any]) -> None:
        """Go to a position, which may hold other rows too."""
        for number, stream in self._streams.items():
            stream.set_state(position[str(number)])


def sft_batches(
    order: grain.MapDataset,
    *,
    rows: int,
    row_length: int,
    chunks_per_row: int,
    own: Sequence[int] | None = None,
    prepare: Callable[[Trajectory], Trajectory] = lambda trajectory: trajectory,
) -> Batches:
    """Return an endless stream of SFT batches.

    Args:
      order: trajectories as `endless_order` orders them; all trainable (an episode that
        infrastructure ended is an error here).
      rows: B, rows a batch.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
      own: numbers of the rows that are needed here; None: all of them.
      prepare: called with each trajectory before its tokens are laid out; it may mask turns.
    """
    options = ExampleOptions(
        row_length=row_length,
        chunks_per_row=chunks_per_row,
        gamma=1.0,
        failure_reward=0.0,
        purpose="sft",
    )
    to_sft_examples = functools.partial(_to_examples, options=options, prepare=prepare)

    def open_row(number: int) -> grain.IterDataset:
        lines = order[number::rows].map(to_sft_examples).to_iter_dataset(READ_OPTIONS)
        examples = grain.experimental.FlatMapIterDataset(lines, Each())
        return pack_stream(examples, row_length, chunks_per_row, bins=ROWS_OPEN)

    return Batches(open_row, rows, own)


def endless_order(parts: Sequence[tuple[RandomAccess[Any], float]], seed: int) -> grain.MapDataset:
    """Return items in an endless order that depends on the seed only.

    A part has each of its items once an epoch, shuffled anew for each of them.

    Args:
      parts: items, and their share of what is drawn.
      seed: of the order.

    Raises:
      ValueError: a part has no item.
    """
    orders = []
    for items, _ in parts:
        if not len(items):
            raise ValueError("nothing to learn from; an endless stream needs at least one item")
        orders.append(grain.MapDataset.source(items).seed(seed).shuffle().repeat())
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, weights=[weight for _, weight in parts])


def _to_examples(
    trajectory: Trajectory,
    options: ExampleOptions,
    prepare: Callable[[Trajectory], Trajectory],
) -> list[Example]:
    return to_examples(prepare(trajectory), 0.0, options)  # SFT reads no advantage
