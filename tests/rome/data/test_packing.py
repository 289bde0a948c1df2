"""Rows hold every trainable trajectory once and whole."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.batch import CONTEXT, IMITATION, RL
from rome.data.lines import fits_row
from rome.data.packing import Batch, microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.model.config import PRESETS

quickly = settings(max_examples=40, deadline=None, derandomize=True)
MODEL = dataclasses.replace(PRESETS["tiny"], num_layers=3, num_experts=7, experts_per_token=2)


def trajectory(*turns, reward=1.0, ending="success", group=0, **chunk_fields):
    """One chunk for each (prompt length, action length)."""
    chunks = [
        Chunk(
            list(range(10, 10 + read)),
            list(range(20, 20 + acted)),
            [-0.25 * (i + 1) for i in range(acted)],
            versions=[(3, 0, acted)] if acted else [],
            **chunk_fields,
        )
        for read, acted in turns
    ]
    return Trajectory("count/1", "count", chunks, reward, ending, group=group)


def packed(trajectories, **changes):
    return pack(
        trajectories,
        **{"row_length": 24, "chunks_per_row": 5, "gamma": 0.5, "failure_reward": -1.0} | changes,
    )


@st.composite
def steps(draw):
    turns = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)
    lists = draw(
        st.lists(
            st.tuples(
                turns,
                st.sampled_from([0.0, 1.0, 0.5]),
                st.sampled_from(["success", "failure", "infra_engine"]),
            ),
            max_size=12,
        )
    )
    made, next_token = [], iter(range(1, 10_000))
    for number, (shape, reward, ending) in enumerate(lists):
        chunks = []
        for read, acted in shape:
            chunk_ids = [[next(next_token) for _ in range(n)] for n in (read, acted)]
            chunks.append(
                Chunk(*chunk_ids, [-float(i) for i in chunk_ids[1]], versions=[(number, 0, acted)])
            )
        made.append(
            Trajectory(f"t{number}", "f", chunks, reward, ending, group=number % 3, episode=number)
        )
    return made


def unpack(batch):
    """Each segment of each row, as plain values."""
    found = []
    for b in range(batch.num_rows):
        for segment in range(1, batch.segments_BT[b].max(initial=0) + 1):
            at, chunks = batch.segments_BT[b] == segment, batch.trajectory_BC[b] == segment
            ids = batch.chunk_ids_BT[b][at]
            assert (np.diff(np.flatnonzero(at)) == 1).all(), "a segment is not in one piece"
            np.testing.assert_array_equal(batch.positions_BT[b][at], np.arange(at.sum()))
            np.testing.assert_array_equal(np.unique(ids[ids >= 0]), np.flatnonzero(chunks))
            found.append(
                {
                    "tokens": batch.tokens_BT[b][at].tolist(),
                    "mask": batch.action_mask_BT[b][at].tolist(),
                    "chunk": (ids - ids[ids >= 0].min() * (ids >= 0)).tolist(),
                    "rollout": batch.logp_rollout_BT[b][at].tolist(),
                    "version": batch.version_BT[b][at].tolist(),
                    "returns": batch.return_BC[b][chunks].tolist(),
                    "sign": batch.sign_BC[b][chunks].tolist(),
                    "reward": batch.reward_BC[b][chunks].tolist(),
                }
            )
    return sorted(found, key=lambda one: one["tokens"])


def expected(trajectory, number):
    reward = trajectory.reward if trajectory.reward > 0 else -1.0
    one = {"tokens": [], "mask": [], "chunk": [], "rollout": [], "version": []}
    for k, chunk in enumerate(trajectory.chunks):
        read, acted = len(chunk.prompt_ids), len(chunk.action_ids)
        one["tokens"] += chunk.prompt_ids + chunk.action_ids
        one["mask"] += [False] * read + [True] * acted
        one["chunk"] += [-1] * read + [k] * acted
        one["rollout"] += [0.0] * read + chunk.logprobs
        one["version"] += [0] * read + [number] * acted
    count = len(trajectory.chunks)
    return one | {
        "returns": [reward * 0.5 ** (count - 1 - k) for k in range(count)],
        "sign": [1.0 if trajectory.reward > 0 else -1.0] * count,
        "reward": [reward] * count,
    }


# Fields that linear episodes without routes do not have.
OPTIONAL = set(Batch._field_defaults)


@given(steps())
@quickly
def test_what_is_packed_can_be_unpacked_nothing_lost_nothing_twice(made):
    batch = packed(made)
    assert unpack(batch) == sorted(
        (expected(t, n) for n, t in enumerate(made) if t.trainable), key=lambda one: one["tokens"]
    )
    padding_BT, padding_BC = batch.segments_BT == 0, ~batch.valid_BC
    assert {name for name, field in batch._asdict().items() if field is None} == OPTIONAL
    for name, field in batch._asdict().items():
        if name in OPTIONAL:
            continue
        on_padding = field[padding_BT if name.endswith("_BT") else padding_BC]
        assert (on_padding == (-1 if name == "chunk_ids_BT" else 0)).all(), name


def routes_of(tokens):
    """[..., L, k], other ones for every token."""
    tokens = np.asarray(tokens, int)[..., None, None]
    return ((tokens + np.arange(3)[:, None] + np.array([0, 3])) % 7 + 1).astype(np.uint8)


def routed(made):
    for trajectory in made:
        for chunk in trajectory.chunks:
            chunk.routes = routes_of(chunk.prompt_ids + chunk.action_ids)
    return made


@given(steps(), st.integers(1, 5))
@quickly
def test_routes_lie_where_their_tokens_lie_and_padding_has_none(made, rows):
    batch = packed(routed(made), routes_for=MODEL)
    for part in microbatches(batch, rows):
        assert part.routes_BTLk.shape == (rows, 24, 3, 2) and part.routes_BTLk.dtype == np.uint8
        real_BT = part.segments_BT > 0
        np.testing.assert_array_equal(
            part.routes_BTLk, routes_of(part.tokens_BT) * real_BT[:, :, None, None]
        )
    for field, plain in zip(batch._replace(routes_BTLk=None), packed(made), strict=True):
        np.testing.assert_array_equal(field, plain)


@given(steps(), st.integers(1, 3), st.integers(0, 2))
@quickly
def test_routes_are_fetched_for_own_rows_only(made, processes, process):
    whole = packed(routed(made), routes_for=MODEL)
    bare = [dataclasses.replace(one, chunks=[*one.chunks]) for one in made]
    for one in bare:
        one.chunks[:] = [dataclasses.replace(chunk, routes=None) for chunk in one.chunks]
    with_routes = {id(one): routed_one for one, routed_one in zip(bare, made, strict=True)}
    fetched = []

    def load(trajectory):
        fetched.append(trajectory)
        return with_routes[id(trajectory)]

    part = packed(
        bare,
        routes_for=MODEL,
        is_own_row=lambda row: row % processes == process,
        load_routes=load,
    )
    own_B = np.arange(part.num_rows) % processes == process
    expected = np.where(own_B[:, None, None, None], whole.routes_BTLk, 0)
    np.testing.assert_array_equal(part.routes_BTLk, expected)
    segments = part.segments_BT[own_B].max(axis=1, initial=0).sum()
    assert len(fetched) == len({id(one) for one in fetched}) == segments


def test_tokens_that_no_engine_was_asked_about_have_no_routes():
    sampled, expert = routed([trajectory((1, 2), (3, 0), (1, 1), (2, 0))])[0], trajectory((1, 1))
    expert.chunks[0].versions = []
    sampled.chunks[-2].routes[-1] = 0  # the last token that was drawn
    batch = packed([sampled, expert], routes_for=MODEL)
    has_BT = (batch.routes_BTLk > 0).all(axis=(2, 3))
    assert has_BT[0, :10].tolist() == [True] * 7 + [False] * 3 and not has_BT[0, 10:].any()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda chunk: setattr(chunk, "routes", None),
            r"trajectory count/1 .* was sampled without routes.*--enable-return-routed-experts",
        ),
        (
            lambda chunk: chunk.routes.__setitem__((0, 0, 0), 8),
            (
                "trajectory count/1 .*: routes name expert 7; this model has experts 0 to 6; it was"
                " sampled by another model"
            ),
        ),
        (
            lambda chunk: setattr(chunk, "routes", chunk.routes.astype(np.uint16)),
            "trajectory count/1 .*: routes are uint16",
        ),
    ],
)
def test_routes_that_this_model_cannot_replay_are_refused_by_name(spoil, message):
    bad = routed([trajectory((1, 2))])[0]
    spoil(bad.chunks[0])
    with pytest.raises(ValueError, match=message):
        packed([bad], routes_for=MODEL)


@given(steps(), st.integers(1, 5))
@quickly
def test_micro_batches_have_one_shape_and_all_rows(made, rows):
    batch = packed(made)
    parts = microbatches(batch, rows)
    assert len(parts) == -(-batch.num_rows // rows)
    assert all(
        part.tokens_BT.shape == (rows, 24) and part.valid_BC.shape == (rows, 5) for part in parts
    )
    assert sorted(
        (one for part in parts for one in unpack(part)), key=lambda one: one["tokens"]
    ) == unpack(batch)


@given(steps())
@quickly
def test_packing_is_deterministic(made):
    for left, right in zip(packed(made), packed(made), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_longest_go_first_so_that_rows_are_full():
    assert (
        packed([trajectory((acted, 5)) for acted in (5, 5, 9, 9)]).num_rows == 2
    )  # 10 + 14 twice; in the order given it takes 3


def test_a_row_is_full_when_its_chunks_are():
    batch = packed([trajectory((1, 1), (1, 1), (1, 1)), trajectory((1, 1), (1, 1), (1, 1))])
    assert batch.num_rows == 2 and batch.valid_BC.sum(1).tolist() == [3, 3]


def test_a_chunk_without_a_sampled_token_is_context_of_the_next():
    batch = packed([trajectory((2, 2), (3, 0), (1, 1), (4, 0))])
    assert batch.valid_BC.sum() == 2
    assert (
        batch.chunk_ids_BT[0, :8].tolist() == [-1, -1, 0, 0, -1, -1, -1, -1]
        and batch.chunk_ids_BT[0, 8] == 1
    )
    assert (batch.segments_BT > 0).sum() == 9  # what nobody answered is left out
    assert batch.return_BC[0, :2].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("too_much", "message"),
    [
        ([(20, 5)], "count/1 .* has 25 tokens but row_length is 24; raise row_length"),
        ([(1, 1)] * 6, "has 6 chunks but chunks_per_row is 5; raise chunks_per_row"),
        ([(0, 2)], "begins with a sampled token"),
    ],
)
def test_a_trajectory_that_no_row_can_hold_is_refused_by_name(too_much, message):
    with pytest.raises(ValueError, match=message):
        packed([trajectory((1, 1)), trajectory(*too_much)])


@pytest.mark.parametrize(
    ("turns", "fits"),
    [([(19, 5)], True), ([(20, 5)], False), ([(1, 1)] * 5, True), ([(1, 1)] * 6, False)],
)
def test_a_row_says_what_it_can_hold(turns, fits):
    one = trajectory(*turns)
    assert fits_row(one, 24, 5) is fits
    if fits:
        assert packed([one]).num_rows == 1


def test_a_logprob_that_is_not_finite_is_refused():
    bad = trajectory((1, 2))
    bad.chunks[0].logprobs[1] = float("-inf")
    with pytest.raises(ValueError, match="not finite"):
        packed([bad])


def test_a_token_without_weight_version_is_refused():
    bad = trajectory((1, 3))
    bad.chunks[0].versions = [(1, 0, 1), (2, 2, 3)]
    with pytest.raises(ValueError, match="without a weight version"):
        packed([bad])


def test_a_turn_that_spans_weight_updates_keeps_a_version_for_each_token():
    spanning = trajectory((1, 3))
    spanning.chunks[0].versions = [(1, 0, 1), (2, 1, 3)]
    assert packed([spanning]).version_BT[0, :4].tolist() == [0, 1, 2, 2]


def test_rl_learns_from_every_action_and_sft_from_sound_ones_only():
    turns = [
        trajectory((1, 1), kind=kind, status=status)
        for kind, status in (
            ("rl", "ok"),
            ("rl", "tool_error"),
            ("rl", "malformed"),
            ("imitation", "ok"),
            ("imitation", "timeout"),
            ("context", "ok"),
        )
    ]
    kinds = {
        purpose: [packed([turn], purpose=purpose).kind_BC[0, 0] for turn in turns]
        for purpose in ("rl", "sft")
    }
    assert kinds["rl"] == [RL, RL, RL, IMITATION, IMITATION, CONTEXT]
    assert kinds["sft"] == [IMITATION, CONTEXT, CONTEXT, IMITATION, CONTEXT, CONTEXT]
    with pytest.raises(ValueError, match="'dpo' unknown"):
        packed(turns, purpose="dpo")


def test_negatives_weigh_less_and_too_long_ones_are_only_read():
    won, lost = trajectory((1, 2)), trajectory((1, 2), (1, 1), reward=0.0, ending="failure")
    plain = packed([won, lost], failure_reward=-1.0, gamma=0.5)
    light = packed([won, lost], failure_reward=-1.0, gamma=0.5, negative_weight=0.25)
    failed = plain.valid_BC & (plain.sign_BC < 0)
    for name in ("return_BC", "reward_BC", "advantage_BC"):
        before, after = getattr(plain, name), getattr(light, name)
        assert before[failed].all()
        np.testing.assert_allclose(after[failed], 0.25 * before[failed])
        np.testing.assert_array_equal(after[~failed], before[~failed])
    assert (
        packed([won, lost], failure_reward=-1.0, negative_tokens=3).kind_BC == plain.kind_BC
    ).all()
    short = packed([won, lost], failure_reward=-1.0, negative_tokens=2)
    assert set(short.kind_BC[failed]) == {CONTEXT} and set(
        short.kind_BC[short.valid_BC & ~failed]
    ) == {RL}
    np.testing.assert_array_equal(short.tokens_BT, plain.tokens_BT)


def test_infrastructure_failures_enter_no_row_and_no_group_statistic():
    lost = trajectory((1, 1), reward=0.0, ending="infra_sandbox")
    won, failed = trajectory((1, 1)), trajectory((1, 1), reward=0.0, ending="failure")
    for left, right in zip(packed([won, failed]), packed([won, lost, failed, lost]), strict=True):
        np.testing.assert_array_equal(left, right)
    assert packed([lost]).num_rows == 0 and microbatches(packed([lost]), 2) == []


def test_batch_is_a_pytree_of_arrays():
    import jax

    plain = packed([trajectory((1, 1))])
    replaying = packed(routed([trajectory((1, 1))]), routes_for=MODEL)
    always = set(Batch._fields) - OPTIONAL
    assert len(jax.tree.leaves(plain)) == len(always)
    assert len(jax.tree.leaves(replaying)) == len(always | {"routes_BTLk"})
