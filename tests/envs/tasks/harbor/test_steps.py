"""Limits of turns and time, and tasks of several steps."""

import pytest

from envs.tasks.harbor import (
    EXAMPLES,
    HarborEnv,
    combine,
)
from tests.envs.tasks.harbor.conftest import CONFIG
from tests.envs.tasks.harbor.playing import bash, play


def test_what_was_done_counts_when_the_turns_or_the_time_are_over(harbor, run):
    reward, info = run(play(harbor(), "true", "echo x > /app/out.txt", max_turns=2))
    assert (reward, info["ending"]) == (1.0, "truncated_turns")
    assert (
        run(play(harbor(name="b"), "true", "true", max_turns=2))[1]["ending"] == "truncated_turns"
    )
    late = harbor({"task.toml": "[agent]\ntimeout_sec = 0.4\n"}, name="late")
    reward, info = run(play(late, "echo x > /app/out.txt; sleep 30"))
    assert (reward, info["ending"], info["status"]) == (1.0, "timeout", "timeout")
    assert run(play(late, "sleep 30"))[1]["ending"] == "timeout"


def test_steps_follow_each_other_in_one_world_and_tests_of_a_step_do_not_stay(run):
    async def episode():
        env = HarborEnv(EXAMPLES / "inventory-steps", CONFIG)
        first, _ = await env.areset()
        await env.astep(
            bash("awk -F, 'NR > 1 && $2 + 0 < $3 + 0 { print $1 }' $INVENTORY | sort > low.txt")
        )
        second, reward, terminated, _, info = await env.astep("done")
        seen = (await env.astep(bash("ls; ls /tests /logs/verifier /solution")))[0]
        _, last, over, _, end = await env.astep("done")
        return first, second, reward, terminated, info, seen, last, over, end

    first, second, reward, terminated, info, seen, last, over, end = run(episode())
    assert "least stock" in first and "delivery came" in second and not terminated and reward == 0.0
    assert info["step_rewards"] == [1.0] and info["step"] == "restock"
    assert (
        "deliveries-today.csv" in seen
        and "low.txt" in seen
        and "setup.sh" not in seen
        and "test.sh" not in seen
        and "reward" not in seen
    )
    assert over and last == 0.5 and end["step_rewards"] == [1.0, 0.0] and end["ending"] == "failure"


def test_a_step_below_its_least_reward_ends_the_task(run):
    reward, info = run(play(EXAMPLES / "inventory-steps"))
    assert reward == 0.0 and info["step_rewards"] == [0.0]


@pytest.mark.parametrize(
    ("rewards", "strategy", "total"),
    [
        ([1.0, 0.5], "mean", 0.75),
        ([1.0], "mean", 0.5),
        ([1.0], "final", 0.0),
        ([0.0, 1.0], "final", 1.0),
    ],
)
def test_a_step_that_was_not_reached_counts_0(rewards, strategy, total):
    assert combine(rewards, 2, strategy) == total
