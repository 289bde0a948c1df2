"""Logprobs of the tokens that were taken, without ever holding [B, T, V].

B rows, T tokens, D model, V vocabulary; n positions of one device (rows and time flattened), m
positions of a block, b blocks; d and v are one device's part of D and V, w a part of v, p of them.

The head is applied to a block of positions at a time, forward and, once more, backward; one number
a position is kept between the two. Where all logits together are few they are one block and are
kept: one product of four less. On a mesh every device scores its own positions: the head is
gathered forward once, backward a part of the vocabulary at a time, and its gradient summed over
blocks in float32 and brought home once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.ops.gathered import WIDE, gather, scatter_sum
from rome.model.sharding import RULES, is_split

BLOCK = 512  # positions whose logits exist at one time
# tokens of the vocabulary whose head and gradient the backward pass holds at one time
MAX_PART = 20_000
KEPT_LOGITS = 2**26  # 256 MiB of float32; beyond, they are computed again


def chunked_logprobs(
    hidden_BTD: Array,
    kernel_DV: Array,
    tokens_BT: Array,
    segments_BT: Array,
    temperature: float = 1.0,
    *,
    block: int | None = None,
    with_entropy: bool = False,
) -> Array | tuple[Array, Array]:
    """Return log p(tokens[t] | tokens before t of the same segment), as the sampler saw it.

    Args:
      hidden_BTD: after the final norm; the vector at t - 1 predicts token t. Its type is the one
        that the head computes in.
      kernel_DV: on a mesh laid out as `rome.model.params.PARAM_AXES` says.
      tokens_BT: ids.
      segments_BT: 0 is padding.
      temperature: divides the logits, as it did while sampling.
      block: positions whose logits exist at one time; by default all of them where they are at most
        KEPT_LOGITS, else BLOCK.
      with_entropy: also return the entropy of the distribution that token t was drawn from, a
        constant to the gradient.

    Returns:
      [B, T] float32 (and the same again for the entropy); 0 at the first token of a segment and on
      padding.
    """
    target_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    predicted = _scores_on_mesh(hidden_BTD, kernel_DV, target_BT, temperature, block)
    continues_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0)))
    has_predecessor_BT = continues_BT & (segments_BT > 0)
    logp_BT, entropy_BT = (
        jnp.where(has_predecessor_BT, jnp.pad(score_BT[:, :-1], ((0, 0), (1, 0))), 0.0)
        for score_BT in predicted
    )
    return (logp_BT, jax.lax.stop_gradient(entropy_BT)) if with_entropy else logp_BT


def tree_logprobs(
    hidden_BTD: Array,
    kernel_DV: Array,
    tokens_BT: Array,
    about_BT: Array,
    predictor_BT: Array,
    temperature: float = 1.0,
    *,
    block: int | None = None,
) -> tuple[Array, Array]:
    """Return log p(tokens[about[t]] | what predictor[t] has seen), for rows of prefix trees.

    One hidden state predicts as many tokens as have it as predictor; it is not computed again.

    Args:
      hidden_BTD: after the final norm. On a mesh, time is whole.
      kernel_DV: as for `chunked_logprobs`.
      tokens_BT: ids.
      about_BT: places.
      predictor_BT: places; -1: nothing is predicted.
      temperature: divides the logits.
      block: as for `chunked_logprobs`.

    Returns:
      The logprobs, [B, T] float32, and the entropy of the distributions, a constant to the
      gradient; both 0 where nothing is predicted.
    """
    target_BT = jnp.take_along_axis(tokens_BT, about_BT, axis=1)
    found = _scores_on_mesh(hidden_BTD, kernel_DV, target_BT, temperature, block, predictor_BT)
    logp_BT, entropy_BT = (jnp.where(predictor_BT >= 0, score_BT, 0.0) for score_BT in found)
    return logp_BT, jax.lax.stop_gradient(entropy_BT)


def _scores_on_mesh(
    hidden_BTD: Array,
    kernel_DV: Array,
    target_BT: Array,
    temperature: float,
    block: int | None,
    predictor_BT: Array | None = None,
) -> tuple[Array, ...]:
    """Return log p(target) and the entropy, [B, T] each, of the hidden states or their choice."""

    def score(
        hidden_BTD: Array, kernel_dv: Array, target_BT: Array, predictor_BT: Array | None
    ) -> tuple[Array, ...]:
        if predictor_BT is not None:
            chosen_BT1 = jnp.maximum(predictor_BT, 0)[..., None]
            hidden_BTD = jnp.take_along_axis(hidden_BTD, chosen_BT1, axis=1)
        hidden_nD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        target_n = target_BT.reshape(-1)
        scores_n = _taken_logprobs(hidden_nD, kernel_dv, target_n, temperature, block, is_split())
        return tuple(score_n.reshape(target_BT.shape) for score_n in scores_n)

    if is_split():
        by_token = PartitionSpec(RULES["batch"], RULES["time"])
        score = jax.shard_map(
            score,
            in_specs=(by_token, PartitionSpec(WIDE, "tensor"), by_token, by_token),
            out_specs=(by_token, by_token),
            check_vma=False,
        )
    return score(hidden_BTD, kernel_DV, target_BT, predictor_BT)


class _Positions(NamedTuple):
    """Positions to score, n of them or b blocks of m."""

    hidden_nD: Array
    target_n: Array
    log_sum_n: Array
    gradient_n: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _taken_logprobs(
    hidden_nD: Array,
    kernel_dv: Array,
    target_n: Array,
    temperature: float,
    block: int | None,
    on_mesh: bool,
) -> tuple[Array, Array]:
    """Return log p(target) and the entropy of each position."""
    return _forward(hidden_nD, kernel_dv, target_n, temperature, block, on_mesh)[0]


def _forward(
    hidden_nD: Array,
    kernel_dv: Array,
    target_n: Array,
    temperature: float,
    block: int | None,
    on_mesh: bool,
) -> tuple[tuple[Array, Array], tuple]:
    kernel_Dv = _gathered(kernel_dv, hidden_nD.dtype, on_mesh)
    keep = _keeps_logits(hidden_nD, kernel_dv, block)

    def total(x: Array) -> Array:
        """Sum over the parts of the vocabulary."""
        return jax.lax.psum(x, "tensor") if on_mesh else x

    def score(hidden_and_target: tuple[Array, Array]) -> tuple[Array, ...]:
        hidden_mD, target_m = hidden_and_target
        logits_mv = _logits(hidden_mD, kernel_Dv, temperature)
        top_m1 = logits_mv.max(axis=-1, keepdims=True)
        if on_mesh:
            top_m1 = jax.lax.pmax(top_m1, "tensor")
        weight_mv = jnp.exp(logits_mv - top_m1)
        sum_m = total(weight_mv.sum(axis=-1))
        log_sum_m = top_m1[:, 0] + jnp.log(sum_m)
        is_target_mv = _is_target(target_m, kernel_Dv.shape[1], on_mesh)
        taken_m = total(jnp.sum(jnp.where(is_target_mv, logits_mv, 0.0), axis=-1)) - log_sum_m
        entropy_m = log_sum_m - total(jnp.sum(weight_mv * logits_mv, axis=-1)) / sum_m
        if keep:
            return taken_m, entropy_m, log_sum_m, logits_mv
        return taken_m, entropy_m, log_sum_m

    if keep:
        logp_n, entropy_n, log_sum_n, *logits = score((hidden_nD, target_n))
    else:
        logits = []
        scores = jax.lax.map(score, (_in_blocks(hidden_nD, block), _in_blocks(target_n, block)))
        n = target_n.shape[0]
        logp_n, entropy_n, log_sum_n = (score_bm.reshape(-1)[:n] for score_bm in scores)
    return (logp_n, entropy_n), (hidden_nD, kernel_dv, target_n, log_sum_n, logits)


def _backward(
    temperature: float, block: int | None, on_mesh: bool, residuals: tuple, gradients: tuple
) -> tuple[Array | None, ...]:
    """Return the gradients of the hidden states and the head.

    d logits = (one_hot(target) - p) * d logp / temperature; the entropy is a constant. Where logits
    are computed again, a part of the vocabulary at a time: neither the whole head nor its whole
    float32 gradient is there at once.
    """
    hidden_nD, kernel_dv, target_n, log_sum_n, logits = residuals
    gradient_n = gradients[0]
    if on_mesh:
        # shard_map hands each part of the vocabulary its share of a gradient that all of them need
        gradient_n = jax.lax.psum(gradient_n, "tensor")
    positions = _Positions(hidden_nD, target_n, log_sum_n, gradient_n)
    if logits:
        d_hidden_nD, d_kernel_dv = _pull_back_kept(
            positions, kernel_dv, logits[0], temperature, on_mesh
        )
    else:
        d_hidden_nD, d_kernel_dv = _pull_back_in_parts(
            positions, kernel_dv, temperature, block, on_mesh
        )
    return d_hidden_nD.astype(hidden_nD.dtype), d_kernel_dv.astype(kernel_dv.dtype), None


_taken_logprobs.defvjp(_forward, _backward)


def _pull_back_kept(
    positions: _Positions,
    kernel_dv: Array,
    logits_nv: Array,
    temperature: float,
    on_mesh: bool,
) -> tuple[Array, Array]:
    """Return both gradients from logits that were kept."""
    dtype = positions.hidden_nD.dtype
    kernel_Dv = _gathered(kernel_dv, dtype, on_mesh)
    first = _first(kernel_Dv.shape[1], on_mesh)
    d_kernel_Dv, d_hidden_nD = _pull_back(positions, logits_nv, kernel_Dv, first, temperature)
    if on_mesh:
        return d_hidden_nD, scatter_sum(d_kernel_Dv.astype(dtype), axis=0)
    return d_hidden_nD, d_kernel_Dv


def _pull_back_in_parts(
    positions: _Positions,
    kernel_dv: Array,
    temperature: float,
    block: int | None,
    on_mesh: bool,
) -> tuple[Array, Array]:
    """Return both gradients, computing the logits of a part of the vocabulary at a time."""
    n, D = positions.hidden_nD.shape
    dtype = positions.hidden_nD.dtype
    v = kernel_dv.shape[1]
    blocks = _Positions(*(_in_blocks(x, block) for x in positions))
    parts = _vocabulary_parts(v)
    width = v // parts

    def one_part(d_hidden_bmD: Array, part: Array) -> tuple[Array, Array]:
        kernel_dw = jax.lax.dynamic_slice_in_dim(kernel_dv, part * width, width, axis=1)
        kernel_Dw = _gathered(kernel_dw, dtype, on_mesh)
        first = _first(v, on_mesh) + part * width

        def add(sum_Dw: Array, part: tuple[_Positions, Array]) -> tuple[Array, Array]:
            block, d_hidden_mD = part
            logits_mw = _logits(block.hidden_nD, kernel_Dw, temperature)
            more_Dw, more_mD = _pull_back(block, logits_mw, kernel_Dw, first, temperature)
            return sum_Dw + more_Dw, d_hidden_mD + more_mD

        nothing_Dw = jnp.zeros(kernel_Dw.shape, jnp.float32)
        sum_Dw, d_hidden_bmD = jax.lax.scan(add, nothing_Dw, (blocks, d_hidden_bmD))
        if on_mesh:  # in the compute type, as the gradients of all other matrices travel
            return d_hidden_bmD, scatter_sum(sum_Dw.astype(dtype), axis=0)
        return d_hidden_bmD, sum_Dw

    nothing_bmD = jnp.zeros(blocks.hidden_nD.shape, jnp.float32)
    d_hidden_bmD, d_kernel_pdw = jax.lax.scan(one_part, nothing_bmD, jnp.arange(parts))
    d_hidden_nD = d_hidden_bmD.reshape(-1, D)[:n]
    d_kernel_dv = jnp.swapaxes(d_kernel_pdw, 0, 1).reshape(kernel_dv.shape)
    return d_hidden_nD, d_kernel_dv


def _pull_back(
    block: _Positions,
    logits_mv: Array,
    kernel_Dv: Array,
    first: Array | int,
    temperature: float,
) -> tuple[Array, Array]:
    """Return a block's gradients [D, v] of the head and [m, D] of the hidden states, in float32."""
    hidden_mD, target_m, log_sum_m, gradient_m = block
    is_target_mv = target_m[:, None] == first + jnp.arange(kernel_Dv.shape[1])
    error_mv = is_target_mv - jnp.exp(logits_mv - log_sum_m[:, None])
    d_mv = (error_mv * (gradient_m / temperature)[:, None]).astype(hidden_mD.dtype)
    # Transposed behind a barrier: on a CPU a product whose left side is transposed leaves the fast
    # matmuls.
    hidden_Dm = jax.lax.optimization_barrier(hidden_mD.T)
    d_kernel_Dv = jnp.einsum("Dm,mv->Dv", hidden_Dm, d_mv, preferred_element_type=jnp.float32)
    d_hidden_mD = jnp.einsum("mv,Dv->mD", d_mv, kernel_Dv, preferred_element_type=jnp.float32)
    return d_kernel_Dv, d_hidden_mD


def _gathered(kernel_dv: Array, dtype: Any, on_mesh: bool) -> Array:
    """Return the kernel in its compute type, whole over D. Cast first: half the bytes travel."""
    kernel_dv = kernel_dv.astype(dtype)
    return gather(kernel_dv, axis=0) if on_mesh else kernel_dv


def _keeps_logits(hidden_nD: Array, kernel_dv: Array, block: int | None) -> bool:
    return block is None and hidden_nD.shape[0] * kernel_dv.shape[1] <= KEPT_LOGITS


def _logits(hidden_mD: Array, kernel_Dv: Array, temperature: float) -> Array:
    logits_mv = jnp.einsum("mD,Dv->mv", hidden_mD, kernel_Dv, preferred_element_type=jnp.float32)
    return logits_mv / temperature


def _first(v: int, on_mesh: bool) -> Array | int:
    """Return the first token of this device's part of the vocabulary."""
    return jax.lax.axis_index("tensor") * v if on_mesh else 0


def _is_target(target_m: Array, v: int, on_mesh: bool) -> Array:
    """Return where each row's target lies, [m, v] bool.

    A mask, not an index, so that it stays local and its gradient is no scatter.
    """
    return target_m[:, None] == _first(v, on_mesh) + jnp.arange(v)


def _vocabulary_parts(v: int) -> int:
    """Return the least number of equal parts of at most MAX_PART tokens."""
    fewest = -(-v // MAX_PART)
    return next(parts for parts in range(fewest, v + 1) if v % parts == 0)


def _in_blocks(values_n: Array, block: int | None) -> Array:
    """Split [n, ...] into [b, m, ...], filled up with zeros."""
    n = values_n.shape[0]
    m = min(block or BLOCK, n)
    other_axes = ((0, 0),) * (values_n.ndim - 1)
    filled = jnp.pad(values_n, ((0, -n % m), *other_axes))
    return filled.reshape(-1, m, *values_n.shape[1:])
