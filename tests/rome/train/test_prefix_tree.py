"""Rows in which lines share their beginnings have the logprobs, losses and gradients of separate
rows: each line alone, whatever it shares with others.
"""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.packing import microbatches, pack
from rome.losses import count_denominators
from rome.train.sums import WholeStep
from tests.rome.data.shared_prefixes import random_groups
from tests.rome.train.test_step import make_learner

ROW = {"row_length": 48, "chunks_per_row": 16, "gamma": 0.9, "failure_reward": -1.0}
ROWS = 4
TOLERANCE = 1e-5  # of the norm of a gradient


def packed(episodes, **changes):
    return scored(microbatches(pack(episodes, **ROW | changes), ROWS))


def scored(batches):
    """logp_old beside what the engine said, so that ratios differ from 1."""
    filled = []
    for batch in batches:
        old_BT = np.where(batch.action_mask_BT, 0.8 * batch.logp_rollout_BT - 0.05, 0)
        filled.append(batch._replace(logp_old_BT=old_BT.astype(np.float32)))
    return filled


def sums_of(learner, params, batches):
    counts = count_denominators(batches)
    tokens = sum(float((batch.segments_BT > 0).sum()) for batch in batches)
    with jax.set_mesh(learner.mesh):
        counts_LE = learner._count_choices(params, batches)
        whole = WholeStep(counts, tokens, 1.0, counts_LE)
        return jax.device_get(learner._sum_up(params, batches, whole))


def relative_error(one, other):
    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in tree))

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return norm([left - right for left, right in pairs]) / norm(jax.tree.leaves(other))


def computed(batches):
    return sum(int((batch.segments_BT > 0).sum()) for batch in batches)


@functools.cache
def learner_of(loss):
    learner = make_learner(loss)
    return learner, learner.init(seed=1).params


@pytest.mark.parametrize("loss", ["ipa", "grpo", "gspo", "sft"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_gradients_of_shared_beginnings_are_those_of_separate_rows(loss, seed):
    learner, params = learner_of(loss)
    episodes = random_groups(seed)
    purpose = "sft" if loss == "sft" else "rl"
    shared = packed(episodes, prefix_tree=True, purpose=purpose)
    alone = packed(episodes, purpose=purpose)
    np.testing.assert_allclose(count_denominators(shared), count_denominators(alone), rtol=1e-6)
    if not count_denominators(alone).trained_tokens:
        return
    assert computed(shared) <= computed(alone)
    one = sums_of(learner, params, shared)
    other = sums_of(learner, params, alone)
    assert relative_error(one.gradients, other.gradients) < TOLERANCE
    for name, value in other.metrics.items():
        if "router" not in name:
            np.testing.assert_allclose(one.metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
