"""Helpers for moving arrays between files and devices without changing a bit."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import NamedSharding


def as_bits(array: jax.Array) -> jax.Array:
    """Return the array as unsigned integers.

    A backend that computes bfloat16 in float32 would change the bits of a NaN even where it only
    moves it.
    """
    return jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def as_floats(bits: jax.Array, dtype: Any) -> jax.Array:
    """Return unsigned integers as floats: the inverse of `as_bits`."""
    return jax.lax.bitcast_convert_type(bits, dtype)


def mesh_axes(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    """Return the mesh axes of each axis of an array of `ndim` axes."""
    axes: list[tuple[str, ...]] = []
    for names in sharding.spec:
        if names is None:
            axes.append(())
        else:
            axes.append(names if isinstance(names, tuple) else (names,))
    return axes + [()] * (ndim - len(axes))
