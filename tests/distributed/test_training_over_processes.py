"""launch.train in several processes: the run of one process with the same mesh, stopped by any,
resumed, and ended together by a death.
"""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.distributed.processes import ROOT, Job, run_job
from tests.processes import user_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
MESH = ["--config.mesh.fsdp=2", "--config.mesh.expert=2", "--config.mesh.tensor=2"]
SFT = [
    "--config=experiments/sft.py:smoke",
    "--config.steps=6",
    "--config.demonstrations=48",
    "--config.eval_tasks=1",
    "--config.checkpoint_every=2",
    *MESH,
]
IPA = [
    "--config=experiments/ipa.py:smoke",
    "--config.steps=3",
    "--config.groups=2",
    "--config.group_size=2",
    "--config.eval_tasks=1",
    "--config.eval_every=3",
    "--config.checkpoint_every=2",
    *MESH,
]
SECONDS = 1000  # of one run, on a busy machine


def job(count: int, flags: list[str], workdir: pathlib.Path, logs: str = "job") -> Job:
    return Job(
        count,
        8 // count,
        ["-m", "launch.train", *flags, f"--workdir={workdir}"],
        workdir.with_name(f"{workdir.name}-{logs}"),
    )


def train(count: int, flags: list[str], workdir: pathlib.Path) -> str:
    """Trains to the end, which a run that is begun anew resumes. Returns what process 0 said."""
    run = run_job(
        count,
        8 // count,
        ["-m", "launch.train", *flags, f"--workdir={workdir}"],
        workdir.with_name(f"{workdir.name}-logs"),
        SECONDS,
    )
    assert run.statuses == [0] * count, run.output()
    return run.text(0)


def metrics(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["loss"] for line in metrics(workdir)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with 8 devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    environment = user_environment(8)
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *SFT, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    train(2, SFT, workdir)
    return workdir


def test_two_processes_give_the_losses_of_one(alone, two):
    assert len(losses(two)) == 6
    np.testing.assert_allclose(losses(two), losses(alone), rtol=1e-5)


def test_four_processes_give_the_losses_of_one(alone, tmp_path):
    train(4, SFT, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)


def test_own_trajectories_that_one_process_began_go_on_in_two(tmp_path):
    data = tmp_path / "talk.jsonl"
    lines = []
    for number in range(200):
        said = " ".join(str(number + word) for word in range(number % 9 + 1))
        messages = [{"role": "user", "content": f"from {number}"}]
        lines.append(json.dumps({"messages": [*messages, {"role": "assistant", "content": said}]}))
    data.write_text("\n".join(lines))
    flags = [
        "--config=experiments/sft.py:smoke",
        f"--config.trajectories={data}",
        "--config.steps=8",
        "--config.eval_tasks=0",
        "--config.rows=16",  # in two micro-batches
        *MESH,
    ]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(1, flags, whole)
    with job(1, flags, moved, "stopped") as run:
        run.wait_until(lambda: len(metrics(moved)) >= 2, SECONDS)
        run.signal(0)
        assert run.wait(300) == [130], run.output()
    assert 2 <= len(metrics(moved)) < 8
    train(2, flags, moved)
    assert [line["tokens"] for line in metrics(moved)] == [
        line["tokens"] for line in metrics(whole)
    ]
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-5)
    last = [json.loads((run / "report.json").read_text())["evals"][-1] for run in (whole, moved)]
    assert last[0]["bits_per_token"] == pytest.approx(last[1]["bits_per_token"], rel=1e-5)


def test_one_process_writes_what_a_run_leaves(two):
    assert [line["step"] for line in metrics(two)] == [1, 2, 3, 4, 5, 6]
    report = json.loads((two / "report.json").read_text())
    assert report["steps"] == 6 and [entry["step"] for entry in report["evals"]] == [0, 6]
    assert (two / "final" / "model.safetensors").exists() and (
        two / "final" / "tokenizer.json"
    ).exists()
    quiet = max(two.with_name("run-logs").glob("*/process_1.log")).read_text()
    assert "process 1 of 2" in quiet and "evaluation" not in quiet and "report:" not in quiet


@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_any_process_stops_all_at_one_step_and_the_run_goes_on_bitwise(
    two, tmp_path, asked
):
    workdir = tmp_path / "run"
    with job(2, SFT, workdir, "stopped") as run:
        run.wait_until(lambda: len(metrics(workdir)) >= 2, SECONDS)
        run.signal(asked)
        assert run.wait(300) == [130, 130], run.output()
    assert "To resume" in run.text(0)
    stopped_at = max(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()
    )
    assert stopped_at == len(metrics(workdir))  # the last whole step is saved
    train(2, SFT, workdir)
    assert losses(workdir) == losses(two)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_others_end_with_its_name_and_the_run_goes_on_bitwise(
    two, tmp_path, killed
):
    workdir = tmp_path / "run"
    with job(2, SFT, workdir, "killed") as run:
        run.wait_until(lambda: len(metrics(workdir)) >= 3, SECONDS)
        run.signal(killed, signal.SIGKILL)
        began = time.monotonic()
        assert run.wait(300)[1 - killed] not in (None, 0, -signal.SIGKILL), run.output()
        print(f"the other one ended after {time.monotonic() - began:.1f} s")
    said = run.text(1 - killed)
    # Missing heartbeats are noticed, or a collective breaks first.
    named = (
        r"unhealthy \(stopped sending heartbeats\):\s+1\b|process 1 gave no sign of life"
        if killed
        else r"leader task was preempted/died|launch\.train: process 1 of 2 failed: .*Connection"
    )
    assert re.search(named, said), said[-3000:]
    train(2, SFT, workdir)
    assert losses(workdir) == losses(two)


def test_a_process_with_another_config_ends_all_with_its_words(tmp_path):
    run = Job(
        2,
        4,
        ["-m", "launch.train", *SFT, f"--workdir={tmp_path / 'run'}"],
        tmp_path / "logs",
        last=("--config.seed=7",),
    )
    assert run.wait(SECONDS) == [1, 1]
    for index in (0, 1):
        (line,) = [
            line for line in run.text(index).splitlines() if line.startswith("launch.train: ")
        ]
        assert re.search(
            r"process 1 of 2 failed: LeaderError: config: process 1 has \S+, process 0 \S+; do all"
            r" hosts see one workdir",
            line,
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mesh_that_leaves_a_process_idle_is_refused(tmp_path):
    run = job(2, [flag for flag in SFT if "mesh" not in flag], tmp_path / "run")
    assert run.wait(SECONDS) == [1, 1]
    assert (
        "takes 1 of the 8 devices and none of process 1" in run.output()
        and "Traceback" not in run.output()
    )


def test_ipa_runs_end_to_end_in_two_processes(two, tmp_path):
    workdir = tmp_path / "run"
    said = train(2, [*IPA, f"--config.init_from={two / 'final'}"], workdir)
    assert "held-out tasks" in said
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(
        line["max_mismatch"] < 1e-3 for line in lines if "max_mismatch" in line
    )  # published weights are the trained ones
    accounting = json.loads((workdir / "report.json").read_text())["accounting"]
    assert (
        accounting["trained"] + accounting["dropped"].get("equal_group", 0) == 3 * 2 * 2
        and accounting["in_flight"] == 0
    )
