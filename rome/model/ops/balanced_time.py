"""Causal attention of a row whose time is split over devices, with equal work on each device.

B rows, T time of the row, g devices of the `sequence` axis, t = T / g time of one device.

A late query sees more keys than an early one, so the device with the end of a row would do nearly
twice the mean. Each device therefore keeps the first half of its queries and takes the second half
of the opposite device: device d has halves 2d and 2g - 1 - 2d of all 2g, whose places add up to the
same everywhere. Device d gets from g - 1 - d what it sends there: one exchange brings queries out,
and the same one brings results home.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def swap_late_halves(x_Bt: Array) -> Array:
    """Exchange the second half of time with the opposite device of the sequence axis.

    On one device of a shard_map, [B, t, ...]. Its own inverse.
    """
    g = jax.lax.axis_size("sequence")
    half = x_Bt.shape[1] // 2
    if g == 1:
        return x_Bt
    opposite = [(device, g - 1 - device) for device in range(g)]
    late = jax.lax.ppermute(x_Bt[:, half:], "sequence", opposite)
    return jnp.concatenate([x_Bt[:, :half], late], axis=1)


def query_places(T: int, g: int) -> np.ndarray:
    """Return the place of each query once late halves are swapped, [T] int32.

    Queries are listed device after device. t must be even where g > 1.
    """
    if g == 1:
        return np.arange(T, dtype=np.int32)
    places_g2h = np.arange(T, dtype=np.int32).reshape(g, 2, -1)
    early_gh = places_g2h[:, 0]
    late_gh = places_g2h[::-1, 1]
    return np.stack([early_gh, late_gh], axis=1).reshape(T)


def busiest_share(places_T: np.ndarray, g: int) -> float:
    """Return the share of its scores that the busiest device computes; 1/2 where work is even.

    Out of all scores of a device's queries with all keys, causality leaves some to compute.
    """
    seen_gt = places_T.reshape(g, -1) + 1.0
    return float(seen_gt.mean(axis=1).max() / places_T.size)
