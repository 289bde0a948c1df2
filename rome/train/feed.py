"""Arrays between the hosts and the mesh, also when the mesh spans several processes: each feeds its own part, and the leader fetches the whole.

B rows, T tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

WHOLE_BYTES = 1 << 30  # an array above this is fetched one slice of its first axis (a layer) after the other


def feed(tree: Any, sharding: Sharding) -> Any:
    """Host arrays, equal in every process, as arrays on the mesh: a process copies to its devices what they hold, nothing else moves."""
    return jax.tree.map(lambda array: put(array, sharding), tree)


def put(array: Any, sharding: Sharding) -> jax.Array:
    """One array (NumPy, or a local JAX array), equal in every process, laid out as `sharding` says."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetch(tree: Any, keep: bool = True) -> Any:
    """The whole arrays on the host, NumPy. Every process takes part in the gathering; one with keep=False gets None and holds nothing."""
    arrays = jax.tree.map(lambda leaf: _fetch_one(leaf, keep), tree)
    return arrays if keep else None


def _fetch_one(array: jax.Array, keep: bool) -> np.ndarray | None:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array) if keep else None
    mesh = array.sharding.mesh
    if array.nbytes <= WHOLE_BYTES or array.ndim == 0:
        whole = _gather(mesh)(array)
        return np.asarray(whole) if keep else None
    host = np.empty(array.shape, array.dtype) if keep else None
    for index in range(array.shape[0]):
        part = _gather_slice(mesh)(array, np.int32(index))
        if keep:
            host[index] = np.asarray(part)
        part.delete()  # the next one needs its place
    return host


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


@functools.cache
def _gather_slice(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda array, index: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), out_shardings=NamedSharding(mesh, PartitionSpec()))
