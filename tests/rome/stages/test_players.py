"""A task that cannot be played costs itself only, in evaluations and demonstrations too."""

import json
import types

import pytest

from envs.gem.episode import DemonstrationEpisode, DemonstrationTurn
from rome.rollout import demonstrations, player
from rome.rollout.episode import Episode, RolloutError
from rome.stages.config import load_config
from rome.stages.players import Players
from rome.train.team import Team
from tests.rome.rollout.worlds import CHAT, EchoEnv, ScriptedEngine

TASKS = [f"count/{number}" for number in range(8)]


def make(workdir, broken, made):
    """Players in whose world some tasks cannot be played; what they make is noted."""
    engines = types.SimpleNamespace(workdir=workdir, pool=ScriptedEngine(["red", "done"]))
    players = Players(load_config("experiments/sft.py", "smoke"), CHAT, engines, Team())

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

    monkeypatch.setattr(player, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(demonstrations, "play_demonstration", play)


def test_how_long_an_episode_may_take_is_known_before_engines_are_started(tmp_path):
    """A run that resumes restores its rollouts first."""
    players = make(tmp_path, (), [])
    del players._engines.pool
    assert players.worst_seconds > 3 * players.config.engine.completion_seconds


def evaluate(players, workdir):
    episodes = [Episode(task, 0, 0, seed=1) for task in TASKS]
    return [trajectory.task for trajectory in players.play_all(episodes, 1.0)]


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
    assert play(make(tmp_path, {"count/2"}, made), tmp_path) == TASKS[:2] + TASKS[3:]
    [line] = map(json.loads, (tmp_path / "spoiled.jsonl").read_text().splitlines())
    assert line["task"] == "count/2" and line["ending"] in ("infra_verifier", "failure")
    made.clear()
    assert play(make(tmp_path, {"count/2"}, made), tmp_path) == TASKS[:2] + TASKS[3:]
    assert "count/2" not in made


@pytest.mark.parametrize("play", [evaluate, demonstrate])
def test_more_than_a_quarter_of_them_end_the_run_with_what_to_do(tmp_path, play):
    players = make(tmp_path, set(TASKS[:3]), [])
    with pytest.raises(RolloutError, match="3 of 8 tasks could not be played") as caught:
        play(players, tmp_path)
    assert "count/2" in str(caught.value) and str(tmp_path / "spoiled.jsonl") in str(caught.value)
