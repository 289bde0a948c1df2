"""A wish to stop: one signal or two at once are one wish, a later one ends the process."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.paths import ROOT

PROGRAM = """
import time
from launch._main import run_command
from launch.train import StopRequest, when_stopped

def main(argv):
    stop = StopRequest()
    print("ready", flush=True)
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        time.sleep(0.01)
        if stop() and time.monotonic() - stop._made_at > {grace}:
            return 7
    return 8

run_command("launch.train", main, when_stopped=when_stopped)
"""


def start(grace: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(grace=grace)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_stop(process) -> None:
    """Wait until the process has answered the first signal."""
    assert select.select([process.stderr], [], [], 30)[0]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_at_once_are_one_wish(first, second):
    process = start(grace=1.5)
    process.send_signal(first)
    wait_for_stop(process)
    process.send_signal(second)
    time.sleep(0.2)
    process.send_signal(second)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 7 and error.count("stopping:") == 1, error


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_later_signal_leaves_at_once_without_a_traceback(second):
    process = start(grace=50)
    process.send_signal(signal.SIGINT)
    wait_for_stop(process)
    time.sleep(1.2)
    process.send_signal(second)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "launch.train: left at once" in error and "Traceback" not in error


def test_a_signal_is_heard_where_nobody_reads_the_answer():
    process = start(grace=0.1)
    process.stderr.close()
    process.stderr = open(os.devnull)  # noqa: SIM115  communicate closes it
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 7
