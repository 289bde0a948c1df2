"""Demonstrations: what the infrastructure spoils is played again, a failed one is an error."""

import asyncio
import dataclasses
import random

import pytest

from envs.gem import format_tool_call
from envs.gem.episode import DemonstrationEpisode, DemonstrationTurn, Line
from envs.rock import SandboxConfig
from envs.safety import compose_env
from envs.tasks.terminal.env import TerminalEnv
from rome.data.batch import CONTEXT, IMITATION
from rome.data.packing import pack
from rome.data.relevance import HARM, MASKS, mask_turns
from rome.data.trajectory import load_trajectory
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


def collect(tmp_path, error_rate=0.0, **options):
    def make_env(task):
        return Losing(task, SandboxConfig(isolation="best_available"))

    return asyncio.run(
        demonstrations.collect_demonstrations(
            {7: "count/3"},
            make_env,
            CHAT,
            error_rate=error_rate,
            concurrency=1,
            record=lambda number: tmp_path / f"{number}.json",
            **options,
        )
    )


def test_a_demonstration_whose_sandbox_is_lost_plays_again(tmp_path):
    Losing.lost = demonstrations.ATTEMPTS - 1
    played = collect(tmp_path)
    assert played[7].reward == 1.0 and Losing.lost == 0


def test_a_script_that_cannot_read_an_answer_fails_its_task_by_name(tmp_path, monkeypatch):
    def demonstration(self, rng, error_rate=0.0):
        shown = yield Line(format_tool_call("bash", {"command": "true"}))
        first, second = shown.split("=")
        yield Line(f"{first} {second}")

    monkeypatch.setattr(Losing, "demonstration", demonstration)
    Losing.lost = 0
    with pytest.raises(SpoiledTaskError, match=r"cannot go on after '\(no output\)'.*unpack"):
        collect(tmp_path)


def test_the_record_of_harm_stays_with_the_turn_and_masks_it():
    env = compose_env(
        "small-mail-write", 1, TerminalEnv("count/3", SandboxConfig()), is_gated=False, harm_rate=1
    )
    played = asyncio.run(demonstrations.demonstrate(env, CHAT, random.Random(0), 0.0))
    harmful = [number for number, chunk in enumerate(played.chunks) if chunk.events]
    assert [played.chunks[number].events for number in harmful] == [["outside"]]
    assert played.reward == 1.0
    learned = mask_turns(played, MASKS, is_demonstration=True)
    kinds = [chunk.kind for chunk in learned.chunks]
    assert [number for number, kind in enumerate(kinds) if kind == "context"] == harmful
    rest = [mask for mask in MASKS if mask != HARM]
    assert "context" not in [chunk.kind for chunk in mask_turns(played, rest).chunks]


def test_the_mistake_is_read_and_a_failed_command_is_no_mistake(tmp_path):
    """Err(k) is a failed call: this one ran, and its exit status stays in the record."""
    Losing.lost = 0
    [trajectory] = collect(tmp_path, error_rate=1.0).values()
    kinds = [chunk.kind for chunk in trajectory.chunks]
    assert kinds.count("context") == 1
    wrong = trajectory.chunks[kinds.index("context")]
    assert wrong.status == "ok" and wrong.exit_code > 0
    assert trajectory == load_trajectory(tmp_path / "7.json")
    # The same turn of somebody who made it on purpose, such as a test that is to fail, is learnt.
    learnt = dataclasses.replace(wrong, kind="rl")
    options = {"row_length": 400, "chunks_per_row": 8, "gamma": 1.0, "failure_reward": 0.0}
    for chunk, kind in [(wrong, CONTEXT), (learnt, IMITATION)]:
        batch = pack([dataclasses.replace(trajectory, chunks=[chunk])], purpose="sft", **options)
        assert batch.kind_BC[0, 0] == kind


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


def test_a_demonstration_that_a_slow_machine_cut_off_plays_again(tmp_path, monkeypatch):
    real = demonstrations.play_demonstration
    slow = [True]

    async def play(env, *arguments):
        if not slow.pop():
            return await real(env, *arguments)
        slow.append(False)
        turns = [DemonstrationTurn("sort a > b", "[timeout]", "timeout")]
        turns.append(DemonstrationTurn("done", "", "ok"))
        return DemonstrationEpisode(env.task.name, "count", "Count.", turns, 0.0, "failure")

    monkeypatch.setattr(demonstrations, "play_demonstration", play)
    assert collect(tmp_path)[7].reward == 1.0


def test_a_demonstrator_that_is_cut_off_every_time_is_named_with_its_command(tmp_path, monkeypatch):
    async def play(env, *_):
        turns = [DemonstrationTurn("sleep 9999", "[timeout]", "timeout")]
        return DemonstrationEpisode(env.task.name, "count", "Count.", turns, 0.0, "failure")

    monkeypatch.setattr(demonstrations, "play_demonstration", play)
    with pytest.raises(SpoiledTaskError, match="time limit: 'sleep 9999'"):
        collect(tmp_path)


def test_an_error_of_one_demonstration_ends_the_others(tmp_path, monkeypatch):
    """They would otherwise go on in the background, and be set aside as the program ends."""
    ended = []

    async def play(env, *_):
        if env.task.name == "count/3":
            await asyncio.sleep(0)
            raise KeyError("not what is expected of an environment")
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(env.task.name)

    monkeypatch.setattr(demonstrations, "play_demonstration", play)

    async def collect_two():
        collecting = demonstrations.collect_demonstrations(
            {0: "count/1", 1: "count/3"},
            lambda task: TerminalEnv(task, SandboxConfig(isolation="best_available")),
            CHAT,
            error_rate=0.0,
            concurrency=2,
            record=lambda number: tmp_path / f"{number}.json",
        )
        with pytest.raises(KeyError):
            await collecting
        assert ended == ["count/1"]

    asyncio.run(collect_two())
