"""Returns and advantages: how much an episode, or one turn of it, is worth within its group.

NumPy, on the host, before trajectories are packed.

R is the reward that losses see, n the episodes of a group, K the turns of an episode, gamma the
discount a turn. The standard deviation is that of a sample (ddof 1).

    normalised     A = (R - mean) / (std + 1e-6)        GRPO (arXiv 2402.03300, Sec. 4.1)
    centred        A = R - mean                         Dr. GRPO (arXiv 2503.20783, Sec. 3.2)
    leave_one_out  A = R - mean of the others           RLOO (arXiv 2402.14740)
                     = n / (n - 1) (R - mean)
    steps          A_k = normalised R                   GiGPO (arXiv 2505.10978, Eq. 5-8), omega = 1
                       + normalised gamma^(K-k) R

In "steps", the first term compares episodes, and the second compares the turns that episodes of the
group took in the same state: its returns are normalised within that step-level group. A turn or an
episode that is alone in its group gets 0 from the term. In the returns of the second term a failure
counts 0, as in the paper, whatever `failure_reward` is: a discounted -1 would rank the early turns
of a failure higher the longer the failure took.
"""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from rome.data.costs import chunk_costs
from rome.data.trajectory import Trajectory
from rome.data.tree import ROOT

Estimator = Literal["normalised", "centred", "leave_one_out", "steps"]
# Own code that compares the episodes of one group: (episodes, their rewards as losses see them) ->
# for each episode its advantage, or one for each of its turns.
Comparison = Callable[
    [Sequence[Trajectory], Sequence[float]], Sequence["float | Sequence[float] | np.ndarray"]
]
PARAMETERS = ("episodes", "rewards")  # of a Comparison, by position
Anchor = Literal["history", "observation"]

_EPSILON = 1e-6  # keeps a group of equal rewards finite


def chunk_returns(reward: float, num_chunks: int, gamma: float) -> np.ndarray:
    """Discount a trajectory's reward to its chunks: G_k = gamma^(K-k) R (Eq. 7 of "Let It Flow").

    Args:
      reward: R, the reward that losses see.
      num_chunks: K, the number of chunks with sampled tokens, those of all branches together.
      gamma: discount a chunk, in (0, 1].

    Returns:
      [K] float64 for k = 1..K; the last chunk gets R itself.
    """
    chunks_left_K = np.arange(num_chunks - 1, -1, -1)
    return reward * np.power(float(gamma), chunks_left_K)


def group_advantages(
    trajectories: Sequence[Trajectory],
    failure_reward: float,
    estimator: Estimator | Comparison = "normalised",
    *,
    gamma: float = 1.0,
    anchor: Anchor = "history",
    safety_cost: Mapping[str, float] | None = None,
) -> list[np.ndarray]:
    """Return the advantages of every trajectory's turns, one array [K] for each trajectory.

    Without "steps" all turns of a trajectory have the same advantage.

    Args:
      trajectories: whole groups (`Trajectory.group`), and only what is trained on.
      failure_reward: reward of a trajectory that the verifier gave 0 or less.
      estimator: one of the table in the module's docstring, or own code.
      gamma: discount a turn, read by "steps".
      anchor: which turns "steps" takes to be in the same state (`anchor_states`).
      safety_cost: of each kind of event, subtracted from the reward (`rome.data.costs`).

    Raises:
      ValueError: estimator or anchor is unknown, or own code returned no advantages.
    """
    rewards = []
    for one in trajectories:
        cost = float(chunk_costs(one, safety_cost or {}).sum())
        rewards.append(loss_reward(one, failure_reward) - cost)
    if callable(estimator):
        return _own_advantages(trajectories, rewards, estimator)
    if estimator not in get_args(Estimator) or anchor not in get_args(Anchor):
        raise ValueError(
            f"advantage {estimator!r} or anchor {anchor!r} unknown; known:"
            f" {', '.join(get_args(Estimator))}; {', '.join(get_args(Anchor))}"
        )
    groups = [trajectory.group for trajectory in trajectories]
    episode_estimator: Estimator = "normalised" if estimator == "steps" else estimator
    episode_level = _compare(groups, rewards, episode_estimator)
    advantages = []
    for trajectory, advantage in zip(trajectories, episode_level, strict=True):
        advantages.append(np.full(len(trajectory.turns), advantage))
    if estimator != "steps":
        return advantages

    step_level = _step_advantages(trajectories, gamma, anchor)
    return [whole_K + step_K for whole_K, step_K in zip(advantages, step_level, strict=True)]


def anchor_states(trajectory: Trajectory, anchor: Anchor) -> list[Hashable]:
    """Return a key for each turn, equal for turns taken in the same state of the environment.

    Args:
      trajectory: one episode. Keys of other episodes of its group can be compared with its own.
      anchor: "observation": the tokens that the environment has just appended, as in GiGPO, where
        the observation is the state (a game's screen). "history": everything that it appended so
        far and every call that it carried out, but not the policy's words between them. A terminal
        does not show its state, but the same commands with the same outputs lead to the same one.
    """
    states: list[Hashable] = []
    digests: list[hashlib.blake2b] = []  # of each turn: what it and those that it goes on from saw
    for (prompt_ids, chunk), parent in zip(trajectory.turns, trajectory.turn_parents, strict=True):
        if anchor == "observation":
            states.append(tuple(prompt_ids))
            continue
        empty = hashlib.blake2b(digest_size=16)
        digest = empty if parent == ROOT else digests[parent].copy()
        observed = json.dumps(list(map(int, prompt_ids)))
        digest.update(observed.encode())
        states.append(digest.copy().digest())
        called = json.dumps(chunk.tool_call, sort_keys=True)
        digest.update(called.encode())
        digests.append(digest)
    return states


def loss_reward(trajectory: Trajectory, failure_reward: float) -> float:
    """Return the reward that losses see, before the costs of events.

    Args:
      trajectory: one episode.
      failure_reward: replaces every reward of 0 or less of a verifier. One that own code gave
        (`Trajectory.training_reward`) is taken as it is.
    """
    reward = trajectory.learned_reward
    if trajectory.training_reward is None and reward <= 0:
        reward = failure_reward
    return reward


def _own_advantages(
    trajectories: Sequence[Trajectory], rewards: Sequence[float], compare: Comparison
) -> list[np.ndarray]:
    """Return what own code says of every group, [K] for each trajectory."""
    places: dict[int, list[int]] = collections.defaultdict(list)
    for place, trajectory in enumerate(trajectories):
        places[trajectory.group].append(place)
    advantages: dict[int, np.ndarray] = {}
    for members in places.values():
        episodes = [trajectories[place] for place in members]
        compared = list(compare(episodes, [rewards[place] for place in members]))
        if len(compared) != len(episodes):
            raise ValueError(
                f"an advantage of own code returned {len(compared)} values for a group of"
                f" {len(episodes)} episodes. Return one for each"
            )
        for place, episode, value in zip(members, episodes, compared, strict=True):
            advantages[place] = _per_turn(value, episode)
    return [advantages[place] for place in range(len(trajectories))]


def _per_turn(value: Any, episode: Trajectory) -> np.ndarray:
    """Return the advantage of an episode at each of its turns, [K]."""
    turns = len(episode.turns)
    value_K = np.asarray(value, np.float64)
    if value_K.shape not in ((), (turns,)) or not np.isfinite(value_K).all():
        raise ValueError(
            f"an advantage of own code returned {value!r} for an episode of {turns} turns. Return a"
            " finite number, or one for each turn"
        )
    return np.broadcast_to(value_K, (turns,)).copy()


def _step_advantages(
    trajectories: Sequence[Trajectory], gamma: float, anchor: Anchor
) -> list[np.ndarray]:
    """Return the step-level term of GiGPO, [K] for each trajectory.

    Only turns that the policy sampled are compared; prefilled and demonstrated turns get 0.
    """
    keys: list[Hashable] = []
    returns: list[float] = []
    for trajectory in trajectories:
        turns = trajectory.turns
        states = anchor_states(trajectory, anchor)
        returns_K = chunk_returns(max(trajectory.learned_reward, 0.0), len(turns), gamma)
        for (_, chunk), state, value in zip(turns, states, returns_K, strict=True):
            if chunk.kind == "rl":
                keys.append((trajectory.group, state))
                returns.append(value)
    remaining = iter(_compare(keys, returns, "normalised"))
    terms = []
    for trajectory in trajectories:
        sampled = [chunk.kind == "rl" for _, chunk in trajectory.turns]
        terms.append(np.array([next(remaining) if one else 0.0 for one in sampled]))
    return terms


def _compare(
    keys: Sequence[Hashable], values: Sequence[float], estimator: Estimator
) -> list[float]:
    """Return each value's advantage among the values that share its key."""
    values_of: dict[Hashable, list[float]] = collections.defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        values_of[key].append(float(value))
    mean_of = {}
    scale_of = {}
    for key, group in values_of.items():
        mean_of[key] = float(np.mean(group))
        scale_of[key] = _scale(np.asarray(group), estimator)
    advantages = []
    for key, value in zip(keys, values, strict=True):
        advantages.append((float(value) - mean_of[key]) * scale_of[key])
    return advantages


def _scale(values: np.ndarray, estimator: Estimator) -> float:
    """Return the factor for distances from a group's mean; 0 for a group of one."""
    n = len(values)
    if n == 1:
        return 0.0
    if estimator == "normalised":
        return float(1.0 / (values.std(ddof=1) + _EPSILON))
    if estimator == "leave_one_out":
        return n / (n - 1)
    return 1.0
