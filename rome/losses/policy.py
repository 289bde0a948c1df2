"""The policy losses that IPA is compared with: the paper's token-level baseline and GRPO.

B rows, T tokens, C chunks a row. Chunks only matter here as the pieces of a trajectory. Imitation chunks (Eq. 10) are learned as in IPA.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from rome.data.batch import RL, Batch
from rome.losses.chunks import at_tokens, exp_bounded, policy_metrics, sum_per_chunk, sum_per_trajectory, tokens_of_kind
from rome.losses.ipa import imitation_term, mismatch_mask, rl_denominator, topr_weight, weighted_sum
from rome.losses.types import Denominators, LossConfig, Metrics


def token_level_loss(logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators) -> tuple[Array, Metrics]:
    """Eq. 4-6: the split of TOPR with one ratio and one reward a trajectory, undiscounted, and a mask for each token."""
    rl_BT = tokens_of_kind(RL, batch)
    drift_BT = jnp.where(rl_BT, logp_BT - batch.logp_old_BT, 0.0)
    log_ratio_BC = sum_per_trajectory(sum_per_chunk(drift_BT, batch), batch) / _rl_tokens_per_trajectory(rl_BT, batch)
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.reward_BC
    keep_BT = mismatch_mask(batch, dataclasses.replace(config, mismatch_mask="token"))

    objective = weighted_sum(keep_BT * at_tokens(weight_BC, batch), logp_BT, rl_BT) / rl_denominator(config, denominators)
    imitation, imitation_metrics = imitation_term(logp_BT, batch, denominators)
    metrics = policy_metrics(
        logp_BT, batch=batch, denominators=denominators, rl_BT=rl_BT, masked_BT=1.0 - keep_BT,
        ratio_BT=at_tokens(exp_bounded(log_ratio_BC), batch),
        clipped_BT=at_tokens((batch.sign_BC < 0) & (log_ratio_BC > 0), batch),
    )
    return -(config.lambda_rl * objective + config.lambda_il * imitation), metrics | imitation_metrics


def grpo_loss(logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators) -> tuple[Array, Metrics]:
    """GRPO: clipped token ratios times the group advantage; a mean over each trajectory's tokens, then over trajectories."""
    rl_BT = tokens_of_kind(RL, batch)
    advantage_BT = at_tokens(batch.advantage_BC, batch)
    ratio_BT = exp_bounded(jnp.where(rl_BT, logp_BT - batch.logp_old_BT, 0.0))
    clipped_ratio_BT = jnp.clip(ratio_BT, 1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate_BT = jnp.minimum(ratio_BT * advantage_BT, clipped_ratio_BT * advantage_BT)

    share_BT = at_tokens(1.0 / _rl_tokens_per_trajectory(rl_BT, batch), batch)
    objective = weighted_sum(share_BT, surrogate_BT, rl_BT) / jnp.maximum(denominators.rl_trajectories, 1.0)
    imitation, imitation_metrics = imitation_term(logp_BT, batch, denominators)
    metrics = policy_metrics(
        logp_BT, batch=batch, denominators=denominators, rl_BT=rl_BT, masked_BT=jnp.zeros_like(ratio_BT),
        ratio_BT=ratio_BT,
        clipped_BT=clipped_ratio_BT * advantage_BT < ratio_BT * advantage_BT,
    )
    return -(config.lambda_rl * objective + config.lambda_il * imitation), metrics | imitation_metrics


def _rl_tokens_per_trajectory(rl_BT: Array, batch: Batch) -> Array:
    """[B, C] at least 1, at each chunk of the trajectory."""
    return jnp.maximum(sum_per_trajectory(sum_per_chunk(rl_BT.astype(jnp.float32), batch), batch), 1.0)
