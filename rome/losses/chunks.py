"""Sums and means over chunks and trajectories of packed rows, and the diagnostics that all policy
losses share.

B rows, T tokens, C chunks a row. Masked sums instead of scatters: they fuse, they shard over B, and
padding cannot leak.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.data.batch import Batch
from rome.losses.types import Denominators, Metrics

# exp(20) = 5e8: beyond every ratio that means something, far below float32's overflow
MAX_LOG_RATIO = 20.0


def sum_per_chunk(values_BT: Array, batch: Batch) -> Array:
    """[B, C]; tokens outside chunks are not read."""
    belongs_BCT = batch.chunk_ids_BT[:, None, :] == jnp.arange(batch.valid_BC.shape[1])[:, None]
    return jnp.sum(jnp.where(belongs_BCT, values_BT[:, None, :], 0.0), axis=-1)


def tokens_per_chunk(batch: Batch) -> Array:
    return sum_per_chunk(jnp.ones(batch.chunk_ids_BT.shape, jnp.float32), batch)


def mean_per_chunk(values_BT: Array, batch: Batch) -> Array:
    return sum_per_chunk(values_BT, batch) / jnp.maximum(tokens_per_chunk(batch), 1.0)


def sum_per_trajectory(values_BC: Array, batch: Batch) -> Array:
    """[B, C]: at each chunk the sum over the chunks of its trajectory."""
    same_BCC = batch.trajectory_BC[:, :, None] == batch.trajectory_BC[:, None, :]
    return jnp.sum(jnp.where(same_BCC, values_BC[:, None, :], 0.0), axis=-1)


def at_tokens(values_BC: Array, batch: Batch) -> Array:
    """[B, T]: at each action token the value of its chunk, 0 elsewhere."""
    values_BT = jnp.take_along_axis(values_BC, jnp.maximum(batch.chunk_ids_BT, 0), axis=1)
    return jnp.where(batch.chunk_ids_BT >= 0, values_BT, jnp.zeros_like(values_BT))


def tokens_of_kind(kind: int, batch: Batch) -> Array:
    """[B, T] bool: action tokens whose chunk is of this kind (RL, IMITATION or CONTEXT)."""
    return at_tokens(batch.valid_BC & (batch.kind_BC == kind), batch)


def exp_bounded(log_ratio: Array) -> Array:
    """exp that stays finite, and so does its gradient, whatever two policies disagree about."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def policy_metrics(
    logp_BT: Array,
    ratio_BT: Array,
    clipped_BT: Array,
    masked_BT: Array,
    rl_BT: Array,
    batch: Batch,
    denominators: Denominators,
) -> Metrics:
    """Token means over the step's RL tokens.

    Three policies: current, old (`logp_old`), rollout (the engine's).

    `mismatch_weight`, `mismatch_weight2` are moments of old / rollout; weight ** 2 / weight2 is the
    effective sample size's share.
    """

    def mean(values_BT: Array) -> Array:
        return jnp.sum(jnp.where(rl_BT, values_BT, 0.0)) / jnp.maximum(denominators.rl_tokens, 1.0)

    drift_BT = logp_BT - batch.logp_old_BT
    mismatch_BT = batch.logp_old_BT - batch.logp_rollout_BT
    weight_BT = exp_bounded(mismatch_BT)
    return {
        "logp": mean(logp_BT),
        "ratio": mean(ratio_BT),  # as the loss defines it, before clipping
        "clipped": mean(clipped_BT),  # share of tokens whose ratio the loss clips
        "masked": mean(masked_BT),  # share of tokens dropped for mismatch
        "kl_old": mean(exp_bounded(drift_BT) - drift_BT - 1.0),  # k3 of KL(old || current)
        "mismatch": mean(mismatch_BT),
        "mismatch_kl": mean(weight_BT - mismatch_BT - 1.0),  # k3 of KL(rollout || old)
        "mismatch_weight": mean(weight_BT),
        "mismatch_weight2": mean(exp_bounded(2.0 * mismatch_BT)),
        "max_mismatch": jnp.max(jnp.where(rl_BT, jnp.abs(mismatch_BT), 0.0)),
    }
