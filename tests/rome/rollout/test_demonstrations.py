"""Demonstrations: what the infrastructure spoils is played again, a failed one is an error."""

import asyncio

import pytest

from envs.rock import SandboxConfig
from envs.tasks.terminal.demonstrator import DemonstrationEpisode, DemonstrationTurn
from envs.tasks.terminal.env import TerminalEnv
from rome.rollout import demonstrations
from rome.rollout.episode import SpoiledTaskError
from tests.rome.rollout.worlds import CHAT


class Losing(TerminalEnv):
    """Loses its sandbox in the middle of the first `lost` episodes."""

    lost = 0

    async def astep(self, action):
        if Losing.lost > 0:
            Losing.lost -= 1
            await self._sandbox.stop()
        return await super().astep(action)


def collect(tmp_path, **options):
    def make_env(task):
        return Losing(task, SandboxConfig(isolation="best_available"))

    return asyncio.run(
        demonstrations.collect_demonstrations(
            {7: "count/3"},
            make_env,
            CHAT,
            error_rate=0.0,
            concurrency=1,
            record=lambda number: tmp_path / f"{number}.json",
            **options,
        )
    )


def test_a_demonstration_whose_sandbox_is_lost_plays_again(tmp_path):
    Losing.lost = demonstrations.ATTEMPTS - 1
    played = collect(tmp_path)
    assert played[7].reward == 1.0 and Losing.lost == 0


def test_a_sandbox_that_is_lost_every_time_ends_the_run_with_its_cause(tmp_path):
    Losing.lost = 100
    with pytest.raises(SpoiledTaskError, match="count/3 ended as infra_sandbox"):
        collect(tmp_path)
    assert Losing.lost == 100 - demonstrations.ATTEMPTS and not list(tmp_path.iterdir())
    Losing.lost = 0


def test_a_demonstrator_that_fails_its_task_costs_that_task_only(tmp_path, monkeypatch):
    async def play(env, *_):
        turn = DemonstrationTurn("done", "", "ok")
        return DemonstrationEpisode(env.task.name, "count", "Count.", [turn], 0.0, "failure")

    monkeypatch.setattr(demonstrations, "play_demonstration", play)
    faults = []
    assert collect(tmp_path, on_spoiled=faults.append) == {} and not list(tmp_path.iterdir())
    assert [(fault.task, fault.ending) for fault in faults] == [("count/3", "failure")]
    assert "not as a success" in faults[0].note
