"""Recorded trajectories as an endless stream of SFT batches whose position can be saved and
restored.

stream = iter(sft_batches(TrajectoryFiles("run/trajectories"), rows=8, row_length=512,
chunks_per_row=32, seed=0)) batch = next(stream)
position = stream.get_state()      # small and JSON-serialisable; goes into the checkpoint
stream.set_state(position)         # the next batch is the one after `batch`
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence

import grain

from rome.data.packing import pack_stream, to_batch, to_example
from rome.data.trajectory import Trajectory, load_trajectory


class TrajectoryFiles(Sequence):
    """The ATIF files of a directory, in the order of their names; each is read when it is asked
    for.
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
        try:
            return load_trajectory(self.paths[index])
        except ValueError as error:  # JSON errors are ValueErrors too
            raise ValueError(f"{self.paths[index]}: {error}") from error


def sft_batches(
    trajectories: Sequence[Trajectory],
    *,
    rows: int,
    row_length: int,
    chunks_per_row: int,
    seed: int,
) -> grain.IterDataset:
    """Batches of `rows` rows for ever.

    Each epoch has every trajectory once, in an order that depends on (seed, epoch) only.

    Args:
      trajectories: all trainable (an episode that infrastructure ended is an error here); a list or
        TrajectoryFiles.
    """
    if not len(trajectories):
        raise ValueError("no trajectories to learn from; an endless stream needs at least one")
    to_sft_example = functools.partial(
        to_example,
        row_length=row_length,
        chunks_per_row=chunks_per_row,
        gamma=1.0,
        failure_reward=0.0,
        advantage=0.0,
        purpose="sft",
    )
    shuffled = (
        grain.MapDataset.source(trajectories).seed(seed).shuffle().repeat().map(to_sft_example)
    )
    stream = shuffled.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16))
    return pack_stream(stream, row_length, chunks_per_row, bins=rows).batch(rows, batch_fn=to_batch)
