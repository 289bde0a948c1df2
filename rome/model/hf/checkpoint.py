"""Hugging Face checkpoints, in and out: safetensors and config.json, streamed between files and
arrays that may lie on any number of devices.

A checkpoint directory is exactly what `transformers` writes for Qwen3MoeForCausalLM. Both
directions move one block of one tensor at a time, on several threads: a range of its rows, at most
BLOCK_BYTES. So host memory holds some hundred megabytes whatever the model's size, and the stacked
parameters exist on their devices only. `hf_names` says which tensor is which slice of ours,
`hf_files` how bytes lie in the files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rome.model.config import ModelConfig
from rome.model.hf import files as hf_files
from rome.model.hf.files import (
    MAX_SHARD_BYTES,
    CheckpointReader,
    CheckpointWriter,
    file_dtype,
    in_threads,
)
from rome.model.hf.names import (
    Tensor,
    checkpoint_tensors,
    expected_tensors,
    leaf_at,
    parameter_shapes,
)
from rome.model.sharding import in_turn

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def read_config(directory: str | pathlib.Path, **overrides: Any) -> ModelConfig:
    """The model of a checkpoint directory.

    `overrides` are ModelConfig fields that config.json does not hold, such as remat="none".
    """
    return ModelConfig.from_hf(
        hf_files.read_json(pathlib.Path(directory) / "config.json"), **overrides
    )


def load_hf(
    directory: str | pathlib.Path,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    *,
    progress: Progress | None = None,
    **overrides: Any,
) -> tuple[Any, ModelConfig]:
    """Reads a checkpoint directory into parameters of `dtype`, stacked over layers.

    Missing, unknown and mis-shaped tensors are one error that lists them, before any is read.

    Args:
      shardings: a sharding for each parameter, as param_shardings gives. Parameters then go
        straight to their devices, and each process reads only its own part, once, however many
        devices hold it. With several processes all of them call this. None: NumPy arrays.
      progress: told the bytes of the files that are read so far, and how many this process will
        read; called from several threads.
      overrides: as in `read_config`.
    """
    directory, dtype = pathlib.Path(directory), np.dtype(dtype)
    config = read_config(directory, **overrides)
    with open_checkpoint(directory, config) as reader:
        arrays = _arrays(config, dtype, shardings)
        jobs = sorted(
            _reads(config, arrays, reader),
            key=lambda job: (
                reader.tensors[job.tensor.name].path,
                reader.tensors[job.tensor.name].offset,
                job.start,
            ),
        )
        count = _Counter(progress, sum(job.bytes for job in jobs))

        def run(job: _Read) -> None:
            each = job.tensor.rows_each
            block = reader.read(job.tensor.name, job.start * each, job.stop * each)
            for part in job.parts:
                part.write(job.tensor, job.start, job.stop, block)
            count.add(job.bytes)

        in_threads(run, jobs)
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        _insert(params, path, array.result())
    return params, config


def save_hf(
    params: Any,
    config: ModelConfig,
    directory: str | pathlib.Path,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    progress: Progress | None = None,
) -> None:
    """Writes config.json and model.safetensors, or several shards and their index where one would
    exceed max_shard_bytes.

    A checkpoint that is already in `directory` is removed first, and the new one is there only when
    all of it is: to publish while someone watches, write beside the place and rename. Where
    parameters lie on the devices of several processes, all of them call this with one shared
    directory; each writes its share of the shards.

    Args:
      params: stacked over layers, or unstacked (`unstack_layers`); NumPy arrays or on devices, in
        any sharding.
      dtype: float32 unless bfloat16 is asked for.
      progress: told the bytes written so far by this process, and how many it will write; called
        from several threads.
    """
    dtype = file_dtype(dtype or jnp.float32)
    tensors = checkpoint_tensors(config)
    _check_parameters(params, config)
    writer = CheckpointWriter(
        pathlib.Path(directory),
        {tensor.name: tensor.shape for tensor in tensors},
        dtype,
        max_shard_bytes,
        jax.process_index(),
        jax.process_count(),
    )
    spelled = config.to_hf() | {"dtype": dtype.name, "torch_dtype": dtype.name}
    write_checkpoint(writer, _cut_all(params, tensors, writer), spelled, progress)


Block = tuple[
    str, int, Callable[[], np.ndarray]
]  # tensor, first row, what brings the rows to the host


def write_checkpoint(
    writer: CheckpointWriter,
    blocks: Iterator[Block],
    config: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Takes a writer from an empty directory to a whole checkpoint.

    `blocks` is drawn in this thread, what it brings is called in others.
    """
    several = jax.process_count() > 1
    wait_for_all = multihost_utils.sync_global_devices if several else lambda name: None
    count = _Counter(progress, writer.own_bytes)

    def write(block: Block) -> None:
        tensor, start, fetch = block
        rows = fetch()
        writer.write(tensor, start, rows)
        count.add(rows.size * writer.dtype.itemsize)

    try:
        if jax.process_index() == 0:
            writer.clear()
        wait_for_all("checkpoint cleared")
        writer.open()
        in_threads(write, blocks)
        writer.finish()
        wait_for_all("checkpoint written")
        if jax.process_index() == 0:
            writer.commit(config)
        wait_for_all("checkpoint committed")
    finally:
        writer.close()


def named_tensors(
    params: Any, config: ModelConfig, only: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of a checkpoint with these parameters, or only the one of that name: its name and
    values, in the parameters' own type.

    One at a time is on the host. Parameters are as in `save_hf`.
    """
    _check_parameters(params, config)
    for tensor in checkpoint_tensors(config):
        if only not in (None, tensor.name):
            continue
        yield tensor.name, _cut(params, tensor, 0, tensor.sizes[tensor.rows[0]])()


def open_checkpoint(directory: pathlib.Path, config: ModelConfig) -> CheckpointReader:
    """The reader of a checkpoint that holds the tensors of `config` and no others."""
    reader = CheckpointReader(directory)
    wanted, found = expected_tensors(config), reader.tensors
    extra = set(found) - set(wanted)
    if config.tie_embeddings:
        extra.discard("lm_head.weight")  # some writers store the tied head a second time
    lists = {
        "missing": [name for name in wanted if name not in found],
        "extra": sorted(extra),
        "misshaped": [
            f"{name} is {found[name].shape}, not {shape}"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ],
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for kind, names in lists.items()
        if names
    ]
    if parts:
        raise ValueError(
            f"{directory} does not hold the tensors its config.json asks for. {'; '.join(parts)}"
        )
    return reader


# -- in
# -------------------------------------------------------------------------------------------------


class _Part:
    """One distinct piece of a parameter: index `starts` to `stops` of each axis, on the devices
    that hold it (none: in host memory).

    A small one is put together on the host. A large one is a buffer on each device, into which
    blocks are written in place.
    """

    def __init__(
        self,
        starts: Sequence[int],
        stops: Sequence[int],
        dtype: np.dtype,
        devices: Sequence[jax.Device],
    ) -> None:
        self.starts, self.stops, self.dtype, self.devices = (
            tuple(starts),
            tuple(stops),
            dtype,
            list(devices),
        )
        shape = tuple(stop - start for start, stop in zip(starts, stops))
        self.on_host = not devices or math.prod(shape) * dtype.itemsize <= hf_files.BLOCK_BYTES
        self.buffers = (
            [np.empty(shape, dtype)]
            if self.on_host
            else [jnp.zeros(shape, dtype, device=device) for device in self.devices]
        )
        self._lock = threading.Lock()

    def needs(self, tensor: Tensor) -> range | None:
        """Which indices of the tensor's row axis are here; None if nothing of it is."""
        stack = len(tensor.index)
        if not all(
            start <= i < stop for i, start, stop in zip(tensor.index, self.starts, self.stops)
        ):
            return None
        return range(self.starts[stack + tensor.rows[0]], self.stops[stack + tensor.rows[0]])

    def write(self, tensor: Tensor, start: int, stop: int, block: np.ndarray) -> None:
        """Takes what is here of `block`: indices start to stop of the tensor's row axis, all
        columns.
        """
        rows = self.needs(tensor)
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first >= last:
            return
        stack, each = len(tensor.index), tensor.rows_each
        starts, stops = list(self.starts[stack:]), list(self.stops[stack:])
        block = block[(first - start) * each : (last - start) * each]
        if tensor.columns:
            axis = tensor.columns[0]
            width = block.shape[1] // tensor.sizes[axis]
            block = block[:, starts[axis] * width : stops[axis] * width]
        starts[tensor.rows[0]], stops[tensor.rows[0]] = first, last
        piece = tensor.to_ours(
            block.astype(self.dtype, copy=False),
            tuple(stop - start for start, stop in zip(starts, stops)),
        )
        at = tuple(
            np.int32(start - origin) for start, origin in zip((*tensor.index, *starts), self.starts)
        )
        piece = piece.reshape((1,) * stack + piece.shape)
        if self.on_host:
            self.buffers[0][tuple(slice(i, i + size) for i, size in zip(at, piece.shape))] = piece
            return
        with self._lock:
            self.buffers = [
                _update(buffer, jax.device_put(piece, device), at)
                for buffer, device in zip(self.buffers, self.devices)
            ]
            jax.block_until_ready(
                self.buffers
            )  # the piece is free again: no more of them than threads


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, piece: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
    return _as_floats(
        jax.lax.dynamic_update_slice(_as_bits(buffer), _as_bits(piece), at), buffer.dtype
    )


def _as_bits(array: jax.Array) -> jax.Array:
    """Unsigned integers: a backend that computes bfloat16 in float32 would change the bits of a NaN
    even where it only moves it.
    """
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _as_floats(bits: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, dtype)


@dataclasses.dataclass
class _Array:
    """A parameter that is being read: its distinct parts of this process in the sharding `read_as`,
    and the sharding that it gets.
    """

    shape: tuple[int, ...]
    sharding: Sharding | None
    read_as: Sharding | None
    parts: list[_Part]

    def result(self) -> np.ndarray | jax.Array:
        if self.sharding is None:
            return self.parts[0].buffers[0]
        on_devices = []
        for part in self.parts:
            on_devices += (
                [jax.device_put(part.buffers[0], device) for device in part.devices]
                if part.on_host
                else part.buffers
            )
            part.buffers = []
        array = jax.make_array_from_single_device_arrays(self.shape, self.read_as, on_devices)
        return (
            array
            if self.read_as is self.sharding
            else jax.jit(lambda array: array, out_shardings=self.sharding, donate_argnums=0)(array)
        )


@dataclasses.dataclass(frozen=True)
class _Read:
    """Indices start to stop of a tensor's row axis, and the parts that take something of them."""

    tensor: Tensor
    start: int
    stop: int
    bytes: int
    parts: list[_Part]


def _arrays(config: ModelConfig, dtype: np.dtype, shardings: Any) -> dict[tuple[str, ...], _Array]:
    shapes = parameter_shapes(config)
    if shardings is not None and jax.tree.structure(shardings) != jax.tree.structure(shapes):
        raise ValueError(
            "shardings are not those of this checkpoint's parameters; make them with"
            " param_shardings(mesh, read_config(directory))"
        )
    arrays = {}
    for path, tensor in {tensor.path: tensor for tensor in checkpoint_tensors(config)}.items():
        shape, stack = tuple(leaf_at(shapes, path).shape), len(tensor.index)
        if shardings is None:
            arrays[path] = _Array(shape, None, None, [_Part([0] * len(shape), shape, dtype, [])])
            continue
        sharding, holders = leaf_at(shardings, path), {}
        read_as = _by_rows(sharding, tensor, shape)
        for device, index in read_as.addressable_devices_indices_map(shape).items():
            bounds = tuple(piece.indices(size)[:2] for piece, size in zip(index, shape))
            holders.setdefault(bounds, []).append(device)
        inner = [stack + axis for group in (tensor.rows, tensor.columns) for axis in group[1:]]
        if any(bounds[axis] != (0, shape[axis]) for bounds in holders for axis in inner):
            raise ValueError(
                f"{'/'.join(path)} {shape} is sharded as {sharding}; of the axes that a checkpoint"
                " joins only the first may be split"
            )
        arrays[path] = _Array(
            shape,
            sharding,
            read_as,
            [_Part(*zip(*bounds), dtype, devices) for bounds, devices in holders.items()],
        )
    return arrays


def _by_rows(sharding: Sharding, tensor: Tensor, shape: tuple[int, ...]) -> Sharding:
    """The sharding to read a parameter in.

    Only rows of a tensor lie together in its file: where several processes split its columns, each
    would read all of them. Then the rows are split further instead, if they divide, and the devices
    exchange what they read.
    """
    if (
        not isinstance(sharding, NamedSharding)
        or sharding.is_fully_addressable
        or not tensor.columns
    ):
        return sharding
    row, column = (len(tensor.index) + group[0] for group in (tensor.rows, tensor.columns))
    axes = _axes(sharding, len(shape))
    axes[row], axes[column] = (
        axes[column] + axes[row],
        (),
    )  # in this order a process's rows lie together
    if shape[row] % math.prod(sharding.mesh.shape[name] for name in axes[row]):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _axes(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes of each axis of an array."""
    axes = [
        () if names is None else names if isinstance(names, tuple) else (names,)
        for names in sharding.spec
    ]
    return axes + [()] * (ndim - len(axes))


def _reads(
    config: ModelConfig, arrays: dict[tuple[str, ...], _Array], reader: CheckpointReader
) -> Iterator[_Read]:
    """What this process has to read: every row that some part needs, once, in blocks."""
    for tensor in checkpoint_tensors(config):
        needs = [
            (part, rows)
            for part in arrays[tensor.path].parts
            if (rows := part.needs(tensor)) is not None
        ]
        row_bytes = reader.tensors[tensor.name].row_bytes * tensor.rows_each
        step = max(1, hf_files.BLOCK_BYTES // row_bytes)
        for begin, end in _merged((rows.start, rows.stop) for _, rows in needs):
            for start in range(begin, end, step):
                stop = min(start + step, end)
                parts = [part for part, rows in needs if rows.start < stop and start < rows.stop]
                yield _Read(tensor, start, stop, (stop - start) * row_bytes, parts)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of ranges, as few as can be, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


# -- out
# -------------------------------------------------------------------------------------------------


def _check_parameters(params: Any, config: ModelConfig) -> None:
    """Raises a ValueError that names the first parameter which is not as the config says."""
    shapes = parameter_shapes(config)
    if isinstance(params.get("layers"), (tuple, list)):
        if len(params["layers"]) != config.num_layers:
            raise ValueError(
                f"parameters have {len(params['layers'])} layers, the config says"
                f" {config.num_layers}"
            )
        return  # each slice is checked when it is cut
    for path in dict.fromkeys(tensor.path for tensor in checkpoint_tensors(config)):
        leaf, shape = leaf_at(params, path), tuple(leaf_at(shapes, path).shape)
        if leaf is None:
            raise ValueError(
                f"parameters have no {'/'.join(path)}; expected the stacked pytree of init_params"
            )
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"parameter {'/'.join(path)} has shape {tuple(leaf.shape)}, the config says {shape}"
            )


def _cut_all(params: Any, tensors: list[Tensor], writer: CheckpointWriter) -> Iterator[Block]:
    for tensor in tensors:
        for start, stop in tensor.blocks(4, hf_files.BLOCK_BYTES):
            fetch = _cut(
                params, tensor, start, stop
            )  # by every process, in one order: it may be a collective
            if writer.owns(tensor.name):
                yield tensor.name, start * tensor.rows_each, fetch


def _cut(params: Any, tensor: Tensor, start: int, stop: int) -> Callable[[], np.ndarray]:
    """Starts to cut indices start to stop of the tensor's row axis out of its parameter; what is
    returned brings them, in checkpoint layout.
    """
    index = tensor.index
    if isinstance(params["layers"], (tuple, list)) and tensor.layer is not None:
        leaf, index = leaf_at(params["layers"][tensor.layer], tensor.path[1:]), index[1:]
    else:
        leaf = leaf_at(params, tensor.path)
    starts, sizes = [0] * len(tensor.sizes), list(tensor.sizes)
    if leaf is None or tuple(leaf.shape[len(index) :]) != tensor.sizes:
        raise ValueError(
            f"parameter {'/'.join(tensor.path)} of {tensor.name} is {getattr(leaf, 'shape', None)},"
            f" the config says {tensor.sizes}"
        )
    starts[tensor.rows[0]], sizes[tensor.rows[0]] = start, stop - start
    at, extent = (*index, *starts), (1,) * len(index) + tuple(sizes)
    if isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]:
        leaf = np.asarray(leaf)  # the same memory: nothing to compile, nothing to copy
    if isinstance(leaf, jax.Array):
        sharding = leaf.sharding
        split = isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated
        cut = in_turn(
            _cut_sharded(leaf, np.array(at, np.int32), extent, sharding)
            if split
            else _cut_whole(leaf, np.array(at, np.int32), extent)
        )
        return lambda: tensor.to_hf(np.asarray(cut.addressable_data(0)).reshape(sizes))
    piece = leaf[tuple(slice(i, i + size) for i, size in zip(at, extent))]
    return lambda: tensor.to_hf(piece.reshape(sizes))


@functools.partial(jax.jit, static_argnums=2)
def _cut_whole(leaf: jax.Array, at: jax.Array, extent: tuple[int, ...]) -> jax.Array:
    return _as_floats(jax.lax.dynamic_slice(_as_bits(leaf), tuple(at), extent), leaf.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cut_sharded(
    leaf: jax.Array, at: jax.Array, extent: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    """leaf[at:at + extent], whole on every device.

    Left to itself the compiler would gather a split axis before it cuts it.

    Every device cuts what it has of the piece, and zeros elsewhere, and all add up; as integers,
    since -0.0 + 0.0 is not -0.0.
    """
    axes = _axes(sharding, leaf.ndim)

    def local(shard: jax.Array, at: jax.Array) -> jax.Array:
        bits, here = _as_bits(shard), jnp.ones((1,) * shard.ndim, bool)
        for axis in sorted(
            range(shard.ndim), key=lambda axis: bool(axes[axis])
        ):  # whole axes first: less is left to gather from
            if not axes[axis]:
                bits = jax.lax.dynamic_slice_in_dim(bits, at[axis], extent[axis], axis)
                continue
            length = shard.shape[axis]
            wanted = at[axis] - jax.lax.axis_index(axes[axis]) * length + jnp.arange(extent[axis])
            bits = jnp.take(bits, jnp.clip(wanted, 0, length - 1), axis=axis)
            here &= jnp.expand_dims(
                (wanted >= 0) & (wanted < length),
                [other for other in range(shard.ndim) if other != axis],
            )
        total = jax.lax.psum(
            jnp.where(here, bits, 0).astype(jnp.uint32),
            tuple(name for names in axes for name in names),
        )
        return _as_floats(total.astype(bits.dtype), shard.dtype)

    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(leaf, at)


class _Counter:
    """Adds up bytes from several threads and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done, self._lock = progress, total, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
