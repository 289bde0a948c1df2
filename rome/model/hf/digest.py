"""A digest of a model's weights that does not depend on where and how they lie.

Each tensor of a checkpoint has a sum over its elements' bits, weighted by their row and column: of
arrays on any mesh it takes one pass of the devices, of files one pass over their blocks. It tells
models apart that were mixed up, not ones that somebody forged.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from rome.model.config import ModelConfig
from rome.model.hf.bits import as_bits
from rome.model.hf.names import Tensor, checkpoint_tensors, leaf_at

# Odd numbers: a product with one loses no bit of a 32-bit word.
_ROW = 2654435769
_COLUMN = 2246822519


def params_digest(params: Any, config: ModelConfig) -> str:
    """Return the digest of parameters stacked over layers, on any mesh: 16 hexadecimal digits."""
    by_path: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in checkpoint_tensors(config):
        by_path.setdefault(tensor.path, []).append(tensor)
    sums = {}
    for path, tensors in by_path.items():
        first = tensors[0]
        leaf = leaf_at(params, path)
        found = _on_host(_sums(leaf, len(first.index), first.rows, first.columns))
        for tensor in tensors:
            sums[tensor.name] = int(found[tensor.index])
    return _digest(sums)


def _on_host(sums: Array) -> np.ndarray:
    """Return sums that may lie on the devices of several processes."""
    if isinstance(sums.sharding, NamedSharding):
        sums = jax.device_put(sums, NamedSharding(sums.sharding.mesh, PartitionSpec()))
    return np.asarray(sums.addressable_data(0))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _sums(leaf: Array, stacked: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Array:
    """Return the sum of each stacked slice, uint32."""
    bits = as_bits(leaf).astype(jnp.uint32)
    sizes = leaf.shape[stacked:]
    weight = _weights(sizes, rows, _ROW) * _weights(sizes, columns, _COLUMN)
    axes = tuple(range(stacked, leaf.ndim))
    # one sum an axis: on a mesh each is split as the array is
    return jnp.sum(bits * weight, axis=axes, dtype=jnp.uint32)


def _weights(sizes: tuple[int, ...], axes: tuple[int, ...], factor: int) -> Array:
    """Return 2 * factor * place + 1 over the places that some axes count, row-major."""
    place = jnp.zeros(sizes, jnp.uint32)
    for axis in axes:
        own = jax.lax.broadcasted_iota(jnp.uint32, sizes, axis)
        place = place * jnp.uint32(sizes[axis]) + own
    return place * jnp.uint32(2 * factor % 2**32) + jnp.uint32(1)


class FilesDigest:
    """The digest of a checkpoint whose rows are handed over block by block, in any order."""

    def __init__(self) -> None:
        self._sums: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, name: str, start: int, rows: np.ndarray) -> None:
        """Add rows of a tensor from row `start` on, in the type that the model is kept in.

        Several threads may call this.
        """
        bits = rows.view(f"u{rows.dtype.itemsize}").astype(np.uint32)
        place = np.arange(start, start + len(rows), dtype=np.uint32)
        total = bits
        if bits.ndim == 2:
            column = np.arange(bits.shape[1], dtype=np.uint32)
            total = bits @ (column * np.uint32(2 * _COLUMN % 2**32) + np.uint32(1))
        row_weights = place * np.uint32(2 * _ROW % 2**32) + np.uint32(1)
        found = int(np.sum(total * row_weights, dtype=np.uint32))
        with self._lock:
            self._sums[name] = (self._sums.get(name, 0) + found) % 2**32

    def result(self) -> str:
        """Return the digest of all rows so far."""
        return _digest(self._sums)


def _digest(sums: Mapping[str, int]) -> str:
    text = "".join(f"{name} {sums[name]}\n" for name in sorted(sums))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
