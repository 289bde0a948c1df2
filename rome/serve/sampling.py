"""Sampling on the device.

Each row is sampled by itself: its noise depends on its seed and the token's position only.

B rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class RowSampling(NamedTuple):
    """How each row is sampled. temperature 0 is greedy, top_k 0 keeps all; seed_B2 are the two
    words of a 64-bit seed.
    """

    seed_B2: Array
    temperature_B: Array
    top_p_B: Array
    top_k_B: Array
    min_p_B: Array


def sample(logits_BV: Array, position_B: Array, rows: RowSampling) -> tuple[Array, Array]:
    """Draws one token for each row.

    Args:
      logits_BV: float32.
      position_B: absolute position that the drawn token will have.
    Returns:
      tokens [B] int32, and their logprobs [B] under softmax(logits / temperature), before top_p,
      top_k and min_p.
    """
    greedy_B = rows.temperature_B <= 0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, rows.temperature_B)[:, None]
    noise_BV = jax.vmap(lambda seed, position: _noise(seed, position, logits_BV.shape[-1]))(
        rows.seed_B2, position_B
    )
    noisy_BV = jnp.where(greedy_B[:, None], scaled_BV, scaled_BV + noise_BV)
    filtered_B = (rows.top_p_B < 1) | (rows.top_k_B > 0) | (rows.min_p_B > 0)
    # One program with a branch, not two programs: the layers before it must not depend on what the
    # others in the batch ask for.
    noisy_BV = jax.lax.cond(
        jnp.any(filtered_B),
        lambda: jnp.where(_allowed(scaled_BV, rows), noisy_BV, -jnp.inf),
        lambda: noisy_BV,
    )
    tokens_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    return tokens_B, token_logprobs(scaled_BV, tokens_B)


def token_logprobs(logits_BV: Array, tokens_B: Array) -> Array:
    """log softmax(logits)[token] without another [B, V] array."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _noise(seed_2: Array, position: Array, size: int) -> Array:
    """Gumbel noise: adding it to logits and taking the maximum samples from their softmax."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))


def _allowed(scaled_BV: Array, rows: RowSampling) -> Array:
    """Which tokens top_k, top_p and min_p keep, all judged on the full distribution; the likeliest
    token always stays.
    """
    size = scaled_BV.shape[-1]
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(scaled_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # probability of all likelier tokens
    rank_V = jnp.arange(size)
    keep_BV = rank_V[None] < jnp.where(rows.top_k_B > 0, rows.top_k_B, size)[:, None]
    keep_BV &= (before_BV <= rows.top_p_B[:, None]) | (rows.top_p_B[:, None] >= 1)
    keep_BV &= probs_BV >= probs_BV[:, :1] * rows.min_p_B[:, None]
    keep_BV |= rank_V[None] == 0
    return (
        jnp.zeros(scaled_BV.shape, bool)
        .at[jnp.arange(scaled_BV.shape[0])[:, None], order_BV]
        .set(keep_BV)
    )
