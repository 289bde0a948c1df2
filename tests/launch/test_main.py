"""Commands: an expected error is one line with its exit status, a fault keeps its traceback."""

import subprocess
import sys

import pytest

from rome.version import VERSION
from tests.paths import ROOT

COMMAND = """
import sys
from launch._main import run_command

class Known(RuntimeError):
    pass

def main(argv):
    raise {error}

run_command("launch.x", main, known_errors=lambda: (Known,), failure_status=3{options})
"""


def run(error, options="", **environment):
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(error=error, options=options)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "error, line",
    [
        ("Known('a  broken\\n machine')", "launch.x: a broken machine\n"),
        ("ValueError('x=3 is too much. Lower it.')", "launch.x: x=3 is too much. Lower it.\n"),
        ("FileNotFoundError(2, 'No such file', 'f')", "launch.x: f: No such file\n"),
    ],
)
def test_an_expected_error_is_one_line_with_the_commands_status(error, line):
    done = run(error)
    assert (done.returncode, done.stderr) == (3, line)
    assert "Traceback" in run(error, ROME_DEBUG="1").stderr


def test_a_fault_of_the_program_keeps_its_traceback():
    done = run("KeyError('x')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_stop_says_what_is_kept_where_the_command_has_something_to_say():
    done = run("KeyboardInterrupt", ", when_stopped=lambda: 'kept in d'")
    assert (done.returncode, done.stderr) == (130, "kept in d\n")


def test_the_version_is_told_and_nothing_is_run():
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.startswith(f"launch.train {VERSION}")
