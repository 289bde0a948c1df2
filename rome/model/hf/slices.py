"""Cut checkpoint tensors out of parameters that may lie on any number of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rome.model.config import ModelConfig
from rome.model.hf.bits import as_bits, as_floats, mesh_axes
from rome.model.hf.names import Tensor, checkpoint_tensors, leaf_at
from rome.model.params import parameter_shapes
from rome.model.sharding import in_turn


def check_parameters(params: Any, config: ModelConfig) -> None:
    """Check that parameters have the shapes of a config.

    Raises:
      ValueError: names the first parameter that has not.
    """
    shapes = parameter_shapes(config)
    layers = params.get("layers")
    if isinstance(layers, (tuple, list)):
        if len(layers) != config.num_layers:
            raise ValueError(
                f"parameters have {len(layers)} layers, the config says {config.num_layers}"
            )
        return  # each slice is checked when it is cut
    for path in dict.fromkeys(tensor.path for tensor in checkpoint_tensors(config)):
        leaf = leaf_at(params, path)
        shape = tuple(leaf_at(shapes, path).shape)
        if leaf is None:
            raise ValueError(
                f"parameters have no {'/'.join(path)}; expected the stacked pytree of init_params"
            )
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"parameter {'/'.join(path)} has shape {tuple(leaf.shape)}, the config says {shape}"
            )


def start_cut(params: Any, tensor: Tensor, start: int, stop: int) -> Callable[[], np.ndarray]:
    """Start to cut rows of a tensor out of its parameter; return a function that brings them.

    Where the parameter lies on several processes' devices, all of them call this in the same order.

    Args:
      params: stacked over layers, or unstacked; NumPy arrays or on devices.
      tensor: the tensor.
      start: first index of the tensor's row axis.
      stop: index after the last one.

    Returns:
      A function without arguments that returns the rows in the checkpoint's layout.

    Raises:
      ValueError: the parameter is absent or has another shape.
    """
    leaf, index = _leaf_of(params, tensor)
    starts = [0] * len(tensor.sizes)
    sizes = list(tensor.sizes)
    starts[tensor.rows[0]] = start
    sizes[tensor.rows[0]] = stop - start
    at = (*index, *starts)
    extent = (1,) * len(index) + tuple(sizes)
    if _is_on_one_cpu(leaf):
        leaf = np.asarray(leaf)  # the same memory: nothing to compile, nothing to copy
    if not isinstance(leaf, jax.Array):
        ends = zip(at, extent, strict=True)
        piece = leaf[tuple(slice(place, place + size) for place, size in ends)]
        return lambda: tensor.to_hf(piece.reshape(sizes))
    cut = in_turn(_cut_on_devices(leaf, np.array(at, np.int32), extent))

    def fetch() -> np.ndarray:
        local = np.asarray(cut.addressable_data(0))
        return tensor.to_hf(local.reshape(sizes))

    return fetch


def _is_on_one_cpu(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    return [device.platform for device in leaf.devices()] == ["cpu"]


def _cut_on_devices(leaf: jax.Array, at: np.ndarray, extent: tuple[int, ...]) -> jax.Array:
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and not sharding.is_fully_replicated:
        return _cut_sharded(leaf, at, extent, sharding)
    return _cut_whole(leaf, at, extent)


def _leaf_of(params: Any, tensor: Tensor) -> tuple[Any, tuple[int, ...]]:
    """Return the parameter of a tensor and the tensor's place on its stacked axes."""
    layers = params["layers"]
    if isinstance(layers, (tuple, list)) and tensor.layer is not None:
        leaf = leaf_at(layers[tensor.layer], tensor.path[1:])
        index = tensor.index[1:]
    else:
        leaf = leaf_at(params, tensor.path)
        index = tensor.index
    if leaf is None or tuple(leaf.shape[len(index) :]) != tensor.sizes:
        raise ValueError(
            f"parameter {'/'.join(tensor.path)} of {tensor.name} is {getattr(leaf, 'shape', None)},"
            f" the config says {tensor.sizes}"
        )
    return leaf, index


@functools.partial(jax.jit, static_argnums=2)
def _cut_whole(leaf: jax.Array, at: jax.Array, extent: tuple[int, ...]) -> jax.Array:
    return as_floats(jax.lax.dynamic_slice(as_bits(leaf), tuple(at), extent), leaf.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _cut_sharded(
    leaf: jax.Array, at: jax.Array, extent: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    """Return leaf[at:at + extent], whole on every device.

    Without this the compiler would gather a split axis before it cuts it. Every device cuts what it
    has of the piece, and zeros elsewhere, and all add up; as integers, since -0.0 + 0.0 is not
    -0.0.
    """
    axes = mesh_axes(sharding, leaf.ndim)
    all_axes = tuple(name for names in axes for name in names)
    # whole axes first: less is left to gather from
    order = sorted(range(leaf.ndim), key=lambda axis: bool(axes[axis]))

    def cut_local(shard: jax.Array, at: jax.Array) -> jax.Array:
        bits = as_bits(shard)
        here = jnp.ones((1,) * shard.ndim, bool)
        for axis in order:
            start = at[axis]
            size = extent[axis]
            if not axes[axis]:
                bits = jax.lax.dynamic_slice_in_dim(bits, start, size, axis)
                continue
            length = shard.shape[axis]
            first = jax.lax.axis_index(axes[axis]) * length
            wanted = start - first + jnp.arange(size)
            bits = jnp.take(bits, jnp.clip(wanted, 0, length - 1), axis=axis)
            is_local = (wanted >= 0) & (wanted < length)
            others = [other for other in range(shard.ndim) if other != axis]
            here &= jnp.expand_dims(is_local, others)
        own = jnp.where(here, bits, 0).astype(jnp.uint32)
        total = jax.lax.psum(own, all_axes)
        return as_floats(total.astype(bits.dtype), shard.dtype)

    return jax.shard_map(
        cut_local,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(leaf, at)
