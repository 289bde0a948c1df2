"""What launch.train answers to a wrong command line: one line, before anything starts."""

import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.parametrize(
    "flag, message",
    [
        pytest.param("--config.gama=1", "gama", marks=pytest.mark.slow),
        ("--config.seed=x", "--config.seed=x"),
        pytest.param("--nope=1", "nope", marks=pytest.mark.slow),
        pytest.param("--config=experiments/none.py", "experiments/none.py", marks=pytest.mark.slow),
        ("--config=experiments/ipa.py:huge", "no preset 'huge'"),
    ],
)
def test_the_command_line_answers_nonsense_with_one_line(flag, message, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            "--config=experiments/ipa.py:smoke",
            f"--workdir={tmp_path / 'run'}",
            flag,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode not in (0, 130)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_misspelt_flag_gets_one_clean_line():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            "--config=experiments/ipa.py",
            "--config.group_sise=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "'group_sise'" in done.stderr and "'group_size'" in done.stderr and "\\" not in done.stderr
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "key", [pytest.param("async_ratio", marks=pytest.mark.slow), "rollout.late"]
)
def test_a_key_that_moved_or_went_is_named_with_its_flag_and_the_list_of_keys(key):
    block, _, name = key.rpartition(".")
    named = f"config key {block}{block and '.'}{name!r} is unknown"
    command = [sys.executable, "-m", "launch.train", "--config=experiments/ipa.py"]
    command.append(f"--config.{key}=1")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert "docs/configuration.md" in done.stderr
