"""A task that cannot be played costs itself only, in evaluations and demonstrations too."""

import json
import types

import pytest

from envs.gem.episode import DemonstrationEpisode, DemonstrationTurn
from rome.engine.errors import EngineError
from rome.evals import runner
from rome.evals.agents import Outcome
from rome.rollout import demonstrations
from rome.rollout.episode import RolloutError, SpoiledTaskError
from rome.stages.config import load_config
from rome.stages.evaluate import HeldOut, play_held_out
from rome.stages.players import Players
from rome.train.team import Team
from tests.rome.rollout.worlds import CHAT, EchoEnv, ScriptedEngine

TASKS = [f"count/{1_000_000 + number}" for number in range(8)]


def make(workdir, broken, made):
    """Players in whose world some tasks cannot be played; what they make is noted."""
    engines = types.SimpleNamespace(workdir=workdir, pool=ScriptedEngine(["red", "done"]))
    config = load_config("experiments/sft.py", "smoke")
    config.task = "terminal:count"
    players = Players(config, CHAT, engines, Team())

    def make_env(task):
        made.append(task)
        return EchoEnv(task, "infra_verifier" if task in broken else "success")

    players.make_env = make_env
    return players


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    async def play(env, *_):
        turn = DemonstrationTurn("done", "", "ok")
        ending = "failure" if env.ending == "infra_verifier" else "success"
        reward = float(ending == "success")
        return DemonstrationEpisode(env.task.name, "count", "Count.", [turn], reward, ending)

    monkeypatch.setattr(runner, "RETRY_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(demonstrations, "play_demonstration", play)


def test_how_long_an_episode_may_take_is_known_before_engines_are_started(tmp_path):
    """A run that resumes restores its rollouts first."""
    players = make(tmp_path, (), [])
    del players._engines.pool
    assert players.worst_seconds > 3 * players.config.engine.completion_seconds


def evaluate(players, workdir):
    out = workdir / f"evaluation{len(list(workdir.iterdir()))}"
    outcomes = play_held_out(players, out, seed=0, tasks_of_family=8, temperature=1.0)["tasks"]
    assert {(one["family"], one["difficulty"], one["source"]) for one in outcomes} == {
        ("count", "1", "terminal:count")
    }
    return [one["task"] for one in outcomes if one["success"]]


def demonstrate(players, workdir):
    played = players.demonstrate(
        TASKS, error_rate=0.0, record=lambda number: workdir / f"{number}.json"
    )
    assert [one.task if one else None for one in played] == [
        None if task in players.spoiled else task for task in TASKS
    ]
    return [one.task for one in played if one]


@pytest.mark.parametrize("play", [evaluate, demonstrate])
def test_it_is_left_out_by_name_and_not_tried_again(tmp_path, play):
    made = []
    assert play(make(tmp_path, {TASKS[2]}, made), tmp_path) == TASKS[:2] + TASKS[3:]
    [line] = map(json.loads, (tmp_path / "spoiled.jsonl").read_text().splitlines())
    assert line["task"] == TASKS[2] and line["ending"] in ("infra_verifier", "failure")
    made.clear()
    assert play(make(tmp_path, {TASKS[2]}, made), tmp_path) == TASKS[:2] + TASKS[3:]
    assert TASKS[2] not in made


@pytest.mark.parametrize("play", [evaluate, demonstrate])
def test_more_than_a_quarter_of_them_end_the_run_with_what_to_do(tmp_path, play):
    players = make(tmp_path, set(TASKS[:3]), [])
    with pytest.raises(RolloutError, match="3 of 8 tasks could not be played") as caught:
        play(players, tmp_path)
    assert TASKS[2] in str(caught.value) and str(tmp_path / "spoiled.jsonl") in str(caught.value)


def test_an_evaluation_that_was_killed_goes_on_with_what_is_missing(tmp_path):
    made = []
    players = make(tmp_path, set(), made)
    play_held_out(players, tmp_path / "e", seed=0, tasks_of_family=5, temperature=1.0)
    asked = len(made)
    whole = play_held_out(players, tmp_path / "e", seed=0, tasks_of_family=8, temperature=1.0)
    assert (asked, len(made)) == (5, 8) and [one["task"] for one in whole["tasks"]] == TASKS


def test_a_task_that_is_set_aside_changes_the_sampling_of_no_other(tmp_path, monkeypatch):
    seeds = []

    async def play(self, task, attempt, seed):
        seeds[-1][task.name] = seed
        return Outcome(1.0, "success", "", 1)

    monkeypatch.setattr(HeldOut, "play", play)
    players = make(tmp_path, set(), [])
    for number in range(2):
        seeds.append({})
        play_held_out(players, tmp_path / f"{number}", seed=0, tasks_of_family=4, temperature=1.0)
        players.spoiled.add(SpoiledTaskError(TASKS[1], "infra_sandbox", "its image is gone", 3))
    before, after = seeds
    assert before.pop(TASKS[1]) and before == after and len(after) == 3


def test_engines_that_fail_end_an_evaluation_with_their_words(tmp_path):
    players = make(tmp_path, set(), [])
    players.policy.engine.error = EngineError("no engine is left")
    with pytest.raises(RolloutError, match="no engine is left"):
        play_held_out(players, tmp_path / "e", seed=0, tasks_of_family=2, temperature=1.0)
    assert not players.spoiled.causes


def test_a_task_without_a_demonstrator_is_not_shown_and_not_set_aside(tmp_path):
    config = load_config("experiments/ipa.py", "smoke")
    config.task = "tests.envs.sources.own:Countdown"
    engines = types.SimpleNamespace(workdir=tmp_path, pool=None)
    players = Players(config, CHAT, engines, Team())
    names = ["Countdown/1", "Countdown/2"]
    shown = players.demonstrate(names, error_rate=0.0, record=lambda n: tmp_path / f"{n}.json")
    assert shown == [None, None] and not players.spoiled.causes
    assert not players.can_show(names[0])
