"""Rows in which lines share their beginnings have the logprobs, losses and gradients of separate
rows: each line alone, whatever it shares with others.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.packing import microbatches, pack
from rome.data.routes import encode_routes
from rome.losses import count_denominators
from rome.stages.old_logprobs import Score, fill_all, fill_where, sampled_by
from rome.train.sums import WholeStep
from tests.rome.data.shared_prefixes import random_groups
from tests.rome.train.test_step import MODEL, make_learner

ROW = {"row_length": 48, "chunks_per_row": 16, "gamma": 0.9, "failure_reward": -1.0}
ROWS = 12  # of the one micro-batch
TOLERANCE = 1e-5  # of the norm of a gradient


def packed(episodes, **changes):
    """One micro-batch; logp_old beside what the engine said, so that ratios differ from 1."""
    (batch,) = microbatches(pack(episodes, **ROW | changes), ROWS)
    old_BT = np.where(batch.action_mask_BT, 0.8 * batch.logp_rollout_BT - 0.05, 0)
    lines_BC = np.ones_like(batch.reward_BC) if batch.lines_BC is None else batch.lines_BC
    return batch._replace(logp_old_BT=old_BT.astype(np.float32), lines_BC=lines_BC)


def sums_of(learner, params, batch):
    whole = WholeStep(count_denominators([batch]), float((batch.segments_BT > 0).sum()), 1.0, None)
    with jax.set_mesh(learner.mesh):
        return jax.device_get(learner._sum_up(params, [batch], whole))


def relative_error(one, other):
    def norm(leaves):
        return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return norm([left - right for left, right in pairs]) / norm(jax.tree.leaves(other))


@functools.cache
def learner_of(loss):
    learner = make_learner(loss)
    return learner, learner.init(seed=1).params


def random_routes(rng):
    def routes(tokens):
        shape = (tokens, MODEL.num_layers, MODEL.num_experts)
        return encode_routes(
            rng.random(shape).argsort(axis=2)[..., : MODEL.experts_per_token], MODEL
        )

    return routes


@pytest.mark.long
@pytest.mark.parametrize(
    "loss, replays",
    [
        ("ipa", False),
        pytest.param("ipa", True, marks=pytest.mark.slow),
        pytest.param("grpo", False, marks=pytest.mark.slow),
        pytest.param("gspo", False, marks=pytest.mark.slow),
        pytest.param("sft", False, marks=pytest.mark.slow),
    ],
)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_gradients_of_shared_beginnings_are_those_of_separate_rows(loss, replays, seed):
    learner, params = learner_of(loss)
    routes = random_routes(np.random.default_rng(seed)) if replays else None
    episodes = random_groups(seed, routes=routes)
    how = {"purpose": "sft" if loss == "sft" else "rl", "routes_for": MODEL if replays else None}
    if not pack(episodes, **ROW, **how, prefix_tree=True).num_rows:
        return
    shared, alone = (packed(episodes, **how, prefix_tree=way) for way in (True, False))
    np.testing.assert_allclose(count_denominators([shared]), count_denominators([alone]), rtol=1e-6)
    one = sums_of(learner, params, shared)
    other = sums_of(learner, params, alone)
    assert relative_error(one.gradients, other.gradients) < TOLERANCE
    for name, value in other.metrics.items():
        if "route" not in name:
            np.testing.assert_allclose(one.metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def by_context(values_BT, batch):
    """Values of tokens by the ids up to each: tokens that are the same are there once."""
    found = {}
    for row, place in zip(*np.nonzero(batch.segments_BT), strict=True):
        before = np.arange(place + 1)
        if batch.tree is None:
            sees = batch.segments_BT[row, : place + 1] == batch.segments_BT[row, place]
        else:
            sees = batch.ends_BT[row, : place + 1] > place
        tokens = tuple(batch.tokens_BT[row, before[sees]].tolist())
        found.setdefault(tokens, []).append(values_BT[row, place])
    return found


@pytest.mark.long
def test_the_balance_of_experts_counts_a_shared_token_once():
    learner, params = learner_of("ipa")
    episodes = random_groups(3, vocabulary=2)
    shared, alone = (packed(episodes, prefix_tree=way) for way in (True, False))
    ((_, shared_LE, shared_routes),) = learner.score_and_record(params, [shared])
    ((_, alone_LE, alone_routes),) = learner.score_and_record(params, [alone])
    of_shared = by_context(shared_routes, shared)
    of_alone = by_context(alone_routes, alone)
    assert of_shared.keys() <= of_alone.keys()
    for tokens, routes in of_shared.items():  # who shares a context has its experts
        np.testing.assert_array_equal(routes[0], of_alone[tokens][0])
    computed = int((shared.segments_BT > 0).sum())
    assert computed < 0.7 * int((alone.segments_BT > 0).sum())
    once_LE = np.zeros_like(shared_LE)
    for routes in of_shared.values():
        for copy in routes:
            for layer, chosen in enumerate(copy):
                once_LE[layer, chosen.astype(int) - 1] += 1
    np.testing.assert_array_equal(shared_LE, once_LE)
    assert shared_LE.sum() == computed * MODEL.num_layers * MODEL.experts_per_token
    assert alone_LE.sum() > shared_LE.sum()


def test_routes_that_a_pass_records_go_to_the_tokens_that_it_sampled():
    """Two samples of one token: the slot of the second lies at another token's place."""
    episodes = [episode for episode in random_groups(11, branching=False) if episode.is_linear]
    same = dataclasses.replace(episodes[0], episode=99)
    batch = packed([episodes[0], same], prefix_tree=True, versions_apart=True)
    assert (batch.about_BT != np.arange(48))[batch.action_mask_BT].any()
    shape = (*batch.tokens_BT.shape, MODEL.num_layers, MODEL.experts_per_token)
    newest = Score(batch.logp_rollout_BT, None, np.full(shape, 2, np.uint8))
    older = Score(batch.logp_rollout_BT, None, np.full(shape, 1, np.uint8))
    version = int(batch.version_BT[batch.action_mask_BT].min())
    mine_BT = sampled_by(batch, {version})
    filled = fill_where(fill_all(batch, newest), older, mine_BT)
    sampled = {
        (row, batch.about_BT[row, slot]) for row, slot in zip(*np.nonzero(mine_BT), strict=True)
    }
    changed = set(zip(*np.nonzero(filled.routes_BTLk[..., 0, 0] == 1), strict=True))
    assert changed == sampled
