"""Output that cannot be written ends nothing: a closed pipe, a full disk, another encoding."""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

PROGRAM = """
import sys
from rome.train.streams import outlast_readers
outlast_readers()
print("begin \\u2581\\u2588 \\u03c0", flush=True)
sys.stdin.read()  # until the test has closed the other end
for number in range(20000):
    print("line", number)
print("last", flush=True)
print("buffered at the end")
print("done", file=sys.stderr)
"""


def start(stdout, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def ended(process) -> list[str]:
    """Return the lines of standard error of a process that must end well."""
    process.stdin.close()
    process.stdin = None
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return error.decode().splitlines()


def test_a_reader_that_goes_away_is_noticed_once_and_ends_nothing():
    process = start(subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    warning, done = ended(process)
    assert warning.startswith("warning: <stdout> cannot be written") and done == "done"


def test_a_full_disk_is_noticed_once_and_ends_nothing():
    with open("/dev/full", "w") as full:
        warning, done = ended(start(full))
    assert "No space left" in warning and done == "done"


@pytest.mark.parametrize("encoding", ["iso8859-1", "ascii", "utf-8"])
def test_characters_that_the_encoding_lacks_are_replaced(encoding):
    process = start(subprocess.PIPE, PYTHONIOENCODING=encoding)
    first = process.stdout.readline().decode(encoding)
    process.stdin.close()
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0 and b"buffered at the end" in rest
    assert first == ("begin ▁█ π\n" if encoding == "utf-8" else "begin ?? ?\n")
    process.stderr.close()
    process.stdout.close()


@pytest.mark.parametrize("closed", [1, 2])
def test_a_program_that_was_started_without_a_stream_runs(closed):
    code = f"exec \"$0\" -c '{PROGRAM}' {closed}>&- < /dev/null"
    done = subprocess.run(
        ["sh", "-c", code, sys.executable], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
