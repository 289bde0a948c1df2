"""Sampling on the device, by inverse transform.

Each row is sampled by itself: its one random number depends on its seed and the token's position
only, and every sum over the vocabulary runs in an order that depends on the row only.

B rows, V vocabulary, n blocks of BLOCK tokens, C candidates of a filter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

AnyArray = Any  # of NumPy where a call is prepared or read, traced by JAX inside the programs
BLOCK = 64  # tokens whose probabilities are summed before blocks are
NO_TOKEN = -1  # fills up lists of tokens
CANDIDATES = 1024  # likeliest tokens among which filters look first


class RowSampling(NamedTuple):
    """How each row is sampled.

    Attributes:
      seed_B2: the two words of a 64-bit seed, uint32.
      temperature_B: 0 is greedy.
      top_p_B: 1 keeps all tokens.
      top_k_B: 0 keeps all tokens.
      min_p_B: 0 keeps all tokens.
    """

    seed_B2: AnyArray
    temperature_B: AnyArray
    top_p_B: AnyArray
    top_k_B: AnyArray
    min_p_B: AnyArray


def sample(logits_BV: Array, position_B: Array, rows: RowSampling) -> tuple[Array, Array]:
    """Draw one token for each row.

    Args:
      logits_BV: float32.
      position_B: absolute position that the drawn token will have.
      rows: how each row is sampled.

    Returns:
      tokens [B] int32, and their logprobs [B] under softmax(logits / temperature), before top_p,
      top_k and min_p.
    """
    greedy_B = rows.temperature_B <= 0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, rows.temperature_B)[:, None]
    top_B1 = scaled_BV.max(axis=-1, keepdims=True)
    weights_BV = jnp.exp(scaled_BV - top_B1)
    total_B = _in_blocks(weights_BV)[2]
    uniform_B = jax.vmap(_uniform)(rows.seed_B2, position_B)
    # Branches of one program, not several programs: the layers before must not depend on what the
    # other rows of the batch ask for.
    kept_BV = jax.lax.cond(
        jnp.any(_is_filtered(rows) & ~greedy_B),
        lambda: _filtered(weights_BV, total_B, rows),
        lambda: weights_BV,
    )
    drawn_B = _draw(kept_BV, uniform_B)
    tokens_B = jax.lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.where(greedy_B, jnp.argmax(scaled_BV, axis=-1), drawn_B),
        lambda: drawn_B,
    ).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, chosen_B - top_B1[:, 0] - jnp.log(total_B)


def token_logprobs(logits_BV: Array, tokens_B: Array) -> Array:
    """Return log softmax(logits)[token] for each row, summed as `sample` does."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    top_B1 = logits_BV.max(axis=-1, keepdims=True)
    total_B = _in_blocks(jnp.exp(logits_BV - top_B1))[2]
    return chosen_B - top_B1[:, 0] - jnp.log(total_B)


def _uniform(seed_2: Array, position: Array) -> Array:
    """Return a number in [0, 1) that depends on seed and position."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, position))


def _draw(weights_BV: Array, uniform_B: Array) -> Array:
    """Return the first token whose running sum of weights exceeds uniform * total.

    A token of weight 0 is never drawn: the sum does not grow there.
    """
    blocks_BnX, before_Bn, total_B = _in_blocks(weights_BV)
    # below the total also where the product rounds up to it
    wanted_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, 0.0))
    block_B = jnp.sum(before_Bn <= wanted_B[:, None], axis=-1) - 1
    # blocks without weight begin where the one before them ends: go back to the one that has some
    is_empty_Bn = jnp.append(before_Bn[:, 1:], total_B[:, None], axis=1) == before_Bn
    filled_Bn = jnp.where(is_empty_Bn, -1, jnp.arange(before_Bn.shape[1]))
    block_B1 = jnp.take_along_axis(jax.lax.cummax(filled_Bn, axis=1), block_B[:, None], axis=1)
    own_BX = jnp.take_along_axis(blocks_BnX, block_B1[:, :, None], axis=1)[:, 0]
    sums_BX = jnp.take_along_axis(before_Bn, block_B1, axis=1) + jnp.cumsum(own_BX, axis=1)
    has_weight_BX = own_BX > 0
    exceeds_BX = (sums_BX > wanted_B[:, None]) & has_weight_BX
    last_B = BLOCK - 1 - jnp.argmax(has_weight_BX[:, ::-1], axis=1)  # where sums round below
    inner_B = jnp.where(exceeds_BX.any(axis=1), jnp.argmax(exceeds_BX, axis=1), last_B)
    return block_B1[:, 0] * BLOCK + inner_B


def _in_blocks(weights_BV: Array) -> tuple[Array, Array, Array]:
    """Return weights in blocks [B, n, X], the sum before each block [B, n], and the total [B].

    The additions are spelled out: a row is summed in the same order in every call.
    """
    B, V = weights_BV.shape
    filled_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK)))
    blocks_BnX = filled_BV.reshape(B, -1, BLOCK)
    sum_Bn = functools.reduce(jnp.add, (blocks_BnX[:, :, i] for i in range(BLOCK)))

    def add(sum_B: Array, block_B: Array) -> tuple[Array, Array]:
        return sum_B + block_B, sum_B

    total_B, before_nB = jax.lax.scan(add, jnp.zeros(B), sum_Bn.T, unroll=16)
    return blocks_BnX, before_nB.T, total_B


def _filtered(weights_BV: Array, total_B: Array, rows: RowSampling) -> Array:
    """Return the weights with 0 for tokens that top_k, top_p or min_p leaves out.

    All three are judged on the full distribution; the most likely token is always kept. The
    likeliest CANDIDATES are looked at; where a row may keep more, the whole vocabulary is.
    """
    V = weights_BV.shape[-1]
    few = min(CANDIDATES, V)
    ranked_BC, ids_BC = jax.lax.top_k(weights_BV, few)
    may_keep_more_B = _kept(ranked_BC, total_B, rows)[:, -1] & _is_filtered(rows)

    def last_kept(ranked_BC: Array, ids_BC: Array) -> tuple[Array, Array]:
        last_B1 = jnp.sum(_kept(ranked_BC, total_B, rows), axis=-1, keepdims=True) - 1
        weight_B1 = jnp.take_along_axis(ranked_BC, last_B1, axis=-1)
        return weight_B1, jnp.take_along_axis(ids_BC, last_B1, axis=-1)

    weight_B1, id_B1 = jax.lax.cond(
        jnp.any(may_keep_more_B) & (few < V),
        lambda: last_kept(*jax.lax.top_k(weights_BV, V)),
        lambda: last_kept(ranked_BC, ids_BC),
    )
    # equal weights are ranked by their ids
    is_tie_BV = (weights_BV == weight_B1) & (jnp.arange(V) <= id_B1)
    kept_BV = (weights_BV > weight_B1) | is_tie_BV | ~_is_filtered(rows)[:, None]
    return jnp.where(kept_BV, weights_BV, 0.0)


def _is_filtered(rows: RowSampling) -> Array:
    return (rows.top_p_B < 1) | (rows.top_k_B > 0) | (rows.min_p_B > 0)


def _kept(ranked_BC: Array, total_B: Array, rows: RowSampling) -> Array:
    """Return which of the likeliest tokens, in order, the filters keep, [B, C] bool."""
    C = ranked_BC.shape[-1]
    blocks_BnX, sum_Bn, _ = _in_blocks(ranked_BC)
    sums_BnX = sum_Bn[:, :, None] + jnp.cumsum(blocks_BnX, axis=-1)
    sums_BC = sums_BnX.reshape(len(total_B), -1)[:, :C]
    before_BC = (sums_BC - ranked_BC) / total_B[:, None]  # probability of all likelier tokens
    rank_C = jnp.arange(C)
    top_k_B = jnp.where(rows.top_k_B > 0, rows.top_k_B, jnp.iinfo(jnp.int32).max)
    top_p_B1 = rows.top_p_B[:, None]
    kept_BC = rank_C[None] < top_k_B[:, None]
    kept_BC &= (before_BC <= top_p_B1) | (top_p_B1 >= 1)
    kept_BC &= ranked_BC >= ranked_BC[:, :1] * rows.min_p_B[:, None]
    return kept_BC | (rank_C[None] == 0)
