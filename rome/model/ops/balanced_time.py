"""Causal attention of a row whose time is split over devices, with the same work for each.

T time of the row, g devices of the `sequence` axis, t = T / g time of one device.

A late query sees more keys than an early one, so the device with the end of a row would do nearly
twice the mean. Each device therefore keeps the first half of its queries and has the second half of
the device that stands as far from the other end: halves 2d and 2g - 1 - 2d of all 2g, whose places
add up to the same everywhere. Device d gets from g - 1 - d what it sends there: one exchange brings
queries out, and the same one results home.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def swap_late_halves(x_Bt: Array) -> Array:
    """On one device of a shard_map, [B, t, ...]: the second half of time becomes that of the
    opposite device of the sequence axis.

    Its own inverse.
    """
    g, half = jax.lax.axis_size("sequence"), x_Bt.shape[1] // 2
    if g == 1:
        return x_Bt
    late = jax.lax.ppermute(x_Bt[:, half:], "sequence", [(d, g - 1 - d) for d in range(g)])
    return jnp.concatenate([x_Bt[:, :half], late], axis=1)


def query_places(T: int, g: int) -> np.ndarray:
    """[T] int32: where in the row each query stands once late halves are swapped, devices one after
    the other. t must be even where g > 1.
    """
    if g == 1:
        return np.arange(T, dtype=np.int32)
    places_g2h = np.arange(T, dtype=np.int32).reshape(g, 2, -1)
    return np.stack([places_g2h[:, 0], places_g2h[::-1, 1]], axis=1).reshape(T)


def busiest_share(places_T: np.ndarray, g: int) -> float:
    """Of the scores of a device's queries with all keys, those that causality leaves to the device
    with most of them: a half where work is even.
    """
    return float((places_T.reshape(g, -1) + 1.0).mean(axis=1).max() / places_T.size)
