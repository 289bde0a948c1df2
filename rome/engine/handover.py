"""Weights that a trainer hands over to an engine in its own process: as arrays, without a file.

The trainer's next update donates its arrays, so an engine gets arrays of its own: a copy in the
compute type, with layers unstacked, on one device or on a mesh. A layer's parameter is copied at a
time. Two figures of 32 bits for each tensor, computed on the devices where the tensor lies, tell
whether the engine holds what the trainer has.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from rome.model.config import ModelConfig
from rome.model.params import engine_sharding
from rome.model.qwen3 import Params
from rome.model.stacking import unstack_layers

# Odd numbers with well mixed bits, by which the figures of a tensor multiply each place and value.
FACTORS = (0x9E3779B1, 0x85EBCA77)
Path = tuple[Any, ...]  # of a parameter in its tree


@dataclasses.dataclass(frozen=True)
class Handover:
    """One version of the weights, as arrays for an engine in this process.

    Attributes:
      params: layers unstacked, in the compute type; shared with nothing else.
      config: of the model, as the engine computes it.
      checksums: of the trainer's own arrays, by name of the tensor.
    """

    params: Params
    config: ModelConfig
    checksums: dict[str, str]

    def changed_since(self, earlier: Handover) -> frozenset[str]:
        """Return the names of the tensors whose values differ from those of another version."""
        return frozenset(
            name for name, sum in self.checksums.items() if earlier.checksums.get(name) != sum
        )


def hand_over(params: Params, config: ModelConfig, place: Mesh | jax.Device) -> Handover:
    """Return a copy of the trainer's weights for an engine.

    The trainer's arrays are only read, and may be donated as soon as this returns.

    Args:
      params: of the trainer, stacked over layers, on any mesh of this process.
      config: of the model; `config.dtype` is the compute type.
      place: the engine's mesh, or its one device. Where its parts are those of a part of the
        trainer's mesh (`rome.model.sharding.engine_part`), no byte passes through the host.
    """
    dtype = jnp.dtype(config.dtype)

    def copy(path: Path, leaf: Array) -> Any:
        name = "/".join(key.key for key in path)
        target = engine_sharding(place, name)
        staged = _staged_as(leaf, target)
        if not _is_stacked(path):
            return jax.device_put(_copy(leaf, dtype, staged), target)
        layers = np.empty(leaf.shape[0], object)  # cut by `unstack_layers` as it is
        for number in range(leaf.shape[0]):
            own = _copy_layer(leaf, np.int32(number), dtype, staged)
            layers[number] = jax.device_put(own, target)
        return layers

    sums = unstack_layers(jax.device_get(_sum_stacked(params, dtype)), config)
    copied = unstack_layers(jax.tree_util.tree_map_with_path(copy, params), config)
    jax.block_until_ready(copied)
    # An engine leaves nothing out that a trainer's experts have no room for.
    served = dataclasses.replace(config, remat="none", capacity_factor=0.0)
    return Handover(copied, served, _name(sums))


def _staged_as(leaf: Array, target: Sharding) -> Sharding | None:
    """Return the sharding on the trainer's mesh that gives each device what the engine has there.

    None: the trainer has one device.
    """
    trainers = getattr(leaf, "sharding", None)  # NumPy arrays have none
    if not isinstance(trainers, NamedSharding):
        return None
    spec = target.spec if isinstance(target, NamedSharding) else PartitionSpec()
    return NamedSharding(trainers.mesh, spec)


def checksums(params: Params) -> dict[str, str]:
    """Return a checksum of each tensor of an engine's weights, by its name."""
    # Layer by layer: layers of one kind share a program.
    others = {name: part for name, part in params.items() if name != "layers"}
    sums = _sum_each(others) | {"layers": tuple(map(_sum_each, params["layers"]))}
    return _name(jax.device_get(sums))


def _is_stacked(path: Path) -> bool:
    return path[0].key == "layers"


@functools.partial(jax.jit, static_argnums=(1, 2))
def _copy(leaf: Array, dtype: Any, sharding: Sharding | None) -> Array:
    # Without jnp.copy, an array that is not cast is returned as it came: the trainer's own, which
    # its next update would delete.
    copied = jnp.copy(leaf.astype(dtype))
    return copied if sharding is None else jax.lax.with_sharding_constraint(copied, sharding)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _copy_layer(stack: Array, number: Array, dtype: Any, sharding: Sharding | None) -> Array:
    layer = jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
    return _copy(layer, dtype, sharding)


@functools.partial(jax.jit, static_argnums=1)
def _sum_stacked(params: Params, dtype: Any) -> Params:
    """Return the sums of the trainer's parameters once they are cast, [L, 2] for a stack."""

    def sum_up(path: Path, leaf: Array) -> Array:
        cast = leaf.astype(dtype)
        return jax.vmap(_sum_bits)(cast) if _is_stacked(path) else _sum_bits(cast)

    return jax.tree_util.tree_map_with_path(sum_up, params)


@jax.jit
def _sum_each(params: Params) -> Params:
    return jax.tree.map(_sum_bits, params)


def _sum_bits(tensor: Array) -> Array:
    """Return [2] uint32: sums over the bits of a tensor, each value mixed with its place.

    Additions of integers may be made in any order: the sums do not depend on the sharding.
    """
    unsigned = jnp.uint16 if tensor.dtype.itemsize == 2 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(tensor, unsigned).astype(jnp.uint32)
    place = jnp.zeros(tensor.shape, jnp.uint32)
    for axis, size in enumerate(tensor.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis)
    sums = []
    for factor in FACTORS:
        mixed = (bits ^ (place * jnp.uint32(factor))) * jnp.uint32(factor)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(FACTORS[0] ^ FACTORS[1])
        sums.append(jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32))
    return jnp.stack(sums)


def _name(sums: Params) -> dict[str, str]:
    """Return two sums for each tensor as text, by the tensor's name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{pair[0]:08x}{pair[1]:08x}"
        for path, pair in jax.tree_util.tree_leaves_with_path(sums)
    }
