"""Log-probabilities of the tokens that were taken, without ever holding [B, T, V].

B rows, T tokens, D model, V vocabulary. The head is applied to a block of positions at a time; the backward pass recomputes each block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def chunked_logprobs(
    hidden_BTD: Array, kernel_DV: Array, tokens_BT: Array, segments_BT: Array, temperature: float = 1.0, *,
    block: int = 128, with_entropy: bool = False,
) -> Array | tuple[Array, Array]:
    """log p(tokens[t] | tokens before t of the same segment), as the sampler saw it.

    Args:
      hidden_BTD: after the final norm; the vector at t - 1 predicts token t.
      segments_BT: 0 is padding.
      temperature: divides the logits, as it did while sampling.
      block: positions whose logits exist at one time.
      with_entropy: also return the entropy of the distribution that token t was drawn from, a constant to the gradient.
    Returns:
      [B, T] float32 (and the same again for the entropy); 0 at the first token of a segment and on padding.
    """
    length = tokens_BT.shape[1]
    target_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    block = min(block, length)
    hidden_NBtD, target_NBt = _in_blocks(hidden_BTD, block), _in_blocks(target_BT, block)

    @jax.checkpoint
    def score(kernel_DV: Array, hidden_and_target: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        hidden_BtD, target_Bt = hidden_and_target
        logits_BtV = jnp.einsum("btd,dv->btv", hidden_BtD, kernel_DV.astype(hidden_BtD.dtype), preferred_element_type=jnp.float32)
        logp_BtV = jax.nn.log_softmax(logits_BtV / temperature)
        # A masked sum, not a gather: it stays local when V is sharded, and its gradient is no scatter.
        is_target_BtV = target_Bt[..., None] == jnp.arange(logp_BtV.shape[-1])
        taken_Bt = jnp.sum(jnp.where(is_target_BtV, logp_BtV, 0.0), axis=-1)
        if not with_entropy:
            return kernel_DV, (taken_Bt, jnp.zeros_like(taken_Bt))
        return kernel_DV, (taken_Bt, jax.lax.stop_gradient(-jnp.sum(jnp.exp(logp_BtV) * logp_BtV, axis=-1)))

    _, scores_NBt = jax.lax.scan(score, kernel_DV, (hidden_NBtD, target_NBt))
    has_predecessor_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0))) & (segments_BT > 0)

    def at_token(score_NBt: Array) -> Array:
        predicted_BT = jnp.moveaxis(score_NBt, 0, 1).reshape(tokens_BT.shape[0], -1)[:, : length - 1]
        return jnp.where(has_predecessor_BT, jnp.pad(predicted_BT, ((0, 0), (1, 0))), 0.0)

    logp_BT, entropy_BT = map(at_token, scores_NBt)
    return (logp_BT, entropy_BT) if with_entropy else logp_BT


def _in_blocks(values_BT: Array, block: int) -> Array:
    """[B, T, ...] -> [N, B, block, ...], T filled up with zeros."""
    rows, length = values_BT.shape[:2]
    filled = jnp.pad(values_BT, ((0, 0), (0, -length % block)) + ((0, 0),) * (values_BT.ndim - 2))
    return jnp.moveaxis(filled.reshape(rows, -1, block, *values_BT.shape[2:]), 1, 0)
