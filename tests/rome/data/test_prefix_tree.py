"""Rows of prefix trees hold every trained token of every line once, behind the tokens of its line,
and each shared token once.
"""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.batch import CONTEXT
from rome.data.packing import microbatches, pack
from rome.data.routes import encode_routes
from rome.data.trajectory import Chunk, Trajectory
from rome.model.config import PRESETS
from tests.rome.data.shared_prefixes import random_groups

ROW = {"row_length": 40, "chunks_per_row": 9, "gamma": 0.9, "failure_reward": -1.0}
MODEL = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_experts=5, experts_per_token=2)
steps = st.integers(0, 10**6)
quickly = settings(max_examples=20, deadline=None, derandomize=True)


def context_of(batch, row, place):
    """The places of a token's line up to it: in a tree its ancestors, else its segment so far."""
    before = np.arange(place + 1)
    if batch.tree is not None:
        return before[batch.ends_BT[row, : place + 1] > place]
    return before[batch.segments_BT[row, : place + 1] == batch.segments_BT[row, place]]


def learned(batch):
    """What each trained token is, with all that a loss reads: as a multiset."""
    kind_BT = batch.kind_BT()
    found = collections.Counter()
    for row, slot in zip(*np.nonzero(batch.action_mask_BT & (kind_BT != CONTEXT)), strict=True):
        place = slot if batch.tree is None else batch.about_BT[row, slot]
        places = context_of(batch, row, place)
        if batch.tree is not None:
            assert batch.predictor_BT[row, slot] == places[-2]
        assert batch.positions_BT[row, place] == len(places) - 1
        chunk = batch.chunk_ids_BT[row, slot]
        routes = () if batch.routes_BTLk is None else batch.routes_BTLk[row, places].tobytes()
        features = [batch.logp_rollout_BT[row, slot], batch.version_BT[row, slot]]
        features += [field[row, chunk] for field in batch[8:12]]
        lines = 1.0 if batch.lines_BC is None else float(batch.lines_BC[row, chunk])
        in_line = int((batch.trajectory_BC[row] == batch.trajectory_BC[row, chunk]).sum())
        assert in_line >= 1
        tokens = tuple(batch.tokens_BT[row, places].tolist())
        found[tokens, *map(float, features), int(kind_BT[row, slot]), lines, routes] += 1
    return found


def chunk_sizes(batch):
    """How many tokens the trained chunks of each line have."""
    kind_BT = batch.kind_BT()
    lines = collections.Counter()
    for row in range(batch.num_rows):
        is_trained_T = batch.action_mask_BT[row] & (kind_BT[row] != CONTEXT)
        chunks_N = batch.chunk_ids_BT[row][is_trained_T]
        for line in np.unique(batch.trajectory_BC[row][chunks_N]):
            of_line = chunks_N[batch.trajectory_BC[row][chunks_N] == line]
            lines[tuple(sorted(np.unique(of_line, return_counts=True)[1].tolist()))] += 1
    return lines


@quickly
@given(steps, st.booleans())
def test_trees_hold_what_separate_rows_learn(seed, versions_apart):
    episodes = random_groups(seed)
    alone = pack(episodes, **ROW)
    shared = pack(episodes, **ROW, prefix_tree=True, versions_apart=versions_apart)
    assert learned(shared) == learned(alone)
    assert chunk_sizes(shared) == chunk_sizes(alone)
    assert shared.num_rows <= alone.num_rows
    for batch in microbatches(shared, 3):
        padding_BT = batch.segments_BT == 0
        assert not batch.ends_BT[padding_BT].any()
        assert (batch.predictor_BT[~batch.action_mask_BT] == -1).all()


@quickly
@given(steps)
def test_tokens_with_other_routes_are_not_shared(seed):
    rng = np.random.default_rng(seed)

    def routes(tokens):
        return encode_routes(rng.integers(0, 2, (tokens, 2, 2)) * 2 + [0, 1], MODEL)

    episodes = random_groups(seed, routes=routes)
    shared = pack(episodes, **ROW, prefix_tree=True, routes_for=MODEL)
    assert learned(shared) == learned(pack(episodes, **ROW, routes_for=MODEL))


def episode(prompt, *answers, **fields):
    chunks = [
        Chunk([*prompt] if not n else [7], list(a), [-0.5] * len(a), versions=[(0, 0, len(a))])
        for n, a in enumerate(answers)
    ]
    chunks[0] = dataclasses.replace(chunks[0], **fields)
    return Trajectory("t", "f", chunks, 1.0, "success")


def test_a_prompt_is_there_once_and_an_answer_that_two_sampled_is_learned_twice():
    prompt = range(10, 20)
    episodes = [episode(prompt, [1, 2], [3]), episode(prompt, [1, 2], [4]), episode(prompt, [5])]
    batch = pack(episodes, **ROW, prefix_tree=True)
    assert batch.num_rows == 1
    tokens = batch.tokens_BT[0][batch.segments_BT[0] > 0]
    assert tokens.tolist() == [*prompt, 1, 2, 7, 3, 4, 5]
    about = batch.about_BT[0][batch.action_mask_BT[0]]
    assert sorted(batch.tokens_BT[0][about].tolist()) == [1, 1, 2, 2, 3, 4, 5]


def test_a_replayed_turn_shares_the_one_that_is_trained():
    source = episode(range(10, 20), [1, 2], [3])
    fork = episode(range(10, 20), [1, 2], [4], kind="context")
    batch = pack([fork, source], **ROW, prefix_tree=True)
    assert (batch.segments_BT > 0).sum() == 15
    assert batch.action_mask_BT.sum() == 4


def test_samples_of_other_versions_are_apart_where_routes_are_replayed():
    one = episode(range(10, 20), [1, 2])
    other = episode(range(10, 20), [1, 2], versions=[(1, 0, 2)])
    sizes = []
    for apart in (False, True):
        batch = pack([one, other], **ROW, prefix_tree=True, versions_apart=apart)
        sizes.append(int((batch.segments_BT > 0).sum()))
    assert sizes == [12, 14]


@pytest.mark.parametrize("shared", [1, 39])
def test_lines_that_share_little_or_do_not_fit_together_are_packed_apart(shared):
    rng = np.random.default_rng(0)
    begins = rng.integers(0, 99, shared).tolist()
    episodes = [episode(begins + rng.integers(0, 99, 39 - shared).tolist(), [n]) for n in range(3)]
    batch = pack(episodes, **ROW | {"row_length": 41}, prefix_tree=True)
    assert batch.num_rows == (3 if shared == 1 else 2)


def test_a_step_without_anything_to_train_has_no_rows():
    nothing = [episode([1, 2], [3], kind="context")]
    assert pack(nothing, **ROW, prefix_tree=True).num_rows == 0
    assert pack([], **ROW, prefix_tree=True).num_rows == 0
