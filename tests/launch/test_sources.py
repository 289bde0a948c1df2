"""launch.train runs to its end over every kind of task: real engines, real environments."""

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

SMOKE = {
    "steps": 2,
    "groups": 2,
    "group_size": 2,
    "eval_every": 0,
    "eval_tasks": 1,
    "init_from": "",
    "max_context": 512,
    "row_length": 512,
}
LONG = {"model": "small", "max_context": 1280, "row_length": 1280}
MIXTURE = "0.5*terminal + 0.5*problems:math/dice"
TASKS = {
    "worlds:shop/easy": LONG | {"max_turns": 6},
    "games:frozen_lake": LONG | {"max_turns": 14},
    "problems:math/dice": {},
    "harbor": {"max_turns": 4},
    "gem:game/guess_the_number": {},
    "gem:game/sokoban-bare": {"max_new_tokens": 8},
    "examples/own_environment.py:Reverse": {},
    MIXTURE: {},
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_over(task, tmp_path):
    changes = SMOKE | TASKS[task] | {"task": task}
    command = [sys.executable, "-m", "launch.train", "--config=experiments/ipa.py:smoke"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=1400
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    report = json.loads((tmp_path / "report.json").read_text())
    evaluation = report["evals"][-1]
    assert report["steps"] == 2 and report["accounting"]["started"] >= 8
    parts = {"terminal", "problems:math/dice"} if task == MIXTURE else {task}
    assert set(evaluation["by_source"]) == parts
    assert sum(n for _, n in evaluation["by_difficulty"].values()) == evaluation["n"] > 0
