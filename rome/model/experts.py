"""The experts themselves: one function, forms behind it that are equal in value and differ in speed. Dropless in every form.

N tokens, D model, E experts, k experts a token, F expert hidden; A = N * k choices (token n, its j-th expert).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.experts_cpu import experts_sorted

IMPLEMENTATIONS = ("auto", "dense", "sorted", "ragged")
DENSE_UP_TO = 128  # tokens; below, sorting costs more than it saves


def experts(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array,
            implementation: str = "auto") -> Array:
    """sum_k weight_k * down(silu(gate(x)) * up(x)), each by the expert that its id names. Dropless in every form.

    implementation: "dense" runs every expert on every token; "sorted" is the fast one for many tokens on CPU, where `lax.ragged_dot`
    ("ragged") costs as much as dense; "auto" chooses by the number of tokens and the platform.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"experts implementation {implementation!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        many = "sorted" if jax.default_backend() == "cpu" else "ragged"
        implementation = "dense" if x_ND.shape[0] <= DENSE_UP_TO else many
    form = {"dense": experts_dense, "sorted": experts_sorted, "ragged": experts_ragged}[implementation]
    return form(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk)


def experts_dense(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array) -> Array:
    """Every expert on every token, times 0 where not chosen. The oracle; also what the engine decodes with: rows stay apart."""
    E = gate_EDF.shape[0]
    weights_EN = jnp.sum(jax.nn.one_hot(ids_Nk, E, dtype=weights_Nk.dtype) * weights_Nk[..., None], axis=1).T
    x_END = jnp.broadcast_to(x_ND, (E, *x_ND.shape))  # one matmul per expert: the weights need no transposed copy
    hidden_ENF = jax.nn.silu(jnp.einsum("END,EDF->ENF", x_END, gate_EDF)) * jnp.einsum("END,EDF->ENF", x_END, up_EDF)
    hidden_ENF = hidden_ENF * weights_EN[..., None].astype(x_ND.dtype)
    return jnp.einsum("ENF,EFD->END", hidden_ENF, down_EFD).sum(axis=0)


def experts_ragged(x_ND: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Nk: Array, ids_Nk: Array) -> Array:
    """Choices sorted by expert, matmuls by `lax.ragged_dot`."""
    ids_A, k = ids_Nk.reshape(-1), ids_Nk.shape[1]
    order_A = jnp.argsort(ids_A, stable=True)
    place_Nk = jnp.argsort(order_A).reshape(ids_Nk.shape)
    sizes_E = jnp.bincount(ids_A, length=gate_EDF.shape[0]).astype(jnp.int32)
    x_AD = _take_rows(x_ND, order_A // k, place_Nk)
    hidden_AF = jax.nn.silu(jax.lax.ragged_dot(x_AD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(x_AD, up_EDF, sizes_E)
    out_AD = jax.lax.ragged_dot(hidden_AF, down_EFD, sizes_E)
    out_NkD = _take_rows(out_AD, place_Nk.reshape(-1), order_A[:, None]).reshape(*ids_Nk.shape, -1)
    return jnp.einsum("NkD,Nk->ND", out_NkD, weights_Nk.astype(x_ND.dtype))


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
