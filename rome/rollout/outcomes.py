"""Statistics of the episodes of one step, and the groups among them that can teach."""

from __future__ import annotations

import collections

import numpy as np

from rome.data.trajectory import Trajectory


def mixed_groups(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Return the episodes of groups with both a success and a failure; none if there are none.

    The episodes of any other group say nothing about what is better than what. That holds for a
    whole step of such groups, too: failures alone would only be made less likely.
    """
    outcomes: dict[int, set[bool]] = collections.defaultdict(set)
    for trajectory in trajectories:
        outcomes[trajectory.group].add(trajectory.reward > 0)
    mixed = {group for group, seen in outcomes.items() if len(seen) == 2}
    return [trajectory for trajectory in trajectories if trajectory.group in mixed]


def rollout_metrics(
    trajectories: list[Trajectory], version: int, seconds: float
) -> dict[str, float]:
    """Return the metrics of the episodes that one step takes.

    Args:
      trajectories: the episodes.
      version: weight version that is trained on them.
      seconds: time in which they were collected.

    Returns:
      Means over episodes, unless the name says otherwise. `success` is the share of episodes with
      a positive reward; `tokens` counts sampled tokens; shares of statuses are over chunks, and
      `cached_token_share` is over the tokens that the engines were sent.
    """
    tokens = np.array([trajectory.num_action_tokens for trajectory in trajectories])
    succeeded = np.array([trajectory.reward > 0 for trajectory in trajectories])
    staleness = [version - trajectory.oldest_version for trajectory in trajectories]
    denied = [trajectory.network_denials > 0 for trajectory in trajectories]
    chunks = [chunk for trajectory in trajectories for chunk in trajectory.chunks]
    statuses = [chunk.status for chunk in chunks]
    sent_tokens = sum(_sent_tokens(trajectory) for trajectory in trajectories)
    cached_tokens = sum(chunk.cached_tokens for chunk in chunks)
    metrics = {
        "reward": float(np.mean([trajectory.reward for trajectory in trajectories])),
        "success": float(succeeded.mean()),
        "turns": float(np.mean([len(trajectory.chunks) for trajectory in trajectories])),
        "tokens": float(tokens.mean()),
        "staleness": float(np.mean(staleness)),
        "tokens_per_s": float(tokens.sum() / seconds),
        "tool_error_share": statuses.count("tool_error") / len(statuses),
        "malformed_share": statuses.count("malformed") / len(statuses),
        "network_denial_share": float(np.mean(denied)),
        "cached_token_share": cached_tokens / max(1, sent_tokens),
    }
    # Failures that grow longer announce a collapse.
    if succeeded.any():
        metrics["tokens_success"] = float(tokens[succeeded].mean())
    if not succeeded.all():
        metrics["tokens_failure"] = float(tokens[~succeeded].mean())
    return metrics


def _sent_tokens(trajectory: Trajectory) -> int:
    """Count the tokens that the engine was sent: each turn sends the whole context again."""
    context = 0
    sent = 0
    for chunk in trajectory.chunks:
        context += len(chunk.prompt_ids)
        sent += context
        context += len(chunk.action_ids)
    return sent
