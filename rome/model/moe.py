"""The mixture of experts: a float32 router over `rome.model.ops.experts`, its losses and metrics.

N tokens (flattened rows), B rows, T time, D model, E experts, k experts a token, F expert hidden, L
layers.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rome.model.config import ModelConfig
from rome.model.ops.experts import NO_EXPERT, WITHOUT_GRADIENT, experts_within
from rome.model.ops.experts_for_engine import experts_for_engine
from rome.model.ops.experts_on_mesh import experts_on_mesh
from rome.model.ops.low_rank import adapted, served_experts
from rome.model.ops.native import product_of_rows
from rome.model.ops.row_sums import softmax_of_rows
from rome.model.sharding import is_on_engine_mesh, is_split


class RouterStats(NamedTuple):
    """Sums over all tokens that are not padding, for each layer; they add up over micro-batches.

    A layer without experts has zeros.

    Attributes:
      counts_LE: how often each expert was chosen, k * tokens in a layer.
      prob_sum_LE: router probabilities, differentiable.
      z_L: squared log-partition functions, differentiable.
      entropy_L: entropy of the router's distribution, nats.
      dropped_L: choices beyond an expert's capacity.
      tokens: number of tokens.
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
    """Return the load balancing loss of transformers: E * sum_e f_e * P_e.

    f_e and P_e are averages over the tokens of all layers together. It is k, the least, when every
    expert gets the same share. Not yet multiplied by config.router_aux_loss_coef.

    Args:
      stats: sums of one micro-batch.
      config: the model.
      counts_LE: counts of the whole step; the micro-batches' losses then add up to the step's.
        None: `stats` are those of the whole step.
      tokens: tokens of the whole step, given with counts_LE.
    """
    if counts_LE is None or tokens is None:
        counts_LE = stats.counts_LE
        tokens = stats.tokens
    rows = jnp.maximum(tokens * len(config.sparse_layers), 1.0)
    share_E = jax.lax.stop_gradient(counts_LE.sum(axis=0)) / rows
    return config.num_experts * jnp.sum(share_E * stats.prob_sum_LE.sum(axis=0)) / rows


def router_z_loss(stats: RouterStats, config: ModelConfig, tokens: Array) -> Array:
    """Return the mean of log(sum_e exp(logit_e)) ** 2 (arXiv 2202.08906).

    Over all layers and the step's `tokens`. It keeps logits where float32 is exact.
    """
    return stats.z_L.sum() / jnp.maximum(tokens * len(config.sparse_layers), 1.0)


def router_metrics(stats: RouterStats, config: ModelConfig, tokens: Array) -> dict[str, Array]:
    """Return this micro-batch's share of the step's means; those of a step add up.

    Args:
      stats: sums of one micro-batch.
      config: the model.
      tokens: tokens of the whole step.

    Returns:
      `router_entropy` in nats, over tokens and layers; `router_dropped`, the share of the choices
      that were beyond an expert's capacity.
    """
    rows = jnp.maximum(tokens * len(config.sparse_layers), 1.0)
    return {
        "router_entropy": stats.entropy_L.sum() / rows,
        "router_dropped": stats.dropped_L.sum() / (rows * config.experts_per_token),
    }


def load_metrics(counts_LE: Array, config: ModelConfig) -> dict[str, Array]:
    """Return how evenly a whole step's choices are spread over experts, as means over layers.

    Args:
      counts_LE: how often each expert was chosen.
      config: the model.

    Returns:
      `router_load_max`: the busiest expert's load over the mean, 1 at best; `router_gini` of the
      loads: 0 if even, near 1 if one expert has them all.
    """
    E = config.num_experts
    counts_LE = counts_LE[np.array(config.sparse_layers)]
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    loads_LE = counts_LE / jnp.maximum(mean_L1, 1e-9)
    ranks_E = jnp.arange(1, E + 1)
    ranked_sum_L = jnp.sum(ranks_E * jnp.sort(loads_LE, axis=1), axis=1)
    gini_L = 2 * ranked_sum_L / E**2 - (E + 1) / E
    busiest_L = loads_LE.max(axis=1)
    return {"router_load_max": busiest_L.mean(), "router_gini": gini_L.mean()}


def route(
    logits_NE: Array,
    config: ModelConfig,
    forced_Nk: Array | None = None,
    by_row: bool = False,
) -> tuple[Array, Array, Array, Array]:
    """Choose experts for each token and weigh them.

    Args:
      logits_NE: float32.
      config: the model.
      forced_Nk: expert ids to replay. Their weights come from the same logits, so the router still
        learns. A token whose ids are negative has no recorded route and chooses for itself.
      by_row: sum each row in an order of its own, as an engine must (`rome.model.ops.row_sums`).

    Returns:
      ids_Nk int32, weights_Nk float32, probs_NE float32, and own_Nk int32: what the router would
      choose. It is ids_Nk where nothing is replayed.
    """
    softmax = softmax_of_rows if by_row else jax.nn.softmax
    probs_NE = softmax(logits_NE)
    _, own_Nk = jax.lax.top_k(jax.lax.stop_gradient(probs_NE), config.experts_per_token)
    ids_Nk = own_Nk if forced_Nk is None else jnp.where(forced_Nk[:, :1] < 0, own_Nk, forced_Nk)
    # an id out of range gives NaN, which cannot go unnoticed
    weights_Nk = jnp.take_along_axis(probs_NE, ids_Nk, axis=-1)
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
    def zeros(cls, E: int) -> LayerRouter:
        """Return the sums of a layer without experts."""
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
        """Run the experts.

        Args:
          x_BTD: normed hidden states.
          real_BT: False for padding, which no expert computes and no sum counts.
          forced_BTk: expert ids to replay, as for `route`.

        Returns:
          out_BTD; own_BTk, the router's own choice, also where others are replayed; and the
          router's sums, which count the experts that were asked for, dropped choices included.
        """
        config = self.config
        B, T, D = x_BTD.shape
        k = config.experts_per_token
        init = nn.initializers.normal(config.initializer_range)
        router_DE = self.param("router", init, (D, config.num_experts))
        weights = self._expert_weights(D, x_BTD.dtype)

        x_ND = x_BTD.reshape(B * T, D)
        logits_NE = product_of_rows(
            x_ND.astype(jnp.float32),
            router_DE.astype(jnp.float32),
            is_native=self.experts == "native" and not is_on_engine_mesh(),
        )
        forced_Nk = None if forced_BTk is None else forced_BTk.reshape(B * T, k)
        by_row = self.experts in WITHOUT_GRADIENT
        ids_Nk, weights_Nk, probs_NE, own_Nk = route(logits_NE, config, forced_Nk, by_row)
        real_N = real_BT.reshape(-1)
        chosen_Nk = jnp.where(real_N[:, None], ids_Nk, NO_EXPERT)

        served = served_experts(self)
        if is_split() and not self.is_initializing():
            out_BTD, ran_BTk = experts_on_mesh(
                x_BTD,
                *weights,
                weights_Nk.reshape(B, T, k),
                chosen_Nk.reshape(B, T, k),
                self.experts,
                config.capacity_factor,
                self.exchange,
            )
            ran_Nk = ran_BTk.reshape(B * T, k)
        elif served or is_on_engine_mesh():  # an engine has no capacity
            out_ND = experts_for_engine(x_ND, weights, weights_Nk, chosen_Nk, self.experts, served)
            out_BTD = out_ND.reshape(B, T, D)
            ran_Nk = chosen_Nk
        else:
            out_ND, ran_Nk = experts_within(
                x_ND, *weights, weights_Nk, chosen_Nk, self.experts, config.capacity_factor
            )
            out_BTD = out_ND.reshape(B, T, D)
        router = _layer_sums(logits_NE, probs_NE, chosen_Nk, ran_Nk, real_N)
        return out_BTD, own_Nk.reshape(B, T, k), router

    def _expert_weights(self, D: int, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
        E = self.config.num_experts
        F = self.config.moe_intermediate_size
        gate_EDF = self._matrices("gate", (E, D, F), dtype)
        up_EDF = self._matrices("up", (E, D, F), dtype)
        down_EFD = self._matrices("down", (E, F, D), dtype)
        return gate_EDF, up_EDF, down_EFD

    def _matrices(self, name: str, shape: tuple[int, int, int], dtype: jnp.dtype) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        return adapted(self, name, self.param(name, init, shape), dtype)


def _layer_sums(
    logits_NE: Array, probs_NE: Array, chosen_Nk: Array, ran_Nk: Array, real_N: Array
) -> LayerRouter:
    """Sum what RouterStats counts over the tokens that are not padding."""

    def over_real(values_N: Array) -> Array:
        return jnp.sum(jnp.where(real_N, values_N, 0.0))

    E = probs_NE.shape[1]
    counts_E = jnp.sum(jax.nn.one_hot(chosen_Nk, E), axis=(0, 1))
    prob_sum_E = jnp.einsum("NE,N->E", probs_NE, real_N.astype(jnp.float32))
    z = over_real(jax.nn.logsumexp(logits_NE, axis=-1) ** 2)
    entropy_N = -jnp.sum(probs_NE * jnp.log(probs_NE + 1e-30), axis=-1)
    entropy = jax.lax.stop_gradient(over_real(entropy_N))
    dropped = over_real(jnp.sum(ran_Nk == NO_EXPERT, axis=-1))
    return LayerRouter(counts_E, prob_sum_E, z, entropy, dropped)
