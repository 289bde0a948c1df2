"""Sums whose order depends on the row alone, not on how many rows are computed with it.

A compiler sums the rows of a small array otherwise than those of a large one. That is a last bit,
but an engine promises that an answer does not depend on the company that it is computed in.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def sum_of_rows(x: Array) -> Array:
    """Return the sum over the last axis, by halves: the additions are spelled out."""
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    padding = [(0, 0)] * (x.ndim - 1) + [(0, width - size)]
    x = jnp.pad(x, padding)
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def softmax_of_rows(logits: Array) -> Array:
    """Return the softmax over the last axis, its sum as in `sum_of_rows`."""
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / sum_of_rows(weights)[..., None]
