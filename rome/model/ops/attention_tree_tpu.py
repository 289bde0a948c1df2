"""Attention over rows of prefix trees on a TPU: Pallas kernels whose mask is one number a key.

B rows, T time, N query heads, K key heads, G query heads per key head (N = K * G), H head dim, Q
queries and Q keys of a tile, n = T / Q tiles of a row.

Splash compares segments or places of queries with the order of keys; who sees a token of a tree is
neither, and a mask that is written out for it takes 4 T^2 bytes. Here a kernel reads the end of
each key's subtree beside the key, and a tile of queries goes through the tiles of keys that hold an
ancestor of one of them. Scores lie keys by queries, so that what belongs to a query is a row of
lanes. The backward pass computes them again: one kernel for the queries, one for keys and values.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = 512  # of queries and of keys: scores and their gradients fit into a TPU core's memory
MIN_TILE = 128  # the lanes of a TPU
HIDDEN = -1e30  # finite: (-inf) - (-inf) would be NaN


def attention_tree(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    ends_BT: Array,
    *,
    saved_output: str,
    interpret: bool = False,
) -> Array:
    """Compute the attention of rows of prefix trees to themselves, [B, T, N, H].

    Beside queries, keys and values, memory is 512 bytes a token of a row for the ends and 4 bytes a
    token and query head for the sums of the softmax.

    Args:
      q_BTNH: queries, scaled.
      k_BTKH: keys.
      v_BTKH: values.
      segments_BT: 0 is padding, whose output is 0.
      ends_BT: key j is seen by the queries at places j to ends[j] - 1.
      saved_output: name of the output for remat policies.
      interpret: run the kernel's program on any device, slowly, for tests.

    Raises:
      ValueError: the row is no multiple of MIN_TILE.
    """
    T = q_BTNH.shape[1]
    if T % MIN_TILE:
        raise ValueError(
            f"attention 'splash' takes rows of prefix trees of a multiple of {MIN_TILE} tokens, not"
            f" {T}; set --config.row_length to such a multiple, or"
            " --config.learner.attention=blocked"
        )
    real_BT = segments_BT != 0
    # padding sees itself: a query without any key has no softmax
    ends_BT = jnp.where(real_BT, ends_BT, jnp.arange(1, T + 1, dtype=jnp.int32))
    q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(a, 1, 2) for a in (q_BTNH, k_BTKH, v_BTKH))
    out_BNTH = _attend(saved_output, interpret, q_BNTH, k_BKTH, v_BKTH, ends_BT)
    return jnp.where(real_BT[:, :, None, None], jnp.swapaxes(out_BNTH, 1, 2), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    saved_output: str, interpret: bool, q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, ends_BT: Array
) -> Array:
    return _forward(saved_output, interpret, q_BNTH, k_BKTH, v_BKTH, ends_BT)[0]


def _forward(
    saved_output: str, interpret: bool, q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, ends_BT: Array
) -> tuple[Array, tuple[Array, ...]]:
    B, N, T, _ = q_BNTH.shape
    visits = _visits(ends_BT, by_keys=False)
    tiles = _Tiles(q_BNTH, k_BKTH, by_keys=False)
    sums = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
    like_q = jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype)
    Q, H = tiles.tile
    one_row = pltpu.VMEM((1, Q), jnp.float32)
    out_BNTH, sum_BN1T = tiles.call(
        _forward_kernel,
        "tree_attention_forward",
        inputs=(tiles.query, tiles.key, tiles.key, tiles.end),
        outputs=(tiles.query, tiles.per_query),
        shapes=(like_q, sums),
        scratch=(one_row, one_row, pltpu.VMEM((H, Q), jnp.float32)),
        matmuls=2,
        interpret=interpret,
    )(*visits, q_BNTH, k_BKTH, v_BKTH, ends_BT[..., None])
    out_BNTH = checkpoint_name(out_BNTH, saved_output)
    sum_BN1T = checkpoint_name(sum_BN1T, saved_output)
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, ends_BT, out_BNTH, sum_BN1T)


def _backward(
    saved_output: str, interpret: bool, residuals: tuple[Array, ...], grad_BNTH: Array
) -> tuple[Array, Array, Array, None]:
    q_BNTH, k_BKTH, v_BKTH, ends_BT, out_BNTH, sum_BN1T = residuals
    product_BNTH = grad_BNTH.astype(jnp.float32) * out_BNTH.astype(jnp.float32)
    along_BN1T = product_BNTH.sum(axis=-1)[:, :, None, :]
    arguments = (q_BNTH, k_BKTH, v_BKTH, ends_BT[..., None], grad_BNTH, along_BN1T, sum_BN1T)
    like_q, like_k = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_BNTH, k_BKTH))
    gradients = []
    for by_keys in (False, True):
        tiles = _Tiles(q_BNTH, k_BKTH, by_keys)
        per_query = (tiles.query, tiles.per_query, tiles.per_query)
        sums = 2 if by_keys else 1
        gradients += tiles.call(
            _keys_kernel if by_keys else _queries_kernel,
            "tree_attention_keys" if by_keys else "tree_attention_queries",
            inputs=(tiles.query, tiles.key, tiles.key, tiles.end, *per_query),
            outputs=(tiles.key, tiles.key) if by_keys else (tiles.query,),
            shapes=(like_k, like_k) if by_keys else (like_q,),
            scratch=(pltpu.VMEM(tiles.tile, jnp.float32),) * sums,
            matmuls=4 if by_keys else 3,
            interpret=interpret,
        )(*_visits(ends_BT, by_keys), *arguments)
    dq_BNTH, dk_BKTH, dv_BKTH = gradients
    return dq_BNTH, dk_BKTH, dv_BKTH, None


_attend.defvjp(_forward, _backward)


class _Visits(NamedTuple):
    """The tiles that a tile goes through, for each row of the batch, flat for scalar memory.

    Attributes:
      order: their numbers; those behind the last repeat it, so that nothing is fetched for them.
        Of tile i of row b they begin at (b * n + i) * n.
      count: how many they are, at b * n + i.
    """

    order: Array
    count: Array


def _visits(ends_BT: Array, by_keys: bool) -> _Visits:
    """Return the tiles of keys that a tile of queries needs; by keys, the tiles of queries."""
    B, T = ends_BT.shape
    Q = math.gcd(TILE, T)
    n = T // Q
    longest_Bn = ends_BT.reshape(B, n, Q).max(axis=2)  # end of the key that is seen longest
    numbers_n = jnp.arange(n)
    own_nn = numbers_n[:, None] == numbers_n
    is_before_nn = numbers_n < numbers_n[:, None]
    is_seen_Bnn = longest_Bn[:, None, :] > numbers_n[:, None] * Q
    needed_Bnn = own_nn | (is_before_nn & is_seen_Bnn)
    if by_keys:
        needed_Bnn = jnp.swapaxes(needed_Bnn, 1, 2)
    count_Bn = needed_Bnn.sum(axis=2)
    order_Bnn = jnp.argsort(~needed_Bnn, axis=2, stable=True)
    last_Bnn = jnp.minimum(numbers_n, count_Bn[..., None] - 1)
    order_Bnn = jnp.take_along_axis(order_Bnn, last_Bnn, axis=2)
    return _Visits(order_Bnn.reshape(-1).astype(jnp.int32), count_Bn.reshape(-1).astype(jnp.int32))


class _Tiles:
    """The grid of a kernel, and which tile of each array a place of the grid sees.

    The grid is rows, heads, tiles, visits: by queries, heads are query heads; by keys, they are key
    heads, and visits are those of G query heads one after the other.
    """

    def __init__(self, q_BNTH: Array, k_BKTH: Array, by_keys: bool):
        B, N, T, H = q_BNTH.shape
        K = k_BKTH.shape[1]
        Q = math.gcd(TILE, T)
        self.n = T // Q
        self.G = N // K
        self.by_keys = by_keys
        self.tile = (Q, H)
        self.grid = (B, K, self.n, self.G * self.n) if by_keys else (B, N, self.n, self.n)
        self.scores = B * N * T * T // 2  # at most: no tile of the future is visited
        self.query = pl.BlockSpec((None, None, Q, H), self._query)
        self.key = pl.BlockSpec((None, None, Q, H), self._key)
        self.end = pl.BlockSpec((None, Q, 1), self._end)
        self.per_query = pl.BlockSpec((None, None, 1, Q), self._per_query)

    def _other(self, b: Array, tile: Array, visit: Array, order: Any) -> Array:
        step = lax.rem(visit, self.n) if self.by_keys else visit
        return order[(b * self.n + tile) * self.n + step]

    def _query(self, b: Array, head: Array, tile: Array, visit: Array, order: Any, _: Any) -> tuple:
        if not self.by_keys:
            return b, head, tile, 0
        query_head = head * self.G + lax.div(visit, self.n)
        return b, query_head, self._other(b, tile, visit, order), 0

    def _per_query(self, *place: Any) -> tuple:
        b, head, tile, _ = self._query(*place)
        return b, head, 0, tile

    def _key(self, b: Array, head: Array, tile: Array, visit: Array, order: Any, _: Any) -> tuple:
        if self.by_keys:
            return b, head, tile, 0
        return b, lax.div(head, self.G), self._other(b, tile, visit, order), 0

    def _end(self, *place: Any) -> tuple:
        b, _, tile, _ = self._key(*place)
        return b, tile, 0

    def call(
        self,
        kernel: Any,
        name: str,
        *,
        inputs: tuple,
        outputs: tuple,
        shapes: tuple,
        scratch: tuple,
        matmuls: int,
        interpret: bool,
    ) -> Any:
        """Return the function that runs a kernel over the grid, on its visits and its inputs."""
        H = self.tile[1]
        moved = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes)
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                in_specs=inputs,
                out_specs=outputs,
                scratch_shapes=scratch,
                grid=self.grid,
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * self.scores * H * matmuls,
                transcendentals=self.scores,
                bytes_accessed=moved,
            ),
            interpret=interpret,
            name=name,
        )


class _Place(NamedTuple):
    """Where a kernel's program is: numbers of its tiles, and which visit of how many this is."""

    queries: Array
    keys: Array
    is_first: Array
    is_visited: Array
    is_last: Array


def _place(tiles: _Tiles, order_ref: Any, count_ref: Any) -> _Place:
    b, tile, visit = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    step = lax.rem(visit, tiles.n) if tiles.by_keys else visit
    at = b * tiles.n + tile
    other = order_ref[at * tiles.n + step]
    queries, keys = (other, tile) if tiles.by_keys else (tile, other)
    is_last = visit == tiles.grid[3] - 1
    return _Place(queries, keys, visit == 0, step < count_ref[at], is_last)


def _scores(place: _Place, q_QH: Array, k_QH: Array, ends_Q1: Array) -> Array:
    """Return the scores of a tile, keys by queries; HIDDEN where the key is no ancestor."""
    scores_QQ = _dot(k_QH, q_QH, 1, 1)
    Q = scores_QQ.shape[0]
    key_QQ = place.keys * Q + lax.broadcasted_iota(jnp.int32, (Q, Q), 0)
    query_QQ = place.queries * Q + lax.broadcasted_iota(jnp.int32, (Q, Q), 1)
    sees_QQ = (key_QQ <= query_QQ) & (query_QQ < ends_Q1)
    return jnp.where(sees_QQ, scores_QQ, HIDDEN)


def _dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Contract one axis of a with one of b, summed in float32."""
    contracted = (((of_a,), (of_b,)), ((), ()))
    return lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _forward_kernel(
    tiles: _Tiles,
    order_ref: Any,
    count_ref: Any,
    q_QH: Any,
    k_QH: Any,
    v_QH: Any,
    ends_Q1: Any,
    out_QH: Any,
    sum_1Q: Any,
    top_1Q: Any,
    total_1Q: Any,
    running_HQ: Any,
) -> None:
    """Write a tile's output and the log of the sum of its softmax, as a running softmax."""
    place = _place(tiles, order_ref, count_ref)

    @pl.when(place.is_first)
    def _() -> None:
        top_1Q[...] = jnp.full(top_1Q.shape, HIDDEN, jnp.float32)
        total_1Q[...] = jnp.zeros(total_1Q.shape, jnp.float32)
        running_HQ[...] = jnp.zeros(running_HQ.shape, jnp.float32)

    @pl.when(place.is_visited)
    def _() -> None:
        scores_QQ = _scores(place, q_QH[...], k_QH[...], ends_Q1[...])
        higher_1Q = jnp.maximum(top_1Q[...], scores_QQ.max(axis=0, keepdims=True))
        # All of a query's weights are 1 where no key of the tile is an ancestor and none was before
        # it. What they add is shrunk to 0 by the first real score, at the latest its own token's.
        weights_QQ = jnp.exp(scores_QQ - higher_1Q)
        shrink_1Q = jnp.exp(top_1Q[...] - higher_1Q)
        top_1Q[...] = higher_1Q
        total_1Q[...] = total_1Q[...] * shrink_1Q + weights_QQ.sum(axis=0, keepdims=True)
        more_HQ = _dot(v_QH[...], weights_QQ.astype(v_QH.dtype), 0, 0)
        running_HQ[...] = running_HQ[...] * shrink_1Q + more_HQ

    @pl.when(place.is_last)
    def _() -> None:
        out_QH[...] = (running_HQ[...] / total_1Q[...]).T.astype(out_QH.dtype)
        sum_1Q[...] = top_1Q[...] + jnp.log(total_1Q[...])


def _weights_and_gradients(
    place: _Place,
    q_QH: Array,
    k_QH: Array,
    v_QH: Array,
    ends_Q1: Array,
    grad_QH: Array,
    along_1Q: Array,
    sum_1Q: Array,
) -> tuple[Array, Array]:
    """Return the weights of a tile and the gradients of its scores, keys by queries."""
    weights_QQ = jnp.exp(_scores(place, q_QH, k_QH, ends_Q1) - sum_1Q)
    dweights_QQ = _dot(v_QH, grad_QH, 1, 1) - along_1Q
    return weights_QQ, weights_QQ * dweights_QQ


def _queries_kernel(tiles: _Tiles, order_ref: Any, count_ref: Any, *refs: Any) -> None:
    """Write the gradient of a tile of queries."""
    *inputs, dq_QH, running_QH = refs
    k_QH = inputs[1]
    place = _place(tiles, order_ref, count_ref)

    @pl.when(place.is_first)
    def _() -> None:
        running_QH[...] = jnp.zeros(running_QH.shape, jnp.float32)

    @pl.when(place.is_visited)
    def _() -> None:
        _, dscores_QQ = _weights_and_gradients(place, *(ref[...] for ref in inputs))
        running_QH[...] += _dot(dscores_QQ.astype(k_QH.dtype), k_QH[...], 0, 0)

    @pl.when(place.is_last)
    def _() -> None:
        dq_QH[...] = running_QH[...].astype(dq_QH.dtype)


def _keys_kernel(tiles: _Tiles, order_ref: Any, count_ref: Any, *refs: Any) -> None:
    """Write the gradients of a tile of keys and of their values, summed over their query heads."""
    *inputs, dk_QH, dv_QH, running_dk_QH, running_dv_QH = refs
    q_QH, grad_QH = inputs[0], inputs[4]
    place = _place(tiles, order_ref, count_ref)

    @pl.when(place.is_first)
    def _() -> None:
        running_dk_QH[...] = jnp.zeros(running_dk_QH.shape, jnp.float32)
        running_dv_QH[...] = jnp.zeros(running_dv_QH.shape, jnp.float32)

    @pl.when(place.is_visited)
    def _() -> None:
        weights_QQ, dscores_QQ = _weights_and_gradients(place, *(ref[...] for ref in inputs))
        running_dk_QH[...] += _dot(dscores_QQ.astype(q_QH.dtype), q_QH[...], 1, 0)
        running_dv_QH[...] += _dot(weights_QQ.astype(grad_QH.dtype), grad_QH[...], 1, 0)

    @pl.when(place.is_last)
    def _() -> None:
        dk_QH[...] = running_dk_QH[...].astype(dk_QH.dtype)
        dv_QH[...] = running_dv_QH[...].astype(dv_QH.dtype)
