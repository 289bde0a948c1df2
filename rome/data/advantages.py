"""What an episode, or one turn of it, is worth beside the others of its group.

NumPy, on the host, before trajectories are packed.

R is the reward that losses see, n the episodes of a group, K the turns of an episode. The standard
deviation is that of a sample (ddof 1).

    normalised     A = (R - mean) / (std + 1e-6)                     GRPO (arXiv 2402.03300, Sec. 4.1)
    centred        A = R - mean                                      Dr. GRPO (arXiv 2503.20783, Sec. 3.2)
    leave_one_out  A = R - mean of the others = n / (n - 1) (R - mean)   RLOO (arXiv 2402.14740)
    steps          A_k = normalised R + normalised gamma^(K-k) R     GiGPO (arXiv 2505.10978, Eq. 5-8), omega = 1

In the last, the first term compares episodes, the second the turns that were taken in the same
state, by whichever episodes of the group: its returns are normalised within that step-level group.
Who has nobody to be compared with gets 0 from the term. In its returns a failure counts 0, as in
the paper, whatever `failure_reward` is: discounted, -1 would make the early turns of a failure the
better the longer it took.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from rome.data.trajectory import Trajectory
from rome.losses.ipa import chunk_returns

Estimator = Literal["normalised", "centred", "leave_one_out", "steps"]
Anchor = Literal["history", "observation"]


def group_advantages(
    trajectories: Sequence[Trajectory],
    failure_reward: float,
    estimator: Estimator = "normalised",
    *,
    gamma: float = 1.0,
    anchor: Anchor = "history",
    denial_penalty: float = 0.0,
) -> list[np.ndarray]:
    """[K] advantages of every trajectory's turns, one number for all of them but with "steps".

    Groups are those of `Trajectory.group` over what is given: give whole groups, and only what is
    trained on.

    Args:
      gamma: discount a turn, read by "steps".
      anchor: which turns "steps" takes to be in one state (`anchor_states`).
    """
    if estimator not in get_args(Estimator) or anchor not in get_args(Anchor):
        raise ValueError(
            f"advantage {estimator!r} or anchor {anchor!r} unknown; known:"
            f" {', '.join(get_args(Estimator))}; {', '.join(get_args(Anchor))}"
        )
    groups = [trajectory.group for trajectory in trajectories]
    rewards = [
        loss_reward(trajectory, failure_reward, denial_penalty) for trajectory in trajectories
    ]
    episode_level = _compare(
        zip(groups, rewards), "normalised" if estimator == "steps" else estimator
    )
    spread = [
        np.full(len(trajectory.turns), advantage)
        for trajectory, advantage in zip(trajectories, episode_level)
    ]
    if estimator != "steps":
        return spread

    returns, states = [], []
    for trajectory in trajectories:
        turns = trajectory.turns
        sampled = [
            chunk.kind == "rl" for _, chunk in turns
        ]  # what was prefilled or shown is no choice to be compared
        returns += [
            value
            for value, mine in zip(
                chunk_returns(max(trajectory.reward, 0.0), len(turns), gamma), sampled
            )
            if mine
        ]
        states += [
            (trajectory.group, state)
            for state, mine in zip(anchor_states(trajectory, anchor), sampled)
            if mine
        ]
    step_level = iter(_compare(zip(states, returns), "normalised"))
    return [
        advantage_K
        + [next(step_level) if chunk.kind == "rl" else 0.0 for _, chunk in trajectory.turns]
        for trajectory, advantage_K in zip(trajectories, spread)
    ]


def anchor_states(trajectory: Trajectory, anchor: Anchor) -> list[Hashable]:
    """For each turn a key that is equal where two turns of a group were taken in the same state of
    the environment.

    "observation": the tokens that the environment has just appended, as GiGPO does it where the
    observation is the state (a game's screen). "history": all that it appended so far and every
    call that was carried out, but not the policy's words between them. A terminal does not show its
    state; the same commands with the same outputs from the same start lead to the same one.
    """
    states: list[Hashable] = []
    digest = hashlib.blake2b(digest_size=16)
    for read, chunk in trajectory.turns:
        if anchor == "observation":
            states.append(tuple(read))
            continue
        digest.update(json.dumps(list(map(int, read))).encode())
        states.append(digest.copy().digest())
        digest.update(json.dumps(chunk.tool_call, sort_keys=True).encode())
    return states


def loss_reward(
    trajectory: Trajectory, failure_reward: float, denial_penalty: float = 0.0
) -> float:
    """The reward that losses see: the verifier's for a success, `failure_reward` otherwise; less
    the penalty if it reached for an ungranted network.
    """
    return (trajectory.reward if trajectory.reward > 0 else failure_reward) - denial_penalty * (
        trajectory.network_denials > 0
    )


def _compare(grouped: Iterable[tuple[Hashable, float]], estimator: Estimator) -> list[float]:
    """The standing of each value among those that share its key."""
    pairs = [(key, float(value)) for key, value in grouped]
    values_of: dict[Hashable, list[float]] = collections.defaultdict(list)
    for key, value in pairs:
        values_of[key].append(value)
    means = {key: float(np.mean(values)) for key, values in values_of.items()}
    scales = {key: _scale(np.asarray(values), estimator) for key, values in values_of.items()}
    return [(value - means[key]) * scales[key] for key, value in pairs]


def _scale(values: np.ndarray, estimator: Estimator) -> float:
    """What a group's distances from its mean are multiplied by; 0 for a group of one, which
    compares nothing.
    """
    n = len(values)
    if n == 1:
        return 0.0
    if estimator == "normalised":
        return float(1.0 / (values.std(ddof=1) + 1e-6))
    return n / (n - 1) if estimator == "leave_one_out" else 1.0
