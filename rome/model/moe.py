"""The mixture of experts: a float32 router over the experts of `rome.model.ops.experts`, and the
losses and figures of the router.

N tokens (flattened rows), D model, E experts, k experts a token, F expert hidden, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rome.model.config import ModelConfig
from rome.model.ops.experts import NO_EXPERT, experts_within
from rome.model.ops.experts_on_mesh import experts_on_mesh
from rome.model.sharding import is_split


class RouterStats(NamedTuple):
    """Sums over the tokens that are not padding, so that they add up over micro-batches; a layer
    without experts has zeros.

    counts_LE: how often each expert was chosen, k * tokens in a layer. prob_sum_LE, z_L: router
    probabilities and squared log-partition functions, differentiable. entropy_L: of the router's
    distribution, nats. dropped_L: choices beyond an expert's capacity.
    """

    counts_LE: Array
    prob_sum_LE: Array
    z_L: Array
    entropy_L: Array
    dropped_L: Array
    tokens: Array


def router_loss(
    stats: RouterStats,
    config: ModelConfig,
    counts_LE: Array | None = None,
    tokens: Array | None = None,
) -> Array:
    """Load balancing as transformers computes it: E * sum_e f_e * P_e, both averaged over the
    tokens of all layers together.

    k when every expert gets the same share, which is the least. Not yet multiplied by
    config.router_aux_loss_coef.

    Args:
      counts_LE, tokens: of the whole step where `stats` are those of one micro-batch; the
        micro-batches' losses then add up to the step's.
    """
    counts_LE, tokens = (
        (stats.counts_LE, stats.tokens) if counts_LE is None else (counts_LE, tokens)
    )
    rows = jnp.maximum(tokens * len(config.sparse_layers), 1.0)
    share_E = jax.lax.stop_gradient(counts_LE.sum(axis=0)) / rows
    return config.num_experts * jnp.sum(share_E * stats.prob_sum_LE.sum(axis=0)) / rows


def router_z_loss(stats: RouterStats, config: ModelConfig, tokens: Array) -> Array:
    """Mean over the step's `tokens` and all layers of log(sum_e exp(logit_e)) ** 2 (arXiv
    2202.08906): logits stay where float32 is exact.
    """
    return stats.z_L.sum() / jnp.maximum(tokens * len(config.sparse_layers), 1.0)


def router_figures(stats: RouterStats, config: ModelConfig, tokens: Array) -> dict[str, Array]:
    """This micro-batch's share of the step's means, so that those of a step add up.

    `router_entropy` in nats, over tokens and layers. `router_dropped`: share of the choices that
    were beyond an expert's capacity.
    """
    rows = jnp.maximum(tokens * len(config.sparse_layers), 1.0)
    return {
        "router_entropy": stats.entropy_L.sum() / rows,
        "router_dropped": stats.dropped_L.sum() / (rows * config.experts_per_token),
    }


def load_figures(counts_LE: Array, config: ModelConfig) -> dict[str, Array]:
    """How evenly a whole step's choices lie, as means over layers.

    `router_load_max`: the busiest expert's load over the mean, 1 at best. `router_gini` of the
    loads: 0 even, near 1 all on one.
    """
    counts_LE = counts_LE[np.array(config.sparse_layers)]
    loads_LE = counts_LE / jnp.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-9)
    E = config.num_experts
    gini_L = (
        2 * jnp.sum(jnp.arange(1, E + 1) * jnp.sort(loads_LE, axis=1), axis=1) / E**2 - (E + 1) / E
    )
    return {"router_load_max": loads_LE.max(axis=1).mean(), "router_gini": gini_L.mean()}


def route(
    logits_NE: Array, config: ModelConfig, forced_Nk: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Chooses experts and weighs them.

    Args:
      logits_NE: float32.
      forced_Nk: expert ids to replay. Their weights come from the same logits, so the router still
        learns. A token whose ids are negative has no recorded route and chooses for itself.
    Returns:
      ids_Nk int32, weights_Nk float32, probs_NE float32, and own_Nk int32: what the router would
      choose. It is ids_Nk where nothing is replayed.
    """
    probs_NE = jax.nn.softmax(logits_NE, axis=-1)
    _, own_Nk = jax.lax.top_k(jax.lax.stop_gradient(probs_NE), config.experts_per_token)
    ids_Nk = own_Nk if forced_Nk is None else jnp.where(forced_Nk[:, :1] < 0, own_Nk, forced_Nk)
    weights_Nk = jnp.take_along_axis(
        probs_NE, ids_Nk, axis=-1
    )  # an id out of range gives NaN: loud
    if config.norm_topk_prob:
        weights_Nk = weights_Nk / weights_Nk.sum(axis=-1, keepdims=True)
    return ids_Nk.astype(jnp.int32), weights_Nk, probs_NE, own_Nk.astype(jnp.int32)


class LayerRouter(NamedTuple):
    """RouterStats of one layer, without the tokens."""

    counts_E: Array
    prob_sum_E: Array
    z: Array
    entropy: Array
    dropped: Array

    @classmethod
    def nothing(cls, E: int) -> LayerRouter:
        return cls(jnp.zeros(E), jnp.zeros(E), jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))


class MoE(nn.Module):
    """Router and experts of one block."""

    config: ModelConfig
    experts: str = "auto"
    exchange: str = "ring"

    @nn.compact
    def __call__(
        self, x_BTD: Array, real_BT: Array, forced_BTk: Array | None = None
    ) -> tuple[Array, Array, LayerRouter]:
        """Returns out_BTD, own_BTk and the router's sums over the tokens where real_BT. Padding is
        given to no expert.

        own_BTk is the router's own choice, also where others are replayed; the sums count the
        experts that were asked for, dropped choices included.
        """
        config = self.config
        (B, T, D), E, F, k = (
            x_BTD.shape,
            config.num_experts,
            config.moe_intermediate_size,
            config.experts_per_token,
        )
        init = nn.initializers.normal(config.initializer_range)
        router_DE = self.param("router", init, (D, E))
        weights = tuple(
            self.param(name, init, shape).astype(x_BTD.dtype)
            for name, shape in (("gate", (E, D, F)), ("up", (E, D, F)), ("down", (E, F, D)))
        )
        x_ND = x_BTD.reshape(B * T, D)
        logits_NE = jnp.matmul(
            x_ND.astype(jnp.float32), router_DE.astype(jnp.float32), precision="highest"
        )
        ids_Nk, weights_Nk, probs_NE, own_Nk = route(
            logits_NE, config, None if forced_BTk is None else forced_BTk.reshape(B * T, k)
        )
        real_N = real_BT.reshape(-1)
        chosen_Nk = jnp.where(real_N[:, None], ids_Nk, NO_EXPERT)
        if is_split() and not self.is_initializing():
            in_rows = lambda a_Nk: a_Nk.reshape(B, T, k)
            out_BTD, ran_BTk = experts_on_mesh(
                x_BTD,
                *weights,
                in_rows(weights_Nk),
                in_rows(chosen_Nk),
                self.experts,
                config.capacity_factor,
                self.exchange,
            )
            ran_Nk = ran_BTk.reshape(B * T, k)
        else:
            out_ND, ran_Nk = experts_within(
                x_ND, *weights, weights_Nk, chosen_Nk, self.experts, config.capacity_factor
            )
            out_BTD = out_ND.reshape(B, T, D)
        over_real = lambda values_N: jnp.sum(jnp.where(real_N, values_N, 0.0))
        router = LayerRouter(
            jnp.sum(jax.nn.one_hot(chosen_Nk, E), axis=(0, 1)),
            jnp.einsum("NE,N->E", probs_NE, real_N.astype(jnp.float32)),
            over_real(jax.nn.logsumexp(logits_NE, axis=-1) ** 2),
            jax.lax.stop_gradient(
                over_real(-jnp.sum(probs_NE * jnp.log(probs_NE + 1e-30), axis=-1))
            ),
            over_real(jnp.sum(ran_Nk == NO_EXPERT, axis=-1)),
        )
        return out_BTD, own_Nk.reshape(B, T, k), router
