"""Environments of gem-llm and verifiers, which know nothing of this project, played and trained."""

import asyncio
import json
import subprocess
import sys

import pytest

from envs.gem import format_tool_call
from envs.gem.episode import PlayedEnv
from envs.rock import SandboxConfig
from envs.sources import open_source
from tests.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.live]
VERIFIERS = "tests.envs.sources.of_verifiers"
GEM = "gem:game:GuessTheNumber-v0-easy"


def need(package):
    return pytest.importorskip(package, reason="tests/requirements-live.txt")


async def said(task, *actions):
    played = PlayedEnv(task.make_env(SandboxConfig()), 60.0, 60.0)
    opening, _ = await played.start()
    played.hand_over()
    turns = []
    for action in actions:
        turns.append(await played.step(action))
    await played.env.aclose()
    return opening, turns, played.reward


def test_a_game_of_gem_llm_is_played_by_its_seed():
    need("gem")
    source = open_source(GEM)
    task = source.train(source.families[0], 3)
    opening, turns, _ = asyncio.run(said(task, "\\boxed{5}"))
    assert "between 1 and 10" in opening and "5" in turns[0].observation
    assert asyncio.run(said(task, "\\boxed{5}")) == (opening, turns, 0.0)


def test_one_turn_of_verifiers_is_graded_by_its_rubric():
    need("verifiers")
    source = open_source(f"{VERIFIERS}:load_environment")
    training = {task.content.opening for task in source.finite(is_trained=True)}
    evaluation = {task.content.opening for task in source.evaluation(100)}
    assert len(training) + len(evaluation) == 36 and not training & evaluation and evaluation
    task = source.task("load_environment/7")
    assert (task.content.opening, task.system) == ("What is 1 + 1?", "Add.")
    _, turns, reward = asyncio.run(said(task, " 2"))
    assert (turns[0].ending, reward) == ("success", 1.0)
    _, turns, reward = asyncio.run(said(task, "3"))
    assert (turns[0].ending, reward) == ("failure", 0.0)


def test_a_tool_of_verifiers_is_called_and_a_malformed_call_is_a_message():
    need("verifiers")
    task = open_source(f"{VERIFIERS}:with_tools").task("with_tools/3")
    assert task.tools[0]["function"]["name"] == "double" and task.max_turns == 4
    call = format_tool_call("double", {"x": 3})
    _, turns, reward = asyncio.run(said(task, call, "6"))
    assert [turn.ending for turn in turns] == ["", "success"] and reward == 1.0
    assert turns[0].observation == "6"
    _, turns, _ = asyncio.run(said(task, '<tool_call>\n{"name": "double"'))
    assert (turns[0].ending, turns[0].status) == ("failure", "malformed")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("package", "spec"), [("gem", GEM), ("verifiers", f"{VERIFIERS}:load_environment")]
)
def test_it_is_trained_for_a_few_steps(package, spec, tmp_path):
    need(package)
    command = [sys.executable, "-m", "launch.train", "--config=experiments/ipa.py:smoke"]
    changes = {
        "task": spec,
        "steps": 2,
        "groups": 2,
        "group_size": 2,
        "eval_every": 0,
        "eval_tasks": 2,
        "max_context": 512,
        "row_length": 512,
        "init_from": "",
    }
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 2 and report["evals"][-1]["n"] == 2
    assert list(report["evals"][-1]["by_source"]) == [spec]
