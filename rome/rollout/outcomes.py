"""Statistics of the episodes of one step, and the groups among them that can teach."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from rome.data.costs import events_of, rewards_differ
from rome.data.trajectory import Trajectory
from rome.data.tree import ROOT


def mixed_groups(
    trajectories: list[Trajectory], costs: Mapping[str, float] | None = None
) -> list[Trajectory]:
    """Return the episodes of groups whose episodes earned different rewards, perhaps none.

    The episodes of any other group say nothing about what is better than what. That holds for a
    whole step of such groups, too: failures alone would only be made less likely.

    Args:
      trajectories: whole groups.
      costs: of harm by kind, which the rewards lose.
    """
    groups: dict[int, list[Trajectory]] = collections.defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group].append(trajectory)
    mixed = {group for group, members in groups.items() if rewards_differ(members, costs)}
    return [trajectory for trajectory in trajectories if trajectory.group in mixed]


def chosen_episodes(
    trajectories: list[Trajectory],
    choose: Callable[[Sequence[Trajectory]], Sequence[Trajectory]],
) -> list[Trajectory]:
    """Return the episodes that own code chooses of each group, in the order taken."""
    groups: dict[int, list[Trajectory]] = collections.defaultdict(list)
    for trajectory in trajectories:
        groups[trajectory.group].append(trajectory)
    chosen = {id(one) for members in groups.values() for one in choose(members)}
    return [trajectory for trajectory in trajectories if id(trajectory) in chosen]


def rollout_metrics(
    taken: list[Trajectory],
    version: int,
    seconds: float,
    replaced: Sequence[Trajectory] = (),
) -> dict[str, float]:
    """Return the metrics of the episodes that were played for one step.

    Args:
      taken: the episodes that the step takes.
      version: weight version that is trained on them.
      seconds: time in which they were collected.
      replaced: episodes of groups without spread, in whose place others were taken. Without them,
        `success` would be that of tasks which are solved now and then, however good the policy is.

    Returns:
      Means over episodes, unless the name says otherwise. A prefix that was replayed is in none of
      them. `success` is the share of episodes that solved their task; `tokens` counts sampled
      tokens; shares of statuses are over turns; `cached_token_share` is over the tokens that the
      engines were sent; `staleness` is of the episodes that are taken.
    """
    trajectories = [*replaced, *taken]
    turns = [trajectory.own_chunks for trajectory in trajectories]
    tokens = np.array([sum(len(chunk.action_ids) for chunk in own) for own in turns])
    succeeded = np.array([trajectory.succeeded for trajectory in trajectories])
    chunks = [chunk for own in turns for chunk in own]
    denied = [any(chunk.network_denials for chunk in own) for own in turns]
    harmed = [any(events_of(chunk) for chunk in own) for own in turns]
    statuses = [chunk.status for chunk in chunks]
    failed_commands = sum(bool(chunk.exit_code) for chunk in chunks)
    ages = staleness(taken, version) or [0]
    sent_tokens = sum(_sent_tokens(trajectory) for trajectory in trajectories)
    cached_tokens = sum(chunk.cached_tokens for chunk in chunks)
    metrics = {
        "reward": float(np.mean([trajectory.reward for trajectory in trajectories])),
        "success": float(succeeded.mean()),
        "turns": float(np.mean([len(own) for own in turns])),
        "tokens": float(tokens.mean()),
        "staleness": float(np.mean(ages)),
        "tokens_per_s": float(tokens.sum() / seconds),
        "nonzero_exit_share": failed_commands / max(1, len(chunks)),
        "tool_error_share": statuses.count("tool_error") / max(1, len(statuses)),
        "malformed_share": statuses.count("malformed") / max(1, len(statuses)),
        "network_denial_share": float(np.mean(denied)),
        "safety_event_share": float(np.mean(harmed)),
        "cached_token_share": cached_tokens / max(1, sent_tokens),
    }
    shaped = [one.training_reward for one in trajectories if one.training_reward is not None]
    if shaped:
        metrics["training_reward"] = float(np.mean(shaped))
    # Failures that grow longer announce a collapse.
    if succeeded.any():
        metrics["tokens_success"] = float(tokens[succeeded].mean())
    if not succeeded.all():
        metrics["tokens_failure"] = float(tokens[~succeeded].mean())
    return metrics


def staleness(trajectories: Iterable[Trajectory], version: int) -> list[int]:
    """Return how many versions old each episode is when `version` is trained on it.

    Episodes without a sampled token have no age and are left out.
    """
    oldest = [trajectory.oldest_version for trajectory in trajectories]
    return [version - sampled for sampled in oldest if sampled is not None]


def _sent_tokens(trajectory: Trajectory) -> int:
    """Count the tokens that the engine was sent: each turn sends the whole context again."""
    contexts: list[int] = []  # tokens at the end of each chunk
    sent = 0
    for chunk, parent in zip(trajectory.chunks, trajectory.parents, strict=True):
        prompt = (0 if parent == ROOT else contexts[parent]) + len(chunk.prompt_ids)
        if chunk.kind != "context":  # a replayed turn went to the environment only
            sent += prompt
        contexts.append(prompt + len(chunk.action_ids))
    return sent
