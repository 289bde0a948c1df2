"""The experts of a mixture: one function, forms behind it that are equal in value.

They differ in speed. Every form is dropless.

N tokens, D model, E experts, k experts a token, F expert hidden; A = N * k choices (token n, its
j-th expert), R rows of a pass of a grouped matmul, P rows of all passes.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.ops.experts_cpu import absent_last, experts_sorted, experts_tiled
from rome.model.ops.native import experts_native
from rome.model.ops.tokamax_library import load_tokamax

IMPLEMENTATIONS = ("auto", "dense", "sorted", "ragged", "megablox", "tokamax")
WITHOUT_GRADIENT = ("tiled", "native")  # for engines on CPU
GROUPED = ("ragged", "megablox", "tokamax")
DENSE_UP_TO = 128  # tokens; below, sorting costs more than it saves
# Tiles of the kernel; both operands and the float32 sum stay in a core's memory. Each expert but
# the first begins inside of a tile, which is computed for the expert before it too: small tiles
# waste less. They cost no traffic as long as one tile is as deep as the matrix: the next tile of
# the same expert finds its weights in place. Fewer rows than 128 leave a matrix unit idle.
MEGABLOX_ROWS = 256
MEGABLOX_ROWS_OF_FEW = 128  # where an expert has less than two tiles of rows
MEGABLOX_DEPTH = 2048
MEGABLOX_COLUMNS = 1024
LANES = 128
# (rows [R, D] by expert, matrices [E, D, F], rows of each matrix [E]) -> [R, F]
GroupedMatmul = Callable[[Array, Array, Array], Array]
# Rows that a part of a mesh makes room for, over the even share of its choices. More choices take
# another pass.
ROWS_OVER_SHARE = 1.5
ROWS_MULTIPLE = 512
# id of a choice that no expert computes: padding, or beyond an expert's capacity
NO_EXPERT = -1


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
    """Run `experts` with a capacity for each expert; return its result and the ids that ran.

    An expert takes at most capacity_factor * N * k / E choices; 0 is no limit.
    """
    if capacity_factor:
        E = gate_EDF.shape[0]
        ids_Nk = drop_beyond(ids_Nk, capacity(ids_Nk.size, E, capacity_factor), E)
    return experts(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, implementation), ids_Nk


def capacity(choices: int, E: int, factor: float) -> int:
    """Return how many of `choices` one of E experts takes: `factor` times its even share."""
    return min(choices, math.ceil(factor * choices / E))


def room(share: float) -> int:
    """Return the rows to make room for where `share` choices come if they lie evenly."""
    return math.ceil(ROWS_OVER_SHARE * share / ROWS_MULTIPLE) * ROWS_MULTIPLE


def drop_beyond(ids_Nk: Array, most: int, E: int) -> Array:
    """Replace ids by NO_EXPERT where an expert has `most` choices already.

    Earlier tokens go first. A dropped choice adds nothing to its token.
    """
    ids_A = absent_last(ids_Nk, E)
    order_A = jnp.argsort(ids_A, stable=True)
    end_E = jnp.cumsum(jnp.bincount(ids_A, length=E + 1))
    start_E = end_E - jnp.bincount(ids_A, length=E + 1)
    rank_A = jnp.arange(ids_A.size) - start_E[ids_A[order_A]]
    nothing_A = jnp.zeros(ids_A.size, bool)
    fits_A = nothing_A.at[order_A].set(rank_A < most, unique_indices=True)
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
    """Return sum_k weight_k * down(silu(gate(x)) * up(x)), each by the expert of its id.

    Args:
      x_ND: tokens.
      gate_EDF: matrices of all experts.
      up_EDF: matrices of all experts.
      down_EFD: matrices of all experts.
      weights_Nk: gate weights.
      ids_Nk: an id outside 0..E-1 names an expert that is not here and adds nothing.
      implementation: "dense" runs every expert on every token; "sorted" is the fast one for many
        tokens on CPU, where `lax.ragged_dot` ("ragged") costs as much as dense; "tiled" and
        "native" (C++) are those of an engine on CPU: for few tokens, row by row, without a
        gradient; "megablox" is the
        kernel of TPUs, "tokamax" of GPUs; "auto" chooses by the number of tokens and the platform.
      rows: of one pass, for the forms with a grouped matmul, where fewer than N * k choices are
        likely to be here. It bounds memory; more choices take more passes.

    Returns:
      [N, D] in x's dtype.

    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS + WITHOUT_GRADIENT:
        raise ValueError(
            f"experts implementation {implementation!r} is unknown; choose one of"
            f" {', '.join(IMPLEMENTATIONS + WITHOUT_GRADIENT)}"
        )
    if implementation == "auto":
        implementation = _best_here(x_ND.shape[0])
    if implementation == "dense":
        return experts_dense(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)
    if implementation == "sorted":
        return experts_sorted(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)
    if implementation == "tiled":
        return experts_tiled(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)
    if implementation == "native":
        return experts_native(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)
    forms = {"ragged": experts_ragged, "megablox": experts_megablox, "tokamax": experts_tokamax}
    grouped = forms[implementation]
    return grouped(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, rows)


def experts_dense(
    x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array
) -> Array:
    """Run every expert on every token, times 0 where not chosen.

    The reference for the other forms.
    """
    E = gate_EDF.shape[0]
    chosen_NkE = jax.nn.one_hot(ids_Nk, E, dtype=weights_Nk.dtype)
    weights_EN = jnp.sum(chosen_NkE * weights_Nk[..., None], axis=1).T
    # one matmul per expert: the weights need no transposed copy
    x_END = jnp.broadcast_to(x_ND, (E, *x_ND.shape))
    gate_ENF = jax.nn.silu(jnp.einsum("END,EDF->ENF", x_END, gate_EDF))
    hidden_ENF = gate_ENF * jnp.einsum("END,EDF->ENF", x_END, up_EDF)
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
    """Sort choices by expert and multiply them by XLA's own grouped matmul."""
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
    """Sort choices by expert and multiply them by the Pallas kernel of TPUs.

    The kernel visits only the tiles that belong to an expert. `interpret` runs its program on any
    device, slowly, for tests.
    """
    matmul = functools.partial(_megablox, interpret=interpret)
    return _in_passes(matmul, rows, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


def experts_tokamax(
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
    rows: int | None = None,
) -> Array:
    """Sort choices by expert and multiply them by tokamax's kernels (Triton, Mosaic)."""
    matmul = grouped_matmul("tokamax")
    return _in_passes(matmul, rows, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


def grouped_matmul(implementation: str) -> GroupedMatmul:
    """Return the grouped matmul of a form of the experts.

    Raises:
      ValueError: the form has none.
    """
    if implementation == "tokamax":
        return load_tokamax().ragged_dot
    if implementation not in GROUPED:
        raise ValueError(
            f"experts implementation {implementation!r} has no grouped matmul; choose one of"
            f" {', '.join(GROUPED)}"
        )
    return _megablox if implementation == "megablox" else jax.lax.ragged_dot


def grouped_mlp(
    matmul: GroupedMatmul,
    sizes_E: Array,
    x_RD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
) -> Array:
    """Return down(silu(gate(x)) * up(x)) of rows that are sorted by expert, [R, D].

    Rows after the last expert's may hold anything: the kernel leaves them, and they are never read.
    """
    gate_RF = jax.nn.silu(matmul(x_RD, gate_EDF, sizes_E))
    hidden_RF = gate_RF * matmul(x_RD, up_EDF, sizes_E)
    return matmul(hidden_RF, down_EFD, sizes_E)


def _best_here(tokens: int) -> str:
    if tokens <= DENSE_UP_TO:
        return "dense"
    return "sorted" if jax.default_backend() == "cpu" else "ragged"


def row_tile(R: int, E: int) -> int:
    """Return the rows of a tile of megablox where E experts share R rows."""
    wanted = MEGABLOX_ROWS if R >= 2 * MEGABLOX_ROWS * E else MEGABLOX_ROWS_OF_FEW
    return max(8, math.gcd(wanted, R))


def _megablox(x_RD: Array, w_EDF: Array, sizes_E: Array, interpret: bool = False) -> Array:
    R = x_RD.shape[0]
    tile = row_tile(R, w_EDF.shape[0])
    filled_RD = jnp.pad(x_RD, ((0, -R % tile), (0, 0)))
    return _tiled_matmul(filled_RD, w_EDF, sizes_E, tile, interpret)[:R]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _tiled_matmul(
    x_RD: Array, w_EDF: Array, sizes_E: Array, tile: int, interpret: bool = False
) -> Array:
    """Multiply rows by their expert's matrix, [R, F], in tiles of `tile` rows.

    The gradient that comes with megablox takes the tiles of the forward matmul, which fit neither
    of its own two: they are chosen for each here.
    """
    _, D, F = w_EDF.shape
    tiling = (tile, _side(D, MEGABLOX_DEPTH), _side(F, MEGABLOX_COLUMNS))
    return _megablox_kernels().gmm(x_RD, w_EDF, sizes_E, x_RD.dtype, tiling, interpret=interpret)


def _tiled_matmul_forward(
    x_RD: Array, w_EDF: Array, sizes_E: Array, tile: int, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    out_RF = _tiled_matmul(x_RD, w_EDF, sizes_E, tile, interpret)
    return out_RF, (x_RD, w_EDF, sizes_E)


def _tiled_matmul_backward(
    tile: int, interpret: bool, residuals: tuple[Array, ...], grad_RF: Array
) -> tuple[Array, Array, None]:
    x_RD, w_EDF, sizes_E = residuals
    E, D, F = w_EDF.shape
    kernels = _megablox_kernels()
    dx_RD = kernels.gmm(
        grad_RF,
        w_EDF,
        sizes_E,
        x_RD.dtype,
        (tile, _side(F, MEGABLOX_DEPTH), _side(D, MEGABLOX_COLUMNS)),
        transpose_rhs=True,
        interpret=interpret,
    )
    dw_EDF = kernels.tgmm(
        x_RD.T,
        grad_RF,
        sizes_E,
        w_EDF.dtype,
        (tile, _side(D, MEGABLOX_COLUMNS), _side(F, MEGABLOX_COLUMNS)),
        num_actual_groups=E,
        interpret=interpret,
    )
    return dx_RD, dw_EDF, None


_tiled_matmul.defvjp(_tiled_matmul_forward, _tiled_matmul_backward)


def _megablox_kernels() -> ModuleType:
    # the package's own name `gmm` is a function that hides its module
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _side(size: int, most: int) -> int:
    """Return the side of a tile: the largest number of whole lanes up to `most` that divides.

    A side that does not divide leaves a tile half empty, and the kernel computes all of it.
    """
    for side in range(most - most % LANES, 0, -LANES):
        if size % side == 0:
            return side
    return min(size, most)


class _Plan(NamedTuple):
    """The order in which choices are computed.

    Attributes:
      choice_P: choices in the order of their experts, absent ones last; filled up with A to whole
        passes.
      place_Nk: place of each choice in that order; -1 for absent ones.
      end_E: where each expert's choices end in it.
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
    wanted = min(ids_Nk.size, rows or ids_Nk.size)
    R = -(-wanted // 8) * 8
    return _grouped(matmul, R, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


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
    """Run the experts by a grouped matmul, R rows at a time.

    In as many passes as the choices that are here need: nothing is dropped, and an array of all N *
    k rows never exists. The backward pass computes each pass again.
    """
    return _grouped_forward(matmul, R, x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)[0]


def _grouped_forward(
    matmul: GroupedMatmul,
    R: int,
    x_ND: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    weights_Nk: Array,
    ids_Nk: Array,
) -> tuple[Array, tuple[Array, ...]]:
    plan = _plan(ids_Nk, gate_EDF.shape[0], R)

    def one_pass(p: Array, out_ND: Array) -> Array:
        x_RD = _rows_of(x_ND, _choices(plan, p, R), ids_Nk.shape[1])
        y_RD = grouped_mlp(matmul, _sizes(plan, p, R), x_RD, gate_EDF, up_EDF, down_EFD)
        return out_ND + _sum_by_token(y_RD, plan, p, weights_Nk)

    nothing_ND = jnp.zeros(x_ND.shape, jnp.float32)
    out_ND = jax.lax.fori_loop(0, _passes(plan, R), one_pass, nothing_ND)
    return out_ND.astype(x_ND.dtype), (x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


def _grouped_backward(
    matmul: GroupedMatmul, R: int, residuals: tuple[Array, ...], grad_ND: Array
) -> tuple[Array | None, ...]:
    x_ND, *weights, weights_Nk, ids_Nk = residuals
    k = ids_Nk.shape[1]
    plan = _plan(ids_Nk, weights[0].shape[0], R)
    ones_Nk = jnp.ones_like(weights_Nk)

    def one_pass(p: Array, sums: tuple) -> tuple:
        dx_ND, dweights, dweights_Nk = sums
        choice_R = _choices(plan, p, R)
        x_RD = _rows_of(x_ND, choice_R, k)
        mlp = functools.partial(grouped_mlp, matmul, _sizes(plan, p, R))
        y_RD, pull = jax.vjp(mlp, x_RD, *weights)
        grad_RD = _rows_of(grad_ND, choice_R, k)
        weight_R = _take_or_zero(weights_Nk.reshape(-1), choice_R)
        weight_R1 = weight_R[:, None].astype(grad_RD.dtype)
        dx_RD, *more = pull(grad_RD * weight_R1)
        product_RD = y_RD.astype(jnp.float32) * grad_RD.astype(jnp.float32)
        dweight_R1 = jnp.sum(product_RD, axis=-1, keepdims=True)
        place_Nk = _place_in(plan, p, R)
        dx_ND = dx_ND + _sum_by_token(dx_RD, plan, p, ones_Nk)
        dweights = jax.tree.map(jnp.add, dweights, tuple(more))
        dweights_Nk = dweights_Nk + _take_or_zero(dweight_R1[:, 0], place_Nk)
        return dx_ND, dweights, dweights_Nk

    nothing = (
        jnp.zeros(x_ND.shape, jnp.float32),
        tuple(map(jnp.zeros_like, weights)),
        jnp.zeros(weights_Nk.shape, jnp.float32),
    )
    dx_ND, dweights, dweights_Nk = jax.lax.fori_loop(0, _passes(plan, R), one_pass, nothing)
    return dx_ND.astype(x_ND.dtype), *dweights, dweights_Nk.astype(weights_Nk.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _plan(ids_Nk: Array, E: int, R: int) -> _Plan:
    ids_A = absent_last(ids_Nk, E)
    A = ids_A.size
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    nowhere_A = jnp.zeros(A, jnp.int32)
    order_A = jnp.arange(A, dtype=jnp.int32)
    place_A = nowhere_A.at[choice_A].set(order_A, unique_indices=True)
    sizes_E = jnp.bincount(ids_A, length=E + 1)[:E]
    end_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    here_A = jnp.arange(A) < end_E[-1]
    choice_P = jnp.pad(jnp.where(here_A, choice_A, A), (0, -A % R), constant_values=A)
    place_Nk = jnp.where(ids_A < E, place_A, -1).reshape(ids_Nk.shape)
    return _Plan(choice_P, place_Nk, end_E)


def _passes(plan: _Plan, R: int) -> Array:
    return -(-plan.end_E[-1] // R)


def _choices(plan: _Plan, p: Array, R: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(plan.choice_P, p * R, R)


def _sizes(plan: _Plan, p: Array, R: int) -> Array:
    """Return the rows of each expert in pass p."""
    end_E = jnp.clip(plan.end_E - p * R, 0, R)
    return jnp.diff(end_E, prepend=0)


def _place_in(plan: _Plan, p: Array, R: int) -> Array:
    """Return the row of each choice in pass p; R, past the end, where it has none."""
    place_Nk = plan.place_Nk - p * R
    return jnp.where((plan.place_Nk >= 0) & (place_Nk >= 0) & (place_Nk < R), place_Nk, R)


def _take_or_zero(values: Array, places: Array) -> Array:
    """Return values at places; 0 past the end."""
    return jnp.take(values, places, mode="fill", fill_value=0)


def _rows_of(x_ND: Array, choice_R: Array, k: int) -> Array:
    # choice A belongs to token N, past the end
    return jnp.take(x_ND, choice_R // k, axis=0, mode="fill", fill_value=0)


def _sum_by_token(y_RD: Array, plan: _Plan, p: Array, weights_Nk: Array) -> Array:
    """Sum for each token the weighted rows of its choices in pass p, [N, D] float32.

    One choice after the other: [N, k, D] never exists.
    """
    place_Nk = _place_in(plan, p, y_RD.shape[0])

    def weighted_row(j: int) -> Array:
        row_ND = jnp.take(y_RD, place_Nk[:, j], axis=0, mode="fill", fill_value=0)
        return row_ND.astype(jnp.float32) * weights_Nk[:, j, None]

    return functools.reduce(jnp.add, map(weighted_row, range(place_Nk.shape[1])))
