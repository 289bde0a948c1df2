"""Attention over rows of prefix trees on a CPU: tiles that hold no ancestor are left out.

B rows, T time, N query heads, K key heads, G query heads per key head (N = K * G), H head dim, Q
queries and Q keys of a tile, X = Q * G, n = T / Q tiles of a row.

A tile of queries goes through the tiles of keys that hold an ancestor of one of them, as many as
there are, and keeps a running softmax. So the work is that of the tree, not of T^2. The backward
pass is written by hand: it keeps the sums of the softmax and computes the scores again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

TILE = 128
HIDDEN = -1e30  # finite: (-inf) - (-inf) would be NaN


def takes(T: int) -> bool:
    """Return whether a row is whole tiles, and enough of them that leaving some out pays."""
    return T % TILE == 0 and T >= 8 * TILE


@jax.custom_vjp
def attention_tree(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, ends_BT: Array) -> Array:
    """Compute the attention of rows of prefix trees to themselves, [B, T, N, H] in q's dtype.

    Key j is seen by the queries at places j to ends[j] - 1. Softmax and sums are float32. A query
    that sees nothing gets zeros, with zero gradients.
    """
    return _forward(q_BTNH, k_BTKH, v_BTKH, ends_BT)[0]


def _forward(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, ends_BT: Array
) -> tuple[Array, tuple[Array, ...]]:
    _, T, N, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    K = k_BTKH.shape[2]
    G = N // K
    q_nBKXH = _tiles(q_BTNH * H**-0.5, K)
    k_BKTH = jnp.swapaxes(k_BTKH, 1, 2)
    v_BKTH = jnp.swapaxes(v_BTKH, 1, 2)
    order_nn, count_n = _needed(ends_BT)

    def tile(inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        """Return the output of a tile of queries and the log of the sum of its softmax."""
        number, q_BKXH, order_n, count = inputs

        def add(place: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top_BKX1, total_BKX1, out_BKXH = running
            start = order_n[place] * TILE
            scores_BKXQ = _scores(q_BKXH, _keys(k_BKTH, start), ends_BT, number * TILE, start, G)
            higher_BKX1 = jnp.maximum(top_BKX1, scores_BKXQ.max(axis=-1, keepdims=True))
            weights_BKXQ = jnp.exp(scores_BKXQ - higher_BKX1)
            shrink_BKX1 = jnp.exp(top_BKX1 - higher_BKX1)
            total_BKX1 = total_BKX1 * shrink_BKX1 + weights_BKXQ.sum(axis=-1, keepdims=True)
            more_BKXH = _dot(weights_BKXQ.astype(dtype), _keys(v_BKTH, start))
            return higher_BKX1, total_BKX1, out_BKXH * shrink_BKX1 + more_BKXH

        one_BKX1 = jnp.zeros((*q_BKXH.shape[:3], 1), jnp.float32)
        running = (one_BKX1 + HIDDEN, one_BKX1, jnp.zeros(q_BKXH.shape, jnp.float32))
        top_BKX1, total_BKX1, out_BKXH = lax.fori_loop(0, count, add, running)
        return (out_BKXH / total_BKX1).astype(dtype), top_BKX1 + jnp.log(total_BKX1)

    numbers_n = jnp.arange(T // TILE)
    out_nBKXH, sum_nBKX1 = lax.map(tile, (numbers_n, q_nBKXH, order_nn, count_n))
    out_BTNH = jnp.where(_sees_itself(ends_BT), _by_time(out_nBKXH, G), 0)
    return out_BTNH, (q_nBKXH, k_BKTH, v_BKTH, ends_BT, out_BTNH, sum_nBKX1)


def _backward(residuals: tuple[Array, ...], grad_BTNH: Array) -> tuple[Array, Array, Array, None]:
    q_nBKXH, k_BKTH, v_BKTH, ends_BT, out_BTNH, sum_nBKX1 = residuals
    _, K, T, H = k_BKTH.shape
    dtype = grad_BTNH.dtype
    G = grad_BTNH.shape[2] // K
    # the weights of a query that sees nothing are not zero, they are even
    grad_BTNH = jnp.where(_sees_itself(ends_BT), grad_BTNH, 0)
    product_BTNH = grad_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32)
    along_nBKX1 = _tiles(jnp.sum(product_BTNH, axis=-1, keepdims=True), K)
    order_nn, count_n = _needed(ends_BT)

    def tile(
        sums: tuple[Array, Array], inputs: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], Array]:
        """Add a tile of queries to the gradients of keys and values; return its own."""
        number, q_BKXH, grad_BKXH, along_BKX1, sum_BKX1, order_n, count = inputs

        def add(place: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_BKXH, dk_BKTH, dv_BKTH = running
            start = order_n[place] * TILE
            k_BKQH = _keys(k_BKTH, start)
            scores_BKXQ = _scores(q_BKXH, k_BKQH, ends_BT, number * TILE, start, G)
            weights_BKXQ = jnp.exp(scores_BKXQ - sum_BKX1)
            dweights_BKXQ = _dot(grad_BKXH, _turned(_keys(v_BKTH, start))) - along_BKX1
            dscores_BKXQ = (weights_BKXQ * dweights_BKXQ).astype(dtype)
            dk_BKQH = _dot(_turned(dscores_BKXQ), q_BKXH)
            dv_BKQH = _dot(_turned(weights_BKXQ.astype(dtype)), grad_BKXH)
            dq_BKXH = dq_BKXH + _dot(dscores_BKXQ, k_BKQH)
            return dq_BKXH, _add_at(dk_BKTH, dk_BKQH, start), _add_at(dv_BKTH, dv_BKQH, start)

        nothing_BKXH = jnp.zeros(q_BKXH.shape, jnp.float32)
        dq_BKXH, *sums = lax.fori_loop(0, count, add, (nothing_BKXH, *sums))
        return tuple(sums), (dq_BKXH * H**-0.5).astype(dtype)

    nothing_BKTH = jnp.zeros(k_BKTH.shape, jnp.float32)
    grad_nBKXH = _tiles(grad_BTNH, K)
    inputs = (jnp.arange(T // TILE), q_nBKXH, grad_nBKXH, along_nBKX1, sum_nBKX1)
    sums = (nothing_BKTH, nothing_BKTH)
    (dk_BKTH, dv_BKTH), dq_nBKXH = lax.scan(tile, sums, (*inputs, order_nn, count_n))
    dk_BTKH, dv_BTKH = (jnp.swapaxes(d, 1, 2).astype(dtype) for d in (dk_BKTH, dv_BKTH))
    return _by_time(dq_nBKXH, G), dk_BTKH, dv_BTKH, None


attention_tree.defvjp(_forward, _backward)


def _needed(ends_BT: Array) -> tuple[Array, Array]:
    """Return the numbers of the tiles of keys that a tile of queries needs, and how many they are.

    They come first in [n, n], in order; those behind them are not needed.
    """
    n = ends_BT.shape[1] // TILE
    last_n = ends_BT.reshape(-1, n, TILE).max(axis=(0, 2))  # end of the key that is seen longest
    numbers_n = jnp.arange(n)
    own_nn = numbers_n[:, None] == numbers_n
    is_before_nn = numbers_n[None, :] < numbers_n[:, None]
    needed_nn = own_nn | (is_before_nn & (last_n[None, :] > numbers_n[:, None] * TILE))
    return jnp.argsort(~needed_nn, axis=1, stable=True), needed_nn.sum(axis=1)


def _sees_itself(ends_BT: Array) -> Array:
    return (ends_BT > jnp.arange(ends_BT.shape[1]))[:, :, None, None]


def _scores(
    q_BKXH: Array, k_BKQH: Array, ends_BT: Array, first_query: Array, first_key: Array, G: int
) -> Array:
    places_Q = jnp.arange(TILE)
    query_Q1 = first_query + places_Q[:, None]
    ends_BQ = lax.dynamic_slice_in_dim(ends_BT, first_key, TILE, axis=1)
    sees_BQQ = (first_key + places_Q <= query_Q1) & (query_Q1 < ends_BQ[:, None, :])
    bias_B1Q1Q = jnp.where(sees_BQQ, 0.0, HIDDEN)[:, None, :, None, :]
    scores_BKXQ = _dot(q_BKXH, _turned(k_BKQH))
    B, K, X, Q = scores_BKXQ.shape
    return (scores_BKXQ.reshape(B, K, Q, G, Q) + bias_B1Q1Q).reshape(B, K, X, Q)


def _tiles(a_BTNH: Array, K: int) -> Array:
    """Split time into tiles, and put heads that share keys together: [n, B, K, Q * G, H]."""
    B, T, N, H = a_BTNH.shape
    a_BnQKGH = a_BTNH.reshape(B, T // TILE, TILE, K, N // K, H)
    return jnp.transpose(a_BnQKGH, (1, 0, 3, 2, 4, 5)).reshape(-1, B, K, TILE * N // K, H)


def _by_time(a_nBKXH: Array, G: int) -> Array:
    """Undo `_tiles`."""
    n, B, K, _, H = a_nBKXH.shape
    a_nBKQGH = a_nBKXH.reshape(n, B, K, TILE, G, H)
    return jnp.transpose(a_nBKQGH, (1, 0, 3, 2, 4, 5)).reshape(B, n * TILE, K * G, H)


def _keys(a_BKTH: Array, start: Array) -> Array:
    return lax.dynamic_slice_in_dim(a_BKTH, start, TILE, axis=2)


def _add_at(sum_BKTH: Array, more_BKQH: Array, start: Array) -> Array:
    added = _keys(sum_BKTH, start) + more_BKQH
    return lax.dynamic_update_slice_in_dim(sum_BKTH, added, start, axis=2)


def _turned(a: Array) -> Array:
    return jnp.swapaxes(a, 2, 3)


def _dot(a: Array, b: Array) -> Array:
    """Return a @ b over the last two axes, summed in float32."""
    return lax.dot_general(
        a, b, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
