"""Recorded trajectories as an endless stream of SFT batches whose position can be saved.

files = TrajectoryFiles("run/trajectories")
stream = iter(sft_batches(files, rows=8, row_length=512, chunks_per_row=32, seed=0))
batch = next(stream)
position = stream.get_state()  # small and JSON-serialisable; goes into the checkpoint
stream.set_state(position)  # the next batch is the one after `batch`
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Protocol, TypeVar

import grain

from rome.data.lines import Example, ExampleOptions, to_example
from rome.data.packing import pack_stream, to_batch
from rome.data.trajectory import Trajectory, load_trajectory

Item = TypeVar("Item", covariant=True)


class RandomAccess(Protocol[Item]):
    """Items that can be counted and fetched by number: what grain reads from."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Return one item."""
        ...


class TrajectoryFiles:
    """The ATIF files of a directory in the order of their names, each read when it is fetched.

    Raises:
      ValueError: the directory has no *.json, or, when it is fetched, a file is no trajectory.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.paths = sorted(pathlib.Path(directory).glob("*.json"))
        if not self.paths:
            raise ValueError(
                f"no trajectory (*.json) in {directory}; record some first or name another"
                " directory"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Trajectory:
        return load_trajectory(self.paths[index], routes=False)  # no likelihood replays them

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(len(self)))


def sft_batches(
    trajectories: RandomAccess[Trajectory],
    *,
    rows: int,
    row_length: int,
    chunks_per_row: int,
    seed: int,
) -> grain.IterDataset:
    """Return an endless stream of SFT batches.

    Each epoch has every trajectory once, in an order that depends on (seed, epoch) only.

    Args:
      trajectories: a list or TrajectoryFiles; all trainable (an episode that infrastructure ended
        is an error here).
      rows: B, rows a batch.
      row_length: T, tokens a row.
      chunks_per_row: C, the most chunks that a row holds.
      seed: of the order.

    Raises:
      ValueError: there is no trajectory.
    """
    if not len(trajectories):
        raise ValueError("no trajectories to learn from; an endless stream needs at least one")
    options = ExampleOptions(
        row_length=row_length,
        chunks_per_row=chunks_per_row,
        gamma=1.0,
        failure_reward=0.0,
        purpose="sft",
    )
    to_sft_example = functools.partial(_to_example, options=options)
    shuffled = grain.MapDataset.source(trajectories).seed(seed).shuffle()
    examples = shuffled.repeat().map(to_sft_example)
    stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
    packed = pack_stream(stream, row_length, chunks_per_row, bins=rows)
    return packed.batch(rows, batch_fn=to_batch)


def _to_example(trajectory: Trajectory, options: ExampleOptions) -> Example:
    return to_example(trajectory, 0.0, options)  # SFT reads no advantage
