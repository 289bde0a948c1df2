"""What the episodes of one step show, and which of them can teach."""

from __future__ import annotations

import numpy as np

from rome.data.trajectory import Trajectory


def mixed_groups(trajectories: list[Trajectory]) -> list[Trajectory]:
    """The episodes of groups that have both a success and a failure; all of them where no group
    has.
    """
    won: dict[int, set[bool]] = {}
    for trajectory in trajectories:
        won.setdefault(trajectory.group, set()).add(trajectory.reward > 0)
    return [
        trajectory for trajectory in trajectories if len(won[trajectory.group]) == 2
    ] or trajectories


def rollout_figures(
    trajectories: list[Trajectory], version: int, seconds: float
) -> dict[str, float]:
    """What one step's episodes show; success is the share whose verifier gave 1."""
    tokens = np.array([trajectory.num_action_tokens for trajectory in trajectories])
    won = np.array([trajectory.reward > 0 for trajectory in trajectories])
    statuses = [chunk.status for trajectory in trajectories for chunk in trajectory.chunks]
    figures = {
        "reward": float(np.mean([trajectory.reward for trajectory in trajectories])),
        "success": float(won.mean()),
        "turns": float(np.mean([len(trajectory.chunks) for trajectory in trajectories])),
        "tokens": float(tokens.mean()),
        "staleness": float(
            np.mean([version - trajectory.oldest_version for trajectory in trajectories])
        ),
        "tokens_per_s": float(tokens.sum() / seconds),
        "tool_error_share": statuses.count("tool_error") / len(statuses),
        "malformed_share": statuses.count("malformed") / len(statuses),
        "network_denial_share": float(
            np.mean([trajectory.network_denials > 0 for trajectory in trajectories])
        ),
        "cached_token_share": (
            sum(chunk.cached_tokens for t in trajectories for chunk in t.chunks)
            / max(1, sum(map(_asked, trajectories)))
        ),
    }
    for name, chosen in (
        ("tokens_success", won),
        ("tokens_failure", ~won),
    ):  # negatives that grow longer announce a collapse
        if chosen.any():
            figures[name] = float(tokens[chosen].mean())
    return figures


def _asked(trajectory: Trajectory) -> int:
    """Tokens that the engine was sent: each turn sends the whole context again."""
    context = asked = 0
    for chunk in trajectory.chunks:
        asked += context + len(chunk.prompt_ids)
        context += len(chunk.prompt_ids) + len(chunk.action_ids)
    return asked
