"""The losses once more, in float64 NumPy, as loops over trajectories, chunks and tokens: no rows, no segments, no padding.

Shares nothing with rome.losses. Tokens are known by their id: every action token of a step has an id of its own, and `logp`, `old` are
tables from that id. Each loss returns (value, {id: d value / d logp}, metrics).
"""

import math
from collections import defaultdict

import numpy as np


def returns(trajectory, gamma, failure_reward):
    reward = trajectory.reward if trajectory.reward > 0 else failure_reward
    return [gamma ** (len(trajectory.chunks) - 1 - k) * reward for k in range(len(trajectory.chunks))]


def of_kind(trajectories, kind):
    return [(t, k, c) for t in trajectories if t.trainable for k, c in enumerate(t.chunks) if c.kind == kind]


def counts(trajectories):
    rl = of_kind(trajectories, "rl")
    return {
        "tokens": sum(len(c.action_ids) for _, _, c in rl),
        "chunks": len(rl),
        "trajectories": len({id(t) for t, _, _ in rl}),
        "imitation": sum(len(c.action_ids) for _, _, c in of_kind(trajectories, "imitation")),
        "sft": sum(len(c.action_ids) for t in trajectories if t.trainable for c in t.chunks if c.kind != "context"),
    }


def rollout_of(trajectories):
    return {i: p for t in trajectories for c in t.chunks for i, p in zip(c.action_ids, c.logprobs)}


def imitation(trajectories, logp, config, gamma, failure_reward, value, gradient):
    total = counts(trajectories)["imitation"]
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
            "logp": logp[i], "ratio": ratio, "clipped": clipped, "masked": masked, "kl_old": math.exp(drift) - drift - 1,
            "mismatch": mismatch, "mismatch_kl": math.exp(mismatch) - mismatch - 1,
            "mismatch_weight": math.exp(mismatch), "mismatch_weight2": math.exp(2 * mismatch),
        }
        for name, figure in figures.items():
            metrics[name] += figure / total
        metrics["max_mismatch"] = max(metrics["max_mismatch"], abs(mismatch))
    return dict(metrics)


def ipa(trajectories, logp, old, config, gamma, failure_reward):
    rollout, total = rollout_of(trajectories), counts(trajectories)
    value, gradient, rows = 0.0, defaultdict(float), []
    for trajectory, k, chunk in of_kind(trajectories, "rl"):
        ids = chunk.action_ids
        ratio = math.exp(np.mean([logp[i] - old[i] for i in ids]))
        success = trajectory.reward > 0
        chunk_kept = math.exp(np.mean([old[i] - rollout[i] for i in ids])) <= config.mismatch_limit
        for i in ids:
            kept = chunk_kept if config.mismatch_mask == "chunk" else math.exp(old[i] - rollout[i]) <= config.mismatch_limit
            weight = kept * (1.0 if success else min(ratio, 1.0)) * returns(trajectory, gamma, failure_reward)[k]
            weight *= config.lambda_rl / total[config.norm]
            value -= weight * logp[i]
            gradient[i] -= weight
            rows.append((i, ratio, not success and ratio > 1, not kept))
    value = imitation(trajectories, logp, config, gamma, failure_reward, value, gradient)
    return value, gradient, finish(rows, rollout, logp, old, total["tokens"])


def token_level(trajectories, logp, old, config, gamma, failure_reward):
    rollout, total = rollout_of(trajectories), counts(trajectories)
    value, gradient, rows = 0.0, defaultdict(float), []
    for trajectory in [t for t in trajectories if t.trainable]:
        ids = [i for chunk in trajectory.chunks if chunk.kind == "rl" for i in chunk.action_ids]
        ratio = math.exp(np.mean([logp[i] - old[i] for i in ids])) if ids else 1.0
        success = trajectory.reward > 0
        for i in ids:
            kept = math.exp(old[i] - rollout[i]) <= config.mismatch_limit
            weight = kept * (trajectory.reward if success else min(ratio, 1.0) * failure_reward)
            weight *= config.lambda_rl / total[config.norm]
            value -= weight * logp[i]
            gradient[i] -= weight
            rows.append((i, ratio, not success and ratio > 1, not kept))
    value = imitation(trajectories, logp, config, gamma, failure_reward, value, gradient)
    return value, gradient, finish(rows, rollout, logp, old, total["tokens"])


def grpo(trajectories, logp, old, config, gamma, failure_reward):
    rollout, total = rollout_of(trajectories), counts(trajectories)
    value, gradient, rows = 0.0, defaultdict(float), []
    usable = [t for t in trajectories if t.trainable]
    for trajectory in usable:
        peers = [t.reward if t.reward > 0 else failure_reward for t in usable if t.group == trajectory.group]
        reward = trajectory.reward if trajectory.reward > 0 else failure_reward
        advantage = (reward - np.mean(peers)) / (np.std(peers, ddof=1) + 1e-6) if len(peers) > 1 else 0.0
        ids = [i for chunk in trajectory.chunks if chunk.kind == "rl" for i in chunk.action_ids]
        for i in ids:
            ratio = math.exp(logp[i] - old[i])
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            is_clipped = clipped * advantage < ratio * advantage
            share = config.lambda_rl / len(ids) / total["trajectories"]
            value -= share * min(ratio * advantage, clipped * advantage)
            gradient[i] -= 0.0 if is_clipped else share * ratio * advantage
            rows.append((i, ratio, is_clipped, False))
    value = imitation(trajectories, logp, config, gamma, failure_reward, value, gradient)
    return value, gradient, finish(rows, rollout, logp, old, total["tokens"])


def sft(trajectories, logp, old, config, gamma, failure_reward):
    learned = [
        i for t in trajectories if t.trainable for c in t.chunks if c.kind != "context" and c.status == "ok" for i in c.action_ids
    ]
    share = 1.0 / max(len(learned), 1)
    value = -sum(logp[i] for i in learned) * share
    return value, defaultdict(float, {i: -share for i in learned}), {"logp": -value}
