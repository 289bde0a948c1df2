"""Interaction-Perceptive Agentic Policy Optimization: Eq. 7-10 of "Let It Flow" (arXiv 2512.24873).

The unit of credit is the chunk c_k, one turn of the policy between two observations. Three policies
meet in every action token: the current one (logp), the trainer's at the weights that sampled the
token (logp_old), and the rollout engine's (logp_rollout).

    G_k   = gamma^(K-k) R                                               Eq. 7   return
    rho_k = exp(mean over c_k of logp - logp_old)                       Eq. 8   ratio: how far the policy moved since sampling
    m_k   = 1[exp(mean over c_k of logp_old - logp_rollout) <= H]               mask: drop what the engine sampled otherwise

    sum over T+ of  m_k G_k sum_t grad logp_t                           Eq. 9   successes (R > 0): plain, off-policy or not
  + sum over T- of  m_k [rho_k]_0^1 G_k sum_t grad logp_t                       failures: fading out as they become unlikely

    lambda_rl (Eq. 9 on RL chunks) + lambda_il (sum of G_k logp_t on imitation chunks)    Eq. 10

B rows, T tokens, C chunks a row. Every weight is a constant to the gradient, so d loss / d logp_t
is minus the weight of token t.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rome.data.batch import IMITATION, RL, Batch
from rome.losses.chunks import (
    at_tokens,
    exp_bounded,
    mean_per_chunk,
    policy_metrics,
    tokens_of_kind,
)
from rome.losses.types import Denominators, LossConfig, Metrics


def ipa_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Eq. 10, negated: this micro-batch's share of the step's loss."""
    log_ratio_BC = mean_per_chunk(logp_BT - batch.logp_old_BT, batch)  # log rho_k, Eq. 8
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.return_BC
    keep_BT = mismatch_mask(batch, config)
    rl_BT = tokens_of_kind(RL, batch)

    objective = weighted_sum(
        keep_BT * at_tokens(weight_BC, batch), logp_BT, rl_BT
    ) / rl_denominator(config, denominators)
    imitation, imitation_metrics = imitation_term(logp_BT, batch, denominators)
    metrics = policy_metrics(
        logp_BT,
        batch=batch,
        denominators=denominators,
        rl_BT=rl_BT,
        masked_BT=1.0 - keep_BT,
        ratio_BT=at_tokens(exp_bounded(log_ratio_BC), batch),
        clipped_BT=at_tokens((batch.sign_BC < 0) & (log_ratio_BC > 0), batch),
    )
    return (
        -(config.lambda_rl * objective + config.lambda_il * imitation),
        metrics | imitation_metrics,
    )


def chunk_returns(reward: float, num_chunks: int, gamma: float) -> np.ndarray:
    """Eq. 7: G_k = gamma^(K-k) R for k = 1..K; the last chunk gets R itself.

    Used on the host, when trajectories are packed.
    """
    return reward * np.power(float(gamma), np.arange(num_chunks - 1, -1, -1))


def topr_weight(log_ratio_BC: Array, sign_BC: Array) -> Array:
    """The split of Eq. 9: 1 in successes, the ratio clipped to [0, 1] in failures."""
    return jnp.where(sign_BC > 0, 1.0, jnp.exp(jnp.minimum(log_ratio_BC, 0.0)))


def mismatch_mask(batch: Batch, config: LossConfig) -> Array:
    """m: [B, T] float32. 0 where old / rollout is above H, for the whole chunk at once or for
    single tokens.
    """
    mismatch_BT = batch.logp_old_BT - batch.logp_rollout_BT
    if config.mismatch_mask == "chunk":
        mismatch_BT = at_tokens(mean_per_chunk(mismatch_BT, batch), batch)
    return (mismatch_BT <= math.log(config.mismatch_limit)).astype(
        jnp.float32
    )  # compared as logs: nothing can overflow


def imitation_term(
    logp_BT: Array, batch: Batch, denominators: Denominators
) -> tuple[Array, Metrics]:
    """The first term of Eq. 10, with pi(c*) read as a data weight: G-weighted log-likelihood of the
    expert's chunks, per token.
    """
    expert_BT = tokens_of_kind(IMITATION, batch)
    count = jnp.maximum(denominators.imitation_tokens, 1.0)
    logp = weighted_sum(jnp.ones_like(logp_BT), logp_BT, expert_BT) / count
    return weighted_sum(at_tokens(batch.return_BC, batch), logp_BT, expert_BT) / count, {
        "imitation_logp": logp
    }


def rl_denominator(config: LossConfig, denominators: Denominators) -> Array:
    """What divides the token sum: counts of the whole step, taken before m_k."""
    counts = {
        "tokens": denominators.rl_tokens,
        "chunks": denominators.rl_chunks,
        "trajectories": denominators.rl_trajectories,
    }
    return jnp.maximum(counts[config.norm], 1.0)  # a step without RL chunks has a sum of 0


def weighted_sum(weight_BT: Array, logp_BT: Array, mask_BT: Array) -> Array:
    """Sum of weight * logp where the mask is set; what lies elsewhere, even a NaN, touches neither
    value nor gradient.

    The weight is a constant: here, and only here, the gradient through ratios and masks is cut.
    """
    weight_BT = jax.lax.stop_gradient(jnp.where(mask_BT, weight_BT, 0.0))
    return jnp.sum(weight_BT * jnp.where(mask_BT, logp_BT, 0.0))
