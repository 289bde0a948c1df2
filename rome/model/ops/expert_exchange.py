"""Experts on a mesh by exchange: each choice of a token travels to the device that holds its
expert, and its result comes back.

m tokens of a chunk, D model, F expert hidden, E experts of all, e experts of one device (E = g *
e), g devices of the expert axis, s of them as senders, k experts a token, A = m * k choices of a
chunk, R rows that a device makes room for in a pass.

The ring (`rome.model.ops.experts_on_mesh`) moves every token past every device: each device sends g
* n * D numbers for tokens and as many for sums, of n tokens. Here it sends at most k * n * D * (g -
1) / g each way, k / g of that. What passes a link is another matter. Let the group extend over c
dimensions of the torus that close to rings, at most r chips of one. A hop of the ring is c links
long where the next device stands in another row, and goes both ways: c * g / 2 times n * D pass a
link in all. An exchange crosses the torus: k * r / 8 times n * D. That is k * r / (4 * c * g) of
the ring's. At k = 8: twice on one ring (g = r), half at 4 x 2, a quarter at 4 x 4, 1/24 at 4 x 4 x
4.

A device's tokens go in chunks, so that memory does not grow with their number. Choices are sorted
by expert and counted; from the counts of all devices each knows where every block of one expert and
one sender lies, and rows arrive in the order of experts, ready for a grouped matmul. A device makes
room for half as much again as its even share. Should more be on their way to any device, another
pass brings the rest: nothing is dropped, whatever the load. The worst, everything to one device,
takes g / 1.5 passes and no more memory.

Gate weights multiply at the expert, in float32, and choices are added up at home, in float32. So
the backward pass, which sends tokens out again and gradients with them, needs no results back:
three exchanges.
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


def is_worthwhile(k: int, g: int, extent: tuple[int, ...]) -> bool:
    """Whether an exchange takes at most half of the ring's time by the bytes that pass the busiest
    link. extent: as of `rome.model.sharding.extent`.
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
    """On one device of a shard_map, [n, D]: what the experts of the whole group make of this
    device's tokens.

    ids_nk: of all E experts; one outside of them adds nothing.
    """
    chunks = chunks_of(x_nD.shape[0])
    one_chunk = lambda tokens: _exchanged(
        matmul, room(ids_nk.size / chunks), *tokens, gate_eDF, up_eDF, down_eFD
    )
    if chunks == 1:
        return one_chunk((x_nD, weights_nk, ids_nk))
    in_chunks = lambda a: a.reshape(chunks, -1, a.shape[-1])
    return jax.lax.map(one_chunk, tuple(map(in_chunks, (x_nD, weights_nk, ids_nk)))).reshape(
        x_nD.shape
    )


def chunks_of(tokens: int) -> int:
    """The fewest equal chunks of at most CHUNK tokens."""
    return next(chunks for chunks in range(-(-tokens // CHUNK), tokens + 1) if tokens % chunks == 0)


def send_rows(
    rows: Array,
    into: Array,
    at_sender_E: Array,
    sent_E: Array,
    at_receiver_E: Array,
    received_E: Array,
) -> Array:
    """The exchange itself, of e blocks with each device: of block i, for device i // e, `sent_E[i]`
    rows from `at_sender_E[i]` on are written over those of that device's `into` from
    `at_receiver_E[i]` on.
    """
    return jax.lax.ragged_all_to_all(
        rows, into, at_sender_E, sent_E, at_receiver_E, received_E, axis_name="expert"
    )


class _Plan(NamedTuple):
    """What every device of the group knows about a chunk of each.

    choice_A: own choices by expert, absent ones last, with A for those. place_mk: where each choice
    stands there, A for absent ones. count_sE: choices. first_sE: where in the sender's order those
    of an expert begin. row_sE: where they begin in the order of the rows of the expert's device,
    which is by expert and then by sender.
    """

    choice_A: Array
    place_mk: Array
    count_sE: Array
    first_sE: Array
    row_sE: Array
    passes: Array


class _Window(NamedTuple):
    """The part of each block that a pass exchanges: where it lies at either end, and its size."""

    at_sender_sE: Array
    at_receiver_sE: Array
    size_sE: Array


def _make_plan(ids_mk: Array, e: int, R: int) -> _Plan:
    g = jax.lax.axis_size("expert")
    A, ids_A = ids_mk.size, absent_last(ids_mk, g * e)
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    place_A = (
        jnp.zeros(A, jnp.int32)
        .at[choice_A]
        .set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
    )
    is_absent_A = ids_A == g * e
    count_sE = jax.lax.all_gather(
        jnp.bincount(ids_A, length=g * e + 1)[:-1].astype(jnp.int32), "expert"
    )
    before = lambda sizes, axis: jnp.cumsum(sizes, axis=axis) - sizes
    count_ge = count_sE.sum(axis=0).reshape(g, e)
    return _Plan(
        jnp.where(is_absent_A[choice_A], A, choice_A),
        jnp.where(is_absent_A, A, place_A).reshape(ids_mk.shape),
        count_sE,
        before(count_sE, 1),
        before(count_ge, 1).reshape(-1) + before(count_sE, 0),
        jnp.max(-(-count_ge.sum(axis=1) // R)),
    )


def _window(plan: _Plan, p: Array, R: int) -> _Window:
    begin_sE, end_sE = (
        jnp.clip(row - plan.row_sE, 0, plan.count_sE) for row in (p * R, (p + 1) * R)
    )
    here_sE = end_sE > begin_sE
    return _Window(
        jnp.where(here_sE, plan.first_sE + begin_sE, 0),
        jnp.where(here_sE, plan.row_sE + begin_sE - p * R, 0),
        end_sE - begin_sE,
    )


def _own(a_sE: Array) -> Array:
    """[s, e]: of this device's experts."""
    e = a_sE.shape[1] // jax.lax.axis_size("expert")
    return jax.lax.dynamic_slice_in_dim(a_sE, jax.lax.axis_index("expert") * e, e, axis=1)


def _send(rows_AD: Array, window: _Window, R: int) -> Array:
    at_sender_E, at_receiver_E, sent_E = (a_sE[jax.lax.axis_index("expert")] for a_sE in window)
    return send_rows(
        rows_AD,
        jnp.zeros((R, rows_AD.shape[1]), rows_AD.dtype),
        at_sender_E,
        sent_E,
        at_receiver_E,
        _own(window.size_sE).reshape(-1),
    )


def _send_home(rows_RD: Array, into_AD: Array, window: _Window) -> Array:
    at_sender_E, at_receiver_E, sent_E = (_own(a_sE).reshape(-1) for a_sE in window)
    return send_rows(
        rows_RD,
        into_AD,
        at_receiver_E,
        sent_E,
        at_sender_E,
        window.size_sE[jax.lax.axis_index("expert")],
    )


def _spread(x_mD: Array, plan: _Plan) -> Array:
    """[A, D]: the token of each choice, in the order of their experts."""
    return jnp.take(
        x_mD, plan.choice_A // plan.place_mk.shape[1], axis=0, mode="fill", fill_value=0
    )


def _add_up(rows_AD: Array, plan: _Plan) -> Array:
    """[m, D]: the sum of each token's choices, in float32 until the end.

    One after the other: [m, k, D] never exists.
    """
    taken = (
        jnp.take(rows_AD, plan.place_mk[:, j], axis=0, mode="fill", fill_value=0).astype(
            jnp.float32
        )
        for j in range(plan.place_mk.shape[1])
    )
    return functools.reduce(jnp.add, taken).astype(rows_AD.dtype)


def _all_weights(weights_mk: Array, plan: _Plan) -> Array:
    """[s * A] float32: the gate weights of all devices' choices, each by expert.

    A few bytes a choice: gathered whole.
    """
    weights_A = jnp.take(
        weights_mk.astype(jnp.float32).reshape(-1), plan.choice_A, mode="fill", fill_value=0
    )
    return jax.lax.all_gather(weights_A, "expert", tiled=True)


def _arrived(plan: _Plan, p: Array, R: int) -> Array:
    """Which of all devices' choices each row of a pass is, [s * A]; past the end where no row is."""
    g, A = plan.count_sE.shape[0], plan.choice_A.size
    count_es, first_es, begin_es = (
        _own(a_sE).T.reshape(-1) for a_sE in (plan.count_sE, plan.first_sE, plan.row_sE)
    )
    row_R = p * R + jnp.arange(R, dtype=jnp.int32)
    block_R = jnp.searchsorted(jnp.cumsum(count_es), row_R, side="right", method="compare_all")
    at = lambda a_es: jnp.take(a_es, block_R, mode="clip")
    return jnp.where(
        block_R < count_es.size, block_R % g * A + at(first_es) + row_R - at(begin_es), g * A
    )


def _weighted(
    matmul: GroupedMatmul, sizes_e: Array, x_RD: Array, weight_R: Array, *matrices: Array
) -> Array:
    """What the experts make of the rows that arrived.

    Behind those may be anything: it is never sent.
    """
    return (
        grouped_mlp(matmul, sizes_e, x_RD, *matrices).astype(jnp.float32) * weight_R[:, None]
    ).astype(x_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(
    matmul: GroupedMatmul, R: int, x_mD: Array, weights_mk: Array, ids_mk: Array, *matrices: Array
) -> Array:
    return _forward(matmul, R, x_mD, weights_mk, ids_mk, *matrices)[0]


def _forward(matmul, R, x_mD, weights_mk, ids_mk, *matrices):
    plan = _make_plan(ids_mk, matrices[0].shape[0], R)
    x_AD, weights_sA = _spread(x_mD, plan), _all_weights(weights_mk, plan)

    def one_pass(p: Array, y_AD: Array) -> Array:
        window = _window(plan, p, R)
        weight_R = jnp.take(weights_sA, _arrived(plan, p, R), mode="fill", fill_value=0)
        y_RD = _weighted(
            matmul, _own(window.size_sE).sum(axis=0), _send(x_AD, window, R), weight_R, *matrices
        )
        return _send_home(y_RD, y_AD, window)

    y_AD = jax.lax.fori_loop(0, plan.passes, one_pass, jnp.zeros_like(x_AD))
    return _add_up(y_AD, plan), (x_mD, weights_mk, ids_mk, *matrices)


def _backward(matmul, R, residuals, grad_mD):
    x_mD, weights_mk, ids_mk, *matrices = residuals
    plan = _make_plan(ids_mk, matrices[0].shape[0], R)
    x_AD, grad_AD, weights_sA = (
        _spread(x_mD, plan),
        _spread(grad_mD, plan),
        _all_weights(weights_mk, plan),
    )

    def one_pass(p: Array, sums: tuple) -> tuple:
        dx_AD, dweights_sA, dmatrices = sums
        window, choice_R = _window(plan, p, R), _arrived(plan, p, R)
        weight_R = jnp.take(weights_sA, choice_R, mode="fill", fill_value=0)
        _, pull = jax.vjp(
            functools.partial(_weighted, matmul, _own(window.size_sE).sum(axis=0)),
            _send(x_AD, window, R),
            weight_R,
            *matrices,
        )
        dx_RD, dweight_R, *more = pull(_send(grad_AD, window, R))
        return (
            _send_home(dx_RD, dx_AD, window),
            dweights_sA.at[choice_R].add(dweight_R, mode="drop"),
            tuple(map(jnp.add, dmatrices, more)),
        )

    nothing = jnp.zeros_like(x_AD), jnp.zeros_like(weights_sA), tuple(map(jnp.zeros_like, matrices))
    dx_AD, dweights_sA, dmatrices = jax.lax.fori_loop(0, plan.passes, one_pass, nothing)
    dweights_A = jax.lax.psum_scatter(dweights_sA, "expert", tiled=True)
    dweights_mk = jnp.take(dweights_A, plan.place_mk, mode="fill", fill_value=0)
    return _add_up(dx_AD, plan), dweights_mk.astype(weights_mk.dtype), None, *dmatrices


_exchanged.defvjp(_forward, _backward)
