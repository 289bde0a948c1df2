"""The gradient of rows that pack the lines of episodes with branches is that of lines that have a
row each, with returns, kinds and counts from their definition.
"""

import dataclasses

import jax
import numpy as np
import pytest

from rome.data.batch import CONTEXT
from rome.data.packing import microbatches, pack
from rome.data.trajectory import Trajectory
from rome.data.tree import ROOT
from rome.losses import count_denominators
from rome.train.sums import WholeStep
from tests.rome.data.trees import leaf_paths
from tests.rome.train.test_step import make_learner, random_trajectories

ROW = {"row_length": 48, "chunks_per_row": 12, "failure_reward": -1.0}
GAMMA = 0.9


def branching_episodes():
    rng = np.random.default_rng(5)
    made = random_trajectories(9, seed=5)
    episodes = []
    for first, second, third in zip(made[::3], made[1::3], made[2::3], strict=True):
        chunks = [*first.chunks, *second.chunks, *third.chunks]
        for number, chunk in enumerate(chunks[1:], 1):
            chunk.parent = int(rng.choice([ROOT, *range(number)]))
        episodes.append(dataclasses.replace(first, chunks=chunks))
    return episodes


def separate_rows(episodes):
    """Each line as a trajectory of its own in a row of its own, its returns put in by hand."""
    rows = []
    for episode in episodes:
        reward = episode.reward or -1.0
        seen = set()
        for path in leaf_paths(episode):
            chunks = [dataclasses.replace(episode.chunks[n], parent=-1) for n in path]
            line = Trajectory("t", "f", chunks, episode.reward, episode.ending)
            row = pack([line], **ROW, gamma=1.0)
            left = [len(episode.chunks) - 1 - number for number in path]
            row.return_BC[0, : len(path)] = reward * GAMMA ** np.array(left)
            row.kind_BC[0, : len(path)][[n in seen for n in path]] = CONTEXT
            seen.update(path)
            rows.append(row)
    return rows


def scored(batches):
    """logp_old beside what the engine said, so that ratios differ from 1."""
    return [
        batch._replace(
            logp_old_BT=np.where(batch.action_mask_BT, batch.logp_rollout_BT - 0.1, 0).astype(
                np.float32
            )
        )
        for batch in batches
    ]


def gradient(learner, params, batches, counts):
    """The gradient of a step, as an update adds it up."""
    with jax.set_mesh(learner.mesh):
        sums = learner._sum_up(params, batches, WholeStep(counts, 1.0, 1.0, None))
    return jax.device_get(sums.gradients)


@pytest.mark.long
def test_packed_lines_have_the_gradient_of_separate_rows():
    episodes = branching_episodes()
    assert any(not episode.is_linear for episode in episodes)
    together = scored(microbatches(pack(episodes, **ROW, gamma=GAMMA), 4))
    rows = [row for line in separate_rows(episodes) for row in microbatches(line, 4)]
    alone = scored(rows)
    assert together[0].segments_BT.max() > 1, "no row holds two lines"
    counts = count_denominators(together)
    assert counts[:2] == count_denominators(alone)[:2]
    learner = make_learner("ipa")
    params = learner.init(seed=0).params
    one, other = (gradient(learner, params, batches, counts) for batches in (together, alone))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(other)))
    assert norm > 1e-3
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6 * norm)
