"""Experts on a mesh by exchange: each choice of a token travels to the device that holds its expert, and its result comes back.

m tokens of a chunk, D model, E experts of all, e experts of one device (E = g * e), g devices of the expert axis, k experts a token, A = m * k
choices of a chunk, R rows that a device makes room for in a pass.

The ring (`rome.model.expert_parallel`) moves every token past every device: each device sends g * n * D numbers for tokens and as many for sums, of
n tokens. Here it sends at most k * n * D * (g - 1) / g each way, k / g of that. What passes a link is another matter: a ring's hop keeps to neighbours
and uses both directions, g / 2 times n * D in all; an exchange crosses the torus, k * r / 8 times n * D where the group extends over at most r chips
of a dimension that closes to a ring. That is k * r / (4 * g) of the ring's. At k = 8: twice on one ring (g = r), as much at 4 x 2, half at 4 x 4,
an eighth at 4 x 4 x 4.

A device's tokens go in chunks, so that memory does not grow with their number. Choices are sorted by expert, so each device's are one block; all know
from the counts where every block lies. A device makes room for half as much again as its even share. Should more be on their way to any device, another
pass brings the rest: nothing is dropped, whatever the load. The worst, everything to one device, takes g / 1.5 passes and no more memory.

Gate weights multiply at the expert, in float32, and choices are added up at home, in float32. So the backward pass, which sends tokens out again and
gradients with them, needs no results back: three exchanges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.experts import NO_EXPERT, room
from rome.model.experts_cpu import absent_last

CHUNK = 2048  # tokens of a device that are under way at a time

LocalExperts = Callable[[Array, Array, Array, Array, Array, Array], Array]  # `rome.model.experts.experts` in one of its forms


def is_worthwhile(k: int, g: int, r: int) -> bool:
    """Whether an exchange takes at most half of the ring's time by the bytes that pass the busiest link. r: as above."""
    return g > 1 and k * r <= 2 * g


def exchange(run: LocalExperts, x_nD: Array, weights_nk: Array, ids_nk: Array, gate_eDF: Array, up_eDF: Array, down_eFD: Array) -> Array:
    """On one device of a shard_map, [n, D]: what the experts of the whole group make of this device's tokens.

    run: computes the experts that are here; an id of NO_EXPERT adds nothing.
    """
    chunks = chunks_of(x_nD.shape[0])
    rows = room(ids_nk.size / chunks)
    one_chunk = lambda tokens: _exchanged(run, rows, *tokens, gate_eDF, up_eDF, down_eFD)
    if chunks == 1:
        return one_chunk((x_nD, weights_nk, ids_nk))
    in_chunks = lambda a: a.reshape(chunks, -1, a.shape[-1])
    return jax.lax.map(one_chunk, tuple(map(in_chunks, (x_nD, weights_nk, ids_nk)))).reshape(x_nD.shape)


def chunks_of(tokens: int) -> int:
    """The fewest equal chunks of at most CHUNK tokens."""
    return next(chunks for chunks in range(-(-tokens // CHUNK), tokens + 1) if tokens % chunks == 0)


def send_rows(rows: Array, into: Array, at_sender_g: Array, sent_g: Array, at_receiver_g: Array, received_g: Array) -> Array:
    """The exchange itself: `sent_g[d]` rows from `at_sender_g[d]` on are written over those of device d's `into` from `at_receiver_g[d]` on."""
    return jax.lax.ragged_all_to_all(rows, into, at_sender_g, sent_g, at_receiver_g, received_g, axis_name="expert")


class _Plan(NamedTuple):
    """What every device of the group knows about a chunk of each. s and d: senders and receivers, g of either.

    choice_A: own choices by expert, absent ones last, with A for those. place_mk: where each choice stands there, A for absent ones.
    count_sE: choices. first_sd: where in the sender's order the block for d begins. row_sd: where it begins in the order of d's rows, which are the
    blocks of all senders. sent_sd: its size.
    """

    choice_A: Array
    place_mk: Array
    count_sE: Array
    first_sd: Array
    row_sd: Array
    sent_sd: Array
    passes: Array


class _Window(NamedTuple):
    """The part of each block that a pass exchanges: where it lies at either end, and its size."""

    at_sender_sd: Array
    at_receiver_sd: Array
    size_sd: Array


def _make_plan(ids_mk: Array, e: int, R: int) -> _Plan:
    g = jax.lax.axis_size("expert")
    A, ids_A = ids_mk.size, absent_last(ids_mk, g * e)
    choice_A = jnp.argsort(ids_A, stable=True).astype(jnp.int32)
    place_A = jnp.zeros(A, jnp.int32).at[choice_A].set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
    is_absent_A = ids_A == g * e
    count_sE = jax.lax.all_gather(jnp.bincount(ids_A, length=g * e + 1)[:-1].astype(jnp.int32), "expert")
    sent_sd = count_sE.reshape(g, g, e).sum(axis=-1)
    before = lambda size_sd, axis: jnp.cumsum(size_sd, axis=axis) - size_sd
    return _Plan(jnp.where(is_absent_A[choice_A], A, choice_A), jnp.where(is_absent_A, A, place_A).reshape(ids_mk.shape), count_sE,
                 before(sent_sd, 1), before(sent_sd, 0), sent_sd, jnp.max(-(-sent_sd.sum(axis=0) // R)))


def _window(plan: _Plan, p: Array, R: int) -> _Window:
    begin_sd, end_sd = (jnp.clip(row - plan.row_sd, 0, plan.sent_sd) for row in (p * R, (p + 1) * R))
    here_sd = end_sd > begin_sd
    return _Window(jnp.where(here_sd, plan.first_sd + begin_sd, 0), jnp.where(here_sd, plan.row_sd + begin_sd - p * R, 0), end_sd - begin_sd)


def _send(rows_AD: Array, window: _Window, R: int) -> Array:
    d = jax.lax.axis_index("expert")
    room_RD = jnp.zeros((R, rows_AD.shape[1]), rows_AD.dtype)
    return send_rows(rows_AD, room_RD, window.at_sender_sd[d], window.size_sd[d], window.at_receiver_sd[d], window.size_sd[:, d])


def _send_home(rows_RD: Array, into_AD: Array, window: _Window) -> Array:
    d = jax.lax.axis_index("expert")
    return send_rows(rows_RD, into_AD, window.at_receiver_sd[:, d], window.size_sd[:, d], window.at_sender_sd[:, d], window.size_sd[d])


def _spread(x_mD: Array, plan: _Plan) -> Array:
    """[A, D]: the token of each choice, in the order of their experts."""
    return jnp.take(x_mD, plan.choice_A // plan.place_mk.shape[1], axis=0, mode="fill", fill_value=0)


def _add_up(rows_AD: Array, plan: _Plan) -> Array:
    """[m, D]: the sum of each token's choices, in float32 until the end. One after the other: [m, k, D] never exists."""
    taken = (jnp.take(rows_AD, plan.place_mk[:, j], axis=0, mode="fill", fill_value=0).astype(jnp.float32) for j in range(plan.place_mk.shape[1]))
    return functools.reduce(jnp.add, taken).astype(rows_AD.dtype)


def _arrived(plan: _Plan, p: Array, R: int) -> tuple[Array, Array]:
    """Of each row of a pass: its expert among those here, NO_EXPERT past the last row; and which of all devices' choices it is, [s * A]."""
    (g, E), d, A = plan.count_sE.shape, jax.lax.axis_index("expert"), plan.choice_A.size
    e = E // g
    here_se = jax.lax.dynamic_slice_in_dim(plan.count_sE, d * e, e, axis=1)
    row_R = p * R + jnp.arange(R, dtype=jnp.int32)
    group_R = jnp.searchsorted(jnp.cumsum(here_se.reshape(-1)), row_R, side="right", method="compare_all")  # of sender and expert
    sender_R = jnp.minimum(group_R // e, g - 1)
    choice_R = sender_R * A + plan.first_sd[sender_R, d] + row_R - plan.row_sd[sender_R, d]
    return jnp.where(group_R < g * e, group_R % e, NO_EXPERT), jnp.where(group_R < g * e, choice_R, g * A)


def _all_weights(weights_mk: Array, plan: _Plan) -> Array:
    """[s * A] float32: the gate weights of all devices' choices, each by expert. A few bytes a choice: gathered whole."""
    weights_A = jnp.take(weights_mk.astype(jnp.float32).reshape(-1), plan.choice_A, mode="fill", fill_value=0)
    return jax.lax.all_gather(weights_A, "expert", tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchanged(run: LocalExperts, R: int, x_mD: Array, weights_mk: Array, ids_mk: Array, *matrices: Array) -> Array:
    return _forward(run, R, x_mD, weights_mk, ids_mk, *matrices)[0]


def _forward(run, R, x_mD, weights_mk, ids_mk, *matrices):
    plan = _make_plan(ids_mk, matrices[0].shape[0], R)
    x_AD, weights_sA = _spread(x_mD, plan), _all_weights(weights_mk, plan)

    def one_pass(p: Array, y_AD: Array) -> Array:
        window, (expert_R, choice_R) = _window(plan, p, R), _arrived(plan, p, R)
        weight_R = jnp.take(weights_sA, choice_R, mode="fill", fill_value=0)
        y_RD = run(_send(x_AD, window, R), *matrices, weight_R[:, None], expert_R[:, None])
        return _send_home(y_RD, y_AD, window)

    y_AD = jax.lax.fori_loop(0, plan.passes, one_pass, jnp.zeros_like(x_AD))
    return _add_up(y_AD, plan), (x_mD, weights_mk, ids_mk, *matrices)


def _backward(run, R, residuals, grad_mD):
    x_mD, weights_mk, ids_mk, *matrices = residuals
    plan = _make_plan(ids_mk, matrices[0].shape[0], R)
    x_AD, grad_AD, weights_sA = _spread(x_mD, plan), _spread(grad_mD, plan), _all_weights(weights_mk, plan)

    def one_pass(p: Array, sums: tuple) -> tuple:
        dx_AD, dweights_sA, dmatrices = sums
        window, (expert_R, choice_R) = _window(plan, p, R), _arrived(plan, p, R)
        weight_R1 = jnp.take(weights_sA, choice_R, mode="fill", fill_value=0)[:, None]
        on_rows = lambda x_RD, weight_R1, *matrices: run(x_RD, *matrices, weight_R1, expert_R[:, None])
        _, pull = jax.vjp(on_rows, _send(x_AD, window, R), weight_R1, *matrices)
        dx_RD, dweight_R1, *more = pull(_send(grad_AD, window, R))
        return (_send_home(dx_RD, dx_AD, window), dweights_sA.at[choice_R].add(dweight_R1[:, 0], mode="drop"),
                tuple(map(jnp.add, dmatrices, more)))

    nothing = jnp.zeros_like(x_AD), jnp.zeros_like(weights_sA), tuple(map(jnp.zeros_like, matrices))
    dx_AD, dweights_sA, dmatrices = jax.lax.fori_loop(0, plan.passes, one_pass, nothing)
    dweights_A = jax.lax.psum_scatter(dweights_sA, "expert", tiled=True)
    dweights_mk = jnp.take(dweights_A, plan.place_mk, mode="fill", fill_value=0)
    return _add_up(dx_AD, plan), dweights_mk.astype(weights_mk.dtype), None, *dmatrices


_exchanged.defvjp(_forward, _backward)
