"""The experts themselves: one function, forms behind it that are equal in value and differ in
speed.

Dropless in every form.

N tokens, D model, E experts, k experts a token, F expert hidden; A = N * k choices (token n, its
j-th expert), R rows of a pass of a grouped matmul, P rows of all passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.ops.experts_cpu import absent_last, experts_sorted

IMPLEMENTATIONS = ("auto", "dense", "sorted", "ragged", "megablox", "tokamax")
GROUPED = ("ragged", "megablox", "tokamax")
DENSE_UP_TO = 128  # tokens; below, sorting costs more than it saves
MEGABLOX_ROWS, MEGABLOX_COLUMNS = (
    512,
    1024,
)  # a tile of the kernel; both operands and the float32 sum stay in a core's memory
GroupedMatmul = Callable[
    [Array, Array, Array], Array
]  # (rows [R, D] by expert, matrices [E, D, F], rows of each matrix [E]) -> [R, F]
ROWS_OVER_SHARE, ROWS_MULTIPLE = (
    1.5,
    512,
)  # rows that a part of a mesh makes room for, over the even share of its choices; more of them take another pass
NO_EXPERT = (
    -1
)  # the id of a choice that no expert computes: padding, or beyond an expert's capacity


def experts_within(
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
    implementation: str,
    capacity_factor: float,
) -> tuple[Array, Array]:
    """`experts` with a capacity of capacity_factor * N * k / E choices for each of them, 0 for
    none; and the ids that ran.
    """
    if capacity_factor:
        ids_Nk = drop_beyond(
            ids_Nk, capacity(ids_Nk.size, gate_EDF.shape[0], capacity_factor), gate_EDF.shape[0]
        )
    return experts(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, implementation), ids_Nk


def capacity(choices: int, E: int, factor: float) -> int:
    """How many of `choices` one of E experts takes: `factor` times its even share."""
    return min(choices, math.ceil(factor * choices / E))


def room(share: float) -> int:
    """Rows to make room for where choices are `share` if they lie evenly."""
    return math.ceil(ROWS_OVER_SHARE * share / ROWS_MULTIPLE) * ROWS_MULTIPLE


def drop_beyond(ids_Nk: Array, most: int, E: int) -> Array:
    """ids with NO_EXPERT where an expert has `most` choices already; earlier tokens go first.

    What is dropped adds nothing to its token.
    """
    ids_A = absent_last(ids_Nk, E)
    order_A = jnp.argsort(ids_A, stable=True)
    start_E = jnp.cumsum(jnp.bincount(ids_A, length=E + 1)) - jnp.bincount(ids_A, length=E + 1)
    rank_A = jnp.arange(ids_A.size) - start_E[ids_A[order_A]]
    fits_A = jnp.zeros(ids_A.size, bool).at[order_A].set(rank_A < most, unique_indices=True)
    return jnp.where(fits_A.reshape(ids_Nk.shape), ids_Nk, NO_EXPERT)


def experts(
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
    implementation: str = "auto",
    rows: int | None = None,
) -> Array:
    """sum_k weight_k * down(silu(gate(x)) * up(x)), each by the expert that its id names; an id
    outside 0..E-1 names one that is not here and adds nothing.

    Dropless in every form.

    implementation: "dense" runs every expert on every token; "sorted" is the fast one for many
    tokens on CPU, where `lax.ragged_dot` ("ragged") costs as much as dense; "megablox" is the
    kernel of TPUs, "tokamax" of GPUs; "auto" chooses by the number of tokens and the platform.
    rows: of one pass, for the forms with a grouped matmul, where fewer than N * k choices are
    likely to be here. Memory is bounded by it; should more
      be here, there are more passes.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"experts implementation {implementation!r} is unknown; choose one of"
            f" {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "auto":
        many = "sorted" if jax.default_backend() == "cpu" else "ragged"
        implementation = "dense" if x_ND.shape[0] <= DENSE_UP_TO else many
    if implementation in ("dense", "sorted"):
        return {"dense": experts_dense, "sorted": experts_sorted}[implementation](
            x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk
        )
    grouped = {"ragged": experts_ragged, "megablox": experts_megablox, "tokamax": experts_tokamax}[
        implementation
    ]
    return grouped(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, rows)


def experts_dense(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> Array:
    """Every expert on every token, times 0 where not chosen.

    The oracle; also what the engine decodes with: rows stay apart.
    """
    E = gate_EDF.shape[0]
    weights_EN = jnp.sum(
        jax.nn.one_hot(ids_Nk, E, dtype=weights_Nk.dtype) * weights_Nk[..., None], axis=1
    ).T
    x_END = jnp.broadcast_to(
        x_ND, (E, *x_ND.shape)
    )  # one matmul per expert: the weights need no transposed copy
    hidden_ENF = jax.nn.silu(jnp.einsum("END,EDF->ENF", x_END, gate_EDF)) * jnp.einsum(
        "END,EDF->ENF", x_END, up_EDF
    )
    hidden_ENF = hidden_ENF * weights_EN[..., None].astype(x_ND.dtype)
    return jnp.einsum("ENF,EFD->END", hidden_ENF, down_EFD).sum(axis=0)


def experts_ragged(
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
    rows: int | None = None,
) -> Array:
    """Choices sorted by expert, multiplied by XLA's own grouped matmul."""
    return _in_passes(
        jax.lax.ragged_dot, rows, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk
    )


def experts_megablox(
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
    rows: int | None = None,
    interpret: bool = False,
) -> Array:
    """Choices sorted by expert, multiplied by the Pallas kernel of TPUs: it visits only the tiles
    that belong to an expert.

    interpret: run the kernel's program on any device, slowly, for tests.
    """
    return _in_passes(
        functools.partial(_megablox, interpret=interpret),
        rows,
        x_ND,
        gate_EDF,
        up_EDF,
        down_EFD,
        weights_Nk,
        ids_Nk,
    )


def _megablox(x_RD: Array, w_EDF: Array, sizes_E: Array, interpret: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    tile = max(8, math.gcd(MEGABLOX_ROWS, x_RD.shape[0]))
    tiling = (tile, min(MEGABLOX_COLUMNS, w_EDF.shape[1]), min(MEGABLOX_COLUMNS, w_EDF.shape[2]))
    filled_RD = jnp.pad(x_RD, ((0, -x_RD.shape[0] % tile), (0, 0)))
    return gmm(filled_RD, w_EDF, sizes_E, x_RD.dtype, tiling, interpret=interpret)[: x_RD.shape[0]]


def experts_tokamax(
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
    rows: int | None = None,
) -> Array:
    """Choices sorted by expert, multiplied by tokamax's kernels (Triton, Mosaic)."""
    return _in_passes(
        grouped_matmul("tokamax"), rows, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk
    )


def grouped_matmul(implementation: str) -> GroupedMatmul:
    """The product that a form of the experts is made of; an error for a form that is made
    otherwise.
    """
    if implementation == "tokamax":
        import tokamax  # in requirements-cuda.txt only

        return tokamax.ragged_dot
    if implementation not in GROUPED:
        raise ValueError(
            f"experts implementation {implementation!r} has no grouped matmul; choose one of"
            f" {', '.join(GROUPED)}"
        )
    return {"ragged": jax.lax.ragged_dot, "megablox": _megablox}[implementation]


class _Plan(NamedTuple):
    """choice_P: choices in the order of their experts, absent ones last, filled up with A to whole
    passes. place_Nk: where each choice stands there.
    """

    choice_P: Array
    place_Nk: Array
    end_E: Array


def _in_passes(
    matmul: GroupedMatmul,
    rows: int | None,
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
) -> Array:
    R = min(ids_Nk.size, rows or ids_Nk.size)
    return _grouped(matmul, -(-R // 8) * 8, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
    matmul: GroupedMatmul,
    R: int,
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
) -> Array:
    """The experts by a grouped matmul, R rows at a time, in as many passes as the choices that are
    here need: nothing is dropped, and an array of all N * k rows never exists.

    The backward pass computes each pass again.
    """
    return _grouped_forward(matmul, R, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)[0]


def _grouped_forward(matmul, R, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk):
    plan = _plan(ids_Nk, gate_EDF.shape[0], R)

    def one_pass(p: Array, out_ND: Array) -> Array:
        x_RD = _rows_of(x_ND, _choices(plan, p, R), ids_Nk.shape[1])
        return out_ND + _home(
            grouped_mlp(matmul, _sizes(plan, p, R), x_RD, gate_EDF, up_EDF, down_EFD),
            plan,
            p,
            weights_Nk,
        )

    out_ND = jax.lax.fori_loop(0, _passes(plan, R), one_pass, jnp.zeros(x_ND.shape, jnp.float32))
    return out_ND.astype(x_ND.dtype), (x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


def _grouped_backward(matmul, R, residuals, grad_ND):
    x_ND, *weights, weights_Nk, ids_Nk = residuals
    k, plan = ids_Nk.shape[1], _plan(ids_Nk, weights[0].shape[0], R)
    ones_Nk = jnp.ones_like(weights_Nk)

    def one_pass(p: Array, sums: tuple) -> tuple:
        dx_ND, dweights, dweights_Nk = sums
        choice_R = _choices(plan, p, R)
        y_RD, pull = jax.vjp(
            functools.partial(grouped_mlp, matmul, _sizes(plan, p, R)),
            _rows_of(x_ND, choice_R, k),
            *weights,
        )
        grad_RD = _rows_of(grad_ND, choice_R, k)
        weight_R = jnp.take(weights_Nk.reshape(-1), choice_R, mode="fill", fill_value=0)
        dx_RD, *more = pull(grad_RD * weight_R[:, None].astype(grad_RD.dtype))
        dweight_R1 = jnp.sum(
            y_RD.astype(jnp.float32) * grad_RD.astype(jnp.float32), axis=-1, keepdims=True
        )
        place_Nk = _place_in(plan, p, R)
        return (
            dx_ND + _home(dx_RD, plan, p, ones_Nk),
            jax.tree.map(jnp.add, dweights, tuple(more)),
            dweights_Nk + jnp.take(dweight_R1[:, 0], place_Nk, mode="fill", fill_value=0),
        )

    nothing = (
        jnp.zeros(x_ND.shape, jnp.float32),
        tuple(map(jnp.zeros_like, weights)),
        jnp.zeros(weights_Nk.shape, jnp.float32),
    )
    dx_ND, dweights, dweights_Nk = jax.lax.fori_loop(0, _passes(plan, R), one_pass, nothing)
    return dx_ND.astype(x_ND.dtype), *dweights, dweights_Nk.astype(weights_Nk.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def grouped_mlp(
    matmul: GroupedMatmul,
    sizes_E: Array,
    x_RD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
) -> Array:
    """Rows behind the last expert's are left to the kernel, which may leave anything there: they
    are never read.
    """
    return matmul(
        jax.nn.silu(matmul(x_RD, gate_EDF, sizes_E)) * matmul(x_RD, up_EDF, sizes_E),
        down_EFD,
        sizes_E,
    )


def _plan(ids_Nk: Array, E: int, R: int) -> _Plan:
    ids_A = absent_last(ids_Nk, E)
    A = ids_A.size
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    place_A = (
        jnp.zeros(A, jnp.int32)
        .at[choice_A]
        .set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
    )
    end_E = jnp.cumsum(jnp.bincount(ids_A, length=E + 1)[:E], dtype=jnp.int32)
    here_A = jnp.arange(A) < end_E[-1]
    choice_P = jnp.pad(jnp.where(here_A, choice_A, A), (0, -A % R), constant_values=A)
    return _Plan(choice_P, jnp.where(ids_A < E, place_A, -1).reshape(ids_Nk.shape), end_E)


def _passes(plan: _Plan, R: int) -> Array:
    return -(-plan.end_E[-1] // R)


def _choices(plan: _Plan, p: Array, R: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(plan.choice_P, p * R, R)


def _sizes(plan: _Plan, p: Array, R: int) -> Array:
    """Rows of each expert in pass p."""
    end_E = jnp.clip(plan.end_E - p * R, 0, R)
    return jnp.diff(end_E, prepend=0)


def _place_in(plan: _Plan, p: Array, R: int) -> Array:
    """The row of each choice in pass p; R, past the end, where it has none."""
    place_Nk = plan.place_Nk - p * R
    return jnp.where((plan.place_Nk >= 0) & (place_Nk >= 0) & (place_Nk < R), place_Nk, R)


def _rows_of(x_ND: Array, choice_R: Array, k: int) -> Array:
    return jnp.take(
        x_ND, choice_R // k, axis=0, mode="fill", fill_value=0
    )  # choice A belongs to token N, past the end


def _home(y_RD: Array, plan: _Plan, p: Array, weights_Nk: Array) -> Array:
    """[N, D] float32: for each token the weighted rows of its choices in pass p.

    One choice after the other: [N, k, D] never exists.
    """
    place_Nk = _place_in(plan, p, y_RD.shape[0])
    taken = (
        jnp.take(y_RD, place_Nk[:, j], axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        * weights_Nk[:, j, None]
        for j in range(place_Nk.shape[1])
    )
    return functools.reduce(jnp.add, taken)
