"""The experts on a CPU: choices sorted by expert, matmuls over tiles of rows that start wherever an
expert's rows start.

N tokens, D model, E experts, k experts a token, F expert hidden; A = N * k choices (token n, its
j-th expert), R = A + the largest tile.

No slot is padded and no weight is copied per block: a loop over the experts takes their rows in
tiles of a few sizes. The last tile of an expert reaches into the rows of the next, which are
written over when their own turn comes. The backward pass is written by hand: it keeps the gate's
and the up projection's outputs, and sums an expert's weight gradients where it loops over its rows.

What XLA does on a CPU shaped this: a product whose left side is transposed leaves the fast matmuls,
so rows are transposed first, behind a barrier; bfloat16 slices of a carried array are turned into
float32 and back as a whole, so they are carried as their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

TILES = (
    256,
    192,
    128,
    64,
)  # rows; an expert's last tile is the smallest that holds what is left: 32 rows are wasted on average


class Plan(NamedTuple):
    """Where each choice went: choice_A lists the choices by expert, place_Nk inverts it; an
    expert's rows are start_E to end_E.
    """

    choice_A: Array
    place_Nk: Array
    start_E: Array
    end_E: Array


def absent_last(ids_Nk: Array, E: int) -> Array:
    """ids_A with E for every expert that is not here."""
    ids_A = ids_Nk.reshape(-1)
    return jnp.where((ids_A >= 0) & (ids_A < E), ids_A, E)


def plan_rows(ids_Nk: Array, E: int) -> Plan:
    ids_A = absent_last(ids_Nk, E)
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    place_A = (
        jnp.zeros_like(choice_A)
        .at[choice_A]
        .set(jnp.arange(choice_A.size, dtype=jnp.int32), unique_indices=True)
    )
    sizes_E = jnp.bincount(ids_A, length=E + 1)[:E].astype(jnp.int32)
    end_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    return Plan(choice_A, place_A.reshape(ids_Nk.shape), end_E - sizes_E, end_E)


@jax.custom_vjp
def experts_sorted(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> Array:
    """sum_k weight_k * down(silu(gate(x)) * up(x)), each by the expert that its id names; sums in
    float32, operands in x's dtype.
    """
    return _forward(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)[0]


def _forward(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> tuple[Array, tuple]:
    (E, F, D), dtype = down_EFD.shape, x_ND.dtype
    plan = plan_rows(ids_Nk, E)
    weight_A = jnp.take(weights_Nk.reshape(-1), plan.choice_A)
    weight_A = jnp.where(
        jnp.arange(plan.choice_A.size) < plan.end_E[-1], weight_A, 0
    )  # the rows of experts that are not here
    x_RD, weight_R = _by_expert(x_ND, plan), _pad(weight_A.astype(jnp.float32))
    R = weight_R.size

    def expert(e: Array, carry: tuple) -> tuple:
        gate_DF, up_DF, down_FD = (_expert_of(w, e, dtype) for w in (gate_EDF, up_EDF, down_EFD))

        def tile(rows: int, at: Array, carry: tuple) -> tuple:
            gate_RF, up_RF, out_RD = carry
            x_MD = _rows(x_RD, at, rows, dtype)
            gate_MF, up_MF = _dot(x_MD, gate_DF), _dot(x_MD, up_DF)
            hidden_MF = (
                gate_MF * jax.nn.sigmoid(gate_MF) * up_MF * _rows(weight_R, at, rows)[:, None]
            )
            out_MD = _dot(hidden_MF.astype(dtype), down_FD)
            return (
                _put(gate_RF, gate_MF, at, dtype),
                _put(up_RF, up_MF, at, dtype),
                _put(out_RD, out_MD, at),
            )

        return _over_tiles(tile, plan.start_E[e], plan.end_E[e], ids_Nk.size, carry)

    nothing_RF = _bits(jnp.zeros((R, F), dtype))
    gate_RF, up_RF, out_RD = lax.fori_loop(
        0, E, expert, (nothing_RF, nothing_RF, jnp.zeros((R, D), jnp.float32))
    )
    residuals = (x_RD, gate_RF, up_RF, weight_R, gate_EDF, up_EDF, down_EFD, weights_Nk, plan)
    return _sum_choices(out_RD, plan).astype(dtype), residuals


def _backward(residuals: tuple, grad_ND: Array) -> tuple[Array | None, ...]:
    x_RD, gate_RF, up_RF, weight_R, gate_EDF, up_EDF, down_EFD, weights_Nk, plan = residuals
    (E, F, D), dtype, R = down_EFD.shape, grad_ND.dtype, weight_R.size
    grad_RD = _by_expert(grad_ND, plan)

    def expert(e: Array, carry: tuple) -> tuple:
        gate_DF, up_DF, down_FD = (_expert_of(w, e, dtype) for w in (gate_EDF, up_EDF, down_EFD))

        def tile(rows: int, at: Array, carry: tuple) -> tuple:
            dx_RD, dweight_R, dgate_DF, dup_DF, ddown_FD = carry
            gate_MF, up_MF, grad_MD = (_rows(a, at, rows, dtype) for a in (gate_RF, up_RF, grad_RD))
            own_M = at + jnp.arange(rows) < plan.end_E[e]  # the rows beyond belong to other experts
            weight_M1 = jnp.where(own_M, _rows(weight_R, at, rows), 0.0)[:, None]
            gate_MF, up_MF = gate_MF.astype(jnp.float32), up_MF.astype(jnp.float32)
            sigmoid_MF = jax.nn.sigmoid(gate_MF)
            silu_MF = gate_MF * sigmoid_MF
            dhidden_MF = _dot(grad_MD, down_FD, transposed=True)
            dweight_M = jnp.where(own_M, jnp.sum(silu_MF * up_MF * dhidden_MF, axis=-1), 0.0)
            dhidden_MF = dhidden_MF * weight_M1
            dpre_MF = (dhidden_MF * up_MF * (sigmoid_MF + silu_MF * (1 - sigmoid_MF))).astype(dtype)
            dup_MF = (dhidden_MF * silu_MF).astype(dtype)
            hidden_MF = (silu_MF * up_MF * weight_M1).astype(dtype)
            x_DM, hidden_FM = _turned(_rows(x_RD, at, rows, dtype)), _turned(hidden_MF)
            dx_MD = _dot(dpre_MF, gate_DF, transposed=True) + _dot(dup_MF, up_DF, transposed=True)
            return (
                _put(dx_RD, dx_MD, at),
                _put(dweight_R, dweight_M, at),
                dgate_DF + _dot(x_DM, dpre_MF),
                dup_DF + _dot(x_DM, dup_MF),
                ddown_FD + _dot(hidden_FM, grad_MD),
            )

        dx_RD, dweight_R, *sums = carry
        own = (
            jnp.zeros((D, F), jnp.float32),
            jnp.zeros((D, F), jnp.float32),
            jnp.zeros((F, D), jnp.float32),
        )
        dx_RD, dweight_R, *own = _over_tiles(
            tile, plan.start_E[e], plan.end_E[e], weights_Nk.size, (dx_RD, dweight_R, *own)
        )
        return (
            dx_RD,
            dweight_R,
            *(lax.dynamic_update_index_in_dim(whole, one, e, 0) for whole, one in zip(sums, own)),
        )

    start = (
        jnp.zeros((R, D), jnp.float32),
        jnp.zeros(R, jnp.float32),
        *(jnp.zeros(w.shape, jnp.float32) for w in (gate_EDF, up_EDF, down_EFD)),
    )
    dx_RD, dweight_R, *dweights = lax.fori_loop(0, E, expert, start)
    dgate_EDF, dup_EDF, ddown_EFD = (
        dw.astype(w.dtype) for dw, w in zip(dweights, (gate_EDF, up_EDF, down_EFD))
    )
    return (
        _sum_choices(dx_RD, plan).astype(dtype),
        dgate_EDF,
        dup_EDF,
        ddown_EFD,
        jnp.take(dweight_R, plan.place_Nk).astype(weights_Nk.dtype),
        None,
    )


experts_sorted.defvjp(_forward, _backward)


def _over_tiles(
    tile: Callable[[int, Array, Any], Any], start: Array, end: Array, choices: int, carry: Any
) -> Any:
    """Calls tile(rows, at, carry) over the rows from start to end, of `choices` in all; the last
    may reach beyond the end.
    """
    state = (start, carry)
    for rows, smaller in zip(TILES, (*TILES[1:], 0)):
        if smaller >= choices:
            continue  # it would never run: one loop less to compile
        more = lambda state, smaller=smaller: end - state[0] > smaller
        state = lax.while_loop(
            more, lambda state, rows=rows: (state[0] + rows, tile(rows, *state)), state
        )
    return state[1]


def _by_expert(x_ND: Array, plan: Plan) -> Array:
    """The row of each choice, in the order of the experts, as bits."""
    token_A = plan.choice_A // plan.place_Nk.shape[1]
    return jnp.take(_bits(x_ND), _pad(token_A), axis=0, mode="clip")


def _sum_choices(out_RD: Array, plan: Plan) -> Array:
    return sum(
        jnp.take(out_RD, plan.place_Nk[:, j], axis=0, mode="clip")
        for j in range(plan.place_Nk.shape[1])
    )


def _pad(values_A: Array) -> Array:
    return jnp.pad(values_A, (0, max(TILES)))


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
    """a @ b, or a @ b.T, summed in float32."""
    return lax.dot_general(
        a, b, (((1,), (1 if transposed else 0,)), ((), ())), preferred_element_type=jnp.float32
    )
