"""Episodes with branches: lines, credit and returns against a brute-force oracle; every sampled
token is trained once; episodes without branches are what they were, bit for bit.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data import lines as lines_module
from rome.data.advantages import anchor_states
from rome.data.batch import CONTEXT, RL
from rome.data.lines import ExampleOptions, fits_row, to_examples
from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.data.tree import LAST, ROOT, credits_of, parse_credit, resolve_parents
from rome.model.config import PRESETS
from tests.rome.data.linear_golden import digests
from tests.rome.data.trees import ancestors, credit_of, episodes, leaf_paths, shapes

quickly = settings(max_examples=60, deadline=None, derandomize=True)
GAMMA = 0.5
ROW = {"row_length": 48, "chunks_per_row": 8}
credits_by_edge = st.fixed_dictionaries(
    {edge: st.sampled_from([0.0, 0.5, 1.0, 2.0]) for edge in ("compaction", "subagent", "rewind")}
)


def packed(trajectories, **changes):
    return pack(trajectories, **ROW | {"gamma": GAMMA, "failure_reward": -1.0} | changes)


def test_episodes_without_branches_are_the_same_files_and_rows_as_before_there_were_any():
    assert digests() == {
        "files": "6b732b5f9e56af60",
        "normalised": "b3232d7857000bdb",
        "steps": "802a8027a6526445",
    }


@given(episodes())
@quickly
def test_lines_are_the_paths_to_the_leaves(trajectory):
    assert trajectory.lines() == leaf_paths(trajectory)
    assert trajectory.is_linear == (trajectory.lines() == [list(range(len(trajectory.chunks)))])


@given(episodes(), credits_by_edge)
@quickly
def test_credit_follows_its_definition(trajectory, credit):
    edges = [chunk.edge for chunk in trajectory.chunks]
    weights = credits_of(trajectory.parents, edges, credit)
    assert weights == pytest.approx(
        [credit_of(trajectory, number, credit) for number in range(len(edges))]
    )


def read_rows(batch):
    """Return (tokens, {action token: (return, reward, kind, version, logprob)}) of each segment."""
    found = []
    for b in range(batch.num_rows):
        for segment in range(1, batch.segments_BT[b].max(initial=0) + 1):
            at = np.flatnonzero(batch.segments_BT[b] == segment)
            np.testing.assert_array_equal(batch.positions_BT[b][at], np.arange(len(at)))
            actions = {}
            for t in at[batch.action_mask_BT[b][at]]:
                c = batch.chunk_ids_BT[b, t]
                assert batch.trajectory_BC[b, c] == segment and batch.valid_BC[b, c]
                actions[int(batch.tokens_BT[b, t])] = (
                    float(batch.return_BC[b, c]),
                    float(batch.reward_BC[b, c]),
                    int(batch.kind_BC[b, c]),
                    int(batch.version_BT[b, t]),
                    float(batch.logp_rollout_BT[b, t]),
                )
            found.append((batch.tokens_BT[b][at].tolist(), actions))
    return found


@given(st.lists(episodes(), min_size=1, max_size=3), credits_by_edge)
@quickly
def test_rows_hold_every_line_and_train_every_sampled_token_once(trajectories, credit):
    for number, trajectory in enumerate(trajectories):
        for chunk in trajectory.chunks:  # tokens of another episode are others
            chunk.action_ids = [token + 9000 * number for token in chunk.action_ids]
    batch = packed(trajectories, edge_credit=credit)
    rows = read_rows(batch)
    trained = [token for _, actions in rows for token in actions if actions[token][2] == RL]
    wanted = {}
    texts = []
    for trajectory in trajectories:
        reward = trajectory.reward or -1.0
        turns = [n for n, chunk in enumerate(trajectory.chunks) if chunk.action_ids]
        for k, number in enumerate(turns):
            chunk = trajectory.chunks[number]
            weight = credit_of(trajectory, number, credit)
            for token, logprob in zip(chunk.action_ids, chunk.logprobs, strict=True):
                if chunk.kind == "rl" and weight:
                    discounted = weight * reward * GAMMA ** (len(turns) - 1 - k)
                    wanted[token] = (discounted, weight * reward, RL, number, logprob)
        for turn in turns:
            path = [trajectory.chunks[n] for n in ancestors(trajectory, turn)]
            texts.append([t for chunk in path for t in (*chunk.prompt_ids, *chunk.action_ids)])
    assert sorted(trained) == sorted(wanted)
    for tokens, actions in rows:
        assert tokens in texts  # from a root to a turn, nothing lost in between
        for token, values in actions.items():
            if values[2] == RL:
                assert values == pytest.approx(wanted[token], abs=1e-6)


@given(episodes(kinds=("rl",), may_be_silent=False))
@quickly
def test_a_shared_turn_is_trained_in_the_first_of_its_lines_and_read_in_the_others(trajectory):
    options = ExampleOptions(**ROW, gamma=GAMMA, failure_reward=-1.0)
    examples = to_examples(trajectory, 0.0, options)
    lines = leaf_paths(trajectory)
    assert len(examples) == len(lines)
    seen = set()
    for example, line in zip(examples, lines, strict=True):
        assert example["kind"].tolist() == [CONTEXT if n in seen else RL for n in line]
        assert (example["lines"] == len(lines)).all()
        seen.update(line)


def test_lines_are_marked_only_where_an_episode_has_several():
    alone = Trajectory("t", "f", [turn(1), turn(2)], 1.0, "success")
    forked = branching()
    assert packed([alone]).lines_BC is None
    batch = packed([alone, forked])
    parts = microbatches(batch, 4)
    counts = np.unique(np.concatenate([part.lines_BC[part.valid_BC] for part in parts]))
    assert counts.tolist() == [1.0, 2.0]


def turn(token, **fields):
    return Chunk([token], [token + 100], [-0.5], versions=[(1, 0, 1)], **fields)


def branching():
    return Trajectory(
        "t", "f", [turn(1), turn(2), turn(3, parent=0, edge="rewind")], 1.0, "success"
    )


def test_rows_that_would_train_a_token_twice_or_never_are_refused():
    trajectory = branching()
    options = ExampleOptions(**ROW, gamma=GAMMA, failure_reward=-1.0)
    examples = to_examples(trajectory, 0.0, options)
    kinds_K = np.full(3, RL)
    for wrong, trained in ((examples * 2, 6), (examples[:1], 2)):
        with pytest.raises(ValueError, match=f"would train {trained} tokens of 3 that were"):
            lines_module._check_trained_once(trajectory, trajectory.turns, kinds_K, wrong)


def test_each_line_must_fit_a_row_and_not_their_sum():
    assert fits_row(branching(), 4, 2) and packed([branching()], row_length=4).num_rows == 2
    assert not fits_row(branching(), 3, 2) and not fits_row(branching(), 4, 1)
    with pytest.raises(ValueError, match="has 4 tokens but row_length is 3"):
        packed([branching()], row_length=3)


def test_routes_of_a_shared_prefix_lie_in_each_of_its_lines():
    trajectory = branching()
    for number, chunk in enumerate(trajectory.chunks):
        chunk.routes = np.full((2, 1, 1), number + 1, np.uint8)
    config = dataclasses.replace(PRESETS["tiny"], num_layers=1, num_experts=9, experts_per_token=1)
    batch = packed([trajectory], row_length=4, routes_for=config)
    first, second = batch.routes_BTLk[..., 0, 0].tolist()
    assert [first, second] == [[1, 1, 2, 2], [1, 1, 3, 3]]


def test_the_state_of_a_turn_is_what_its_own_line_has_seen():
    first, second, third = anchor_states(branching(), "history")
    alone = Trajectory("t", "f", [turn(1), turn(3)], 1.0, "success")
    assert anchor_states(alone, "history") == [first, third] and second != third


@pytest.mark.parametrize("parent", [1, 2, -3])
def test_a_parent_that_is_no_earlier_chunk_is_refused(parent):
    with pytest.raises(ValueError, match=f"chunk 1 has parent {parent}"):
        Trajectory("t", "f", [turn(1), turn(2, parent=parent)], 1.0, "success")


def test_a_rewind_to_nothing_and_an_unknown_edge_are_refused():
    with pytest.raises(ValueError, match="chunk 0 of t rewinds to no chunk"):
        Trajectory("t", "f", [turn(1, edge="rewind")], 1.0, "success")
    with pytest.raises(ValueError, match="edge 'return' unknown"):
        turn(1, edge="return")


@given(shapes())
@quickly
def test_parents_resolve_to_earlier_chunks(shape):
    resolved = resolve_parents([parent for parent, _ in shape])
    for number, (parent, _) in enumerate(shape):
        expected = number - 1 if parent == LAST and number else parent
        assert resolved[number] == (ROOT if expected == LAST else expected)


def test_credit_is_read_from_a_text():
    assert parse_credit("") == {}
    assert parse_credit("subagent:0.5  rewind:0") == {"subagent": 0.5, "rewind": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "subagent",
        "subagent:x",
        "subagent:-1",
        "subagent:inf",
        "continuation:1",
        "rewind:1 rewind:2",
        "return:1",
        "subagent:nan",
    ],
)
def test_credit_that_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match="is no credit of an edge"):
        parse_credit(text)
