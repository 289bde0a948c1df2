"""The losses once more, in float64 NumPy, as loops over trajectories, chunks and tokens: no rows,
no segments, no padding.

Shares nothing with rome.losses. Tokens are known by their id: every action token of a step has an
id of its own, and `logp`, `old` are tables from that id. Each loss returns (value, {id: d value / d
logp}, metrics).
"""

import math
from collections import defaultdict

import numpy as np


def returns(trajectory, gamma, failure_reward):
    reward = trajectory.reward if trajectory.reward > 0 else failure_reward
    return [
        gamma ** (len(trajectory.chunks) - 1 - k) * reward for k in range(len(trajectory.chunks))
    ]


def of_kind(trajectories, kind):
    return [
        (t, k, c)
        for t in trajectories
        if t.trainable
        for k, c in enumerate(t.chunks)
        if c.kind == kind
    ]


def counts(trajectories):
    rl = of_kind(trajectories, "rl")
    return {
        "tokens": sum(len(c.action_ids) for _, _, c in rl),
        "chunks": len(rl),
        "trajectories": len({id(t) for t, _, _ in rl}),
    }


def trained_counts(trajectories):
    """What both terms of Eq. 10 are divided by, by config.norm."""
    trained = of_kind(trajectories, "rl") + of_kind(trajectories, "imitation")
    return {
        "tokens": sum(len(c.action_ids) for _, _, c in trained),
        "chunks": len(trained),
        "trajectories": len({id(t) for t, _, _ in trained}),
    }


def rollout_of(trajectories):
    return {
        i: p
        for t in trajectories
        for c in t.chunks
        for i, p in zip(c.action_ids, c.logprobs, strict=True)
    }


def loss_reward(trajectory, failure_reward):
    return trajectory.reward if trajectory.reward > 0 else failure_reward


def rl_ids(trajectory):
    return [i for chunk in trajectory.chunks if chunk.kind == "rl" for i in chunk.action_ids]


def imitation(trajectories, logp, config, gamma, failure_reward, value, gradient, norm="tokens"):
    total = trained_counts(trajectories)[norm]
    for trajectory, k, chunk in of_kind(trajectories, "imitation"):
        weight = config.lambda_il * returns(trajectory, gamma, failure_reward)[k] / total
        for i in chunk.action_ids:
            value -= weight * logp[i]
            gradient[i] -= weight
    return value


def finish(rows, rollout, logp, old, total):
    """Metrics from rows of (id, ratio, clipped, masked)."""
    metrics = defaultdict(float)
    for i, ratio, clipped, masked in rows:
        drift, mismatch = logp[i] - old[i], old[i] - rollout[i]
        figures = {
            "logp": logp[i],
            "ratio": ratio,
            "clipped": clipped,
            "masked": masked,
            "kl_old": math.exp(drift) - drift - 1,
            "mismatch": mismatch,
            "mismatch_kl": math.exp(mismatch) - mismatch - 1,
            "mismatch_weight": math.exp(mismatch),
            "mismatch_weight2": math.exp(2 * mismatch),
        }
        for name, figure in figures.items():
            metrics[name] += figure / total
        metrics["max_mismatch"] = max(metrics["max_mismatch"], abs(mismatch))
    return dict(metrics)


def ipa(trajectories, logp, old, config, gamma, failure_reward):
    rollout, total = rollout_of(trajectories), counts(trajectories)
    trained = trained_counts(trajectories)
    value, gradient, rows = 0.0, defaultdict(float), []
    for trajectory, k, chunk in of_kind(trajectories, "rl"):
        ids = chunk.action_ids
        ratio = math.exp(np.mean([logp[i] - old[i] for i in ids]))
        success = trajectory.reward > 0
        chunk_kept = math.exp(np.mean([old[i] - rollout[i] for i in ids])) <= config.mismatch_limit
        for i in ids:
            kept = (
                chunk_kept
                if config.mismatch_mask == "chunk"
                else math.exp(old[i] - rollout[i]) <= config.mismatch_limit
            )
            weight = (
                kept
                * (1.0 if success else min(ratio, 1.0))
                * returns(trajectory, gamma, failure_reward)[k]
            )
            weight *= config.lambda_rl / trained[config.norm]
            value -= weight * logp[i]
            gradient[i] -= weight
            rows.append((i, ratio, not success and ratio > 1, not kept))
    value = imitation(
        trajectories, logp, config, gamma, failure_reward, value, gradient, config.norm
    )
    return value, gradient, finish(rows, rollout, logp, old, total["tokens"])


def token_level(trajectories, logp, old, config, gamma, failure_reward):
    rollout, total = rollout_of(trajectories), counts(trajectories)
    trained = trained_counts(trajectories)
    value, gradient, rows = 0.0, defaultdict(float), []
    for trajectory in [t for t in trajectories if t.trainable]:
        ids = [i for chunk in trajectory.chunks if chunk.kind == "rl" for i in chunk.action_ids]
        ratio = math.exp(np.mean([logp[i] - old[i] for i in ids])) if ids else 1.0
        success = trajectory.reward > 0
        for i in ids:
            kept = math.exp(old[i] - rollout[i]) <= config.mismatch_limit
            weight = kept * (trajectory.reward if success else min(ratio, 1.0) * failure_reward)
            weight *= config.lambda_rl / trained[config.norm]
            value -= weight * logp[i]
            gradient[i] -= weight
            rows.append((i, ratio, not success and ratio > 1, not kept))
    value = imitation(
        trajectories, logp, config, gamma, failure_reward, value, gradient, config.norm
    )
    return value, gradient, finish(rows, rollout, logp, old, total["tokens"])


def normalised(value, values):
    return (value - np.mean(values)) / (np.std(values, ddof=1) + 1e-6) if len(values) > 1 else 0.0


def peers_of(trajectory, usable, failure_reward):
    return [loss_reward(t, failure_reward) for t in usable if t.group == trajectory.group]


def clipped(ratio, advantage, config):
    """(value, d value / d ratio, clipped) of min(r A, clip(r) A), bounded below by c A where A < 0
    and a dual clip is set.
    """
    bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    value, slope = (
        (bounded * advantage, 0.0)
        if bounded * advantage < ratio * advantage
        else (ratio * advantage, advantage)
    )
    if config.dual_clip and advantage < 0 and value < config.dual_clip * advantage:
        value, slope = config.dual_clip * advantage, 0.0
    return value, slope, slope == 0.0 and advantage != 0.0


def by_token(trajectories, logp, old, config, gamma, failure_reward, term, advantage_of=None):
    """A sum over RL tokens of term(id, chunk, trajectory, A, counts) -> (value, d value / d logp,
    ratio, clipped, masked).
    """
    rollout, total = rollout_of(trajectories), counts(trajectories)
    value, gradient, rows = 0.0, defaultdict(float), []
    usable = [t for t in trajectories if t.trainable]
    for trajectory in usable:
        peers = peers_of(trajectory, usable, failure_reward)
        for k, chunk in enumerate(trajectory.chunks):
            if chunk.kind != "rl":
                continue
            advantage = (
                advantage_of(trajectory, k, peers)
                if advantage_of
                else normalised(loss_reward(trajectory, failure_reward), peers)
            )
            for i in chunk.action_ids:
                more, slope, ratio, is_clipped, masked = term(
                    i, chunk, trajectory, advantage, total
                )
                value -= config.lambda_rl * more
                gradient[i] -= config.lambda_rl * slope
                rows.append((i, ratio, is_clipped, masked))
    value = imitation(trajectories, logp, config, gamma, failure_reward, value, gradient)
    return value, gradient, finish(rows, rollout, logp, old, total["tokens"])


def clipped_tokens(
    trajectories, logp, old, config, gamma, failure_reward, weight, advantage_of=None
):
    """weight(id, chunk, trajectory, counts) times the clipped surrogate of each token."""

    def term(i, chunk, trajectory, advantage, total):
        ratio = math.exp(logp[i] - old[i])
        value, slope, is_clipped = clipped(ratio, advantage, config)
        w = weight(i, chunk, trajectory, total)
        return w * value, w * slope * ratio, ratio, is_clipped, False

    return by_token(trajectories, logp, old, config, gamma, failure_reward, term, advantage_of)


def grpo(trajectories, logp, old, config, gamma, failure_reward):
    return clipped_tokens(
        trajectories,
        logp,
        old,
        config,
        gamma,
        failure_reward,
        lambda i, chunk, t, total: 1 / len(rl_ids(t)) / total["trajectories"],
    )


def dr_grpo(trajectories, logp, old, config, gamma, failure_reward):
    return clipped_tokens(
        trajectories,
        logp,
        old,
        config,
        gamma,
        failure_reward,
        lambda i, chunk, t, total: 1 / config.token_constant / total["trajectories"],
        lambda t, k, peers: loss_reward(t, failure_reward) - np.mean(peers),
    )


def dapo(trajectories, logp, old, config, gamma, failure_reward):
    return clipped_tokens(
        trajectories,
        logp,
        old,
        config,
        gamma,
        failure_reward,
        lambda i, chunk, t, total: 1 / total["tokens"],
    )


def tis(trajectories, logp, old, config, gamma, failure_reward):
    rollout = rollout_of(trajectories)
    return clipped_tokens(
        trajectories,
        logp,
        old,
        config,
        gamma,
        failure_reward,
        lambda i, chunk, t, total: (
            min(math.exp(old[i] - rollout[i]), config.mismatch_limit)
            / len(rl_ids(t))
            / total["trajectories"]
        ),
    )


def icepop(trajectories, logp, old, config, gamma, failure_reward):
    rollout = rollout_of(trajectories)

    def term(i, chunk, trajectory, advantage, total):
        ratio, rho = math.exp(logp[i] - old[i]), math.exp(old[i] - rollout[i])
        value, slope, is_clipped = clipped(ratio, advantage, config)
        kept = config.mismatch_low <= rho <= config.mismatch_limit
        w = rho * kept / len(rl_ids(trajectory)) / total["trajectories"]
        return w * value, w * slope * ratio, ratio, is_clipped, not kept

    return by_token(trajectories, logp, old, config, gamma, failure_reward, term)


def gigpo(trajectories, logp, old, config, gamma, failure_reward):
    usable = [t for t in trajectories if t.trainable]

    def history(trajectory, k):
        return [
            (c.prompt_ids, c.tool_call if n < k else None)
            for n, c in enumerate(trajectory.chunks[: k + 1])
        ]

    def advantage(trajectory, k, peers):
        same = [
            returns(t, gamma, 0.0)[n]
            for t in usable
            if t.group == trajectory.group
            for n, c in enumerate(t.chunks)
            if c.kind == "rl" and history(t, n) == history(trajectory, k)
        ]
        return normalised(loss_reward(trajectory, failure_reward), peers) + normalised(
            returns(trajectory, gamma, 0.0)[k], same
        )

    return clipped_tokens(
        trajectories,
        logp,
        old,
        config,
        gamma,
        failure_reward,
        lambda i, chunk, t, total: 1 / len(chunk.action_ids) / total["chunks"],
        advantage,
    )


def gspo(trajectories, logp, old, config, gamma, failure_reward):
    def term(i, chunk, trajectory, advantage, total):
        ids = rl_ids(trajectory)
        ratio = math.exp(np.mean([logp[j] - old[j] for j in ids]))
        value, slope, is_clipped = clipped(ratio, advantage, config)
        share = (
            1 / len(ids) / total["trajectories"]
        )  # each token has its part of the trajectory's one term
        return share * value, share * slope * ratio, ratio, is_clipped, False

    return by_token(trajectories, logp, old, config, gamma, failure_reward, term)


def rloo(trajectories, logp, old, config, gamma, failure_reward):
    def others(trajectory, k, peers):
        reward = loss_reward(trajectory, failure_reward)
        return reward - (sum(peers) - reward) / (len(peers) - 1) if len(peers) > 1 else 0.0

    def term(i, chunk, trajectory, advantage, total):
        w = advantage / total["trajectories"]
        return w * logp[i], w, math.exp(logp[i] - old[i]), False, False

    return by_token(trajectories, logp, old, config, gamma, failure_reward, term, others)


def cispo(trajectories, logp, old, config, gamma, failure_reward):
    def term(i, chunk, trajectory, advantage, total):
        ratio = math.exp(logp[i] - old[i])
        bounded = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        w = bounded * advantage / total["tokens"]
        return w * logp[i], w, ratio, bounded != ratio, False

    return by_token(trajectories, logp, old, config, gamma, failure_reward, term)


def topr(trajectories, logp, old, config, gamma, failure_reward):
    rollout = rollout_of(trajectories)

    def term(i, chunk, trajectory, advantage, total):
        ratio = math.exp(sum(logp[j] - rollout[j] for j in rl_ids(trajectory)))
        success = trajectory.reward > 0
        w = (
            (1.0 if success else min(ratio, 1.0))
            * loss_reward(trajectory, failure_reward)
            / total["trajectories"]
        )
        return w * logp[i], w, ratio, not success and ratio > 1, False

    return by_token(trajectories, logp, old, config, gamma, failure_reward, term)


def sft(trajectories, logp, old, config, gamma, failure_reward):
    learned = [
        i
        for t in trajectories
        if t.trainable
        for c in t.chunks
        if c.kind != "context" and c.status == "ok"
        for i in c.action_ids
    ]
    share = 1.0 / max(len(learned), 1)
    value = -sum(logp[i] for i in learned) * share
    return value, defaultdict(float, {i: -share for i in learned}), {"logp": -value}
