"""What is wrong with the file of --config, or its preset, is one line of every command."""

import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.processes import user_environment


def refused(command: str, config: str) -> str:
    """Run a command with a config that cannot be loaded, and return its one line of error."""
    done = subprocess.run(
        [sys.executable, "-m", command, f"--config={config}"],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["launch.train", "launch.compile"])
@pytest.mark.parametrize("file", ["ipa", "safety", "cpt"])
def test_an_unknown_preset_is_refused_with_those_that_there_are(command, file):
    said = refused(command, f"experiments/{file}.py:nope")
    assert said.startswith(f"{command}: flag --config=experiments/{file}.py:nope: experiments/")
    assert "has no preset 'nope'. Choose one of tiny, smoke" in said


def test_a_fault_of_the_file_itself_is_named_with_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config(preset='tiny'):\n    return len(3)\n")
    said = refused("launch.train", str(file))
    assert f"{file}:2: TypeError: object of type 'int' has no len()" in said
