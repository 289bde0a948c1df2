"""What episodes and turns are worth within their group, against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.advantages import anchor_states, chunk_returns, group_advantages
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory

LIST, MAKE = (
    {"name": "bash", "arguments": {"command": "ls"}},
    {"name": "bash", "arguments": {"command": "touch a"}},
)
SMALL = 1e-6


def episode(*turns, reward=1.0, group=0, ending="success", kind="rl"):
    """Of turns (tokens read, call)."""
    chunks = [
        Chunk(prompt_ids=list(read), action_ids=[7], logprobs=[-1.0], tool_call=call, kind=kind)
        for read, call in turns
    ]
    return Trajectory(
        task="t", family="f", chunks=chunks, reward=reward, ending=ending, group=group
    )


def of(rewards, estimator, groups=None):
    step = [
        episode(([1], None), reward=reward, group=group)
        for reward, group in zip(rewards, groups or [0] * len(rewards), strict=True)
    ]
    return [float(advantage) for (advantage,) in group_advantages(step, -1.0, estimator)]


def test_episodes_are_compared_within_their_group_and_one_alone_with_nobody():
    spread = np.std([1, -1, -1], ddof=1) + SMALL
    groups = [0, 0, 0, 1, 2, 2]
    rewards = (1, 0, 0, 1, 0.5, 0.5)
    np.testing.assert_allclose(
        of(rewards, "normalised", groups),
        [4 / 3 / spread, -2 / 3 / spread, -2 / 3 / spread, 0, 0, 0],
    )
    np.testing.assert_allclose(of(rewards, "centred", groups), [4 / 3, -2 / 3, -2 / 3, 0, 0, 0])
    np.testing.assert_allclose(
        of(rewards, "leave_one_out", groups), [1 - -1, -1 - 0, -1 - 0, 0, 0, 0]
    )


@given(rewards=st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_advantages_of_a_group_add_up_to_nothing_and_leave_one_out_leaves_one_out(rewards):
    seen = [reward if reward > 0 else -1.0 for reward in rewards]
    for estimator in ("normalised", "centred", "leave_one_out"):
        assert sum(of(rewards, estimator)) == pytest.approx(0, abs=1e-9)
    others = [seen[i] - np.mean(seen[:i] + seen[i + 1 :]) for i in range(len(seen))]
    np.testing.assert_allclose(of(rewards, "leave_one_out"), others, atol=1e-12)


def test_turns_taken_in_the_same_state_are_compared_by_their_discounted_returns():
    """Both begin alike; they part after the first call, so that the second turn of each stands
    alone.
    """
    won = episode(([1], LIST), ([2], MAKE), ([3], None), reward=1.0)
    lost = episode(([1], MAKE), ([2], MAKE), reward=0.0, ending="failure")
    advantages = group_advantages([won, lost], -1.0, "steps", gamma=0.5)
    whole = 1.0 / (np.std([1, -1], ddof=1) + SMALL)  # half of 2 away from the mean
    first = (0.25 - 0) / 2 / (np.std([0.25, 0], ddof=1) + SMALL)
    np.testing.assert_allclose(advantages[0], [whole + first, whole, whole])
    np.testing.assert_allclose(advantages[1], [-whole - first, -whole])


def test_failures_alone_teach_nothing_however_long_they_took():
    lost = [
        episode(*[([1], LIST), ([2], LIST), ([2], LIST)][:turns], reward=0.0, ending="failure")
        for turns in (1, 2, 3)
    ]
    assert not np.concatenate(group_advantages(lost, -1.0, "steps", gamma=0.5)).any()


def test_where_the_observation_is_the_state_equal_observations_meet_wherever_they_come_from():
    won = episode(([1], LIST), ([2], MAKE), reward=1.0)
    lost = episode(([1], MAKE), ([2], MAKE), reward=0.0, ending="failure")
    by_history, by_observation = (
        group_advantages([won, lost], -1.0, "steps", gamma=0.5, anchor=anchor)
        for anchor in ("history", "observation")
    )
    assert by_history[0][1] < by_observation[0][1] and by_history[1][1] > by_observation[1][1]
    np.testing.assert_allclose(by_history[0][0], by_observation[0][0])


def test_a_state_is_what_was_carried_out_and_seen_and_not_how_it_was_said():
    one = episode(([1], LIST), ([2], None), ([4], None))
    two = episode(([1], dict(reversed(LIST.items()))), ([2], None), ([5], None))
    two.chunks[0].action_ids, two.chunks[0].logprobs = [8, 9], [-1.0, -2.0]
    assert anchor_states(one, "history")[:2] == anchor_states(two, "history")[:2]
    assert anchor_states(one, "history")[2] != anchor_states(two, "history")[2]
    split = episode(([1, 2], None)), episode(([1], None), ([2], None))
    assert anchor_states(split[0], "history")[0] != anchor_states(split[1], "history")[1]


def test_states_of_different_groups_never_meet_and_shown_turns_are_not_compared():
    won, lost = (
        episode(([1], LIST), reward=1.0),
        episode(([1], LIST), reward=0.0, group=1, ending="failure"),
    )
    assert [list(a) for a in group_advantages([won, lost], -1.0, "steps")] == [[0.0], [0.0]]
    shown = episode(([1], LIST), reward=1.0, kind="context")
    lost.group = 0
    whole = 1.0 / (np.std([1, -1], ddof=1) + SMALL)
    np.testing.assert_allclose(
        np.concatenate(group_advantages([shown, lost], -1.0, "steps")), [whole, -whole]
    )  # the step level has one turn only


def test_each_turn_carries_its_own_advantage_into_its_row():
    won, lost = (
        episode(([1], LIST), ([2], MAKE), reward=1.0),
        episode(([1], MAKE), reward=0.0, ending="failure"),
    )
    options = dict(row_length=8, chunks_per_row=4, gamma=0.5, failure_reward=-1.0)
    batch = pack([won, lost], **options, advantage="steps")
    expected = group_advantages([won, lost], -1.0, "steps", gamma=0.5)
    np.testing.assert_allclose(
        batch.advantage_BC[batch.valid_BC], np.concatenate(expected), rtol=1e-6
    )
    with pytest.raises(ValueError, match="'best' or anchor 'history' unknown"):
        pack([won], **options, advantage="best")


def test_an_episode_that_reached_for_the_network_is_worth_less():
    """The cost is taken once a turn, whatever the number of attempts, and a success that costs more
    than it earned is a failure.
    """
    step = [episode(([1], LIST), reward=reward, group=0) for reward in (1.0, 1.0, 0.0)]
    step[1].chunks[0].network_denials = 3
    np.testing.assert_allclose(
        group_advantages(step, -1.0, "centred", safety_cost={"egress": 1.5}),
        np.array([[1.0], [-0.5], [-1.0]]) + 0.5 / 3,
    )
    batch = pack(
        step,
        row_length=2,
        chunks_per_row=1,
        gamma=1.0,
        failure_reward=-1.0,
        safety_cost={"egress": 1.5},
    )
    assert sorted(zip(batch.reward_BC.ravel(), batch.sign_BC.ravel(), strict=True)) == [
        (-1, -1),
        (-0.5, -1),
        (1, 1),
    ]
    assert sorted(
        pack(step, row_length=2, chunks_per_row=1, gamma=1.0, failure_reward=-1.0).reward_BC.ravel()
    ) == [-1, 1, 1]


def test_returns_discount_per_chunk_and_end_with_the_reward_itself():
    np.testing.assert_allclose(chunk_returns(2.0, 3, 0.5), [0.5, 1.0, 2.0])
    np.testing.assert_allclose(chunk_returns(-1.0, 2, 1.0), [-1.0, -1.0])
