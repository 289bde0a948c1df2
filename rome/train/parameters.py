"""The parameters of a training checkpoint (orbax) without the rest of its state: read slice by
slice or onto a mesh, and written alone.

`Checkpoints` keeps whole training states. What is written here is a checkpoint of the same layout
that holds parameters only: a place to start from, not to resume.
"""

from __future__ import annotations

import math
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import Block
from rome.model.hf.names import checkpoint_tensors, leaf_at
from rome.model.params import parameter_shapes
from rome.train.checkpoint import CheckpointError, save_options

BOX_BYTES = (
    1024**3
)  # read at a time by `blocks`; whole stored chunks, so a little more where they are large


def saved_steps(directory: pathlib.Path) -> list[int]:
    """The whole checkpoints of a directory, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(directory))


class StoredParameters:
    """The parameters of checkpoint `step` under `directory`, still on disk.

    Raises: CheckpointError where they are not there, cannot be read, or are not those of `config`.
    """

    def __init__(self, directory: pathlib.Path, step: int, config: ModelConfig) -> None:
        self.path, self.config = (directory / str(step) / "state").absolute(), config
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(self.path).tree["params"]
        except Exception as error:  # orbax raises many kinds; each means the same to the user
            raise CheckpointError(
                f"{self.path} holds no parameters that can be read ({_first_line(error)}). Choose"
                " another --step."
            ) from error
        self._tree = tree
        shapes = {
            _names(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(config))
        }
        stored = {
            _names(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        wrong = [
            f"{'/'.join(path)} is {stored.get(path, 'missing')}, not"
            f" {shapes.get(path, 'one of its parameters')}"
            for path in sorted(shapes.keys() | stored.keys())
            if shapes.get(path) != stored.get(path)
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path} is of another model than its config.json says:"
                f" {'; '.join(wrong[:4])}{'; ...' if len(wrong) > 4 else ''}"
            )
        self.dtype = np.dtype(leaf_at(tree, ("embed", "embedding")).dtype)

    def restore(self, shardings: Any, dtype: Any) -> Any:
        """All of them as arrays of `dtype` in these shardings; every process reads its own part."""
        like = {
            "params": jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
                dict(self._tree),
                shardings,
            )
        }
        try:
            arguments = ocp.args.PyTreeRestore(
                like,
                restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                partial_restore=True,
            )
            return ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
                self.path, args=arguments
            )["params"]
        except Exception as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({_first_line(error)}). Choose another step."
            ) from error

    def blocks(self) -> Iterator[Block]:
        """Every tensor of a Hugging Face checkpoint, as `write_checkpoint` takes them.

        Memory holds a few boxes of BOX_BYTES.
        """
        tensors = checkpoint_tensors(self.config)
        for path in dict.fromkeys(tensor.path for tensor in tensors):
            array = self._open(path)
            own = [tensor for tensor in tensors if tensor.path == path]
            stack, row_axis = len(own[0].index), len(own[0].index) + own[0].rows[0]
            split = tuple(range(stack)) or (row_axis,)
            by_index = {tensor.index: tensor for tensor in own}
            for starts, stops in _boxes(
                array.shape,
                array.chunk_layout.read_chunk.shape,
                array.dtype.numpy_dtype.itemsize,
                split,
            ):
                box = _Box(array, tuple(slice(*bounds) for bounds in zip(starts, stops)), self.path)
                for index in np.ndindex(
                    *(stop - start for start, stop in zip(starts[:stack], stops[:stack]))
                ):
                    tensor = by_index[tuple(start + i for start, i in zip(starts, index))]
                    yield (
                        tensor.name,
                        starts[row_axis] * tensor.rows_each,
                        lambda box=box, index=index, tensor=tensor: tensor.to_hf(box.read()[index]),
                    )

    def _open(self, path: tuple[str, ...]) -> tensorstore.TensorStore:
        name = ".".join(("params", *path))
        return tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": f"file://{self.path}", "path": f"{name}/"},
            },
            open=True,
            read=True,
        ).result()


class _Box:
    """A part of a stored array: read once, by the first thread that asks, and freed with the last
    that holds it.
    """

    def __init__(
        self, array: tensorstore.TensorStore, where: tuple[slice, ...], path: pathlib.Path
    ) -> None:
        self._array, self._where, self._path = array, where, path
        self._lock, self._values = threading.Lock(), None

    def read(self) -> np.ndarray:
        with self._lock:
            if self._values is None:
                try:
                    self._values = self._array[self._where].read().result()
                except ValueError as error:
                    raise CheckpointError(
                        f"{self._path} cannot be read ({_first_line(error)}). Choose another"
                        " --step."
                    ) from error
            return self._values


def save_parameters(directory: pathlib.Path, params: Any) -> None:
    """Writes `params` as checkpoint 0 of `directory`: there whole, or not at all."""
    state = {"params": params}
    with ocp.CheckpointManager(directory.absolute()) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state, save_args=save_options(state))
            ),
        )


def _boxes(
    shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int, split: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Starts and stops of boxes of about BOX_BYTES that make up an array; only the axes in `split`
    are divided, between chunks if that fits.
    """
    steps = list(shape)
    for axis in split:
        rest = math.prod(steps) // steps[axis] * itemsize
        fitting = max(1, min(steps[axis], BOX_BYTES // rest))
        if fitting >= chunk[axis]:
            fitting -= fitting % chunk[axis]
        elif chunk[axis] * rest <= 4 * BOX_BYTES:
            fitting = chunk[axis]
        steps[axis] = fitting
    for corner in np.ndindex(*(-(-size // step) for size, step in zip(shape, steps))):
        starts = tuple(i * step for i, step in zip(corner, steps))
        yield (
            starts,
            tuple(min(start + step, size) for start, step, size in zip(starts, steps, shape)),
        )


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
