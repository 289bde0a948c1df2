"""Demonstrations: what the infrastructure spoils is played again, a failed one is an error."""

import asyncio

import pytest

from envs.rock import SandboxConfig
from envs.tasks.terminal.env import TerminalEnv
from rome.rollout import demonstrations
from rome.rollout.episode import RolloutError
from tests.rome.rollout.worlds import CHAT


class Losing(TerminalEnv):
    """Loses its sandbox in the middle of the first `lost` episodes."""

    lost = 0

    async def astep(self, action):
        if Losing.lost > 0:
            Losing.lost -= 1
            await self._sandbox.stop()
        return await super().astep(action)


def collect(tmp_path):
    def make_env(task):
        return Losing(task, SandboxConfig(isolation="best_available"))

    return asyncio.run(
        demonstrations.collect_demonstrations(
            ["count/3"],
            make_env,
            CHAT,
            error_rate=0.0,
            concurrency=1,
            record=lambda number: tmp_path / f"{number}.json",
        )
    )


def test_a_demonstration_whose_sandbox_is_lost_plays_again(tmp_path):
    Losing.lost = demonstrations.ATTEMPTS - 1
    (trajectory,) = collect(tmp_path)
    assert trajectory.reward == 1.0 and Losing.lost == 0


def test_a_sandbox_that_is_lost_every_time_ends_the_run_with_its_cause(tmp_path):
    Losing.lost = 100
    with pytest.raises(RolloutError, match="count/3 ended as infra_sandbox"):
        collect(tmp_path)
    assert Losing.lost == 100 - demonstrations.ATTEMPTS and not list(tmp_path.iterdir())
    Losing.lost = 0
