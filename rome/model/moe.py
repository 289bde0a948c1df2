"""The mixture of experts: a float32 router over the experts of `rome.model.experts`, and the losses and figures of the router.

N tokens (flattened rows), D model, E experts, k experts a token, F expert hidden, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rome.model.config import ModelConfig
from rome.model.expert_parallel import experts_on_mesh
from rome.model.experts import experts
from rome.model.sharding import is_split


class RouterStats(NamedTuple):
    """Sums over the tokens that are not padding, so that they add up over micro-batches.

    counts_LE: how often each expert was chosen; k * tokens in each layer. prob_sum_LE: router probabilities, differentiable.
    """

    counts_LE: Array
    prob_sum_LE: Array
    tokens: Array


def router_loss(stats: RouterStats, config: ModelConfig) -> Array:
    """Load balancing as transformers computes it: E * sum_e f_e * P_e, both averaged over the tokens of all layers together.

    k when every expert gets the same share, which is the least. Not yet multiplied by config.router_aux_loss_coef.
    """
    rows = jnp.maximum(stats.tokens * len(config.sparse_layers), 1.0)
    share_E = jax.lax.stop_gradient(stats.counts_LE.sum(axis=0)) / rows
    prob_E = stats.prob_sum_LE.sum(axis=0) / rows
    return config.num_experts * jnp.sum(share_E * prob_E)


def route(logits_NE: Array, config: ModelConfig, forced_Nk: Array | None = None) -> tuple[Array, Array, Array, Array]:
    """Chooses experts and weighs them.

    Args:
      logits_NE: float32.
      forced_Nk: expert ids to replay. Their weights come from the same logits, so the router still learns. A token whose ids are negative
        has no recorded route and chooses for itself.
    Returns:
      ids_Nk int32, weights_Nk float32, probs_NE float32, and own_Nk int32: what the router would choose. It is ids_Nk where nothing is replayed.
    """
    probs_NE = jax.nn.softmax(logits_NE, axis=-1)
    _, own_Nk = jax.lax.top_k(jax.lax.stop_gradient(probs_NE), config.experts_per_token)
    ids_Nk = own_Nk if forced_Nk is None else jnp.where(forced_Nk[:, :1] < 0, own_Nk, forced_Nk)
    weights_Nk = jnp.take_along_axis(probs_NE, ids_Nk, axis=-1)  # an id out of range gives NaN: loud
    if config.norm_topk_prob:
        weights_Nk = weights_Nk / weights_Nk.sum(axis=-1, keepdims=True)
    return ids_Nk.astype(jnp.int32), weights_Nk, probs_NE, own_Nk.astype(jnp.int32)


class MoE(nn.Module):
    """Router and experts of one block."""

    config: ModelConfig
    experts: str = "auto"

    @nn.compact
    def __call__(self, x_BTD: Array, real_BT: Array, forced_BTk: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """Returns out_BTD, own_BTk, counts_E and prob_sum_E (both summed over the tokens where real_BT).

        own_BTk is the router's own choice, also where others are replayed; counts_E counts the experts that ran.
        """
        config = self.config
        (B, T, D), E, F, k = x_BTD.shape, config.num_experts, config.moe_intermediate_size, config.experts_per_token
        init = nn.initializers.normal(config.initializer_range)
        router_DE = self.param("router", init, (D, E))
        gate_EDF, up_EDF, down_EFD = (self.param(name, init, shape).astype(x_BTD.dtype) for name, shape in
                                      (("gate", (E, D, F)), ("up", (E, D, F)), ("down", (E, F, D))))
        x_ND = x_BTD.reshape(B * T, D)
        logits_NE = jnp.matmul(x_ND.astype(jnp.float32), router_DE.astype(jnp.float32), precision="highest")
        ids_Nk, weights_Nk, probs_NE, own_Nk = route(logits_NE, config, None if forced_BTk is None else forced_BTk.reshape(B * T, k))
        if is_split() and not self.is_initializing():
            out_BTD = experts_on_mesh(x_BTD, gate_EDF, up_EDF, down_EFD, weights_Nk.reshape(B, T, k), ids_Nk.reshape(B, T, k), self.experts)
        else:
            out_BTD = experts(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk, self.experts).reshape(B, T, D)
        real_N = real_BT.reshape(-1).astype(jnp.float32)
        counts_E = jnp.einsum("Nke,N->e", jax.nn.one_hot(ids_Nk, E), real_N)
        prob_sum_E = jnp.einsum("Ne,N->e", probs_NE, real_N)
        return out_BTD, own_Nk.reshape(B, T, k), counts_E, prob_sum_E
