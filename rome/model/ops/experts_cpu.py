"""The experts on a CPU: choices sorted by expert, multiplied in tiles of rows.

N tokens, D model, E experts, k experts a token, F expert hidden; A = N * k choices (token n, its
j-th expert), R = A + the largest tile, M rows of a tile.

Tiles start where an expert's rows start: no slot is padded and no weight is copied per block. A
loop over the experts takes their rows in tiles of a few sizes. The last tile of an expert reaches
into the rows of the next, which are overwritten in their own turn. The backward pass is written by
hand: it keeps the outputs of the gate and up projections, and sums an expert's weight gradients
while it loops over its rows.

XLA on a CPU shaped this: a product whose left side is transposed leaves the fast matmuls, so rows
are transposed first, behind a barrier; bfloat16 slices of a carried array are turned into float32
and back as a whole, so they are carried as their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

# Rows. An expert's last tile is the smallest that holds the rest: 32 rows are wasted on average.
TILES = (256, 192, 128, 64)
# Of a call with few tokens. No more than 32: a row's numbers are then the same in each of them.
FEW_TILES = (32, 16, 8)


class Sorting(NamedTuple):
    """The order of choices by expert.

    Attributes:
      choice_A: choices in that order.
      place_Nk: place of each choice in it, the inverse of choice_A.
      start_E: where each expert's rows start.
      end_E: where each expert's rows end.
    """

    choice_A: Array
    place_Nk: Array
    start_E: Array
    end_E: Array


def absent_last(ids_Nk: Array, E: int) -> Array:
    """Return ids_A, the flat ids, with E for every expert that is not here."""
    ids_A = ids_Nk.reshape(-1)
    return jnp.where((ids_A >= 0) & (ids_A < E), ids_A, E)


def sort_choices(ids_Nk: Array, E: int) -> Sorting:
    """Sort choices by expert, absent ones last."""
    ids_A = absent_last(ids_Nk, E)
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    nowhere_A = jnp.zeros_like(choice_A)
    order_A = jnp.arange(choice_A.size, dtype=jnp.int32)
    place_A = nowhere_A.at[choice_A].set(order_A, unique_indices=True)
    sizes_E = jnp.bincount(ids_A, length=E + 1)[:E].astype(jnp.int32)
    end_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    return Sorting(choice_A, place_A.reshape(ids_Nk.shape), end_E - sizes_E, end_E)


@jax.custom_vjp
def experts_sorted(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> Array:
    """Return sum_k weight_k * down(silu(gate(x)) * up(x)), each by the expert of its id.

    Sums are float32, operands x's dtype.
    """
    return _forward(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)[0]


def _forward(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> tuple[Array, tuple]:
    E, F, D = down_EFD.shape
    dtype = x_ND.dtype
    plan = sort_choices(ids_Nk, E)
    weight_A = jnp.take(weights_Nk.reshape(-1), plan.choice_A)
    is_here_A = jnp.arange(plan.choice_A.size) < plan.end_E[-1]
    weight_A = jnp.where(is_here_A, weight_A, 0)
    x_RD = _by_expert(x_ND, plan)
    weight_R = _pad(weight_A.astype(jnp.float32))
    R = weight_R.size

    def expert(e: Array, carry: tuple) -> tuple:
        gate_DF = _expert_of(gate_EDF, e, dtype)
        up_DF = _expert_of(up_EDF, e, dtype)
        down_FD = _expert_of(down_EFD, e, dtype)

        def tile(rows: int, at: Array, carry: tuple) -> tuple:
            gate_RF, up_RF, out_RD = carry
            x_MD = _rows(x_RD, at, rows, dtype)
            gate_MF = _dot(x_MD, gate_DF)
            up_MF = _dot(x_MD, up_DF)
            silu_MF = gate_MF * jax.nn.sigmoid(gate_MF)
            hidden_MF = silu_MF * up_MF * _rows(weight_R, at, rows)[:, None]
            out_MD = _dot(hidden_MF.astype(dtype), down_FD)
            gate_RF = _put(gate_RF, gate_MF, at, dtype)
            up_RF = _put(up_RF, up_MF, at, dtype)
            out_RD = _put(out_RD, out_MD, at)
            return gate_RF, up_RF, out_RD

        return _over_tiles(tile, plan.start_E[e], plan.end_E[e], ids_Nk.size, carry)

    nothing_RF = _bits(jnp.zeros((R, F), dtype))
    nothing = (nothing_RF, nothing_RF, jnp.zeros((R, D), jnp.float32))
    gate_RF, up_RF, out_RD = lax.fori_loop(0, E, expert, nothing)
    residuals = (x_RD, gate_RF, up_RF, weight_R, gate_EDF, up_EDF, down_EFD, weights_Nk, plan)
    return _sum_choices(out_RD, plan).astype(dtype), residuals


def experts_tiled(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> Array:
    """Return what `experts_sorted` does, without a gradient, in tiles for few tokens.

    A row's numbers do not depend on other rows. An expert without rows costs nothing.
    """
    E, _, D = down_EFD.shape
    dtype = x_ND.dtype
    plan = sort_choices(ids_Nk, E)
    x_RD = _by_expert(x_ND, plan, FEW_TILES)
    weight_A = jnp.take(weights_Nk.reshape(-1).astype(jnp.float32), plan.choice_A)
    weight_R = _pad(weight_A, FEW_TILES)

    def expert(e: Array, out_RD: Array) -> Array:
        gate_DF = _expert_of(gate_EDF, e, dtype)
        up_DF = _expert_of(up_EDF, e, dtype)
        down_FD = _expert_of(down_EFD, e, dtype)

        def tile(rows: int, at: Array, out_RD: Array) -> Array:
            x_MD = _rows(x_RD, at, rows, dtype)
            gate_MF = _dot(x_MD, gate_DF)
            hidden_MF = gate_MF * jax.nn.sigmoid(gate_MF) * _dot(x_MD, up_DF)
            hidden_MF = hidden_MF * _rows(weight_R, at, rows)[:, None]
            return _put(out_RD, _dot(hidden_MF.astype(dtype), down_FD), at)

        start, end = plan.start_E[e], plan.end_E[e]
        return _over_tiles(tile, start, end, ids_Nk.size, out_RD, FEW_TILES)

    def if_chosen(e: Array, out_RD: Array) -> Array:
        is_chosen = plan.end_E[e] > plan.start_E[e]
        return lax.cond(is_chosen, expert, lambda e, out_RD: out_RD, e, out_RD)

    nothing_RD = jnp.zeros((weight_R.size, D), jnp.float32)
    out_RD = lax.fori_loop(0, E, if_chosen, nothing_RD)
    return _sum_present(out_RD, plan).astype(dtype)


def _backward(residuals: tuple, grad_ND: Array) -> tuple[Array | None, ...]:
    x_RD, gate_RF, up_RF, weight_R, gate_EDF, up_EDF, down_EFD, weights_Nk, plan = residuals
    E, F, D = down_EFD.shape
    dtype = grad_ND.dtype
    R = weight_R.size
    grad_RD = _by_expert(grad_ND, plan)

    def expert(e: Array, carry: tuple) -> tuple:
        gate_DF = _expert_of(gate_EDF, e, dtype)
        up_DF = _expert_of(up_EDF, e, dtype)
        down_FD = _expert_of(down_EFD, e, dtype)

        def tile(rows: int, at: Array, carry: tuple) -> tuple:
            dx_RD, dweight_R, dgate_DF, dup_DF, ddown_FD = carry
            gate_MF = _rows(gate_RF, at, rows, dtype)
            up_MF = _rows(up_RF, at, rows, dtype)
            grad_MD = _rows(grad_RD, at, rows, dtype)
            own_M = at + jnp.arange(rows) < plan.end_E[e]  # the rows beyond belong to other experts
            weight_M1 = jnp.where(own_M, _rows(weight_R, at, rows), 0.0)[:, None]
            gate_MF = gate_MF.astype(jnp.float32)
            up_MF = up_MF.astype(jnp.float32)
            sigmoid_MF = jax.nn.sigmoid(gate_MF)
            silu_MF = gate_MF * sigmoid_MF
            dhidden_MF = _dot(grad_MD, down_FD, transposed=True)
            dweight_M = jnp.where(own_M, jnp.sum(silu_MF * up_MF * dhidden_MF, axis=-1), 0.0)
            dhidden_MF = dhidden_MF * weight_M1
            dsilu_MF = sigmoid_MF + silu_MF * (1 - sigmoid_MF)
            dgate_MF = (dhidden_MF * up_MF * dsilu_MF).astype(dtype)
            dup_MF = (dhidden_MF * silu_MF).astype(dtype)
            hidden_MF = (silu_MF * up_MF * weight_M1).astype(dtype)
            x_DM = _turned(_rows(x_RD, at, rows, dtype))
            hidden_FM = _turned(hidden_MF)
            dx_MD = _dot(dgate_MF, gate_DF, transposed=True)
            dx_MD = dx_MD + _dot(dup_MF, up_DF, transposed=True)
            dx_RD = _put(dx_RD, dx_MD, at)
            dweight_R = _put(dweight_R, dweight_M, at)
            dgate_DF = dgate_DF + _dot(x_DM, dgate_MF)
            dup_DF = dup_DF + _dot(x_DM, dup_MF)
            ddown_FD = ddown_FD + _dot(hidden_FM, grad_MD)
            return dx_RD, dweight_R, dgate_DF, dup_DF, ddown_FD

        dx_RD, dweight_R, dgate_EDF, dup_EDF, ddown_EFD = carry
        nothing_DF = jnp.zeros((D, F), jnp.float32)
        nothing_FD = jnp.zeros((F, D), jnp.float32)
        own_carry = (dx_RD, dweight_R, nothing_DF, nothing_DF, nothing_FD)
        dx_RD, dweight_R, dgate_DF, dup_DF, ddown_FD = _over_tiles(
            tile, plan.start_E[e], plan.end_E[e], weights_Nk.size, own_carry
        )
        dgate_EDF = lax.dynamic_update_index_in_dim(dgate_EDF, dgate_DF, e, 0)
        dup_EDF = lax.dynamic_update_index_in_dim(dup_EDF, dup_DF, e, 0)
        ddown_EFD = lax.dynamic_update_index_in_dim(ddown_EFD, ddown_FD, e, 0)
        return dx_RD, dweight_R, dgate_EDF, dup_EDF, ddown_EFD

    nothing = (
        jnp.zeros((R, D), jnp.float32),
        jnp.zeros(R, jnp.float32),
        jnp.zeros(gate_EDF.shape, jnp.float32),
        jnp.zeros(up_EDF.shape, jnp.float32),
        jnp.zeros(down_EFD.shape, jnp.float32),
    )
    dx_RD, dweight_R, dgate_EDF, dup_EDF, ddown_EFD = lax.fori_loop(0, E, expert, nothing)
    dgate_EDF = dgate_EDF.astype(gate_EDF.dtype)
    dup_EDF = dup_EDF.astype(up_EDF.dtype)
    ddown_EFD = ddown_EFD.astype(down_EFD.dtype)
    dx_ND = _sum_choices(dx_RD, plan).astype(dtype)
    dweights_Nk = jnp.take(dweight_R, plan.place_Nk).astype(weights_Nk.dtype)
    return dx_ND, dgate_EDF, dup_EDF, ddown_EFD, dweights_Nk, None


experts_sorted.defvjp(_forward, _backward)


def _over_tiles(
    tile: Callable[[int, Array, Any], Any],
    start: Array,
    end: Array,
    choices: int,
    carry: Any,
    tiles: Sequence[int] = TILES,
) -> Any:
    """Call tile(rows, at, carry) over the rows from start to end.

    The last tile may reach beyond the end. `choices` are the rows of all experts together.
    """
    state = (start, carry)
    for rows, smaller in zip(tiles, (*tiles[1:], 0), strict=True):
        if smaller < choices:  # else it would never run: one loop less to compile
            state = _while_more(tile, rows, smaller, end, state)
    return state[1]


def _while_more(
    tile: Callable[[int, Array, Any], Any], rows: int, smaller: int, end: Array, state: Any
) -> Any:
    """Take tiles of `rows` rows while a tile of `smaller` rows would not hold the rest."""

    def holds_more(state: tuple[Array, Any]) -> Array:
        return end - state[0] > smaller

    def take(state: tuple[Array, Any]) -> tuple[Array, Any]:
        return state[0] + rows, tile(rows, *state)

    return lax.while_loop(holds_more, take, state)


def _by_expert(x_ND: Array, plan: Sorting, tiles: Sequence[int] = TILES) -> Array:
    """Return the row of each choice, in the order of the experts, as bits."""
    token_A = plan.choice_A // plan.place_Nk.shape[1]
    return jnp.take(_bits(x_ND), _pad(token_A, tiles), axis=0, mode="clip")


def _sum_choices(out_RD: Array, plan: Sorting) -> Array:
    k = plan.place_Nk.shape[1]
    rows = [jnp.take(out_RD, plan.place_Nk[:, j], axis=0, mode="clip") for j in range(k)]
    return jnp.asarray(sum(rows))


def _sum_present(out_RD: Array, plan: Sorting) -> Array:
    """Sum the choices of each token whose expert is here; rows of absent ones hold anything."""
    total_ND = jnp.zeros((plan.place_Nk.shape[0], out_RD.shape[1]), jnp.float32)
    for place_N in plan.place_Nk.T:
        row_ND = jnp.take(out_RD, place_N, axis=0, mode="clip")
        total_ND = total_ND + jnp.where((place_N < plan.end_E[-1])[:, None], row_ND, 0)
    return total_ND


def _pad(values_A: Array, tiles: Sequence[int] = TILES) -> Array:
    return jnp.pad(values_A, (0, max(tiles)))


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _of_bits(bits: Array, dtype: Any) -> Array:
    return lax.bitcast_convert_type(bits, dtype) if bits.dtype == jnp.uint16 else bits


def _expert_of(weight: Array, e: Array, dtype: Any) -> Array:
    return _of_bits(lax.dynamic_index_in_dim(_bits(weight), e, 0, keepdims=False), dtype)


def _rows(array: Array, at: Array, rows: int, dtype: Any = jnp.float32) -> Array:
    return _of_bits(lax.dynamic_slice_in_dim(array, at, rows), dtype)


def _put(array: Array, rows: Array, at: Array, dtype: Any = jnp.float32) -> Array:
    return lax.dynamic_update_slice_in_dim(array, _bits(rows.astype(dtype)), at, 0)


def _turned(x_MD: Array) -> Array:
    return lax.optimization_barrier(x_MD.T)


def _dot(a: Array, b: Array, transposed: bool = False) -> Array:
    """Return a @ b, or a @ b.T, summed in float32."""
    summed_axes = ((1,), (1 if transposed else 0,))
    return lax.dot_general(a, b, (summed_axes, ((), ())), preferred_element_type=jnp.float32)
