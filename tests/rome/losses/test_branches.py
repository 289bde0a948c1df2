"""Losses of episodes with branches against float64 NumPy: an episode counts once however many lines
it has, and a turn that several lines share counts once.
"""

import numpy as np
import pytest

from rome.data.trajectory import Trajectory
from rome.data.tree import ROOT
from rome.losses import LossConfig, count_denominators
from tests.rome.data.trees import leaf_paths
from tests.rome.losses.random_step import GAMMA, evaluate, packed, random_step

CLIP = 0.2


def branching_step(seed):
    """A random step of RL episodes, most of them with branches."""
    step = random_step(seed, trajectories=9, kinds=("rl",))
    rng = np.random.default_rng(seed)
    made = []
    for trajectory in step.trajectories:
        if not trajectory.trainable:
            continue
        for number, chunk in enumerate(trajectory.chunks[1:], 1):
            chunk.parent = int(rng.choice([ROOT, *range(number), number - 1]))
        made.append(trajectory)
    assert any(not trajectory.is_linear for trajectory in made)
    step.trajectories = made
    return step


def lines(trajectory: Trajectory):
    """Yield the numbers of the turns that each line trains."""
    seen = set()
    for path in leaf_paths(trajectory):
        yield [number for number in path if number not in seen]
        seen.update(path)


def advantages(trajectories):
    rewards = {id(t): t.reward if t.reward > 0 else -1.0 for t in trajectories}
    found = {}
    for t in trajectories:
        group = [rewards[id(other)] for other in trajectories if other.group == t.group]
        spread = np.std(group, ddof=1) if len(group) > 1 else 0.0
        found[id(t)] = (rewards[id(t)] - np.mean(group)) / (spread + 1e-6) if spread else 0.0
    return found


def surrogate(ratio, advantage, low=CLIP, high=CLIP):
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def oracle(name, step):
    """The objective, a mean over episodes of a mean over lines; of ipa, a mean over tokens."""
    logp, old = step.logp.astype(np.float64), step.old.astype(np.float64)
    advantage = advantages(step.trajectories)
    episodes = []
    tokens = 0
    for t in step.trajectories:
        reward = t.reward if t.reward > 0 else -1.0
        of_lines = []
        for line in lines(t):
            ids = [i for number in line for i in t.chunks[number].action_ids]
            log_ratio = logp[ids] - old[ids]
            if name == "grpo":
                of_lines.append(np.mean(surrogate(np.exp(log_ratio), advantage[id(t)])))
            elif name == "gspo":
                ratio = np.exp(np.mean(log_ratio))
                of_lines.append(surrogate(ratio, advantage[id(t)], 3e-4, 4e-4))
            elif name == "token_level":
                weight = 1.0 if reward > 0 else np.exp(min(0.0, np.mean(log_ratio)))
                of_lines.append(weight * reward * np.sum(logp[ids]))
            else:
                for number in line:
                    ids = t.chunks[number].action_ids
                    mean = np.mean(logp[ids] - old[ids])
                    weight = 1.0 if reward > 0 else np.exp(min(0.0, mean))
                    discount = GAMMA ** (len(t.chunks) - 1 - number)
                    of_lines.append(weight * discount * reward * np.sum(logp[ids]))
                    tokens += len(ids)
        is_mean = name in ("grpo", "gspo")
        episodes.append(np.mean(of_lines) if is_mean else np.sum(of_lines))
    return np.sum(episodes) / tokens if name == "ipa" else np.mean(episodes)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ipa", "token_level", "grpo", "gspo"])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_episode_counts_once_however_many_lines_it_has(name, seed):
    step = branching_step(seed)
    clip = {"clip_low": 3e-4, "clip_high": 4e-4} if name == "gspo" else {}
    norm = {"norm": "trajectories"} if name == "token_level" else {}
    config = LossConfig(mismatch_limit=float("inf"), lambda_il=0.0, **clip, **norm)
    value, _, _ = evaluate(name, packed(step, name), step.logp, config)
    assert value == pytest.approx(-oracle(name, step), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_counts_of_a_step_are_of_its_episodes_turns_and_tokens(seed):
    step = branching_step(seed)
    counts = count_denominators(packed(step))
    chunks = [chunk for t in step.trajectories for chunk in t.chunks]
    assert counts.rl_trajectories == pytest.approx(len(step.trajectories), abs=1e-5)
    assert counts.rl_chunks == len(chunks)
    assert counts.rl_tokens == sum(len(chunk.action_ids) for chunk in chunks)
