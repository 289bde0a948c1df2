"""Sums and means over the chunks and trajectories of packed rows, and the shared policy metrics.

Of an episode with branches, each line is a trajectory here.

B rows, T tokens, C chunks a row. Masked sums instead of scatters: they fuse, they shard over B, and
padding cannot leak.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from rome.data.batch import CONTEXT, RL, Batch
from rome.losses.types import Denominators, Metrics

# exp(20) = 5e8: beyond every ratio that means something, far below float32's overflow
MAX_LOG_RATIO = 20.0


def sum_per_chunk(values_BT: Array, batch: Batch[Array]) -> Array:
    """Sum values over the tokens of each chunk, [B, C]. Values outside chunks are not read."""
    chunks_C1 = jnp.arange(batch.valid_BC.shape[1])[:, None]
    belongs_BCT = batch.chunk_ids_BT[:, None, :] == chunks_C1
    return jnp.sum(jnp.where(belongs_BCT, values_BT[:, None, :], 0.0), axis=-1)


def tokens_per_chunk(batch: Batch[Array]) -> Array:
    """Count the action tokens of each chunk, [B, C] float32."""
    return sum_per_chunk(jnp.ones(batch.chunk_ids_BT.shape, jnp.float32), batch)


def mean_per_chunk(values_BT: Array, batch: Batch[Array]) -> Array:
    """Average values over the tokens of each chunk, [B, C]; 0 for an empty chunk."""
    return sum_per_chunk(values_BT, batch) / jnp.maximum(tokens_per_chunk(batch), 1.0)


def sum_per_trajectory(values_BC: Array, batch: Batch[Array]) -> Array:
    """Sum values over the chunks of each trajectory, [B, C]: at each chunk its trajectory's sum."""
    same_BCC = batch.trajectory_BC[:, :, None] == batch.trajectory_BC[:, None, :]
    return jnp.sum(jnp.where(same_BCC, values_BC[:, None, :], 0.0), axis=-1)


def share_of_episode(values_BC: Array, batch: Batch[Array]) -> Array:
    """Divide values of lines by the number of lines of their episode, [B, C].

    So that the sum over the lines of an episode is a mean over them.
    """
    if batch.lines_BC is None:
        return values_BC
    return values_BC / jnp.maximum(batch.lines_BC, 1.0)


def at_tokens(values_BC: Array, batch: Batch[Array]) -> Array:
    """Spread each chunk's value over its action tokens, [B, T]; 0 for all other tokens."""
    values_BT = jnp.take_along_axis(values_BC, jnp.maximum(batch.chunk_ids_BT, 0), axis=1)
    return jnp.where(batch.chunk_ids_BT >= 0, values_BT, jnp.zeros_like(values_BT))


def tokens_of_kind(kind: int, batch: Batch[Array]) -> Array:
    """Return which tokens are actions of a chunk of this kind, [B, T] bool.

    Args:
      kind: RL, IMITATION or CONTEXT of `rome.data.batch`.
      batch: the micro-batch.
    """
    return at_tokens(batch.valid_BC & (batch.kind_BC == kind), batch)


def exp_bounded(log_ratio: Array) -> Array:
    """Return exp(log_ratio), clipped so that value and gradient stay finite for any input."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def policy_metrics(
    logp_BT: Array,
    ratio_BT: Array,
    clipped_BT: Array,
    masked_BT: Array,
    rl_BT: Array,
    batch: Batch[Array],
    denominators: Denominators,
) -> Metrics:
    """Average what all policy losses report over the step's RL tokens.

    Three policies: current (logp_BT), old (`logp_old`), rollout (`logp_rollout`, the engine's).
    `mismatch_weight` and `mismatch_weight2` are moments of w = old / rollout; the effective sample
    size is the share mismatch_weight ** 2 / mismatch_weight2 of the tokens.

    Args:
      logp_BT: logprobs at the current weights.
      ratio_BT: ratio of current to old as the loss defines it, before clipping.
      clipped_BT: 1 where the loss clips the ratio.
      masked_BT: 1 where the loss drops the token for mismatch.
      rl_BT: action tokens of RL chunks.
      batch: the micro-batch.
      denominators: counts of the whole step.
    """

    def mean(values_BT: Array) -> Array:
        return jnp.sum(jnp.where(rl_BT, values_BT, 0.0)) / jnp.maximum(denominators.rl_tokens, 1.0)

    drift_BT = logp_BT - batch.logp_old_BT
    mismatch_BT = batch.logp_old_BT - batch.logp_rollout_BT
    weight_BT = exp_bounded(mismatch_BT)
    return {
        "logp": mean(logp_BT),
        "ratio": mean(ratio_BT),
        "clipped": mean(clipped_BT),
        "masked": mean(masked_BT),
        "kl_old": mean(exp_bounded(drift_BT) - drift_BT - 1.0),  # k3 of KL(old || current)
        "mismatch": mean(mismatch_BT),
        "mismatch_kl": mean(weight_BT - mismatch_BT - 1.0),  # k3 of KL(rollout || old)
        "mismatch_weight": mean(weight_BT),
        "mismatch_weight2": mean(exp_bounded(2.0 * mismatch_BT)),
        "max_mismatch": jnp.max(jnp.where(rl_BT, jnp.abs(mismatch_BT), 0.0)),
    }


def policy_entropy(entropy_BT: Array, batch: Batch[Array], denominators: Denominators) -> Array:
    """Return this micro-batch's share of the mean entropy of the policy, in nats a token.

    The mean is over the step's RL tokens: what the policy sampled itself. Where a step has none,
    as in SFT, it is over all tokens that are trained.

    Args:
      entropy_BT: of the distribution that each token was drawn from.
      batch: the micro-batch.
      denominators: counts of the whole step.
    """
    has_rl = denominators.rl_tokens > 0
    is_rl_BC = batch.kind_BC == RL
    is_counted_BC = jnp.where(has_rl, is_rl_BC, batch.kind_BC != CONTEXT)
    counted_BT = at_tokens(batch.valid_BC & is_counted_BC, batch)
    count = jnp.where(has_rl, denominators.rl_tokens, denominators.trained_tokens)
    return jnp.sum(jnp.where(counted_BT, entropy_BT, 0.0)) / jnp.maximum(count, 1.0)
