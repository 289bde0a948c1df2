"""Low-rank adapters (LoRA, arXiv 2106.09685) where a layer takes its matrices.

An adapted matrix W is used as W + A B, rounded once to the compute type: the numbers of a
checkpoint that the product was merged into. The sum exists for the layer that runs now, no other.

E experts, I inputs, O outputs (an axis each or several), r rank.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

SUFFIX = "_lora"  # of the name beside a matrix's own that its adapter {"a", "b"} has


def adapted(module: nn.Module, name: str, weight: Array, dtype: Any) -> Array:
    """Return a parameter of a module in `dtype`, with its adapter added where it has one."""
    if not module.has_variable("params", name + SUFFIX):
        return weight.astype(dtype)
    pair = module.get_variable("params", name + SUFFIX)
    return add_product(weight, pair["a"], pair["b"]).astype(dtype)


def add_product(weight: Array, a: Array, b: Array) -> Array:
    """Return weight + a b in float32.

    Args:
      weight: [I, O], or [E, I, O] for experts.
      a: [I, r], or [E, I, r].
      b: [r, O] or [E, r, O], scaled.
    """
    if a.ndim + b.ndim == weight.ndim + 2:
        product = jnp.tensordot(a, b, axes=1, precision="highest")
    else:
        product = jnp.matmul(a, b, precision="highest")
    return weight.astype(jnp.float32) + product
