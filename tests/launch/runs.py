"""Runs of launch.train in processes of their own: to start, interrupt and read them."""

import json
import pathlib
import random
import subprocess
import sys
import time

from tests.paths import ROOT
from tests.processes import user_environment

# A few of the curriculum's families, one of them unseen: what is shown here is how runs begin, end
# and go on.
TASKS = "terminal:path,rename,sum,obey,find_append"
SFT = [
    "--config=experiments/sft.py:smoke",
    f"--config.task={TASKS}",
    "--config.steps=6",
    "--config.demonstrations=48",
    "--config.eval_tasks=1",
    "--config.checkpoint_every=2",
]


def command(flags: list[str], workdir: pathlib.Path) -> list[str]:
    return [sys.executable, "-m", "launch.train", *flags, f"--workdir={workdir}"]


def train(flags: list[str], workdir: pathlib.Path) -> str:
    done = subprocess.run(
        command(flags, workdir),
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def refused(flags: list[str], workdir: pathlib.Path) -> str:
    """Run the command, which must end with status 1, and return its one line of error."""
    done = subprocess.run(
        command(flags, workdir),
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("launch.train: "))


def train_and_interrupt(
    flags: list[str], workdir: pathlib.Path, number: int, after_steps: int
) -> int:
    """Starts the run and sends it a signal at some moment after its first steps.

    Returns its exit status.
    """
    process = subprocess.Popen(
        command(flags, workdir),
        cwd=ROOT,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    ends = time.monotonic() + 240
    while (
        len(metrics(workdir)) < after_steps and process.poll() is None and time.monotonic() < ends
    ):
        time.sleep(0.02)
    time.sleep(random.uniform(0.0, 0.5))
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def metrics(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def report(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "report.json").read_text())


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["loss"] for line in metrics(workdir)]
