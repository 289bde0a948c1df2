"""A verifier that is wrong about a share of the tasks."""

import pytest

from benchmarks.wrong_rewards import WrongReward
from rome.data.trajectory import Trajectory

TASKS = [f"terminal#count/{number}" for number in range(2000)]


def episode(task, reward):
    return Trajectory(task, "count", [], reward, "success" if reward else "failure")


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_the_stated_share_of_tasks_is_turned_round_whole(rate):
    reward = WrongReward(rate)
    wrong = {task for task in TASKS if reward(episode(task, 0.0)) == 1.0}
    assert len(wrong) / len(TASKS) == pytest.approx(rate, abs=0.03)
    assert {task for task in TASKS if reward(episode(task, 1.0)) == -1.0} == wrong


def test_the_choice_depends_on_the_seed_and_not_on_the_process():
    chosen = [[WrongReward(0.3, seed=seed).is_wrong(task) for task in TASKS] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert WrongReward(0.3, failure=0.0)(episode(TASKS[chosen[0].index(False)], 0.0)) == 0.0


def test_a_rate_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"rate=30\.0 is no share"):
        WrongReward(rate=30.0)
