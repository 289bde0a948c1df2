"""Put parameters together from blocks of a checkpoint's tensors, on any number of devices.

Each process reads only the parts of the parameters that its devices hold, once, however many of its
devices hold them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rome.model.config import ModelConfig
from rome.model.hf import files
from rome.model.hf.bits import as_bits, as_floats, mesh_axes
from rome.model.hf.names import Tensor, checkpoint_tensors, leaf_at
from rome.model.params import parameter_shapes

Path = tuple[str, ...]  # keys of a parameter in the pytree


class Part:
    """One distinct piece of a parameter, on the devices that hold it.

    A small one is put together on the host. A large one is a buffer on each device, into which
    blocks are written in place.

    Args:
      starts: first index of the piece on each axis of the parameter.
      stops: index after its last one.
      dtype: of the parameter.
      devices: that hold it; none: host memory.
    """

    def __init__(
        self,
        starts: Sequence[int],
        stops: Sequence[int],
        dtype: np.dtype,
        devices: Sequence[jax.Device],
    ) -> None:
        self.starts = tuple(starts)
        self.stops = tuple(stops)
        self.dtype = dtype
        self.devices = list(devices)
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        size = math.prod(shape) * dtype.itemsize
        self.on_host = not devices or size <= files.BLOCK_BYTES
        self.buffers: list[Any]
        if self.on_host:
            self.buffers = [np.empty(shape, dtype)]
        else:
            self.buffers = [jnp.zeros(shape, dtype, device=device) for device in self.devices]
        self._lock = threading.Lock()

    def needed_rows(self, tensor: Tensor) -> range | None:
        """Return which indices of the tensor's row axis are here; None if none of it is."""
        num_stacked = len(tensor.index)
        stacked = zip(
            tensor.index, self.starts[:num_stacked], self.stops[:num_stacked], strict=True
        )
        if not all(start <= place < stop for place, start, stop in stacked):
            return None
        row_axis = num_stacked + tensor.rows[0]
        return range(self.starts[row_axis], self.stops[row_axis])

    def write(self, tensor: Tensor, start: int, stop: int, block: np.ndarray) -> None:
        """Copy the rows and columns that are here out of a block of a tensor.

        Args:
          tensor: of this parameter.
          start: first index of the tensor's row axis in the block.
          stop: index after the last one.
          block: all columns of these rows, as in the checkpoint.
        """
        rows = self.needed_rows(tensor)
        if rows is None:
            return
        first = max(start, rows.start)
        last = min(stop, rows.stop)
        if first >= last:
            return
        num_stacked = len(tensor.index)
        starts = list(self.starts[num_stacked:])
        stops = list(self.stops[num_stacked:])
        starts[tensor.rows[0]] = first
        stops[tensor.rows[0]] = last
        first_row = (first - start) * tensor.rows_each
        last_row = (last - start) * tensor.rows_each
        block = block[first_row:last_row]
        if tensor.columns:
            axis = tensor.columns[0]
            width = block.shape[1] // tensor.sizes[axis]
            block = block[:, starts[axis] * width : stops[axis] * width]
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        piece = tensor.to_ours(block.astype(self.dtype, copy=False), sizes)
        places = zip((*tensor.index, *starts), self.starts, strict=True)
        at = tuple(np.int32(place - origin) for place, origin in places)
        self._put(piece.reshape((1,) * num_stacked + piece.shape), at)

    def _put(self, piece: np.ndarray, at: tuple[np.int32, ...]) -> None:
        if self.on_host:
            ends = zip(at, piece.shape, strict=True)
            self.buffers[0][tuple(slice(place, place + size) for place, size in ends)] = piece
            return
        with self._lock:
            updated = []
            for buffer, device in zip(self.buffers, self.devices, strict=True):
                updated.append(_update(buffer, jax.device_put(piece, device), at))
            self.buffers = updated
            # The piece is free again: there are no more pieces than threads.
            jax.block_until_ready(self.buffers)


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, piece: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    bits = jax.lax.dynamic_update_slice(as_bits(buffer), as_bits(piece), at)
    return as_floats(bits, buffer.dtype)


@dataclasses.dataclass
class PartialArray:
    """A parameter that is being read.

    Attributes:
      shape: of the parameter.
      sharding: that it gets; None: a NumPy array.
      read_as: sharding in which it is read.
      parts: distinct parts of this process in `read_as`.
    """

    shape: tuple[int, ...]
    sharding: Sharding | None
    read_as: Sharding | None
    parts: list[Part]

    def result(self) -> np.ndarray | jax.Array:
        """Return the parameter; every part has been written."""
        if self.read_as is None:
            return self.parts[0].buffers[0]
        on_devices: list[jax.Array] = []
        for part in self.parts:
            if part.on_host:
                on_devices += [jax.device_put(part.buffers[0], device) for device in part.devices]
            else:
                on_devices += part.buffers
            part.buffers = []
        array = jax.make_array_from_single_device_arrays(self.shape, self.read_as, on_devices)
        if self.read_as is self.sharding:
            return array
        move = jax.jit(lambda array: array, out_shardings=self.sharding, donate_argnums=0)
        return move(array)


@dataclasses.dataclass(frozen=True)
class Read:
    """Indices start to stop of a tensor's row axis, and the parts that take some of them."""

    tensor: Tensor
    start: int
    stop: int
    bytes: int
    parts: list[Part]


def partial_arrays(
    config: ModelConfig, dtype: np.dtype, shardings: Any
) -> dict[Path, PartialArray]:
    """Return an empty array for each parameter.

    Args:
      config: the model.
      dtype: of the parameters.
      shardings: a sharding for each parameter; None: NumPy arrays.

    Raises:
      ValueError: the shardings have another structure, or split an axis that cannot be split.
    """
    shapes = parameter_shapes(config)
    if shardings is not None and jax.tree.structure(shardings) != jax.tree.structure(shapes):
        raise ValueError(
            "shardings are not those of this checkpoint's parameters; make them with"
            " param_shardings(mesh, read_config(directory))"
        )
    arrays = {}
    for path, tensor in {tensor.path: tensor for tensor in checkpoint_tensors(config)}.items():
        shape = tuple(leaf_at(shapes, path).shape)
        if shardings is None:
            whole = Part([0] * len(shape), shape, dtype, [])
            arrays[path] = PartialArray(shape, None, None, [whole])
        else:
            arrays[path] = sharded_array(tensor, shape, dtype, leaf_at(shardings, path))
    return arrays


def reads(
    config: ModelConfig, arrays: dict[Path, PartialArray], reader: files.CheckpointReader
) -> Iterator[Read]:
    """Yield every row that some part of this process needs, once, in blocks."""
    return reads_of(
        ((tensor, arrays[tensor.path]) for tensor in checkpoint_tensors(config)), reader
    )


def reads_of(
    tensors: Iterable[tuple[Tensor, PartialArray]], reader: files.CheckpointReader
) -> Iterator[Read]:
    """Yield the rows of some tensors that their arrays need, once, in blocks."""
    for tensor, array in tensors:
        needs = []
        for part in array.parts:
            rows = part.needed_rows(tensor)
            if rows is not None:
                needs.append((part, rows))
        row_bytes = reader.tensors[tensor.name].row_bytes * tensor.rows_each
        step = max(1, files.BLOCK_BYTES // row_bytes)
        for begin, end in _merged((rows.start, rows.stop) for _, rows in needs):
            for start in range(begin, end, step):
                stop = min(start + step, end)
                parts = [part for part, rows in needs if rows.start < stop and start < rows.stop]
                yield Read(tensor, start, stop, (stop - start) * row_bytes, parts)


def sharded_array(
    tensor: Tensor, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> PartialArray:
    """Return an empty array with a sharding, for the parameter that a tensor is a slice of.

    Raises:
      ValueError: the sharding splits an axis that cannot be split.
    """
    read_as = _by_rows(sharding, tensor, shape)
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in read_as.addressable_devices_indices_map(shape).items():
        axes = zip(index, shape, strict=True)
        bounds = tuple(piece.indices(size)[:2] for piece, size in axes)
        holders.setdefault(bounds, []).append(device)
    num_stacked = len(tensor.index)
    inner = [num_stacked + axis for axis in (*tensor.rows[1:], *tensor.columns[1:])]
    if any(bounds[axis] != (0, shape[axis]) for bounds in holders for axis in inner):
        raise ValueError(
            f"{'/'.join(tensor.path)} {shape} is sharded as {sharding}; of the axes that a"
            " checkpoint joins only the first may be split"
        )
    parts = []
    for bounds, devices in holders.items():
        starts = [start for start, _ in bounds]
        stops = [stop for _, stop in bounds]
        parts.append(Part(starts, stops, dtype, devices))
    return PartialArray(shape, sharding, read_as, parts)


def _by_rows(sharding: Sharding, tensor: Tensor, shape: tuple[int, ...]) -> Sharding:
    """Return the sharding to read a parameter in.

    Only rows of a tensor lie together in its file: where several processes split its columns, each
    would read all of them. Then the rows are split further instead, if they divide, and the devices
    exchange what they read.
    """
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable:
        return sharding
    if not tensor.columns:
        return sharding
    row = len(tensor.index) + tensor.rows[0]
    column = len(tensor.index) + tensor.columns[0]
    axes = mesh_axes(sharding, len(shape))
    axes[row] = axes[column] + axes[row]  # in this order a process's rows lie together
    axes[column] = ()
    if shape[row] % math.prod(sharding.mesh.shape[name] for name in axes[row]):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of ranges as the least number of ranges, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
