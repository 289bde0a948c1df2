"""A wish to stop: one signal or two at once are one wish, a later one ends the process."""

import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.paths import ROOT

PROGRAM = """
import sys
import time
from launch import _stop
from launch._main import run_command

_stop.ONE_WISH_SECONDS = {one_wish}
stop = _stop.StopRequest("launch.train")
stop.listen()

def main(argv):
    stop.begin()
    print("ready", flush=True)
    ends = time.monotonic() + 600
    try:
        while time.monotonic() < ends:
            time.sleep(0.01)
            if stop() and time.monotonic() - stop._heard_at > {grace}:
                return 7
        return 8
    except KeyboardInterrupt:
        print("leaving", file=sys.stderr, flush=True)
        {on_the_way_out}
        raise

run_command("launch.train", main, when_stopped=stop.when_stopped)
"""


def start(grace: float, on_the_way_out: str = "pass", one_wish: float = 1.0) -> subprocess.Popen:
    program = PROGRAM.format(grace=grace, on_the_way_out=on_the_way_out, one_wish=one_wish)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_stop(process) -> None:
    """Wait until the process has answered the first signal."""
    assert select.select([process.stderr], [], [], 60)[0]


@pytest.mark.parametrize(
    "first", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_at_once_are_one_wish(first, second):
    process = start(grace=1.5, one_wish=60.0)  # on a busy machine "at once" may take a second
    process.send_signal(first)
    wait_for_stop(process)
    process.send_signal(second)
    time.sleep(0.2)
    process.send_signal(second)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 7 and error.count("stopping:") == 1, error


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_later_signal_leaves_at_once_without_a_traceback(second):
    process = start(grace=500)
    process.send_signal(signal.SIGINT)
    wait_for_stop(process)
    time.sleep(1.2)
    process.send_signal(second)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "launch.train: left at once" in error and "Traceback" not in error


def catches_sigterm(process) -> bool:
    """Return whether the process has installed its handlers: Python itself has none of SIGTERM."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = [line for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_the_first_imports_ends_with_one_line_and_no_workdir(number, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.train", f"--workdir={workdir}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    ends = time.monotonic() + 60
    while not catches_sigterm(process) and time.monotonic() < ends:
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and not workdir.exists()
    assert error.split("\n") == ["", "launch.train: stopped before anything was started", ""]


@pytest.mark.slow
def test_signals_after_the_second_one_cannot_break_the_way_out():
    process = start(grace=500, on_the_way_out="time.sleep(600)")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        wait_for_stop(process)
        os.read(process.stderr.fileno(), 10_000)
        time.sleep(1.2)
        if process.poll() is not None:
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error


def test_a_signal_is_heard_where_nobody_reads_the_answer():
    process = start(grace=0.1)
    process.stderr.close()
    process.stderr = open(os.devnull)  # noqa: SIM115  communicate closes it
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 7
