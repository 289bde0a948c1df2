"""The parameters of a training checkpoint without the rest of its state.

`Checkpoints` keeps whole training states. Here parameters alone are read, slice by slice or onto a
mesh, and written as a checkpoint of the same layout that holds nothing else: a place to start from,
not to resume.
"""

from __future__ import annotations

import functools
import math
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import Block
from rome.model.hf.names import checkpoint_tensors, leaf_at
from rome.model.hf.peft import HostAdapters
from rome.model.lora import Lora, adapter_shapes
from rome.model.params import parameter_shapes
from rome.train.checkpoint import CheckpointError, first_line, save_options

# `blocks` reads this much at a time: whole stored chunks, so a little more where they are large.
BOX_BYTES = 1024**3
MAX_DIFFERENCES = 4  # parameters that a message names

Place = tuple[int, ...]


def saved_steps(directory: pathlib.Path) -> list[int]:
    """Return the steps of the whole checkpoints of a directory, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(directory))


class StoredParameters:
    """The parameters of one checkpoint, still on disk.

    Args:
      directory: of the checkpoints.
      step: of the checkpoint.
      config: the model that the parameters must be of.

    Attributes:
      dtype: of the stored parameters.

    Raises:
      CheckpointError: where the parameters are missing, cannot be read, or are of another model.
    """

    def __init__(self, directory: pathlib.Path, step: int, config: ModelConfig) -> None:
        self.path = (directory / str(step) / "state").absolute()
        self.config = config
        self._tree = _stored_tree(self.path, parameter_shapes(config))
        self.dtype = np.dtype(leaf_at(self._tree, ("embed", "embedding")).dtype)

    def restore(self, shardings: Any, dtype: Any) -> Any:
        """Return all parameters on a mesh; every process reads its own part.

        Args:
          shardings: a tree like that of the parameters.
          dtype: of the returned arrays.

        Raises:
          CheckpointError: where the files cannot be read.
        """

        def abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

        return _restore(self.path, jax.tree.map(abstract, dict(self._tree), shardings))

    def blocks(self) -> Iterator[Block]:
        """Yield every tensor of a Hugging Face checkpoint, as `write_checkpoint` takes them.

        A block is (name, first row, a function that reads it). Memory holds a few boxes of
        BOX_BYTES.
        """
        tensors = checkpoint_tensors(self.config)
        for path in dict.fromkeys(tensor.path for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.path == path]
            yield from self._blocks_of_array(self._open(path), own)

    def _blocks_of_array(
        self, array: tensorstore.TensorStore, tensors: Sequence[Any]
    ) -> Iterator[Block]:
        """Yield the blocks of the tensors that lie in one stored array.

        The first axes of the array index the tensors; the axis after them counts their rows.
        """
        num_stacked = len(tensors[0].index)
        row_axis = num_stacked + tensors[0].rows[0]
        split = tuple(range(num_stacked)) or (row_axis,)
        by_index = {tensor.index: tensor for tensor in tensors}
        shape = tuple(array.shape)
        chunk: Any = array.chunk_layout.read_chunk.shape
        itemsize = array.dtype.numpy_dtype.itemsize
        for starts, stops in _boxes(shape, chunk, itemsize, split):
            where = tuple(slice(*bounds) for bounds in zip(starts, stops, strict=True))
            box = _Box(array, where, self.path)
            extents = [
                stop - start
                for start, stop in zip(starts[:num_stacked], stops[:num_stacked], strict=True)
            ]
            for inside in np.ndindex(*extents):
                index = tuple(
                    start + i for start, i in zip(starts[:num_stacked], inside, strict=True)
                )
                tensor = by_index[index]
                read = functools.partial(_read_tensor, box, inside, tensor)
                yield tensor.name, starts[row_axis] * tensor.rows_each, read

    def _open(self, path: tuple[str, ...]) -> tensorstore.TensorStore:
        name = ".".join(("params", *path))
        # No URL: in one, a folder called "run#2" would be cut at the "#".
        base = {"driver": "file", "path": f"{self.path}/"}
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


class _Box:
    """A part of a stored array: read once, by the first thread that asks for it.

    It is freed with the last reference to it.
    """

    def __init__(
        self, array: tensorstore.TensorStore, where: tuple[slice, ...], path: pathlib.Path
    ) -> None:
        self._array = array
        self._where = where
        self._path = path
        self._lock = threading.Lock()
        self._values: np.ndarray | None = None

    def read(self) -> np.ndarray:
        with self._lock:
            if self._values is None:
                self._values = self._read()
            return self._values

    def _read(self) -> np.ndarray:
        try:
            return self._array[self._where].read().result()
        except ValueError as error:
            raise CheckpointError(
                f"{self._path} cannot be read ({first_line(error)}). Choose another --step."
            ) from error


def _read_tensor(box: _Box, index: Place, tensor: Any) -> Any:
    """Return one tensor of a box in the layout of a Hugging Face checkpoint."""
    return tensor.to_hf(box.read()[index])


def stored_adapters(
    directory: pathlib.Path, step: int, config: ModelConfig, lora: Lora
) -> HostAdapters:
    """Return the adapters of one checkpoint, in host memory.

    Raises:
      CheckpointError: they are missing, cannot be read, or are of another model.
    """
    path = (directory / str(step) / "state").absolute()
    shapes = adapter_shapes(config, lora)
    _stored_tree(path, shapes)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    adapters = _restore(path, jax.tree.map(abstract, shapes))
    return HostAdapters.of(jax.device_get(adapters), config, lora)


def stored_base(directory: pathlib.Path, step: int) -> dict[str, str]:
    """Return what a checkpoint of adapters says of their base: from, digest, dtype.

    Raises:
      CheckpointError: it says nothing that can be read.
    """
    path = (directory / str(step) / "host").absolute()
    try:
        return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path)["base"]
    except Exception as error:
        raise CheckpointError(
            f"{path} does not say what its adapters belong to ({first_line(error)}). Choose another"
            " --step."
        ) from error


def _stored_tree(path: pathlib.Path, shapes: Any) -> Any:
    """Return the metadata of a checkpoint's parameters, after a check that they have these shapes.

    Raises:
      CheckpointError: they cannot be read, or have others.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree["params"]
    except Exception as error:  # orbax raises many types; each means the same to the user
        raise CheckpointError(
            f"{path} holds no parameters that can be read ({first_line(error)}). Choose another"
            " --step."
        ) from error
    wanted = _shapes(shapes)
    stored = _shapes(tree)
    wrong = [
        f"{'/'.join(name)} is {stored.get(name, 'missing')}, not"
        f" {wanted.get(name, 'one of its parameters')}"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    if wrong:
        more = "; ..." if len(wrong) > MAX_DIFFERENCES else ""
        raise CheckpointError(
            f"{path} is of another model than its config.json says:"
            f" {'; '.join(wrong[:MAX_DIFFERENCES])}{more}"
        )
    return tree


def _restore(path: pathlib.Path, params: Any) -> Any:
    """Return the parameters of a checkpoint like these abstract arrays."""
    like = {"params": params}
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    try:
        arguments = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        return checkpointer.restore(path, args=arguments)["params"]
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}). Choose another step."
        ) from error


def save_parameters(directory: pathlib.Path, params: Any) -> None:
    """Write `params` as checkpoint 0 of a directory, whole or not at all."""
    state = {"params": params}
    arrays = ocp.args.StandardSave(state, save_args=save_options(state))
    with ocp.CheckpointManager(directory.absolute()) as manager:
        manager.save(0, args=ocp.args.Composite(state=arrays))


def _boxes(
    shape: Place, chunk: Place, itemsize: int, split: tuple[int, ...]
) -> Iterator[tuple[Place, Place]]:
    """Yield starts and stops of boxes of about BOX_BYTES that make up an array.

    Only the axes in `split` are divided, between stored chunks if that fits.
    """
    steps = list(shape)
    for axis in split:
        bytes_of_row = math.prod(steps) // steps[axis] * itemsize
        fitting = max(1, min(steps[axis], BOX_BYTES // bytes_of_row))
        if fitting >= chunk[axis]:
            fitting -= fitting % chunk[axis]
        elif chunk[axis] * bytes_of_row <= 4 * BOX_BYTES:
            fitting = chunk[axis]
        steps[axis] = fitting
    counts = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
    for corner in np.ndindex(*counts):
        starts = tuple(i * step for i, step in zip(corner, steps, strict=True))
        stops = tuple(
            min(start + step, size) for start, step, size in zip(starts, steps, shape, strict=True)
        )
        yield starts, stops


def _shapes(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of each leaf by its path of names."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
