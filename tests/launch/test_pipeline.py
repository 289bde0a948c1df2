"""experiments/rome.py end to end: four stages in order, killed in two of them, one table."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from rome.train.metrics import read_metrics
from tests.paths import ROOT
from tests.processes import user_environment

COMMAND = [
    *(sys.executable, "-m", "launch.train", "--config=experiments/rome.py:smoke"),
    *("--config.task=terminal:path,rename", "--config.eval_tasks=2"),
]
SECONDS = 900.0


def kill_after(workdir: pathlib.Path, stage: pathlib.Path, pattern: str, files: int) -> None:
    """Run the pipeline until a stage has left so many files of a kind, and kill it."""
    with subprocess.Popen(
        [*COMMAND, f"--workdir={workdir}"],
        cwd=ROOT,
        env=user_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + SECONDS
        try:
            while sum(1 for _ in stage.glob(pattern)) < files:
                assert process.poll() is None, "it ended before it was killed"
                assert time.monotonic() < deadline, f"{stage} has no {files} {pattern}"
                time.sleep(0.2)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_the_whole_pipeline_is_killed_in_two_stages_and_ends_with_its_table(tmp_path):
    workdir = tmp_path / "rome"
    second, first = workdir / "init", workdir / "init" / "init"
    kill_after(workdir, first, "trajectories/expert_*.json", files=20)
    assert (first / "init" / "final").is_dir(), "CPT has ended"
    played = {path: path.stat().st_mtime_ns for path in first.glob("trajectories/expert_*.json")}
    assert len(played) < 80, "killed in the middle"
    before = (first / "init" / "final" / "model.safetensors").stat().st_mtime_ns
    kill_after(workdir, second, "selection.json", files=1)
    assert all(path.stat().st_mtime_ns == when for path, when in played.items())
    done = subprocess.run(
        [*COMMAND, f"--workdir={workdir}"],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (first / "init" / "final" / "model.safetensors").stat().st_mtime_ns == before
    report = json.loads((workdir / "report.json").read_text())
    stages = report["stages"]
    assert [entry["loss"] for entry in stages[-3:]] == ["sft", "sft", "ipa"]
    assert {entry["loss"] for entry in stages[:-3]} == {"cpt"}
    assert all(entry["after"] is not None for entry in stages[-4:])
    assert len({entry["after"]["n"] for entry in stages[-4:]}) == 1, "one held-out evaluation"
    assert stages[0]["bits_after"] < stages[0]["bits_before"]
    assert json.loads((first / "selection.json").read_text())["select"] == "filtered"
    chosen = json.loads((second / "selection.json").read_text())
    assert chosen["select"] == "preferred" and chosen["removed"]["ranked"] > 0
    assert [record["step"] for record in read_metrics(first)] == list(range(1, 31))
    assert "what each stage added" in done.stdout
    assert (workdir / "plots" / "stages.png").stat().st_size > 5000
