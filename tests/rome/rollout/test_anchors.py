"""Resampling: where episodes begin, what is crucial, what is shown where a fork fails."""

import random

import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.anchors import Anchors, anchor_of, crucial_chunks, fisher_less, fork_imitation


def played(task, chunks, anchor=0, reward=0.0):
    kinds = ["context"] * anchor + ["rl"] * (chunks - anchor)
    return Trajectory(
        task,
        "f",
        [Chunk([1], [2], [-0.5], [(1, 0, 1)], kind=kind) for kind in kinds],
        reward,
        "success" if reward else "failure",
    )


def source_of(trajectory):
    return f"file {len(trajectory.chunks)}"


def observe(anchors, group):
    hard = anchors.tasks.get(group[0].task)
    anchors.observe(group, hard.source if hard else "", source_of)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_fishers_test_is_scipys(wins, losses, other_wins, other_losses):
    expected = scipy.stats.fisher_exact(
        [[wins, losses], [other_wins, other_losses]], alternative="less"
    ).pvalue
    assert fisher_less(wins, wins + losses, other_wins, other_wins + other_losses) == pytest.approx(
        expected, rel=1e-9
    )


def test_a_chunk_is_crucial_where_success_jumps_and_not_where_chance_explains_it():
    assert crucial_chunks(
        {0: [False] * 8, 1: [False] * 8, 2: [True] * 7 + [False], 3: [True] * 8}
    ) == [1]
    assert crucial_chunks({0: [False, False], 1: [True, False]}) == []
    assert (
        crucial_chunks({0: [True] * 8, 1: [False] * 8}) == []
    )  # worse afterwards is no reason to begin before it
    assert crucial_chunks({}) == []


def test_parallel_anchors_are_spread_and_half_of_them_go_before_a_crucial_chunk():
    anchors = Anchors("parallel", 4)
    anchors.enter("a/1", "expert.json", 4)
    assert anchors.choose(3, random.Random(0)) == [("a/1", "expert.json", (0, 1, 2, 3))]
    anchors.tasks["a/1"].outcomes = {0: [False] * 8, 1: [False] * 8, 2: [False] * 8, 3: [True] * 8}
    assert anchors.choose(1, random.Random(0))[0][2] == (0, 2, 2, 2)
    anchors.enter("b/1", "x", 9)
    assert {anchors for _, _, anchors in anchors.choose(2, random.Random(0))} == {
        (0, 2, 2, 2),
        (0, 2, 4, 6),
    }


def test_rollback_begins_at_the_last_chunk_and_goes_back_as_success_recovers():
    anchors = Anchors("rollback", 2)
    anchors.enter("a/1", "expert.json", 3)
    seen = []
    for rewards in ([0, 0], [1, 0], [0, 0], [1, 1], [1, 1]):
        ((_, _, begin),) = anchors.choose(1, random.Random(0))
        seen.append(begin)
        observe(anchors, [played("a/1", 3, begin[0], reward) for reward in rewards])
    assert seen == [(2, 2), (2, 2), (1, 1), (1, 1), (0, 0)]
    assert not anchors.tasks  # solved from the beginning


def test_a_task_that_the_policy_solves_from_the_beginning_is_done_with_and_others_stay():
    anchors = Anchors("parallel", 2)
    anchors.enter("a/1", "expert.json", 3)
    observe(anchors, [played("other/1", 3, reward=1.0)])
    observe(anchors, [played("a/1", 4, 0), played("a/1", 4, 2, 1.0)])
    assert list(anchors.tasks) == ["a/1"]
    observe(anchors, [played("a/1", 4, 0, 1.0), played("a/1", 4, 2, 1.0)])
    assert not anchors.tasks


def test_the_source_is_refreshed_by_a_success_that_is_not_longer():
    anchors = Anchors("parallel", 2)
    anchors.enter("a/1", "expert.json", 4)
    observe(anchors, [played("a/1", 5, 1, 1.0)])
    assert anchors.tasks["a/1"].source == "expert.json"
    observe(anchors, [played("a/1", 4, 1, 1.0)])
    assert anchors.tasks["a/1"].source == "file 4" and set(anchors.tasks["a/1"].outcomes) == {1}
    observe(anchors, [played("a/1", 3, 1, 1.0), played("a/1", 6)])
    assert (anchors.tasks["a/1"].chunks, set(anchors.tasks["a/1"].outcomes)) == (3, {0})


def test_a_success_with_branches_is_no_source():
    anchors = Anchors("parallel", 2)
    anchors.enter("a/1", "expert.json", 4)
    branching = played("a/1", 4, 1, 1.0)
    branching.chunks[3].parent = 1
    observe(anchors, [branching])
    task = anchors.tasks["a/1"]
    assert (task.source, task.outcomes) == ("expert.json", {1: [True]})


def test_what_is_known_survives_json():
    import json

    anchors, again = Anchors("parallel", 2), Anchors("parallel", 2)
    anchors.enter("a/1", "expert.json", 4)
    observe(anchors, [played("a/1", 4, 1, 1.0), played("a/1", 4, 0)])
    again.load(json.loads(json.dumps(anchors.to_json())))
    assert again.tasks == anchors.tasks


@pytest.mark.parametrize(
    "rewards, shown",
    [
        ({0: 0, 1: 0, 2: 1}, 2),
        ({0: 1, 1: 0, 2: 0}, 3),
        ({0: 0, 1: 1, 2: 1}, 1),
        ({0: 0, 1: 1, 2: 0}, 3),
        ({0: 1, 1: 1}, None),
    ],
)
def test_imitation_reaches_to_the_last_fork_without_a_success(rewards, shown):
    source = played("a/1", 4, reward=1.0)
    imitated = fork_imitation(
        source, [played("a/1", 4, anchor, float(reward)) for anchor, reward in rewards.items()]
    )
    if shown is None:
        assert imitated is None
    else:
        assert [chunk.kind for chunk in imitated.chunks] == ["imitation"] * shown + ["context"] * (
            4 - shown
        )
        assert all(not chunk.versions for chunk in imitated.chunks) and imitated.reward == 1.0


def test_the_anchor_of_a_trajectory_is_what_it_was_led_along():
    assert [anchor_of(played("a/1", 4, anchor)) for anchor in (0, 2, 4)] == [0, 2, 4]


def test_a_group_led_along_an_earlier_source_says_nothing_about_the_anchors_of_a_shorter_one():
    anchors = Anchors("parallel", 8)
    anchors.enter("a/1", "expert.json", 6)
    observe(anchors, [played("a/1", 3, 1, 1.0)])  # three chunks are enough
    late = (
        [played("a/1", 6, 4) for _ in range(8)]
        + [played("a/1", 6, 5, 1.0) for _ in range(8)]
        + [played("a/1", 6)]
    )
    anchors.observe(late, "expert.json", source_of)
    assert anchors.tasks["a/1"].outcomes == {0: [False]}
    assert (
        max(anchors.choose(1, random.Random(0))[0][2]) < 3
    )  # the whole source would leave nothing to play
    observe(anchors, [played("a/1", 3, 2, 1.0)])
    anchors.observe(
        [played("a/1", 3, 2)], "file 3", source_of
    )  # as long, and newer ones took its place meanwhile
    assert anchors.tasks["a/1"].outcomes[2] == [True, False]
