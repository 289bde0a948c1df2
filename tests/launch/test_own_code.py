"""launch.train with own code beside the user's own experiment file, on real processes."""

import json
import subprocess
import sys

import pytest

from rome.data.trajectory import load_trajectory
from tests.paths import ROOT
from tests.processes import user_environment

EXPERIMENT = """
from experiments import ipa

def get_config(preset="smoke"):
    config = ipa.get_config("smoke")
    config.experiment = "lab"
    config.init_from = ""  # random weights solve nothing: only the own reward tells episodes apart
    config.loss = "lab.py:Clipped"
    config.advantage = "lab.py:below_the_best"
    config.reward = "lab.py:Varied"
    config.filter = "lab.py:first_half"
    config.steps = 2
    config.groups = 3
    config.group_size = 4
    config.eval_tasks = 1
    config.eval_every = 0
    config.rollout.filter_groups = True
    return config
"""


@pytest.fixture
def lab(tmp_path):
    """A folder of a user, away from the repository, with an experiment and its own code."""
    folder = tmp_path / "lab"
    folder.mkdir()
    own = (ROOT / "tests/rome/stages/own.py").read_text()
    (folder / "lab.py").write_text(own)
    (folder / "experiment.py").write_text(EXPERIMENT)
    return folder


def run(lab, *flags):
    return subprocess.run(
        [sys.executable, "-m", "launch.train", f"--config={lab}/experiment.py", *flags],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_trains_with_the_users_loss_advantage_reward_and_filter(lab, tmp_path):
    workdir = tmp_path / "run"
    done = run(lab, f"--workdir={workdir}", "--config.own.reward.weight=0.5")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all({"own_objective", "max_ratio"} <= line.keys() for line in lines)
    assert all(line["training_reward"] > line["reward"] for line in lines)
    episodes = [load_trajectory(path) for path in (workdir / "trajectories").glob("lab_*.json")]
    for episode in episodes:
        written = {token for chunk in episode.chunks for token in chunk.action_ids}
        assert episode.training_reward == pytest.approx(episode.reward + 0.5 * len(written))
    accounting = json.loads((workdir / "report.json").read_text())["accounting"]
    dropped = accounting["dropped"]
    assert accounting["trained"] > 0 and dropped["filtered"] == accounting["trained"]
    assert accounting["started"] == accounting["trained"] + sum(dropped.values())
    config = json.loads((workdir / "config.json").read_text())
    keys = {"loss": {"ceiling": 1.2}, "advantage": {}, "reward": {"weight": 0.5}, "filter": {}}
    assert config["own"] == keys


@pytest.mark.long
def test_wrong_own_code_ends_the_command_with_one_line_before_anything_is_started(lab, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", "--config.loss=lab.py:mean_over_the_batch"]
    done = run(lab, *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "config.loss='lab.py:mean_over_the_batch': its value is" in done.stderr
    assert not workdir.exists()
