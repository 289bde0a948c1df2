"""The experts themselves: one function, forms behind it that are equal in value and differ in speed. Dropless in every form.

N tokens, D model, E experts, k experts a token, F expert hidden; A = N * k choices (token n, its j-th expert), R rows of a grouped matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.experts_cpu import absent_last, experts_sorted

IMPLEMENTATIONS = ("auto", "dense", "sorted", "ragged", "megablox", "tokamax")
DENSE_UP_TO = 128  # tokens; below, sorting costs more than it saves
MEGABLOX_ROWS, MEGABLOX_COLUMNS = 512, 1024  # a tile of the kernel; both operands and the float32 sum stay in a core's memory


NO_EXPERT = -1  # the id of a choice that no expert computes: padding, or beyond an expert's capacity


def experts_within(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array, implementation: str,
                   capacity_factor: float) -> tuple[Array, Array]:
    """`experts` with a capacity of capacity_factor * N * k / E choices for each of them, 0 for none; and the ids that ran."""
    if capacity_factor:
        ids_Nk = drop_beyond(ids_Nk, capacity(ids_Nk.size, gate_EDF.shape[0], capacity_factor), gate_EDF.shape[0])
    return experts(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, implementation), ids_Nk


def capacity(choices: int, E: int, factor: float) -> int:
    """How many of `choices` one of E experts takes: `factor` times its even share."""
    return min(choices, math.ceil(factor * choices / E))


def drop_beyond(ids_Nk: Array, most: int, E: int) -> Array:
    """ids with NO_EXPERT where an expert has `most` choices already; earlier tokens go first. What is dropped adds nothing to its token."""
    ids_A = absent_last(ids_Nk, E)
    order_A = jnp.argsort(ids_A, stable=True)
    start_E = jnp.cumsum(jnp.bincount(ids_A, length=E + 1)) - jnp.bincount(ids_A, length=E + 1)
    rank_A = jnp.arange(ids_A.size) - start_E[ids_A[order_A]]
    fits_A = jnp.zeros(ids_A.size, bool).at[order_A].set(rank_A < most, unique_indices=True)
    return jnp.where(fits_A.reshape(ids_Nk.shape), ids_Nk, NO_EXPERT)


def experts(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array,
            implementation: str = "auto", most: int | None = None) -> Array:
    """sum_k weight_k * down(silu(gate(x)) * up(x)), each by the expert that its id names; an id outside 0..E-1 names one that is not here and adds
    nothing. Dropless in every form.

    implementation: "dense" runs every expert on every token; "sorted" is the fast one for many tokens on CPU, where `lax.ragged_dot`
    ("ragged") costs as much as dense; "megablox" is the kernel of TPUs, "tokamax" of GPUs; "auto" chooses by the number of tokens and the platform.
    most: a bound of the choices that are here, where the caller knows one below N * k; forms with a grouped matmul then hold that many rows.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"experts implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        many = "sorted" if jax.default_backend() == "cpu" else "ragged"
        implementation = "dense" if x_ND.shape[0] <= DENSE_UP_TO else many
    if implementation in ("dense", "sorted"):
        return {"dense": experts_dense, "sorted": experts_sorted}[implementation](x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)
    grouped = {"ragged": experts_ragged, "megablox": experts_megablox, "tokamax": experts_tokamax}[implementation]
    return grouped(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, most)


def experts_dense(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array) -> Array:
    """Every expert on every token, times 0 where not chosen. The oracle; also what the engine decodes with: rows stay apart."""
    E = gate_EDF.shape[0]
    weights_EN = jnp.sum(jax.nn.one_hot(ids_Nk, E, dtype=weights_Nk.dtype) * weights_Nk[..., None], axis=1).T
    x_END = jnp.broadcast_to(x_ND, (E, *x_ND.shape))  # one matmul per expert: the weights need no transposed copy
    hidden_ENF = jax.nn.silu(jnp.einsum("END,EDF->ENF", x_END, gate_EDF)) * jnp.einsum("END,EDF->ENF", x_END, up_EDF)
    hidden_ENF = hidden_ENF * weights_EN[..., None].astype(x_ND.dtype)
    return jnp.einsum("ENF,EFD->END", hidden_ENF, down_EFD).sum(axis=0)


def experts_ragged(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array,
                   most: int | None = None, matmul: Callable[[Array, Array, Array], Array] = jax.lax.ragged_dot) -> Array:
    """Choices sorted by expert, multiplied by a grouped matmul (rows [A, D], matrices [E, D, F], rows of each matrix [E]) -> [A, F]."""
    k, E = ids_Nk.shape[1], gate_EDF.shape[0]
    ids_A = absent_last(ids_Nk, E)
    A = ids_A.shape[0]
    R = A if most is None else min(A, -(-most // 8) * 8)  # rows; the absent come last in order and are cut off
    order_A = jnp.argsort(ids_A, stable=True)
    sizes_E = jnp.bincount(ids_A, length=E + 1)[:E].astype(jnp.int32)
    place_Nk = jnp.where(ids_A < E, jnp.argsort(order_A), A).reshape(ids_Nk.shape)
    choice_R = jnp.where(jnp.arange(R) < sizes_E.sum(), order_A[:R], A)  # rows behind the last expert's are no one's and are never read
    x_RD = _take_rows(x_ND, choice_R // k, place_Nk)
    hidden_RF = jax.nn.silu(matmul(x_RD, gate_EDF, sizes_E)) * matmul(x_RD, up_EDF, sizes_E)
    out_RD = matmul(hidden_RF, down_EFD, sizes_E)
    out_NkD = _take_rows(out_RD, place_Nk.reshape(-1), choice_R[:, None]).reshape(*ids_Nk.shape, -1)
    return jnp.einsum("NkD,Nk->ND", out_NkD, weights_Nk.astype(x_ND.dtype))


def experts_megablox(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array,
                     most: int | None = None, interpret: bool = False) -> Array:
    """Choices sorted by expert, multiplied by the Pallas kernel of TPUs: it visits only the tiles that belong to an expert.

    interpret: run the kernel's program on any device, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    def matmul(x_RD: Array, w_EDF: Array, sizes_E: Array) -> Array:
        tile = max(8, math.gcd(MEGABLOX_ROWS, x_RD.shape[0]))
        tiling = (tile, min(MEGABLOX_COLUMNS, w_EDF.shape[1]), min(MEGABLOX_COLUMNS, w_EDF.shape[2]))
        filled_RD = jnp.pad(x_RD, ((0, -x_RD.shape[0] % tile), (0, 0)))
        return gmm(filled_RD, w_EDF, sizes_E, x_RD.dtype, tiling, interpret=interpret)[:x_RD.shape[0]]

    return experts_ragged(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, most, matmul)


def experts_tokamax(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array, most: int | None = None) -> Array:
    """Choices sorted by expert, multiplied by tokamax's kernels (Triton, Mosaic)."""
    import tokamax  # in requirements-cuda.txt only

    return experts_ragged(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, most, tokamax.ragged_dot)


@jax.custom_vjp
def _take_rows(x_RD: Array, index_Q: Array, takers_RJ: Array) -> Array:
    """x[index], zeros where an index is past the end. `takers` lists for each row of x who took it, so that the gradient is a gather
    too: the scatter-add that JAX would make is several times slower on CPU."""
    return jnp.take(x_RD, index_Q, axis=0, mode="fill", fill_value=0)


def _take_rows_forward(x_RD, index_Q, takers_RJ):
    return _take_rows(x_RD, index_Q, takers_RJ), takers_RJ


def _take_rows_backward(takers_RJ, grad_QD):
    return jnp.take(grad_QD, takers_RJ, axis=0, mode="fill", fill_value=0).sum(axis=1), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)
