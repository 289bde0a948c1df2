"""Sampling on the device.

Each row is sampled by itself: its noise depends on its seed and the token's position only.

B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

AnyArray = Any  # of NumPy where a call is prepared or read, traced by JAX inside the programs


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

    def noise(seed_2: Array, position: Array) -> Array:
        return _gumbel_noise(seed_2, position, logits_BV.shape[-1])

    noise_BV = jax.vmap(noise)(rows.seed_B2, position_B)
    noisy_BV = jnp.where(greedy_B[:, None], scaled_BV, scaled_BV + noise_BV)
    filtered_B = (rows.top_p_B < 1) | (rows.top_k_B > 0) | (rows.min_p_B > 0)
    # One program with a branch, not two programs: the layers before it must not depend on what the
    # other rows of the batch ask for.
    noisy_BV = jax.lax.cond(
        jnp.any(filtered_B),
        lambda: jnp.where(_allowed_tokens(scaled_BV, rows), noisy_BV, -jnp.inf),
        lambda: noisy_BV,
    )
    tokens_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    return tokens_B, token_logprobs(scaled_BV, tokens_B)


def token_logprobs(logits_BV: Array, tokens_B: Array) -> Array:
    """Return log softmax(logits)[token] for each row, without another [B, V] array."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _gumbel_noise(seed_2: Array, position: Array, size: int) -> Array:
    """Return Gumbel noise: the maximum of logits + noise is a sample from their softmax."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, position), (size,))


def _allowed_tokens(scaled_BV: Array, rows: RowSampling) -> Array:
    """Return which tokens top_k, top_p and min_p keep, [B, V] bool.

    All three are judged on the full distribution; the most likely token is always kept.
    """
    B, V = scaled_BV.shape
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(scaled_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV  # probability of all likelier tokens
    rank_V = jnp.arange(V)
    top_k_B = jnp.where(rows.top_k_B > 0, rows.top_k_B, V)
    top_p_B1 = rows.top_p_B[:, None]
    min_p_B1 = rows.min_p_B[:, None]
    keep_BV = rank_V[None] < top_k_B[:, None]
    keep_BV &= (before_BV <= top_p_B1) | (top_p_B1 >= 1)
    keep_BV &= probs_BV >= probs_BV[:, :1] * min_p_B1
    keep_BV |= rank_V[None] == 0
    row_B1 = jnp.arange(B)[:, None]
    nothing_BV = jnp.zeros((B, V), bool)
    return nothing_BV.at[row_B1, order_BV].set(keep_BV)  # from ranks back to token ids
