"""The contract of `iflow -p` with the programs around it: streams, signals, exit statuses."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.rome.agent.iflow.scripted import Fail, Say, ScriptedEndpoint

pytestmark = pytest.mark.slow
SECONDS = 60


@pytest.fixture
def start(tmp_path):
    """Return what starts the command."""
    (tmp_path / "project").mkdir()
    started = []

    def start(endpoint, *flags, **given):
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | given
        where = ["--workspace=host", f"--directory={tmp_path / 'project'}"]
        program = subprocess.Popen(
            [sys.executable, "-m", "launch.agent", f"--base_url={endpoint.url}", *where, *flags],
            env={**os.environ, "HOME": str(tmp_path)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            **streams,
        )
        started.append(program)
        return program

    yield start
    for program in started:
        program.kill()
        program.wait()


@pytest.mark.parametrize("form", ["text", "stream-json"])
def test_a_reader_that_goes_away_ends_the_session(start, form):
    words = Say("word " * 1000, pieces=200, pause=0.01)
    with ScriptedEndpoint([words] * 3) as endpoint:
        program = start(endpoint, "-p", "go", f"--output_format={form}")
        program.stdout.close()
        status = program.wait(SECONDS)
        errors = program.stderr.read()
        assert status == 4 and "Traceback" not in errors and "cannot be written" in errors
        assert len(endpoint.requests) <= 1


def test_the_result_of_a_turn_is_never_that_of_an_earlier_one(start):
    with ScriptedEndpoint(["the first", Fail(401, "wrong key")]) as endpoint:
        start(endpoint, "-p", "one").communicate(timeout=SECONDS)
        second = start(endpoint, "-p", "two", "--continue", "--output_format=json")
        said = json.loads(second.communicate(timeout=SECONDS)[0])
    assert second.returncode == 2
    assert (said["outcome"], said["result"]) == ("infrastructure", "")


def test_a_closed_input_is_an_empty_one(start):
    with ScriptedEndpoint([]) as endpoint:
        program = start(endpoint, "-p", "-", stdin=None, preexec_fn=lambda: os.close(0))
        assert program.wait(SECONDS) == 1
        assert "say what is to be done" in program.stderr.read()


@pytest.mark.parametrize(
    "flags",
    [
        ("--prices", "1", "2", "3", "4"),
        ("--prices", "-1"),
        ("--max_turns=-1",),
        ("--context_tokens=-1",),
        ("--base_url=nonsense",),
        ("--http=99999",),
    ],
)
def test_a_wrong_flag_is_one_line(start, flags):
    with ScriptedEndpoint([]) as endpoint:
        program = start(endpoint, "-p", "go", *flags)
        status = program.wait(SECONDS)
        errors = program.stderr.read()
        assert status == 1 and len(errors.splitlines()) == 1, errors
