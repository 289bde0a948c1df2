"""The reward of own code: asked beside the event loop, never waited for without end."""

import asyncio
import threading

import pytest

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout import reward
from rome.rollout.episode import RolloutError
from rome.rollout.outcomes import chosen_episodes, rollout_metrics


def episode(group=0, number=0):
    chunk = Chunk([1], [2, 3], [-0.5, -0.5], [(0, 0, 2)])
    return Trajectory("t/0", "t", [chunk], 0.0, "failure", group=group, episode=number)


def test_many_slow_answers_are_waited_for_together():
    all_asked = threading.Barrier(20)

    def slow(trajectory):
        all_asked.wait(30)  # broken, unless all of them are asked at once
        return float(trajectory.episode)

    async def ask_all():
        return await asyncio.gather(*(reward.ask(slow, episode(number=n)) for n in range(20)))

    assert asyncio.run(ask_all()) == [float(number) for number in range(20)]


def test_one_that_hangs_ends_the_step_with_a_line_that_names_it(monkeypatch):
    monkeypatch.setattr(reward, "REWARD_SECONDS", 0.1)
    forever = threading.Event()
    with pytest.raises(RolloutError, match=r"reward of own code took longer than 0 s .* of t/0"):
        asyncio.run(reward.ask(lambda _: forever.wait(), episode()))
    forever.set()


def test_what_own_code_raises_is_raised():
    def fails(_):
        raise KeyError("score")

    with pytest.raises(KeyError, match="score"):
        asyncio.run(reward.ask(fails, episode()))


def test_a_filter_sees_one_group_at_a_time_and_order_is_kept():
    first, second = [episode(0, n) for n in range(3)], [episode(1, n) for n in range(2)]
    mixed = [first[0], second[0], first[1], second[1], first[2]]
    seen = []

    def choose(members):
        seen.append(len(members))
        return members[::-1][:2] if len(members) == 3 else []

    assert chosen_episodes(mixed, choose) == [first[1], first[2]]
    assert sorted(seen) == [2, 3]


def test_the_mean_of_own_rewards_is_a_metric_where_there_are_any():
    plain, shaped = episode(), episode(number=1)
    assert "training_reward" not in rollout_metrics([plain], 1, 1.0)
    shaped.training_reward = 0.25
    assert rollout_metrics([plain, shaped], 1, 1.0)["training_reward"] == 0.25
