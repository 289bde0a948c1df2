"""Functions over trees of arrays and their shardings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding


def cast_tree(params: dict, dtype: Any) -> dict:
    """Return the parameters as arrays of `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def zeros_like_tree(params: dict) -> dict:
    """Return zeros in the shapes of the parameters."""
    return jax.tree.map(jnp.zeros_like, params)


def all_finite(params: dict) -> jax.Array:
    """Return whether no array holds inf or NaN, as a boolean scalar."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return jnp.all(jnp.stack(finite))


def shardings_of(tree: Any) -> Any:
    """Return the sharding of every array (or abstract array) of a tree, in the same tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def in_device_memory(sharding: NamedSharding) -> NamedSharding:
    """Return the same layout in the memory of the devices."""
    return sharding.with_memory_kind("device")


def in_host_memory(sharding: NamedSharding) -> NamedSharding:
    """Return the same layout in the host's memory."""
    return sharding.with_memory_kind("pinned_host")


def abstract(leaf: Any, sharding: NamedSharding) -> Any:
    """Return shape, dtype and sharding of an array, without its values."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
