"""Attention over packed rows or a cache: one function, kernels behind it, the einsum reference beside them.

B batch, T query time, S key time, N query heads, K key heads, G query heads per key head (N = K * G), H head dim.

Who sees whom is said by places and segments, never by a [T, S] mask handed in, so that kernels that take segment ids fit behind the same
function: a query sees the keys of its own segment (0 is padding) whose place is not after its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

IMPLEMENTATIONS = ("auto", "reference", "blocked")
QUERY_BLOCK = 128


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *, q_places_BT: Array, k_places_BS: Array, q_segments_BT: Array,
              k_segments_BS: Array, implementation: str = "auto", ordered: bool = False) -> Array:
    """Causal grouped-query attention within segments; softmax in float32.

    Args:
      q_places_BT, k_places_BS: where each query and key stands in its row; a query sees places up to its own.
      q_segments_BT, k_segments_BS: 0 is padding. A padding query sees nothing and gets zeros, with zero gradients.
      ordered: places are 0, 1, 2, ... on both sides (a packed row). Lets an implementation skip blocks of keys that lie in the future.
    Returns:
      [B, T, N, H] in q's dtype.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    T = q_BTNH.shape[1]
    if implementation == "auto":
        implementation = "blocked" if ordered and T > QUERY_BLOCK else "reference"
    if implementation == "reference":
        return _attend(q_BTNH, k_BSKH, v_BSKH, q_places_BT, k_places_BS, q_segments_BT, k_segments_BS)
    if not ordered or k_BSKH.shape[1] != T:
        raise ValueError("attention implementation 'blocked' needs ordered places and as many keys as queries; use 'reference'")
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        q, k = slice(start, start + QUERY_BLOCK), slice(0, start + QUERY_BLOCK)
        blocks.append(_attend(q_BTNH[:, q], k_BSKH[:, k], v_BSKH[:, k], q_places_BT[:, q], k_places_BS[:, k], q_segments_BT[:, q],
                              k_segments_BS[:, k]))
    return jnp.concatenate(blocks, axis=1)


def _attend(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places_BT: Array, k_places_BS: Array, q_segments_BT: Array,
            k_segments_BS: Array) -> Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    sees_BTS = ((q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & (q_segments_BT[:, :, None] != 0)
                & (k_places_BS[:, None, :] <= q_places_BT[:, :, None]))
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH * H**-0.5, k_BSKH, preferred_element_type=jnp.float32)
    weights_BKGTS = _masked_softmax(scores_BKGTS, sees_BTS[:, None, None])
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


def _masked_softmax(scores: Array, sees: Array) -> Array:
    """Softmax over the last axis where `sees`; zeros, not NaN, for a row that sees nothing."""
    scores = jnp.where(sees, scores, -1e30)  # finite: exp(-inf - -inf) would be NaN, also in the gradient
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(sees, jnp.exp(scores - top), 0.0)
    return weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
