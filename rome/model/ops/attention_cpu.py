"""Causal attention within segments on a CPU: blocks of queries, each against the keys that it may
see, and a backward pass by hand.

B rows, T time, N query heads, K key heads, G query heads per key head (N = K * G), H head dim, Q
queries of a block, X = Q * G, S keys seen.

The backward pass keeps the sums of the softmax and computes the scores again, so memory grows with
T and not with its square; the weights of short rows are few and are kept. Gradients of keys and
values are summed transposed, [H, S]: then every product has its left side as it lies, without which
XLA on a CPU leaves its fast matmuls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import Array, lax

QUERIES, MOST_RANGES = (
    128,
    8,
)  # of a block; of keys: each range is compiled on its own, blocks of one range share a loop
KEPT_WEIGHTS = 2**25  # of all rows and heads of a layer, counted as if nothing were hidden
HIDDEN = -1e30  # finite: (-inf) - (-inf) would be NaN


@jax.custom_vjp
def attention_blocked(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array) -> Array:
    """Attention of a packed row to itself, [B, T, N, H] in q's dtype: token t sees those of its
    segment up to t; segment 0 is padding.

    Softmax and sums are float32. A padding query sees nothing and gets zeros, with zero gradients.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, segments_BT: Array
) -> tuple[Array, tuple]:
    T, (B, _, K, H), dtype = q_BTNH.shape[1], k_BTKH.shape, q_BTNH.dtype
    q_BKTGH = _by_key_head(q_BTNH * H**-0.5, K)
    k_BKTH, v_BKTH = jnp.swapaxes(k_BTKH, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)

    kept = _keeps(q_BTNH.shape)

    def block(start: Array, rows: int, seen: int) -> tuple[Array, ...]:
        q_BKXH = _block(q_BKTGH, start, rows)
        scores_BKXS = _scores(q_BKXH, k_BKTH[:, :, :seen], _bias(segments_BT, start, rows, seen))
        top_BKX1 = scores_BKXS.max(axis=-1, keepdims=True)
        weights_BKXS = jnp.exp(scores_BKXS - top_BKX1)
        total_BKX1 = weights_BKXS.sum(axis=-1, keepdims=True)
        weights_BKXS = weights_BKXS.astype(dtype)
        out_BKXH = _dot(weights_BKXS, v_BKTH[:, :, :seen]) / total_BKX1
        sum_BKX1 = total_BKX1 if kept else top_BKX1 + jnp.log(total_BKX1)
        out = out_BKXH.reshape(B, K, rows, -1, H).astype(dtype), sum_BKX1.reshape(B, K, rows, -1, 1)
        return (*out, weights_BKXS) if kept else out

    outs = [_map_blocks(block, *range_) for range_ in _ranges(T)]
    out_BKTGH, sum_BKTG1 = (jnp.concatenate(parts, axis=2) for parts in list(zip(*outs))[:2])
    out_BTNH = jnp.where(segments_BT[:, :, None, None] != 0, _by_time(out_BKTGH), 0)
    weights = [out[2] for out in outs] if kept else None
    return out_BTNH, (q_BKTGH, k_BKTH, v_BKTH, segments_BT, out_BTNH, sum_BKTG1, weights)


def _backward(residuals: tuple, grad_BTNH: Array) -> tuple[Array | None, ...]:
    q_BKTGH, k_BKTH, v_BKTH, segments_BT, out_BTNH, sum_BKTG1, weights = residuals
    B, K, T, G, H = q_BKTGH.shape
    dtype = grad_BTNH.dtype
    grad_BTNH = jnp.where(
        segments_BT[:, :, None, None] != 0, grad_BTNH, 0
    )  # a padding query's weights are not zero, they are even
    along_BTN1 = jnp.sum(
        grad_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1, keepdims=True
    )
    grad_BKTGH, along_BKTG1 = _by_key_head(grad_BTNH, K), _by_key_head(along_BTN1, K)

    def block(
        start: Array,
        rows: int,
        seen: int,
        weights_BKXS: Array | None,
        dk_BKHT: Array,
        dv_BKHT: Array,
    ) -> tuple[Array, Array, Array]:
        q_BKXH, grad_BKXH, along_BKX1, sum_BKX1 = (
            _block(a, start, rows) for a in (q_BKTGH, grad_BKTGH, along_BKTG1, sum_BKTG1)
        )
        k_BKSH, v_BKSH = k_BKTH[:, :, :seen], v_BKTH[:, :, :seen]
        if weights_BKXS is None:
            weights_BKXS = jnp.exp(
                _scores(q_BKXH, k_BKSH, _bias(segments_BT, start, rows, seen)) - sum_BKX1
            )
        else:  # sums are of the weights as they were kept
            weights_BKXS = weights_BKXS.astype(jnp.float32) / sum_BKX1
        dscores_BKXS = (
            weights_BKXS * (_dot(grad_BKXH, v_BKSH, transposed=True) - along_BKX1)
        ).astype(dtype)
        dq_BKXH = _dot(dscores_BKXS, k_BKSH) * H**-0.5
        dk_BKHT = dk_BKHT.at[..., :seen].add(_dot(_turned(q_BKXH), dscores_BKXS))
        dv_BKHT = dv_BKHT.at[..., :seen].add(_dot(_turned(grad_BKXH), weights_BKXS.astype(dtype)))
        return dq_BKXH.reshape(B, K, rows, G, H).astype(dtype), dk_BKHT, dv_BKHT

    dk_BKHT = dv_BKHT = jnp.zeros((B, K, H, T), jnp.float32)
    dqs = []
    for i, (starts, rows, seen) in enumerate(_ranges(T)):
        own = functools.partial(block, rows=rows, seen=seen, weights_BKXS=weights and weights[i])
        dq_BKTGH, dk_BKHT, dv_BKHT = _scan_blocks(own, starts, dk_BKHT, dv_BKHT)
        dqs.append(dq_BKTGH)
    dq_BTNH = _by_time(jnp.concatenate(dqs, axis=2))
    dk_BTKH, dv_BTKH = (jnp.transpose(d, (0, 3, 1, 2)).astype(dtype) for d in (dk_BKHT, dv_BKHT))
    return dq_BTNH, dk_BTKH, dv_BTKH, None


attention_blocked.defvjp(_forward, _backward)


def _keeps(shape: tuple[int, ...]) -> bool:
    """Whether a layer's weights are kept: they are few, and no range of keys has several blocks."""
    B, T, N, _ = shape
    return B * N * T * T <= KEPT_WEIGHTS and T <= QUERIES * MOST_RANGES


def _ranges(T: int) -> Iterator[tuple[list[int], int, int]]:
    """(starts of blocks, queries in each, keys that they see): at most MOST_RANGES of full blocks,
    and the rest of the row.
    """
    full = T // QUERIES
    step = max(1, -(-full // MOST_RANGES))
    for first in range(0, full, step):
        blocks = range(first, min(first + step, full))
        yield [b * QUERIES for b in blocks], QUERIES, (blocks[-1] + 1) * QUERIES
    if T % QUERIES:
        yield [full * QUERIES], T % QUERIES, T


def _map_blocks(block: Callable, starts: list[int], rows: int, seen: int) -> tuple[Array, ...]:
    if len(starts) == 1:
        return block(starts[0], rows, seen)
    return tuple(map(_joined, lax.map(lambda start: block(start, rows, seen), jnp.array(starts))))


def _scan_blocks(block: Callable, starts: list[int], dk: Array, dv: Array) -> tuple[Array, ...]:
    if len(starts) == 1:
        return block(starts[0], dk_BKHT=dk, dv_BKHT=dv)

    def step(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], Array]:
        out, dk, dv = block(start, dk_BKHT=sums[0], dv_BKHT=sums[1])
        return (dk, dv), out

    (dk, dv), outs = lax.scan(step, (dk, dv), jnp.array(starts))
    return _joined(outs), dk, dv


def _joined(blocks: Array) -> Array:
    """[n, B, K, Q, ...] -> [B, K, n * Q, ...]"""
    n, B, K, rows, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 2).reshape(B, K, n * rows, *rest)


def _block(a_BKTGH: Array, start: Array | int, rows: int) -> Array:
    B, K, _, G, H = a_BKTGH.shape
    return lax.dynamic_slice_in_dim(a_BKTGH, start, rows, axis=2).reshape(B, K, rows * G, H)


def _bias(segments_BT: Array, start: Array | int, rows: int, seen: int) -> Array:
    """[B, 1, Q, 1, S]: 0 where a query sees a key.

    Made once, behind a barrier: else it is computed anew for every head.
    """
    own_BQ = lax.dynamic_slice_in_dim(segments_BT, start, rows, axis=1)
    sees_BQS = (own_BQ[:, :, None] == segments_BT[:, None, :seen]) & (
        jnp.arange(seen) <= start + jnp.arange(rows)[:, None]
    )
    return lax.optimization_barrier(jnp.where(sees_BQS, 0.0, HIDDEN)[:, None, :, None])


def _scores(q_BKXH: Array, k_BKSH: Array, bias_B1Q1S: Array) -> Array:
    B, K, X, _ = q_BKXH.shape
    rows, seen = bias_B1Q1S.shape[2], bias_B1Q1S.shape[4]
    scores_BKQGS = _dot(q_BKXH, k_BKSH, transposed=True).reshape(B, K, rows, X // rows, seen)
    return (scores_BKQGS + bias_B1Q1S).reshape(B, K, X, seen)


def _by_key_head(a_BTNH: Array, K: int) -> Array:
    B, T, N, H = a_BTNH.shape
    return jnp.transpose(a_BTNH.reshape(B, T, K, N // K, H), (0, 2, 1, 3, 4))


def _by_time(a_BKTGH: Array) -> Array:
    B, K, T, G, H = a_BKTGH.shape
    return jnp.swapaxes(a_BKTGH, 1, 2).reshape(B, T, K * G, H)


def _turned(a_BKXH: Array) -> Array:
    return lax.optimization_barrier(jnp.swapaxes(a_BKXH, 2, 3))


def _dot(a: Array, b: Array, transposed: bool = False) -> Array:
    """a @ b, or a @ b.T, over the last two axes, summed in float32."""
    return lax.dot_general(
        a,
        b,
        (((3,), (3 if transposed else 2,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )
