"""The policy losses that IPA is compared with, in the form of their papers.

r = pi / pi_old of a token, rho = pi_old / mu (the trainer against the engine at the same weights),
A = advantage (rome.data.advantages), R = reward, y a trajectory's n RL tokens. Sums and means run
over the whole step: over trajectories, or over tokens where a line says so.

    token_level  the paper's baseline, Eq. 4-6 of "Let It Flow": TOPR's split with exp(mean log r) and a mask for each token
    grpo      mean_y 1/n sum_t min(r A, clip(r, 1 - e, 1 + e) A)                     arXiv 2402.03300, Eq. 3; no KL term
    dr_grpo   mean_y 1/M sum_t min(r A, clip(r) A), A = R - mean, M constant         arXiv 2503.20783, Sec. 3.2
    dapo      token mean of min(r A, clip(r, 1 - e_low, 1 + e_high) A)               arXiv 2503.14476, Eq. 8, 10, 12
    gspo      mean_y min(s A, clip(s) A), s = exp(1/n sum_t log r)                   arXiv 2507.18071, Eq. 5, 7
    gigpo     mean over turns of the mean over its tokens of min(r A, clip(r) A)     arXiv 2505.10978, Eq. 8 for A
    tis       grpo, each token times min(rho, C)                                     Yao et al. 2025, "Your Efficient RL Framework Secretly Brings ..."
    icepop    grpo, each token times rho where a <= rho <= b, else 0                 Ling team 2025, "Small Leak Can Sink a Great Ship"
    rloo      mean_y A sum_t log pi, A = R - mean of the others                      arXiv 2402.14740
    cispo     token mean of sg(clip(r, 1 - e_low, 1 + e_high)) A log pi              arXiv 2506.13585, Eq. 4-5
    topr      mean_y R sum_t log pi; failures times sg([prod_t pi / mu]_0^1)         arXiv 2503.14286, Eq. 8

All maximised, so a loss is minus this. DAPO's dynamic sampling and overlong penalty are not here:
which groups are kept and replaced is the scheduler's affair, what an episode is rewarded the
verifier's. dual_clip c bounds min(r A, clip(r) A) below by c A where A < 0 (arXiv 1912.09729):
without it the ratio of a failure has no upper bound, which asynchronous training cannot afford.

B rows, T tokens, C chunks a row. A turn is a chunk. Imitation chunks (Eq. 10) are learned as in
IPA.
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
    sum_per_chunk,
    sum_per_trajectory,
    tokens_of_kind,
    tokens_per_chunk,
)
from rome.losses.ipa import imitation_term, mismatch_mask, rl_denominator, topr_weight, weighted_sum
from rome.losses.types import Denominators, LossConfig, Metrics


def token_level_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Eq. 4-6: the split of TOPR with one ratio and one reward a trajectory, undiscounted, and a
    mask for each token.
    """
    rl_BT = tokens_of_kind(RL, batch)
    log_ratio_BC = _trajectory_sum(
        _log_ratio(logp_BT, batch, rl_BT), batch
    ) / _rl_tokens_per_trajectory(rl_BT, batch)
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.reward_BC
    keep_BT = mismatch_mask(batch, dataclasses.replace(config, mismatch_mask="token"))

    objective = weighted_sum(
        keep_BT * at_tokens(weight_BC, batch), logp_BT, rl_BT
    ) / rl_denominator(config, denominators)
    return _finish(
        objective,
        logp_BT,
        batch,
        config,
        denominators,
        rl_BT,
        masked_BT=1.0 - keep_BT,
        ratio_BT=at_tokens(exp_bounded(log_ratio_BC), batch),
        clipped_BT=at_tokens((batch.sign_BC < 0) & (log_ratio_BC > 0), batch),
    )


def grpo_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """GRPO: clipped token ratios times the group advantage; a mean over each trajectory's tokens,
    then over trajectories.
    """
    return _clipped_loss(logp_BT, batch, config, denominators, per_trajectory=True)


def dr_grpo_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Dr.

    GRPO: GRPO whose token sums are divided by a constant, so that the length of a trajectory does
    not weaken its tokens.

    The advantages are to be "centred" ones.
    """
    count = jnp.maximum(denominators.rl_trajectories, 1.0) * config.token_constant
    return _clipped_loss(logp_BT, batch, config, denominators, count=count)


def dapo_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """DAPO: a wider clip upwards than downwards, and every token of the step counts the same.

    The paper divides by the tokens of a group and averages over groups; here as in its code, by the
    tokens of the step.
    """
    return _clipped_loss(
        logp_BT, batch, config, denominators, count=jnp.maximum(denominators.rl_tokens, 1.0)
    )


def tis_loss(
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """Truncated importance sampling: GRPO corrected for what the engine sampled otherwise than the
    trainer would have, up to a weight of C.
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
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """IcePop: GRPO corrected as in TIS, but a token on which engine and trainer disagree too much,
    either way, is dropped.
    """
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
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """GiGPO: each turn is a sample with an advantage of its own; a mean over its tokens, then over
    the turns of the step.

    The advantages are to be those of "steps".
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
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """GSPO: one ratio a trajectory, the geometric mean of its tokens', clipped as a whole; the
    gradient goes through it.
    """
    rl_BT = tokens_of_kind(RL, batch)
    tokens_BC = _rl_tokens_per_trajectory(rl_BT, batch)
    ratio_BC = exp_bounded(_trajectory_sum(_log_ratio(logp_BT, batch, rl_BT), batch) / tokens_BC)
    # A trajectory's advantage is one number; in a row of several kinds of chunk each still carries
    # it.
    surrogate_BC, clipped_BC = _clipped_surrogate(ratio_BC, batch.advantage_BC, config)

    # The surrogate stands at each of the trajectory's n tokens, so that 1/n of each adds up to it
    # once.
    objective = weighted_sum(
        at_tokens(1.0 / tokens_BC, batch), at_tokens(surrogate_BC, batch), rl_BT
    ) / jnp.maximum(denominators.rl_trajectories, 1.0)
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
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """RLOO: REINFORCE on whole trajectories.

    No ratio corrects for the age of a sample: it wants fresh ones and one update a step.

    The advantages are to be those of "leave_one_out".
    """
    rl_BT = tokens_of_kind(RL, batch)
    objective = weighted_sum(at_tokens(batch.advantage_BC, batch), logp_BT, rl_BT) / jnp.maximum(
        denominators.rl_trajectories, 1.0
    )
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
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """CISPO: REINFORCE with clipped token ratios as weights, so that no token loses its gradient;
    every token of the step counts the same.
    """
    rl_BT = tokens_of_kind(RL, batch)
    ratio_BT = exp_bounded(_log_ratio(logp_BT, batch, rl_BT))
    clipped_ratio_BT = jnp.clip(ratio_BT, 1.0 - config.clip_low, 1.0 + config.clip_high)
    objective = weighted_sum(
        clipped_ratio_BT * at_tokens(batch.advantage_BC, batch), logp_BT, rl_BT
    ) / jnp.maximum(denominators.rl_tokens, 1.0)
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
    logp_BT: Array, batch: Batch, config: LossConfig, denominators: Denominators
) -> tuple[Array, Metrics]:
    """TOPR: successes plain; failures weighted by the probability ratio of the whole trajectory to
    the policy that sampled it, at most 1.

    The ratio is a product over all tokens, against the engine: of a long failure that has become
    less likely little is left.
    """
    rl_BT = tokens_of_kind(RL, batch)
    log_ratio_BC = _trajectory_sum(jnp.where(rl_BT, logp_BT - batch.logp_rollout_BT, 0.0), batch)
    weight_BC = topr_weight(log_ratio_BC, batch.sign_BC) * batch.reward_BC
    objective = weighted_sum(at_tokens(weight_BC, batch), logp_BT, rl_BT) / jnp.maximum(
        denominators.rl_trajectories, 1.0
    )
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
    batch: Batch,
    config: LossConfig,
    denominators: Denominators,
    *,
    count: Array | None = None,
    per_trajectory: bool = False,
    weight_BT: Array | float = 1.0,
    masked_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """Minus the weighted sum over tokens of min(r A, clip(r) A) / count; per_trajectory: over the
    mean of each trajectory, instead.
    """
    rl_BT = tokens_of_kind(RL, batch)
    ratio_BT = exp_bounded(_log_ratio(logp_BT, batch, rl_BT))
    surrogate_BT, clipped_BT = _clipped_surrogate(
        ratio_BT, at_tokens(batch.advantage_BC, batch), config
    )
    if per_trajectory:
        weight_BT = weight_BT * at_tokens(1.0 / _rl_tokens_per_trajectory(rl_BT, batch), batch)
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
    """(min(r A, clip(r) A), where the clip took the gradient away)."""
    plain, bounded = (
        ratio * advantage,
        jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high) * advantage,
    )
    surrogate, clipped = jnp.minimum(plain, bounded), bounded < plain
    if config.dual_clip:
        floor = jnp.where(advantage < 0, config.dual_clip * advantage, -jnp.inf)
        surrogate, clipped = jnp.maximum(surrogate, floor), clipped | (surrogate < floor)
    return surrogate, clipped


def _finish(
    objective: Array,
    logp_BT: Array,
    batch: Batch,
    config: LossConfig,
    denominators: Denominators,
    rl_BT: Array,
    *,
    ratio_BT: Array,
    clipped_BT: Array,
    masked_BT: Array | None = None,
) -> tuple[Array, Metrics]:
    """Adds the imitation term of Eq. 10 to what is to be maximised, and the figures that all policy
    losses share.
    """
    imitation, imitation_metrics = imitation_term(logp_BT, batch, denominators)
    metrics = policy_metrics(
        logp_BT,
        batch=batch,
        denominators=denominators,
        rl_BT=rl_BT,
        ratio_BT=ratio_BT,
        clipped_BT=clipped_BT,
        masked_BT=jnp.zeros_like(logp_BT) if masked_BT is None else masked_BT,
    )
    return (
        -(config.lambda_rl * objective + config.lambda_il * imitation),
        metrics | imitation_metrics,
    )


def _log_ratio(logp_BT: Array, batch: Batch, rl_BT: Array) -> Array:
    """log r at RL tokens; 0 elsewhere, where either side may hold anything."""
    return jnp.where(rl_BT, logp_BT - batch.logp_old_BT, 0.0)


def _trajectory_sum(values_BT: Array, batch: Batch) -> Array:
    """[B, C]: at each chunk the sum over the tokens of its trajectory."""
    return sum_per_trajectory(sum_per_chunk(values_BT, batch), batch)


def _rl_tokens_per_trajectory(rl_BT: Array, batch: Batch) -> Array:
    """[B, C] at least 1, at each chunk of the trajectory."""
    return jnp.maximum(_trajectory_sum(rl_BT.astype(jnp.float32), batch), 1.0)
