"""Rounding to a narrower floating-point type, seen through by gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def _identity_to_gradients(x: Array, rounded: Array) -> Array:
    return rounded


@_identity_to_gradients.defjvp
def _jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[1], tangents[0]


def round_straight_through(x: Array, dtype: Any) -> Array:
    """Round x to the numbers of `dtype`, and keep its own type; the gradient is that of x itself.

    Unlike a cast there and back, XLA must not leave it out: its default,
    xla_allow_excess_precision, drops such pairs of casts.

    Args:
      x: float32.
      dtype: a floating-point type of at most as many bits; x is returned as it is where it has it.
    """
    if x.dtype == jnp.dtype(dtype):
        return x
    kind = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
    return _identity_to_gradients(x, jax.lax.stop_gradient(rounded))
