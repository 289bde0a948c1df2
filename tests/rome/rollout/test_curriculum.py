"""The curriculum's draws: proportions, memory, determinism."""

import collections
import random

from rome.data.trajectory import Trajectory
from rome.rollout.curriculum import FLOOR, UNSOLVED, Curriculum


def seen(family, reward):
    return Trajectory(f"{family}/1", family, [], reward, "failure")


def shares(curriculum, number=20_000):
    counts = collections.Counter(curriculum.draw(number, random.Random(1)))
    return {family: count / number for family, count in counts.items()}


def test_families_are_drawn_alike_before_anything_is_known():
    assert all(abs(share - 0.25) < 0.02 for share in shares(Curriculum("abcd")).values())


def test_open_families_are_drawn_most_and_decided_ones_still_sometimes():
    measured = shares(Curriculum("abc", {"a": 0.0, "b": 0.5, "c": 1.0}))
    weights = {"a": UNSOLVED + FLOOR, "b": 0.25 + UNSOLVED / 2 + FLOOR, "c": FLOOR}
    for family, weight in weights.items():
        assert abs(measured[family] - weight / sum(weights.values())) < 0.02
    assert measured["b"] > measured["a"] > measured["c"] > 0


def test_the_estimate_follows_what_was_seen():
    curriculum = Curriculum("ab")
    curriculum.observe([seen("a", 1.0)] * 200 + [seen("b", 0.9)] * 200)
    assert curriculum.rates["a"] > 0.99 and curriculum.rates["b"] < 0.01
    curriculum.observe([seen("a", 1.0), seen("a", 0.0)] * 300)
    assert 0.4 < curriculum.rates["a"] < 0.6


def test_the_same_rates_and_seed_draw_the_same_families():
    one = Curriculum("abc")
    one.observe([seen("a", 1.0)] * 3)
    other = Curriculum("abc", dict(one.rates))
    assert one.draw(30, random.Random(4)) == other.draw(30, random.Random(4))
