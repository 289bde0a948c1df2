"""Experts on a mesh by exchange: each choice is sent to its expert's device, the result back.

m tokens of a chunk, n tokens of one device, D model, F expert hidden, E experts of all, e experts
of one device (E = g * e), g devices of the expert axis, s of them as senders, k experts a token, A
= m * k choices of a chunk, R rows that a device makes room for in a part of a pass.

Cost. The ring (`rome.model.ops.experts_on_mesh`) moves every token past every device: each device
sends g * n * D numbers for tokens and as many for sums, of n tokens. Here it sends at most k * n *
D * (g - 1) / g each way, k / g of that. The load of a link is another matter. Let the group extend
over c dimensions of the torus that close to rings, at most r chips of one. A hop of the ring is c
links long where the next device stands in another row, and goes both ways: c * g / 2 times n * D
pass a link in all. An exchange crosses the torus: k * r / 8 times n * D. That is k * r / (4 * c *
g) of the ring's. At k = 8: twice on one ring (g = r), half at 4 x 2, a quarter at 4 x 4, 1/24 at 4
x 4 x 4.

Passes. A device's tokens go in chunks, so that memory does not grow with their number. Choices are
sorted by expert and counted; from the counts of all devices each knows where every block of one
expert and one sender lies, and rows arrive in the order of experts, ready for a grouped matmul. A
device makes room for half as much again as its even share. Should more be on their way to any
device, another pass brings the rest: nothing is dropped, whatever the load. The worst, everything
to one device, takes g / 1.5 passes and no more memory.

A pass has PARTS equal parts, by the order of experts. Each depends on none of the others, so that
one part's rows are under way while another's are multiplied: on TPUs with the flag for an exchange
that starts and ends apart (`rome.train.xla_flags`), the first part's way out and the last one's way
home are what nothing hides.

Gradients. Gate weights multiply at the expert, in float32, and choices are added up at home, in
float32. So the backward pass, which sends tokens out again and gradients with them, needs no
results back: three exchanges.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.ops.experts import GroupedMatmul, grouped_mlp, room
from rome.model.ops.experts_cpu import absent_last

CHUNK = 2048  # tokens of a device that are under way at a time
PARTS = 2  # of a pass


def is_worthwhile(k: int, g: int, extent: tuple[int, ...]) -> bool:
    """Return whether an exchange takes at most half of the ring's time.

    By the bytes that pass the busiest link.

    Args:
      k: experts a token.
      g: devices of the expert axis.
      extent: chips that these extend over, as of `rome.model.sharding.extent`.
    """
    return bool(extent) and k * max(extent) <= 2 * len(extent) * g


def exchange(
    matmul: GroupedMatmul,
    x_nD: Array,
    weights_nk: Array,
    ids_nk: Array,
    gate_eDF: Array,
    up_eDF: Array,
    down_eFD: Array,
) -> Array:
    """Return the experts' sum for this device's tokens, [n, D].

    On one device of a shard_map.

    Args:
      matmul: the grouped matmul of `rome.model.ops.experts`.
      x_nD: this device's tokens.
      weights_nk: gate weights.
      ids_nk: ids among all E experts; one outside of them adds nothing.
      gate_eDF: matrices of this device's experts.
      up_eDF: matrices of this device's experts.
      down_eFD: matrices of this device's experts.
    """
    chunks = chunks_of(x_nD.shape[0])

    def one_chunk(tokens: tuple[Array, Array, Array]) -> Array:
        rows = room(ids_nk.size / chunks / PARTS)
        return _exchanged(matmul, rows, *tokens, gate_eDF, up_eDF, down_eFD)

    if chunks == 1:
        return one_chunk((x_nD, weights_nk, ids_nk))
    in_chunks = tuple(a.reshape(chunks, -1, a.shape[-1]) for a in (x_nD, weights_nk, ids_nk))
    return jax.lax.map(one_chunk, in_chunks).reshape(x_nD.shape)


def chunks_of(tokens: int) -> int:
    """Return the least number of equal chunks of at most CHUNK tokens."""
    fewest = -(-tokens // CHUNK)
    return next(chunks for chunks in range(fewest, tokens + 1) if tokens % chunks == 0)


def send_rows(
    rows: Array,
    into: Array,
    at_sender_E: Array,
    sent_E: Array,
    at_receiver_E: Array,
    received_E: Array,
) -> Array:
    """Exchange e blocks of rows with each device; return `into` with the received rows.

    Args:
      rows: rows to send.
      into: rows that the received ones overwrite.
      at_sender_E: first row of each block. Block i goes to device i // e.
      sent_E: rows of each block.
      at_receiver_E: first row in the receiver's `into` of each block.
      received_E: rows of each block that this device receives.
    """
    return jax.lax.ragged_all_to_all(
        rows, into, at_sender_E, sent_E, at_receiver_E, received_E, axis_name="expert"
    )


class _Plan(NamedTuple):
    """What every device of the group knows about a chunk of each.

    Attributes:
      choice_A: own choices by expert, absent ones last, with A for those.
      place_mk: place of each choice in choice_A; A for absent ones.
      count_sE: choices of each sender for each expert.
      first_sE: where an expert's choices begin in the sender's order.
      row_sE: where they begin in the order of the rows of the expert's device, which is by expert
        and then by sender.
      rows_E: rows of a part on the device of each expert.
      passes: number of passes that bring all rows.
    """

    choice_A: Array
    place_mk: Array
    count_sE: Array
    first_sE: Array
    row_sE: Array
    rows_E: Array
    passes: Array


class _Window(NamedTuple):
    """What a part exchanges of each block: where it lies at either end, and its size."""

    at_sender_sE: Array
    at_receiver_sE: Array
    size_sE: Array


def _before(sizes: Array, axis: int) -> Array:
    """Return the sum of the sizes before each one."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def _make_plan(ids_mk: Array, e: int, R: int) -> _Plan:
    g = jax.lax.axis_size("expert")
    E = g * e
    A = ids_mk.size
    ids_A = absent_last(ids_mk, E)
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    nowhere_A = jnp.zeros(A, jnp.int32)
    order_A = jnp.arange(A, dtype=jnp.int32)
    place_A = nowhere_A.at[choice_A].set(order_A, unique_indices=True)
    is_absent_A = ids_A == E
    count_E = jnp.bincount(ids_A, length=E + 1)[:-1].astype(jnp.int32)
    count_sE = jax.lax.all_gather(count_E, "expert")
    count_ge = count_sE.sum(axis=0).reshape(g, e)
    choice_A = jnp.where(is_absent_A[choice_A], A, choice_A)
    place_mk = jnp.where(is_absent_A, A, place_A).reshape(ids_mk.shape)
    first_sE = _before(count_sE, 1)
    row_sE = _before(count_ge, 1).reshape(-1) + _before(count_sE, 0)
    count_g = count_ge.sum(axis=1)
    passes = jnp.max(-(-count_g // (PARTS * R)))
    rows_g = -(-count_g // jnp.maximum(PARTS * passes, 1))
    rows_E = jnp.repeat(rows_g, e, total_repeat_length=E)
    return _Plan(choice_A, place_mk, count_sE, first_sE, row_sE, rows_E, passes)


def _parts_of(p: Array) -> list[Array]:
    """Return the numbers of the parts of a pass."""
    return [PARTS * p + part for part in range(PARTS)]


def _window(plan: _Plan, part: Array) -> _Window:
    first_row_E = part * plan.rows_E
    begin_sE = jnp.clip(first_row_E - plan.row_sE, 0, plan.count_sE)
    end_sE = jnp.clip(first_row_E + plan.rows_E - plan.row_sE, 0, plan.count_sE)
    here_sE = end_sE > begin_sE
    at_sender_sE = jnp.where(here_sE, plan.first_sE + begin_sE, 0)
    at_receiver_sE = jnp.where(here_sE, plan.row_sE + begin_sE - first_row_E, 0)
    return _Window(at_sender_sE, at_receiver_sE, end_sE - begin_sE)


def _own(a_sE: Array) -> Array:
    """Return the columns of this device's experts, [s, e]."""
    e = a_sE.shape[1] // jax.lax.axis_size("expert")
    return jax.lax.dynamic_slice_in_dim(a_sE, jax.lax.axis_index("expert") * e, e, axis=1)


def _send(rows_AD: Array, window: _Window, R: int) -> Array:
    at_sender_E, at_receiver_E, sent_E = (a_sE[jax.lax.axis_index("expert")] for a_sE in window)
    nothing_RD = jnp.zeros((R, rows_AD.shape[1]), rows_AD.dtype)
    received_E = _own(window.size_sE).reshape(-1)
    return send_rows(rows_AD, nothing_RD, at_sender_E, sent_E, at_receiver_E, received_E)


def _send_home(rows_RD: Array, into_AD: Array, window: _Window) -> Array:
    at_sender_E, at_receiver_E, sent_E = (_own(a_sE).reshape(-1) for a_sE in window)
    received_E = window.size_sE[jax.lax.axis_index("expert")]
    return send_rows(rows_RD, into_AD, at_receiver_E, sent_E, at_sender_E, received_E)


def _spread(x_mD: Array, plan: _Plan) -> Array:
    """Return the token of each choice, in the order of their experts, [A, D]."""
    token_A = plan.choice_A // plan.place_mk.shape[1]
    return jnp.take(x_mD, token_A, axis=0, mode="fill", fill_value=0)


def _add_up(rows_AD: Array, plan: _Plan) -> Array:
    """Sum each token's choices, [m, D], in float32 until the end.

    One after the other: [m, k, D] never exists.
    """

    def row_of(j: int) -> Array:
        row_mD = jnp.take(rows_AD, plan.place_mk[:, j], axis=0, mode="fill", fill_value=0)
        return row_mD.astype(jnp.float32)

    total_mD = functools.reduce(jnp.add, map(row_of, range(plan.place_mk.shape[1])))
    return total_mD.astype(rows_AD.dtype)


def _all_weights(weights_mk: Array, plan: _Plan) -> Array:
    """Return the gate weights of all devices' choices, each by expert, [s * A] float32.

    A few bytes a choice: gathered whole.
    """
    flat_A = weights_mk.astype(jnp.float32).reshape(-1)
    weights_A = jnp.take(flat_A, plan.choice_A, mode="fill", fill_value=0)
    return jax.lax.all_gather(weights_A, "expert", tiled=True)


def _arrived(plan: _Plan, part: Array, R: int) -> Array:
    """Return which of all devices' choices each row of a part is, an index into [s * A].

    Past the end where no row arrived.
    """
    g = plan.count_sE.shape[0]
    A = plan.choice_A.size
    count_es = _own(plan.count_sE).T.reshape(-1)
    first_es = _own(plan.first_sE).T.reshape(-1)
    begin_es = _own(plan.row_sE).T.reshape(-1)
    rows = plan.rows_E[jax.lax.axis_index("expert") * _own(plan.count_sE).shape[1]]
    place_R = jnp.arange(R, dtype=jnp.int32)
    row_R = part * rows + place_R
    block_R = jnp.searchsorted(jnp.cumsum(count_es), row_R, side="right", method="compare_all")
    sender_R = block_R % g
    first_R = jnp.take(first_es, block_R, mode="clip")
    begin_R = jnp.take(begin_es, block_R, mode="clip")
    choice_R = sender_R * A + first_R + row_R - begin_R
    return jnp.where((block_R < count_es.size) & (place_R < rows), choice_R, g * A)


def _weighted(
    matmul: GroupedMatmul, sizes_e: Array, x_RD: Array, weight_R: Array, *matrices: Array
) -> Array:
    """Return the experts' weighted results for the rows that arrived, [R, D].

    The rows after those may hold anything; they are never sent.
    """
    y_RD = grouped_mlp(matmul, sizes_e, x_RD, *matrices).astype(jnp.float32)
    return (y_RD * weight_R[:, None]).astype(x_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(
    matmul: GroupedMatmul, R: int, x_mD: Array, weights_mk: Array, ids_mk: Array, *matrices: Array
) -> Array:
    return _forward(matmul, R, x_mD, weights_mk, ids_mk, *matrices)[0]


def _forward(
    matmul: GroupedMatmul, R: int, x_mD: Array, weights_mk: Array, ids_mk: Array, *matrices: Array
) -> tuple[Array, tuple[Array, ...]]:
    plan = _make_plan(ids_mk, matrices[0].shape[0], R)
    x_AD = _spread(x_mD, plan)
    weights_sA = _all_weights(weights_mk, plan)

    def one_pass(p: Array, y_AD: Array) -> Array:
        windows = [_window(plan, part) for part in _parts_of(p)]
        arrived = [_send(x_AD, window, R) for window in windows]
        for part, window, x_RD in zip(_parts_of(p), windows, arrived, strict=True):
            weight_R = jnp.take(weights_sA, _arrived(plan, part, R), mode="fill", fill_value=0)
            sizes_e = _own(window.size_sE).sum(axis=0)
            y_RD = _weighted(matmul, sizes_e, x_RD, weight_R, *matrices)
            y_AD = _send_home(y_RD, y_AD, window)
        return y_AD

    y_AD = jax.lax.fori_loop(0, plan.passes, one_pass, jnp.zeros_like(x_AD))
    return _add_up(y_AD, plan), (x_mD, weights_mk, ids_mk, *matrices)


def _backward(
    matmul: GroupedMatmul, R: int, residuals: tuple[Array, ...], grad_mD: Array
) -> tuple[Array | None, ...]:
    x_mD, weights_mk, ids_mk, *matrices = residuals
    plan = _make_plan(ids_mk, matrices[0].shape[0], R)
    x_AD = _spread(x_mD, plan)
    grad_AD = _spread(grad_mD, plan)
    weights_sA = _all_weights(weights_mk, plan)

    def one_pass(p: Array, sums: tuple) -> tuple:
        dx_AD, dweights_sA, dmatrices = sums
        windows = [_window(plan, part) for part in _parts_of(p)]
        arrived = [(_send(x_AD, one, R), _send(grad_AD, one, R)) for one in windows]
        for part, window, (x_RD, grad_RD) in zip(_parts_of(p), windows, arrived, strict=True):
            choice_R = _arrived(plan, part, R)
            weight_R = jnp.take(weights_sA, choice_R, mode="fill", fill_value=0)
            compute = functools.partial(_weighted, matmul, _own(window.size_sE).sum(axis=0))
            _, pull = jax.vjp(compute, x_RD, weight_R, *matrices)
            dx_RD, dweight_R, *more = pull(grad_RD)
            dx_AD = _send_home(dx_RD, dx_AD, window)
            dweights_sA = dweights_sA.at[choice_R].add(dweight_R, mode="drop")
            dmatrices = tuple(map(jnp.add, dmatrices, more))
        return dx_AD, dweights_sA, dmatrices

    nothing = jnp.zeros_like(x_AD), jnp.zeros_like(weights_sA), tuple(map(jnp.zeros_like, matrices))
    dx_AD, dweights_sA, dmatrices = jax.lax.fori_loop(0, plan.passes, one_pass, nothing)
    dweights_A = jax.lax.psum_scatter(dweights_sA, "expert", tiled=True)
    dweights_mk = jnp.take(dweights_A, plan.place_mk, mode="fill", fill_value=0)
    return _add_up(dx_AD, plan), dweights_mk.astype(weights_mk.dtype), None, *dmatrices


_exchanged.defvjp(_forward, _backward)
