"""Attention over packed rows or a cache: one function, implementations behind it.

B rows, T query time, S key time, N query heads, K key heads, G query heads per key head (N = K *
G), H head dim.

Places and segments say which keys a query sees, never a [T, S] mask that is handed in, so that
kernels which take segment ids fit behind the same function: a query sees the keys of its own
segment (0 is padding) whose place is not after its own. In rows of prefix trees, laid out depth
first, one more number a key says which queries see it: those before its end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.ops import attention_tree_cpu
from rome.model.ops.attention_cpu import attention_blocked
from rome.model.ops.attention_kernels import splash, tokamax

IMPLEMENTATIONS = ("auto", "reference", "blocked", "splash", "tokamax")
HIDDEN_SCORE = -1e30  # finite: (-inf) - (-inf) would be NaN, also in the gradient


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_places_BT: Array,
    k_places_BS: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    ordered: bool = False,
    implementation: str = "auto",
    ends_BT: Array | None = None,
) -> Array:
    """Compute causal grouped-query attention within segments; softmax in float32.

    Args:
      q_BTNH: queries, not scaled.
      k_BSKH: keys.
      v_BSKH: values.
      q_places_BT: position of each query in its row; a query sees places up to its own.
      k_places_BS: position of each key in its row.
      q_segments_BT: 0 is padding. A padding query sees nothing and gets zeros, with zero gradients.
      k_segments_BS: 0 is padding.
      ordered: places are 0, 1, 2, ... and segments the same on both sides, as in a packed row that
        attends to itself.
      implementation: "reference" scores every query against every key. The others take ordered
        places only: "blocked" takes queries in blocks, leaves out the keys that lie in a block's
        future, nearly half of the work, and those that are no ancestors in long rows of trees, and
        computes the scores again in its backward pass;
        "splash" is a kernel of TPUs, "tokamax" of NVIDIA GPUs. "auto" is "blocked" where places
        are ordered.
      ends_BT: for a row that attends to itself: key j is seen by the queries at places j to
        ends[j] - 1; 0 on padding. None: by all of its segment that follow.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ValueError: the implementation is unknown or needs ordered places.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; choose one of"
            f" {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation in ("blocked", "splash", "tokamax") and not ordered:
        raise ValueError(
            f"attention implementation {implementation!r} needs ordered places; choose 'reference'"
        )
    if ordered and implementation in ("auto", "blocked"):
        if ends_BT is not None and attention_tree_cpu.takes(q_BTNH.shape[1]):
            return attention_tree_cpu.attention_tree(q_BTNH, k_BSKH, v_BSKH, ends_BT)
        return attention_blocked(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, ends_BT)
    if implementation in ("splash", "tokamax"):
        kernel = splash if implementation == "splash" else tokamax
        out_BTNH = kernel(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, ends_BT)
        return out_BTNH.astype(q_BTNH.dtype)
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    scaled_BTKGH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H)
    # heads first: matmuls without copies
    q_BKTGH = jnp.transpose(scaled_BTKGH, (0, 2, 1, 3, 4))
    k_BKSH = jnp.swapaxes(k_BSKH, 1, 2)
    v_BKSH = jnp.swapaxes(v_BSKH, 1, 2)
    sees_BTS = _sees(q_places_BT, k_places_BS, q_segments_BT, k_segments_BS)
    if ends_BT is not None:
        sees_BTS &= q_places_BT[:, :, None] < ends_BT[:, None, :]
    out_BKTGH = _attend(q_BKTGH, k_BKSH, v_BKSH, sees_BTS)
    return jnp.swapaxes(out_BKTGH, 1, 2).reshape(B, T, N, H)


def _sees(
    q_places_BT: Array, k_places_BS: Array, q_segments_BT: Array, k_segments_BS: Array
) -> Array:
    equal_BTS = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    same_BTS = equal_BTS & (q_segments_BT[:, :, None] != 0)
    return same_BTS & (k_places_BS[:, None, :] <= q_places_BT[:, :, None])


def _attend(q_BKTGH: Array, k_BKSH: Array, v_BKSH: Array, sees_BTS: Array) -> Array:
    """Return the attention output; the softmax is normalised after values are summed.

    That is one pass less over the scores.
    """
    scores_BKTGS = jnp.einsum(
        "BKTGH,BKSH->BKTGS", q_BKTGH, k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BKTGS = jnp.where(sees_BTS[:, None, :, None, :], scores_BKTGS, HIDDEN_SCORE)
    top_BKTG1 = jax.lax.stop_gradient(scores_BKTGS.max(axis=-1, keepdims=True))
    weights_BKTGS = jnp.exp(scores_BKTGS - top_BKTG1)
    total_BKTG1 = weights_BKTGS.sum(axis=-1, keepdims=True)
    out_BKTGH = jnp.einsum(
        "BKTGS,BKSH->BKTGH",
        weights_BKTGS.astype(v_BKSH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    blind_BT = ~sees_BTS.any(axis=-1)  # all its scores are equal, so its weights are not zero
    out_BKTGH = jnp.where(blind_BT[:, None, :, None, None], 0.0, out_BKTGH / total_BKTG1)
    return out_BKTGH.astype(q_BKTGH.dtype)
