"""launch.redteam as a process: it goes on after a kill, and what it writes can be played."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.paths import ROOT

DEADLINE = 800.0


def start(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def run(module, *arguments):
    process = start(module, *arguments)
    out, error = process.communicate(timeout=DEADLINE)
    return process.returncode, out, error


@pytest.mark.slow
def test_after_a_kill_it_goes_on_and_its_seeds_are_sound_tasks(tmp_path):
    command = ("--dataset=terminal", "--agent=attacker", "--carriers=readme", "--goals=destroy")
    command = (*command, "--budget=40", f"--out={tmp_path / 'out'}")
    plays = tmp_path / "out/results.jsonl"
    process = start("launch.redteam", *command)
    limit = time.monotonic() + DEADLINE
    while not plays.exists() or plays.read_text().count("\n") < 3:
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    kept = plays.read_text().splitlines()[:3]

    status, _, error = run("launch.redteam", *command)
    assert status == 0, error
    assert plays.read_text().splitlines()[:3] == kept
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["found"][0]["successes"] == report["found"][0]["plays"]
    names = [json.loads(line)["task"] for line in plays.read_text().splitlines()]
    assert len(names) == len(set(names)) <= 40

    seeds = f"--dataset=safety:{tmp_path / 'out/seeds.json'}:2"
    proof = ("--validate", "--attempts=1", f"--out={tmp_path / 'proof'}")
    status, out, error = run("launch.eval", seeds, *proof)
    assert status == 0, out + error


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--carriers=fax", "--carriers has no 'fax'; known: forwarded"),
        pytest.param("--goals=joy", "--goals has no 'joy'; known: exf", marks=pytest.mark.slow),
        ("--attacker_model=m", "both --attacker_endpoint URL and --attacker_model NAME"),
    ],
)
def test_wrong_flags_are_one_clear_line(tmp_path, flag, said):
    status, _, error = run(
        "launch.redteam", "--dataset=terminal", "--agent=noop", flag, f"--out={tmp_path / 'out'}"
    )
    assert status == 2
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
