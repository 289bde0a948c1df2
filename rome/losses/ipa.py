"""Interaction-Perceptive Agentic Policy Optimization, Eq. 7-10 of "Let It Flow" (arXiv 2512.24873).

The unit of credit is the chunk c_k, one turn of the policy between two observations. Three policies
meet in every action token: the current one (logp), the trainer's at the weights that sampled the
token (logp_old), and the rollout engine's (logp_rollout).

Eq. 7, return: G_k = gamma^(K-k) R (`rome.data.advantages.chunk_returns`).

Eq. 8, ratio: rho_k = exp(mean over c_k of logp - logp_old). How far the policy moved since it
sampled the chunk.

Mask: m_k = 1[exp(mean over c_k of logp_old - logp_rollout) <= H]. Drops chunks for which engine and
trainer disagree.

Eq. 9, gradient, over the chunks of successful (T+, R > 0) and of failed (T-) trajectories:

    sum over T+ of  m_k             G_k  sum_t grad logp_t
  + sum over T- of  m_k  [rho_k]_0^1  G_k  sum_t grad logp_t

Successes count in full however old the sample is; failures fade out as they become unlikely.

Eq. 10: lambda_rl (Eq. 9 on RL chunks) + lambda_il (sum of G_k logp_t on imitation chunks). Both
sums are divided by one count, the step's trained tokens, so that a token of a demonstration weighs
as much as one of an equally discounted success, however few demonstrations there are.

B rows, T tokens, C chunks a row. Every weight is a constant to the gradient, so d loss / d logp_t
is minus the weight of token t.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
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
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return the negated objective of Eq. 10: this micro-batch's share of the step's loss.

    Args:
      logp_BT: float32 logprobs at the current weights; only action tokens are read.
      batch: the micro-batch, logp_old_BT filled in.
      config: reads norm, mismatch_mask, mismatch_limit, lambda_rl and lambda_il.
      denominators: counts of the whole step.

    Returns:
      The loss, and metrics that add up over micro-batches (`max_*` combine by maximum).
    """
    log_ratio_BC = mean_per_chunk(logp_BT - batch.logp_old_BT, batch)  # log rho_k, Eq. 8
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.return_BC
    keep_BT = mismatch_mask(batch, config)
    rl_BT = tokens_of_kind(RL, batch)

    weight_BT = keep_BT * at_tokens(weight_BC, batch)
    total = weighted_sum(weight_BT, logp_BT, rl_BT)
    count = shared_denominator(config, denominators)
    objective = total / count
    imitation, imitation_metrics = imitation_term(logp_BT, batch, count, denominators)
    metrics = policy_metrics(
        logp_BT,
        batch=batch,
        denominators=denominators,
        rl_BT=rl_BT,
        masked_BT=1.0 - keep_BT,
        ratio_BT=at_tokens(exp_bounded(log_ratio_BC), batch),
        clipped_BT=at_tokens((batch.sign_BC < 0) & (log_ratio_BC > 0), batch),
    )
    loss = -(config.lambda_rl * objective + config.lambda_il * imitation)
    return loss, metrics | imitation_metrics


def topr_weight(log_ratio_BC: Array, sign_BC: Array) -> Array:
    """Return the weights of Eq. 9: 1 for successes, the ratio clipped to [0, 1] for failures."""
    return jnp.where(sign_BC > 0, 1.0, jnp.exp(jnp.minimum(log_ratio_BC, 0.0)))


def mismatch_mask(batch: Batch[Array], config: LossConfig) -> Array:
    """Return m of Eq. 9, [B, T] float32: 0 where old / rollout is above H.

    The ratio is a chunk's geometric mean or a single token's, as config.mismatch_mask says.
    """
    mismatch_BT = batch.logp_old_BT - batch.logp_rollout_BT
    if config.mismatch_mask == "chunk":
        mismatch_BT = at_tokens(mean_per_chunk(mismatch_BT, batch), batch)
    kept_BT = mismatch_BT <= math.log(config.mismatch_limit)  # as logs: nothing can overflow
    return kept_BT.astype(jnp.float32)


def imitation_term(
    logp_BT: Array, batch: Batch[Array], count: Array, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return the imitation term of Eq. 10: the return-weighted logprobs of imitation tokens.

    pi(c*) of the paper is read as a data weight.

    Args:
      logp_BT: logprobs at the current weights.
      batch: the micro-batch.
      count: that the sum is divided by.
      denominators: counts of the whole step.
    """
    imitated_BT = tokens_of_kind(IMITATION, batch)
    return_BT = at_tokens(batch.return_BC, batch)
    term = weighted_sum(return_BT, logp_BT, imitated_BT) / count
    logp = weighted_sum(jnp.ones_like(logp_BT), logp_BT, imitated_BT)
    imitation_tokens = denominators.trained_tokens - denominators.rl_tokens
    return term, {"imitation_logp": logp / jnp.maximum(imitation_tokens, 1.0)}


def shared_denominator(config: LossConfig, denominators: Denominators) -> Array:
    """Return what config.norm divides both terms of Eq. 10 by: a count of the step, before m_k."""
    counts = {
        "tokens": denominators.trained_tokens,
        "chunks": denominators.trained_chunks,
        "trajectories": denominators.trained_trajectories,
    }
    return jnp.maximum(counts[config.norm], 1.0)  # a step without trained chunks has a sum of 0


def weighted_sum(weight_BT: Array, logp_BT: Array, mask_BT: Array) -> Array:
    """Sum weight * logp over the mask, with the weight a constant to the gradient.

    Values outside the mask, even NaN, touch neither value nor gradient. This is the only place that
    cuts the gradient through ratios and masks.
    """
    weight_BT = jax.lax.stop_gradient(jnp.where(mask_BT, weight_BT, 0.0))
    return jnp.sum(weight_BT * jnp.where(mask_BT, logp_BT, 0.0))
