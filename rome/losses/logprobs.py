"""Log-probabilities of the tokens that were taken, without holding [B, T, V] where it is large.

B rows, T tokens, D model, V vocabulary, t positions of a block. The head is applied to a block of positions at a time, and the backward pass, by
hand, computes each block's logits again. Where all logits together are few they are one block and are kept: one product of four less.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

KEPT_LOGITS = 2**26  # 256 MiB of float32


class Scores(NamedTuple):
    """Of one block: log p of the targets, entropy (0 unless asked for), and the log of the softmax's sum."""

    taken_Bt: Array
    entropy_Bt: Array
    sum_Bt: Array


def chunked_logprobs(
    hidden_BTD: Array, kernel_DV: Array, tokens_BT: Array, segments_BT: Array, temperature: float = 1.0, *,
    block: int = 128, with_entropy: bool = False,
) -> Array | tuple[Array, Array]:
    """log p(tokens[t] | tokens before t of the same segment), as the sampler saw it.

    Args:
      hidden_BTD: after the final norm; the vector at t - 1 predicts token t.
      segments_BT: 0 is padding.
      temperature: divides the logits, as it did while sampling.
      block: positions whose logits exist at one time, where there are more than KEPT_LOGITS of them.
      with_entropy: also return the entropy of the distribution that token t was drawn from, a constant to the gradient.
    Returns:
      [B, T] float32 (and the same again for the entropy); 0 at the first token of a segment and on padding.
    """
    rows, length = tokens_BT.shape
    target_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    kernel_DV = kernel_DV.astype(hidden_BTD.dtype)
    if rows * length * kernel_DV.shape[1] <= KEPT_LOGITS:
        scores = _score_whole(hidden_BTD, kernel_DV, target_BT, temperature, with_entropy)
    else:
        scores = _score_blocks(hidden_BTD, kernel_DV, target_BT, temperature, with_entropy, min(block, length))
    has_predecessor_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0))) & (segments_BT > 0)
    at_token = lambda score_BT: jnp.where(has_predecessor_BT, jnp.pad(score_BT[:, :-1], ((0, 0), (1, 0))), 0.0)
    return tuple(map(at_token, scores)) if with_entropy else at_token(scores[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _score_whole(hidden_BTD: Array, kernel_DV: Array, target_BT: Array, temperature: float, with_entropy: bool) -> tuple[Array, Array]:
    return _score_whole_forward(hidden_BTD, kernel_DV, target_BT, temperature, with_entropy)[0]


def _score_whole_forward(hidden_BTD, kernel_DV, target_BT, temperature, with_entropy):
    logits_BTV = _logits(hidden_BTD, kernel_DV, temperature)
    scores = _score(logits_BTV, target_BT, with_entropy)
    return scores[:2], (logits_BTV, scores.sum_Bt, hidden_BTD, kernel_DV, target_BT)


def _score_whole_backward(temperature, with_entropy, residuals, grads):
    logits_BTV, sum_BT, hidden_BTD, kernel_DV, target_BT = residuals
    dhidden_BTD, dkernel_DV = _gradients(logits_BTV, sum_BT, grads[0] / temperature, hidden_BTD, kernel_DV, target_BT)
    return dhidden_BTD, dkernel_DV.astype(kernel_DV.dtype), None


_score_whole.defvjp(_score_whole_forward, _score_whole_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _score_blocks(
    hidden_BTD: Array, kernel_DV: Array, target_BT: Array, temperature: float, with_entropy: bool, block: int,
) -> tuple[Array, Array]:
    return _score_blocks_forward(hidden_BTD, kernel_DV, target_BT, temperature, with_entropy, block)[0]


def _score_blocks_forward(hidden_BTD, kernel_DV, target_BT, temperature, with_entropy, block):
    score = lambda inputs: _score(_logits(inputs[0], kernel_DV, temperature), inputs[1], with_entropy)
    scores = lax.map(score, (_in_blocks(hidden_BTD, block), _in_blocks(target_BT, block)))
    scores = Scores(*(_joined(values, target_BT.shape[1]) for values in scores))
    return scores[:2], (scores.sum_Bt, hidden_BTD, kernel_DV, target_BT)


def _score_blocks_backward(temperature, with_entropy, block, residuals, grads):
    sum_BT, hidden_BTD, kernel_DV, target_BT = residuals

    def step(dkernel_DV, inputs):
        hidden_BtD, target_Bt, sum_Bt, grad_Bt = inputs
        dhidden_BtD, more_DV = _gradients(_logits(hidden_BtD, kernel_DV, temperature), sum_Bt, grad_Bt, hidden_BtD, kernel_DV, target_Bt)
        return dkernel_DV + more_DV, dhidden_BtD

    blocks = tuple(_in_blocks(values, block) for values in (hidden_BTD, target_BT, sum_BT, grads[0] / temperature))
    dkernel_DV, dhidden_NBtD = lax.scan(step, jnp.zeros(kernel_DV.shape, jnp.float32), blocks)
    return _joined(dhidden_NBtD, target_BT.shape[1]), dkernel_DV.astype(kernel_DV.dtype), None


_score_blocks.defvjp(_score_blocks_forward, _score_blocks_backward)


def _logits(hidden_BtD: Array, kernel_DV: Array, temperature: float) -> Array:
    return jnp.matmul(hidden_BtD, kernel_DV, preferred_element_type=jnp.float32) / temperature


def _score(logits_BtV: Array, target_Bt: Array, with_entropy: bool) -> Scores:
    top_Bt = logits_BtV.max(axis=-1)
    exp_BtV = jnp.exp(logits_BtV - top_Bt[..., None])
    total_Bt = exp_BtV.sum(axis=-1)
    sum_Bt = top_Bt + jnp.log(total_Bt)
    # A masked sum, not a gather: it stays local when V is sharded.
    taken_Bt = jnp.sum(jnp.where(_is_target(target_Bt, logits_BtV.shape[-1]), logits_BtV, 0.0), axis=-1) - sum_Bt
    if not with_entropy:
        return Scores(taken_Bt, jnp.zeros_like(taken_Bt), sum_Bt)
    return Scores(taken_Bt, sum_Bt - jnp.sum(exp_BtV * logits_BtV, axis=-1) / total_Bt, sum_Bt)


def _gradients(logits_BtV: Array, sum_Bt: Array, grad_Bt: Array, hidden_BtD: Array, kernel_DV: Array, target_Bt: Array) -> tuple[Array, Array]:
    """Of sum(grad * log p(target)) by the hidden states and, float32, by the kernel."""
    is_target_BtV = _is_target(target_Bt, logits_BtV.shape[-1]).astype(jnp.float32)
    dlogits_BtV = (grad_Bt[..., None] * (is_target_BtV - jnp.exp(logits_BtV - sum_Bt[..., None]))).astype(hidden_BtD.dtype)
    dhidden_BtD = lax.dot_general(dlogits_BtV, kernel_DV, (((2,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    hidden_DBt = lax.optimization_barrier(jnp.moveaxis(hidden_BtD, 2, 0))  # XLA's fast matmuls on a CPU want the left side as it lies
    dkernel_DV = lax.dot_general(hidden_DBt, dlogits_BtV, (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)
    return dhidden_BtD.astype(hidden_BtD.dtype), dkernel_DV


def _is_target(target_Bt: Array, V: int) -> Array:
    return target_Bt[..., None] == jnp.arange(V, dtype=target_Bt.dtype)


def _in_blocks(values_BT: Array, block: int) -> Array:
    """[B, T, ...] -> [N, B, block, ...], T filled up with zeros."""
    rows, length = values_BT.shape[:2]
    filled = jnp.pad(values_BT, ((0, 0), (0, -length % block)) + ((0, 0),) * (values_BT.ndim - 2))
    return jnp.moveaxis(filled.reshape(rows, -1, block, *values_BT.shape[2:]), 1, 0)


def _joined(values_NBt: Array, length: int) -> Array:
    """The inverse of _in_blocks."""
    values_BNt = jnp.moveaxis(values_NBt, 0, 1)
    return values_BNt.reshape(values_BNt.shape[0], -1, *values_BNt.shape[3:])[:, :length]
