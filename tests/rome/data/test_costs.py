"""Costs of events: who pays for them, and how they enter returns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.data.costs import chunk_costs, discounted_costs, parse_costs
from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory


def trajectory(events, reward=1.0, kinds=None):
    chunks = []
    for place, kinds_of_harm in enumerate(events):
        chunk = Chunk([1], [2], [0.0], versions=[(0, 0, 1)], events=list(kinds_of_harm))
        chunk.kind = kinds[place] if kinds else "rl"
        chunks.append(chunk)
    return Trajectory("task", "family", chunks, reward, "success" if reward > 0 else "failure")


def features(one, **options):
    batch = pack([one], row_length=8, chunks_per_row=4, gamma=0.5, failure_reward=-1.0, **options)
    count = len(one.chunks)
    return batch.return_BC[0, :count], batch.sign_BC[0, :count], batch.reward_BC[0, :count]


def test_a_text_of_costs_is_read_and_anything_else_is_refused():
    assert parse_costs("") == {}
    assert parse_costs("egress:1 secret_sent:2.5") == {"egress": 1.0, "secret_sent": 2.5}
    for text in ("egress", "egress:", "egress:-1", "egress:nan", "a:1 a:2", "inf:inf", ":1"):
        with pytest.raises(ValueError, match="no cost of a kind"):
            parse_costs(text)


def test_a_turn_pays_in_full_earlier_ones_discounted_and_later_ones_nothing():
    one = trajectory([[], ["mining"], []])
    returns, signs, rewards = features(one, safety_cost={"mining": 2.0})
    np.testing.assert_allclose(returns, [0.25 - 1.0, 0.5 - 2.0, 1.0])
    np.testing.assert_allclose(rewards, [-1.0] * 3)
    np.testing.assert_allclose(signs, [-1.0] * 3)
    returns, signs, _ = features(one, safety_cost={"mining": 0.75})
    np.testing.assert_allclose(returns, [0.25 - 0.375, 0.5 - 0.75, 1.0])
    np.testing.assert_allclose(signs, [-1.0, -1.0, 1.0])


def test_without_costs_nothing_changes():
    one = trajectory([["mining"], ["egress"]])
    for options in ({}, {"safety_cost": {"tests": 9.0}}):
        returns, signs, rewards = features(one, **options)
        np.testing.assert_allclose(returns, [0.5, 1.0])
        np.testing.assert_allclose(rewards, [1.0, 1.0])
        np.testing.assert_allclose(signs, [1.0, 1.0])


def test_a_refused_address_is_the_event_egress_once_a_turn():
    one = trajectory([["egress"], []])
    one.chunks[0].network_denials = 5
    one.chunks[1].network_denials = 1
    np.testing.assert_allclose(chunk_costs(one, {"egress": 2.0}), [2.0, 2.0])


def test_a_replayed_prefix_is_not_charged():
    one = trajectory([["mining"], ["mining"]], kinds=["context", "rl"])
    np.testing.assert_allclose(chunk_costs(one, {"mining": 1.0}), [0.0, 1.0])


def test_events_are_kept_in_the_file_of_an_episode(tmp_path):
    one = trajectory([["mining", "egress"], []])
    save_trajectory(one, tmp_path / "one.json")
    again = load_trajectory(tmp_path / "one.json")
    assert [chunk.events for chunk in again.chunks] == [["mining", "egress"], []]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0.1, 1.0, exclude_min=True))
def test_discounted_costs_are_those_of_the_definition(costs, gamma):
    wanted = [
        sum(gamma ** (later - place) * costs[later] for later in range(place, len(costs)))
        for place in range(len(costs))
    ]
    np.testing.assert_allclose(discounted_costs(np.array(costs), gamma), wanted)
