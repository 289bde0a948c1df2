"""Runs of launch.train to break: started, watched by what they write, hurt, and read afterwards."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from rome.model.hf.checkpoint import load_hf
from tests.paths import ROOT
from tests.processes import user_environment

SFT = [
    "--config=experiments/sft.py:smoke",
    "--config.steps=4",
    "--config.demonstrations=24",
    "--config.eval_tasks=1",
    "--config.eval_every=0",
]
IPA = [
    "--config=experiments/ipa.py:smoke",
    "--config.steps=6",
    "--config.groups=3",
    "--config.group_size=2",
    "--config.eval_tasks=1",
    "--config.eval_every=0",
    "--config.checkpoint_every=2",
    "--config.rollout.async_ratio=1",
    "--config.concurrency=4",
    "--config.rollout.filter_groups=False",
]


class Patience:
    """A limit of seconds that a busy machine makes longer.

    Where four processes want each core, a second counts as a quarter of one: what is measured is
    about the work that the run could do.
    """

    def __init__(self, seconds):
        self.left = seconds
        self._looked = time.monotonic()

    def is_over(self):
        now = time.monotonic()
        wanted = os.getloadavg()[0] / len(os.sched_getaffinity(0))
        self.left -= (now - self._looked) / max(1.0, wanted)
        self._looked = now
        return self.left < 0


def command(flags, workdir):
    return [sys.executable, "-m", "launch.train", *flags, f"--workdir={workdir}"]


def environment(**more):
    return user_environment() | more


@contextlib.contextmanager
def training(flags, workdir):
    """A run in the background; ended for certain."""
    with open(workdir.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            command(flags, workdir),
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait(30)


def output(workdir):
    return workdir.with_suffix(".log").read_text(errors="replace")


def metrics(workdir):
    path = workdir / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def wait_for_steps(process, workdir, steps, seconds=240):
    patience = Patience(seconds)
    while len(metrics(workdir)) < steps:
        assert process.poll() is None, f"the run ended early: {output(workdir)[-2000:]}"
        assert not patience.is_over(), (
            f"no step {steps} within {seconds} s: {output(workdir)[-2000:]}"
        )
        time.sleep(0.02)


def wait_for_end(process, workdir, seconds=240):
    """Wait until a run ends by itself, as it should."""
    patience = Patience(seconds)
    while process.poll() is None:
        assert not patience.is_over(), f"no end within {seconds} s: {output(workdir)[-2000:]}"
        time.sleep(0.1)
    assert process.returncode == 0, output(workdir)[-2000:]


def kill_group(process, seconds=60):
    """Kill a run's whole process group, and wait until everything that it started is gone."""
    started = [process.pid, *descendants(process.pid)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    patience = Patience(seconds)
    while left := [pid for pid in started if is_running(pid)]:
        assert not patience.is_over(), f"processes {left} have outlived their run"
        time.sleep(0.05)


def is_running(pid):
    """Return whether a process is there and is no zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def descendants(pid):
    """Process ids below `pid`, whatever sessions they made."""
    children = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    found, open_ = [], [pid]
    while open_:
        more = children.get(open_.pop(), [])
        found += more
        open_ += more
    return found


def find(pid, word):
    """The descendants of `pid` whose command line has `word`."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if word.encode() in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def check_whole(workdir, steps=6, episodes=6):
    """All steps are there, every sample is accounted for, and none was trained on twice."""
    assert [line["step"] for line in metrics(workdir)] == list(range(1, steps + 1))
    accounting = json.loads((workdir / "report.json").read_text())["accounting"]
    assert accounting["trained"] == steps * episodes and accounting["in_flight"] == 0
    assert accounting["started"] == accounting["trained"] + sum(accounting["dropped"].values())
    taken = {
        entry["step"]: entry["groups"]
        for entry in map(json.loads, (workdir / "steps.jsonl").read_text().splitlines())
    }
    groups = [tuple(group) for step in taken.values() for group in step]
    assert len(groups) == len(set(groups))
    return accounting


def weights_are_finite(directory):
    """Return whether no parameter of a Hugging Face directory is inf or NaN."""
    params, _ = load_hf(directory)
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
