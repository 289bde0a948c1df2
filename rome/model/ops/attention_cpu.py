"""Causal attention within segments on a CPU: blocks of queries against the keys that they may see.

B rows, T time, N query heads, K key heads, G query heads per key head (N = K * G), H head dim, Q
queries of a block, X = Q * G, S keys seen, n blocks of a range.

The backward pass is written by hand. It keeps the sums of the softmax and computes the scores
again, so memory grows with T and not with its square; the weights of short rows are few and are
kept. Gradients of keys and values are summed transposed, [H, S]: then the left side of every
product lies in memory as it is read, without which XLA on a CPU leaves its fast matmuls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

QUERIES = 128  # queries of a block
MAX_RANGES = 8  # ranges of keys: each is compiled on its own, blocks of one range share a loop
KEPT_WEIGHTS = 2**25  # of all rows and heads of a layer, counted as if nothing were hidden
HIDDEN = -1e30  # finite: (-inf) - (-inf) would be NaN


class _Range(NamedTuple):
    """Blocks of queries that see the same keys: the first `seen` of the row."""

    starts: list[int]
    queries: int
    seen: int


@jax.custom_vjp
def attention_blocked(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    ends_BT: Array | None = None,
) -> Array:
    """Compute the attention of a packed row to itself, [B, T, N, H] in q's dtype.

    Token t sees the tokens of its segment up to t, with ends those of them whose end is after t;
    segment 0 is padding. Softmax and sums are float32. A padding query sees nothing and gets zeros,
    with zero gradients.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, ends_BT)[0]


def _forward(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array, ends_BT: Array | None = None
) -> tuple[Array, tuple]:
    T = q_BTNH.shape[1]
    B, _, K, H = k_BTKH.shape
    dtype = q_BTNH.dtype
    q_BKTGH = _by_key_head(q_BTNH * H**-0.5, K)
    k_BKTH = jnp.swapaxes(k_BTKH, 1, 2)
    v_BKTH = jnp.swapaxes(v_BTKH, 1, 2)
    kept = _keeps(q_BTNH.shape)

    def block(start: Array | int, queries: int, seen: int) -> tuple[Array, ...]:
        """Return the output of a block, the sum of its softmax and, if kept, its weights."""
        q_BKXH = _block(q_BKTGH, start, queries)
        bias_B1Q1S = _bias(segments_BT, ends_BT, start, queries, seen)
        scores_BKXS = _scores(q_BKXH, k_BKTH[:, :, :seen], bias_B1Q1S)
        top_BKX1 = scores_BKXS.max(axis=-1, keepdims=True)
        weights_BKXS = jnp.exp(scores_BKXS - top_BKX1)
        total_BKX1 = weights_BKXS.sum(axis=-1, keepdims=True)
        weights_BKXS = weights_BKXS.astype(dtype)
        out_BKXH = _dot(weights_BKXS, v_BKTH[:, :, :seen]) / total_BKX1
        sum_BKX1 = total_BKX1 if kept else top_BKX1 + jnp.log(total_BKX1)
        out_BKQGH = out_BKXH.reshape(B, K, queries, -1, H).astype(dtype)
        sum_BKQG1 = sum_BKX1.reshape(B, K, queries, -1, 1)
        if kept:
            return out_BKQGH, sum_BKQG1, weights_BKXS
        return out_BKQGH, sum_BKQG1

    ranges = [_map_blocks(block, *one) for one in _ranges(T)]
    out_BKTGH = jnp.concatenate([one[0] for one in ranges], axis=2)
    sum_BKTG1 = jnp.concatenate([one[1] for one in ranges], axis=2)
    out_BTNH = jnp.where(segments_BT[:, :, None, None] != 0, _by_time(out_BKTGH), 0)
    weights = [one[2] for one in ranges] if kept else None
    residuals = q_BKTGH, k_BKTH, v_BKTH, segments_BT, ends_BT, out_BTNH, sum_BKTG1, weights
    return out_BTNH, residuals


def _backward(residuals: tuple, grad_BTNH: Array) -> tuple[Array | None, ...]:
    q_BKTGH, k_BKTH, v_BKTH, segments_BT, ends_BT, out_BTNH, sum_BKTG1, weights = residuals
    B, K, T, G, H = q_BKTGH.shape
    dtype = grad_BTNH.dtype
    # a padding query's weights are not zero, they are even
    grad_BTNH = jnp.where(segments_BT[:, :, None, None] != 0, grad_BTNH, 0)
    product_BTNH = grad_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    along_BTN1 = jnp.sum(product_BTNH, axis=-1, keepdims=True)
    grad_BKTGH = _by_key_head(grad_BTNH, K)
    along_BKTG1 = _by_key_head(along_BTN1, K)

    def block(
        start: Array | int,
        queries: int,
        seen: int,
        weights_BKXS: Array | None,
        dk_BKHT: Array,
        dv_BKHT: Array,
    ) -> tuple[Array, Array, Array]:
        """Return a block's gradient of the queries, and the sums with its part added."""
        q_BKXH = _block(q_BKTGH, start, queries)
        grad_BKXH = _block(grad_BKTGH, start, queries)
        along_BKX1 = _block(along_BKTG1, start, queries)
        sum_BKX1 = _block(sum_BKTG1, start, queries)
        k_BKSH = k_BKTH[:, :, :seen]
        v_BKSH = v_BKTH[:, :, :seen]
        if weights_BKXS is None:
            bias_B1Q1S = _bias(segments_BT, ends_BT, start, queries, seen)
            weights_BKXS = jnp.exp(_scores(q_BKXH, k_BKSH, bias_B1Q1S) - sum_BKX1)
        else:  # sums are of the weights as they were kept
            weights_BKXS = weights_BKXS.astype(jnp.float32) / sum_BKX1
        dweights_BKXS = _dot(grad_BKXH, v_BKSH, transposed=True) - along_BKX1
        dscores_BKXS = (weights_BKXS * dweights_BKXS).astype(dtype)
        dq_BKXH = _dot(dscores_BKXS, k_BKSH) * H**-0.5
        dk_BKHS = _dot(_turned(q_BKXH), dscores_BKXS)
        dk_BKHT = dk_BKHT.at[..., :seen].add(dk_BKHS)
        dv_BKHS = _dot(_turned(grad_BKXH), weights_BKXS.astype(dtype))
        dv_BKHT = dv_BKHT.at[..., :seen].add(dv_BKHS)
        dq_BKQGH = dq_BKXH.reshape(B, K, queries, G, H).astype(dtype)
        return dq_BKQGH, dk_BKHT, dv_BKHT

    dk_BKHT = dv_BKHT = jnp.zeros((B, K, H, T), jnp.float32)
    dqs = []
    for number, (starts, queries, seen) in enumerate(_ranges(T)):
        kept_weights = weights and weights[number]
        own = functools.partial(block, queries=queries, seen=seen, weights_BKXS=kept_weights)
        dq_BKTGH, dk_BKHT, dv_BKHT = _scan_blocks(own, starts, dk_BKHT, dv_BKHT)
        dqs.append(dq_BKTGH)
    dq_BTNH = _by_time(jnp.concatenate(dqs, axis=2))
    dk_BTKH = jnp.transpose(dk_BKHT, (0, 3, 1, 2)).astype(dtype)
    dv_BTKH = jnp.transpose(dv_BKHT, (0, 3, 1, 2)).astype(dtype)
    return dq_BTNH, dk_BTKH, dv_BTKH, None, None


attention_blocked.defvjp(_forward, _backward)


def _keeps(shape: tuple[int, ...]) -> bool:
    """Return whether a layer's weights are kept: few, and no range of keys has several blocks."""
    B, T, N, _ = shape
    return B * N * T * T <= KEPT_WEIGHTS and T <= QUERIES * MAX_RANGES


def _ranges(T: int) -> Iterator[_Range]:
    """Yield at most MAX_RANGES ranges of full blocks, then the rest of the row."""
    full = T // QUERIES
    step = max(1, -(-full // MAX_RANGES))
    for first in range(0, full, step):
        end = min(first + step, full)
        starts = [number * QUERIES for number in range(first, end)]
        yield _Range(starts, QUERIES, end * QUERIES)
    rest = T % QUERIES
    if rest:
        yield _Range([full * QUERIES], rest, T)


def _map_blocks(block: Callable, starts: list[int], queries: int, seen: int) -> tuple[Array, ...]:
    if len(starts) == 1:
        return block(starts[0], queries, seen)
    results = lax.map(lambda start: block(start, queries, seen), jnp.array(starts))
    return tuple(map(_joined, results))


def _scan_blocks(block: Callable, starts: list[int], dk: Array, dv: Array) -> tuple[Array, ...]:
    if len(starts) == 1:
        return block(starts[0], dk_BKHT=dk, dv_BKHT=dv)

    def step(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], Array]:
        out, dk, dv = block(start, dk_BKHT=sums[0], dv_BKHT=sums[1])
        return (dk, dv), out

    (dk, dv), outs = lax.scan(step, (dk, dv), jnp.array(starts))
    return _joined(outs), dk, dv


def _joined(blocks: Array) -> Array:
    """Join blocks along time: [n, B, K, Q, ...] to [B, K, n * Q, ...]."""
    n, B, K, Q, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 2).reshape(B, K, n * Q, *rest)


def _block(a_BKTGH: Array, start: Array | int, queries: int) -> Array:
    B, K, _, G, H = a_BKTGH.shape
    a_BKQGH = lax.dynamic_slice_in_dim(a_BKTGH, start, queries, axis=2)
    return a_BKQGH.reshape(B, K, queries * G, H)


def _bias(
    segments_BT: Array, ends_BT: Array | None, start: Array | int, queries: int, seen: int
) -> Array:
    """Return [B, 1, Q, 1, S]: 0 where a query sees a key, HIDDEN elsewhere.

    Made once, behind a barrier: without it, it is computed anew for every head.
    """
    own_BQ = lax.dynamic_slice_in_dim(segments_BT, start, queries, axis=1)
    same_BQS = own_BQ[:, :, None] == segments_BT[:, None, :seen]
    place_Q1 = start + jnp.arange(queries)[:, None]
    sees_BQS = same_BQS & (jnp.arange(seen) <= place_Q1)
    if ends_BT is not None:
        sees_BQS &= place_Q1 < ends_BT[:, None, :seen]
    bias_BQS = jnp.where(sees_BQS, 0.0, HIDDEN)
    return lax.optimization_barrier(bias_BQS[:, None, :, None])


def _scores(q_BKXH: Array, k_BKSH: Array, bias_B1Q1S: Array) -> Array:
    B, K, X, _ = q_BKXH.shape
    _, _, Q, _, S = bias_B1Q1S.shape
    scores_BKQGS = _dot(q_BKXH, k_BKSH, transposed=True).reshape(B, K, Q, X // Q, S)
    return (scores_BKQGS + bias_B1Q1S).reshape(B, K, X, S)


def _by_key_head(a_BTNH: Array, K: int) -> Array:
    B, T, N, H = a_BTNH.shape
    return jnp.transpose(a_BTNH.reshape(B, T, K, N // K, H), (0, 2, 1, 3, 4))


def _by_time(a_BKTGH: Array) -> Array:
    B, K, T, G, H = a_BKTGH.shape
    return jnp.swapaxes(a_BKTGH, 1, 2).reshape(B, T, K * G, H)


def _turned(a_BKXH: Array) -> Array:
    return lax.optimization_barrier(jnp.swapaxes(a_BKXH, 2, 3))


def _dot(a: Array, b: Array, transposed: bool = False) -> Array:
    """Return a @ b, or a @ b.T, over the last two axes, summed in float32."""
    summed_axes = ((3,), (3 if transposed else 2,))
    batch_axes = ((0, 1), (0, 1))
    return lax.dot_general(a, b, (summed_axes, batch_axes), preferred_element_type=jnp.float32)
