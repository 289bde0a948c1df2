"""Low-rank adapters (LoRA, arXiv 2106.09685) where a layer takes its matrices.

An adapted matrix W is used as W + A B, rounded once to the compute type: the numbers of a
checkpoint that the product was merged into. The sum exists for the layer that runs now, no other.

An engine has several adapters, in slots, and its tokens choose one each or none: it adds (x A) B to
x W, which is the same but for rounding.

E experts, I inputs, O outputs (an axis each or several), r rank, T tokens, k experts a token, S
slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rome.model.ops.native import adapted_experts_native, product_of_rows

SUFFIX = "_lora"  # of the name beside a matrix's own that its adapter {"a", "b"} has
SERVED = "_served"  # of the name beside it that the adapters of an engine, `Served`, have
EXPERTS = ("gate", "up", "down")
RunExperts = Callable[[tuple[Array, Array, Array], Array], Array]


class Served(NamedTuple):
    """The adapters of an engine for one matrix, and which of them each token of a call has.

    Attributes:
      a: [I, S, r], float32; of experts [S, E, I, r].
      b: [S, r, O], float32; of experts [S, E, r, O].
      slot_T: -1: none.
      scale_S: factor of each adapter's products.
    """

    a: Array
    b: Array
    slot_T: Array
    scale_S: Array


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


def with_served(
    module: nn.Module, name: str, x_BTI: Array, product_BTO: Array, is_native: bool = False
) -> Array:
    """Return x W with what the adapters of an engine add; as it is where it has none.

    Args:
      module: of the matrix W.
      name: of W.
      x_BTI: one row of tokens, B = 1; the inputs may be several axes.
      product_BTO: x W; the outputs may be several axes.
      is_native: whether C++ takes these arrays.

    One product with the adapters of all slots, where all but the token's own are multiplied by 0.
    """
    if not module.has_variable("params", name + SERVED):
        return product_BTO
    a, b, slot_T, scale_S = module.get_variable("params", name + SERVED)
    T = x_BTI.shape[1]
    S, r = b.shape[:2]
    x_TI = x_BTI.reshape(T, -1).astype(jnp.float32)
    low_TSr = product_of_rows(x_TI, a.reshape(-1, S * r), is_native).reshape(T, S, r)
    factor_TS = jnp.where(slot_T[:, None] == jnp.arange(S), scale_S, 0.0)
    low_TZ = (low_TSr * factor_TS[:, :, None]).reshape(T, S * r)
    out_TO = product_of_rows(low_TZ, b.reshape(S * r, -1), is_native)
    return product_BTO + out_TO.reshape(product_BTO.shape).astype(product_BTO.dtype)


def served_experts(module: nn.Module) -> dict[str, Served]:
    """Return the adapters of an engine for the experts of a module, by name of the matrix."""
    return {
        name: module.get_variable("params", name + SERVED)
        for name in EXPERTS
        if module.has_variable("params", name + SERVED)
    }


def adapted_experts(
    served: dict[str, Served],
    x_TD: Array,
    weights: tuple[Array, Array, Array],
    weights_Tk: Array,
    ids_Tk: Array,
    is_native: bool,
    run: RunExperts,
) -> Array:
    """Return the experts' outputs [T, D] with an engine's adapters.

    Args:
      served: of `served_experts`; at least one. On a mesh, one device's parts, as of the weights.
      x_TD: inputs of the experts.
      weights: gate, up and down, without adapters.
      weights_Tk: of the experts of each token.
      ids_Tk: experts of each token; one that is not here is none.
      is_native: whether C++ takes these arrays. It computes low-rank products for the choices that
        need them; otherwise each adapter in use is added to the weights of all experts.
      run: computes the experts from gate, up and down and the ids of each token.
    """
    _, _, slot_T, scale_S = next(iter(served.values()))
    if is_native:
        pairs = [_pair(served.get(name), *weight.shape) for name, weight in _named(weights)]
        return adapted_experts_native(x_TD, weights, weights_Tk, ids_Tk, slot_T, scale_S, pairs)

    def run_slot(slot: Array, merged: Callable[[], tuple[Array, Array, Array]]) -> Array:
        own_T = slot_T == slot
        ids_own_Tk = jnp.where(own_T[:, None], ids_Tk, -1)
        nothing = jnp.zeros_like(x_TD)
        return jax.lax.cond(own_T.any(), lambda: run(merged(), ids_own_Tk), lambda: nothing)

    def add_slot(slot: Array, out_TD: Array) -> Array:
        def merged() -> tuple[Array, Array, Array]:
            return tuple(  # type: ignore[return-value]
                _merged(weight, served.get(name), slot) for name, weight in _named(weights)
            )

        return out_TD + run_slot(slot, merged)

    without_TD = run_slot(jnp.asarray(-1), lambda: weights)
    return jax.lax.fori_loop(0, scale_S.size, add_slot, without_TD)


def _named(weights: tuple[Array, Array, Array]) -> list[tuple[str, Array]]:
    return list(zip(EXPERTS, weights, strict=True))


def _pair(served: Served | None, E: int, I: int, O: int) -> tuple[Array, Array]:  # noqa: E741
    """Return A and B of one matrix, of rank 0 where it has no adapters."""
    if served is None:
        return jnp.zeros((1, E, I, 0), jnp.float32), jnp.zeros((1, E, 0, O), jnp.float32)
    return served.a, served.b


def _merged(weight: Array, served: Served | None, slot: Array) -> Array:
    if served is None:
        return weight
    scaled = served.scale_S[slot] * served.b[slot]
    return add_product(weight, served.a[slot], scaled).astype(weight.dtype)
