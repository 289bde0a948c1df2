"""The policy losses that IPA is compared with, each in the form of its paper.

r = pi / pi_old of a token, rho = pi_old / mu (the trainer against the engine at the same weights),
A = advantage (`rome.data.advantages`), R = reward, y a trajectory with n RL tokens, e the clip
range. Sums and means run over the whole step: over trajectories, or over tokens where a line says
so. Every loss is minus the objective:

    token_level  Eq. 4-6 of "Let It Flow": TOPR's split with exp(mean log r), one mask a token
    grpo         mean_y 1/n sum_t min(r A, clip(r) A)                   arXiv 2402.03300, Eq. 3
    dr_grpo      mean_y 1/M sum_t min(r A, clip(r) A), M constant       arXiv 2503.20783, Sec. 3.2
    dapo         token mean of min(r A, clip(r, 1-e_low, 1+e_high) A)   arXiv 2503.14476, Eq. 8-12
    gspo         mean_y min(s A, clip(s) A), s = exp(1/n sum_t log r)   arXiv 2507.18071, Eq. 5, 7
    gigpo        turn mean of token mean of min(r A, clip(r) A)         arXiv 2505.10978, A: Eq. 8
    tis          grpo, each token times min(rho, C)                     Yao et al. 2025 [1]
    icepop       grpo, each token times rho where a <= rho <= b, else 0 Ling team 2025 [2]
    rloo         mean_y A sum_t log pi                                  arXiv 2402.14740
    cispo        token mean of sg(clip(r)) A log pi                     arXiv 2506.13585, Eq. 4-5
    topr         mean_y R sum_t log pi, failures times                  arXiv 2503.14286, Eq. 8
                 sg([prod_t pi / mu]_0^1)

[1] "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
[2] "Small Leak Can Sink a Great Ship".

Not here: GRPO's KL term; DAPO's dynamic sampling (the scheduler keeps and replaces groups) and
overlong penalty (the verifier rewards). dual_clip c bounds min(r A, clip(r) A) below by c A where
A < 0 (arXiv 1912.09729): without it the ratio of a failure has no upper bound, which asynchronous
training cannot afford.

Of an episode with branches, y is one line with the tokens that are trained there. A mean over y of
a sum over t is then the sum over all lines, divided by the number of episodes; where the sum is a
mean itself (1/n), it is the mean over the lines of each episode, and over episodes.

B rows, T tokens, C chunks a row. A turn is a chunk. None of these papers imitates: their default
lambda_il is 0. With one above 0 a loss is a hybrid of its own: its objective keeps its denominator,
and the imitation term of Eq. 10, divided by the step's trained tokens, is added.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from rome.data.batch import RL, Batch
from rome.losses.chunks import (
    at_tokens,
    exp_bounded,
    policy_metrics,
    share_of_episode,
    sum_per_chunk,
    sum_per_trajectory,
    tokens_of_kind,
    tokens_per_chunk,
)
from rome.losses.ipa import (
    imitation_term,
    mismatch_mask,
    shared_denominator,
    topr_weight,
    weighted_sum,
)
from rome.losses.types import Denominators, LossConfig, Metrics


def token_level_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return the paper's token-level baseline: TOPR's split without chunks (Eq. 4-6).

    One ratio and one undiscounted reward a trajectory, and a mask for each token.
    """
    rl_BT = tokens_of_kind(RL, batch)
    total_log_ratio_BC = _trajectory_sum(_log_ratio(logp_BT, batch, rl_BT), batch)
    log_ratio_BC = total_log_ratio_BC / _rl_tokens_per_trajectory(rl_BT, batch)
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.reward_BC
    keep_BT = mismatch_mask(batch, dataclasses.replace(config, mismatch_mask="token"))

    total = weighted_sum(keep_BT * at_tokens(weight_BC, batch), logp_BT, rl_BT)
    count = shared_denominator(config, denominators)
    return _finish(
        total / count,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        imitation_count=count,
        masked_BT=1.0 - keep_BT,
        ratio_BT=at_tokens(exp_bounded(log_ratio_BC), batch),
        clipped_BT=at_tokens((batch.sign_BC < 0) & (log_ratio_BC > 0), batch),
    )


def grpo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return GRPO's loss: clipped token ratios times the group advantage.

    A mean over each trajectory's tokens, then over trajectories.
    """
    return _clipped_loss(logp_BT, batch, config, denominators, per_trajectory=True)


def dr_grpo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return the loss of Dr. GRPO: GRPO with token sums divided by a constant.

    So the length of a trajectory does not weaken its tokens. Needs "centred" advantages.
    """
    count = jnp.maximum(denominators.rl_trajectories, 1.0) * config.token_constant
    return _clipped_loss(logp_BT, batch, config, denominators, count=count)


def dapo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return DAPO's loss: a wider clip upwards, and every token of the step counts the same.

    The paper divides by the tokens of a group and averages over groups; this divides by the tokens
    of the step, as the paper's code does.
    """
    count = jnp.maximum(denominators.rl_tokens, 1.0)
    return _clipped_loss(logp_BT, batch, config, denominators, count=count)


def tis_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return GRPO's loss with truncated importance sampling: tokens weighted by min(rho, C).

    Corrects for the engine's sampling distribution where it differs from the trainer's.
    """
    rho_BT = exp_bounded(batch.logp_old_BT - batch.logp_rollout_BT)
    return _clipped_loss(
        logp_BT,
        batch,
        config,
        denominators,
        per_trajectory=True,
        weight_BT=jnp.minimum(rho_BT, config.mismatch_limit),
    )


def icepop_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return IcePop's loss: as TIS, but tokens with rho outside [alpha, beta] are dropped."""
    rho_BT = exp_bounded(batch.logp_old_BT - batch.logp_rollout_BT)
    kept_BT = (rho_BT >= config.mismatch_low) & (rho_BT <= config.mismatch_limit)
    return _clipped_loss(
        logp_BT,
        batch,
        config,
        denominators,
        per_trajectory=True,
        weight_BT=jnp.where(kept_BT, rho_BT, 0.0),
        masked_BT=1.0 - kept_BT,
    )


def gigpo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return GiGPO's loss: each turn is a sample with its own advantage.

    A mean over the turn's tokens, then over the turns of the step. Needs "steps" advantages.
    """
    weight_BT = at_tokens(1.0 / jnp.maximum(tokens_per_chunk(batch), 1.0), batch)
    return _clipped_loss(
        logp_BT,
        batch,
        config,
        denominators,
        weight_BT=weight_BT,
        count=jnp.maximum(denominators.rl_chunks, 1.0),
    )


def gspo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return GSPO's loss: one clipped ratio a trajectory, the geometric mean of its tokens'.

    The gradient goes through the ratio.
    """
    rl_BT = tokens_of_kind(RL, batch)
    tokens_BC = _rl_tokens_per_trajectory(rl_BT, batch)
    ratio_BC = exp_bounded(_trajectory_sum(_log_ratio(logp_BT, batch, rl_BT), batch) / tokens_BC)
    # Every chunk carries its trajectory's advantage, whatever kinds of chunk the row has.
    surrogate_BC, clipped_BC = _clipped_surrogate(ratio_BC, batch.advantage_BC, config)

    # The surrogate stands at each of the trajectory's n tokens: 1/n of each adds up to it once.
    share_BT = at_tokens(share_of_episode(1.0 / tokens_BC, batch), batch)
    total = weighted_sum(share_BT, at_tokens(surrogate_BC, batch), rl_BT)
    objective = total / jnp.maximum(denominators.rl_trajectories, 1.0)
    return _finish(
        objective,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        ratio_BT=at_tokens(ratio_BC, batch),
        clipped_BT=at_tokens(clipped_BC, batch),
    )


def rloo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return RLOO's loss: REINFORCE on whole trajectories.

    No ratio corrects for the age of a sample: use fresh samples and one update a step. Needs
    "leave_one_out" advantages.
    """
    rl_BT = tokens_of_kind(RL, batch)
    total = weighted_sum(at_tokens(batch.advantage_BC, batch), logp_BT, rl_BT)
    objective = total / jnp.maximum(denominators.rl_trajectories, 1.0)
    ratio_BT = exp_bounded(_log_ratio(logp_BT, batch, rl_BT))
    return _finish(
        objective,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        ratio_BT=ratio_BT,
        clipped_BT=jnp.zeros_like(ratio_BT),
    )


def cispo_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return CISPO's loss: REINFORCE weighted by clipped token ratios.

    The ratio is a constant weight, so no token loses its gradient; every token of the step counts
    the same.
    """
    rl_BT = tokens_of_kind(RL, batch)
    ratio_BT = exp_bounded(_log_ratio(logp_BT, batch, rl_BT))
    clipped_ratio_BT = jnp.clip(ratio_BT, 1.0 - config.clip_low, 1.0 + config.clip_high)
    weight_BT = clipped_ratio_BT * at_tokens(batch.advantage_BC, batch)
    total = weighted_sum(weight_BT, logp_BT, rl_BT)
    objective = total / jnp.maximum(denominators.rl_tokens, 1.0)
    return _finish(
        objective,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        ratio_BT=ratio_BT,
        clipped_BT=clipped_ratio_BT != ratio_BT,
    )


def topr_loss(
    logp_BT: Array, batch: Batch[Array], config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Return TOPR's loss: successes in full, failures weighted by their probability ratio.

    The ratio is the product over all of the trajectory's tokens of current / rollout, at most 1, so
    a long failure that has become less likely has nearly no weight.
    """
    rl_BT = tokens_of_kind(RL, batch)
    log_ratio_BC = _trajectory_sum(jnp.where(rl_BT, logp_BT - batch.logp_rollout_BT, 0.0), batch)
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.reward_BC
    total = weighted_sum(at_tokens(weight_BC, batch), logp_BT, rl_BT)
    objective = total / jnp.maximum(denominators.rl_trajectories, 1.0)
    return _finish(
        objective,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        ratio_BT=at_tokens(exp_bounded(log_ratio_BC), batch),
        clipped_BT=at_tokens((batch.sign_BC < 0) & (log_ratio_BC > 0), batch),
    )


def _clipped_loss(
    logp_BT: Array,
    batch: Batch[Array],
    config: LossConfig,
    denominators: Denominators,
    *,
    count: Array | float = 1.0,
    per_trajectory: bool = False,
    weight_BT: Array | float = 1.0,
    masked_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """Return minus the weighted sum over tokens of min(r A, clip(r) A), divided by a count.

    With per_trajectory it is a mean over each trajectory's tokens, then over trajectories, and
    `count` is not read. masked_BT is 1 where weight_BT drops a token for mismatch, for the metrics.
    """
    rl_BT = tokens_of_kind(RL, batch)
    ratio_BT = exp_bounded(_log_ratio(logp_BT, batch, rl_BT))
    advantage_BT = at_tokens(batch.advantage_BC, batch)
    surrogate_BT, clipped_BT = _clipped_surrogate(ratio_BT, advantage_BT, config)
    if per_trajectory:
        share_BC = share_of_episode(1.0 / _rl_tokens_per_trajectory(rl_BT, batch), batch)
        weight_BT = weight_BT * at_tokens(share_BC, batch)
        count = jnp.maximum(denominators.rl_trajectories, 1.0)
    objective = weighted_sum(jnp.broadcast_to(weight_BT, rl_BT.shape), surrogate_BT, rl_BT) / count
    return _finish(
        objective,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        ratio_BT=ratio_BT,
        clipped_BT=clipped_BT,
        masked_BT=masked_BT,
    )


def _clipped_surrogate(ratio: Array, advantage: Array, config: LossConfig) -> tuple[Array, Array]:
    """Return min(r A, clip(r) A) and where the clip removed the gradient."""
    plain = ratio * advantage
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    bounded = clipped_ratio * advantage
    surrogate = jnp.minimum(plain, bounded)
    clipped = bounded < plain
    if not config.dual_clip:
        return surrogate, clipped
    floor = jnp.where(advantage < 0, config.dual_clip * advantage, -jnp.inf)
    floored = jnp.maximum(surrogate, floor)
    return floored, clipped | (surrogate < floor)


def _finish(
    objective: Array,
    logp_BT: Array,
    batch: Batch[Array],
    config: LossConfig,
    denominators: Denominators,
    rl_BT: Array,
    *,
    ratio_BT: Array,
    clipped_BT: Array,
    masked_BT: Array | None = None,
    imitation_count: Array | None = None,
) -> tuple[Array, Metrics]:
    """Add the imitation term of Eq. 10 to the objective, negate, and add the shared metrics.

    The term is divided by imitation_count; by default by the step's trained tokens.
    """
    if imitation_count is None:
        imitation_count = jnp.maximum(denominators.trained_tokens, 1.0)
    imitation, imitation_metrics = imitation_term(logp_BT, batch, imitation_count, denominators)
    metrics = policy_metrics(
        logp_BT,
        batch=batch,
        denominators=denominators,
        rl_BT=rl_BT,
        ratio_BT=ratio_BT,
        clipped_BT=clipped_BT,
        masked_BT=jnp.zeros_like(logp_BT) if masked_BT is None else masked_BT,
    )
    loss = -(config.lambda_rl * objective + config.lambda_il * imitation)
    return loss, metrics | imitation_metrics


def _log_ratio(logp_BT: Array, batch: Batch[Array], rl_BT: Array) -> Array:
    """Return log r at RL tokens and 0 elsewhere, where either side may hold any value."""
    return jnp.where(rl_BT, logp_BT - batch.logp_old_BT, 0.0)


def _trajectory_sum(values_BT: Array, batch: Batch[Array]) -> Array:
    """Sum token values over each trajectory, [B, C]: at each chunk its trajectory's sum."""
    return sum_per_trajectory(sum_per_chunk(values_BT, batch), batch)


def _rl_tokens_per_trajectory(rl_BT: Array, batch: Batch[Array]) -> Array:
    """Count the RL tokens of each chunk's trajectory, [B, C]; at least 1."""
    return jnp.maximum(_trajectory_sum(rl_BT.astype(jnp.float32), batch), 1.0)
