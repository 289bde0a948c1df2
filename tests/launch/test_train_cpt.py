"""launch.train on plain text: killed, diverged, stopped and resumed; SFT that starts from it."""

import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.runs import (
    SFT,
    command,
    losses,
    metrics,
    refused,
    report,
    train,
    train_and_interrupt,
)
from tests.paths import ROOT
from tests.processes import user_environment


@pytest.mark.slow
def test_plain_text_is_learnt_killed_and_resumed(tmp_path):
    flags = ["--config=experiments/cpt.py:smoke", "--config.steps=8", "--config.checkpoint_every=2"]
    train(flags, tmp_path / "whole")
    document = report(tmp_path / "whole")
    first, last = document["evals"]
    assert (first["stage"], first["step"], last["step"]) == ("cpt", 0, 8) and document[
        "isolation"
    ] == "no sandbox"
    assert last["bits_per_byte"] < first["bits_per_byte"] and first["bytes"] == last["bytes"] > 1000
    assert (tmp_path / "whole" / "plots" / "cpt_loss.png").exists() and not (
        tmp_path / "whole" / "engine.log"
    ).exists()
    train_and_interrupt(flags, tmp_path / "killed", signal.SIGKILL, after_steps=3)
    said = train(flags, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole") and "bits a byte" in said


@pytest.mark.slow
def test_sft_starts_from_plain_text_and_both_stages_are_reported(tmp_path):
    train([*SFT, "--config.steps=2", "--config.init_from=experiments/cpt.py"], tmp_path / "sft")
    assert [entry["stage"] for entry in report(tmp_path / "sft")["evals"]] == [
        "cpt",
        "cpt",
        "sft",
        "sft",
    ]


@pytest.mark.slow
def test_a_run_that_diverged_goes_on_from_its_last_good_checkpoint_as_its_message_says(tmp_path):
    workdir = tmp_path / "run"
    flags = ["--config=experiments/cpt.py:smoke", "--config.steps=6", "--config.checkpoint_every=1"]
    # With a cosine the first update has the rate 0; the second one overflows the weights.
    overflow = ["--config.decay=True", "--config.warmup_updates=1", "--config.weight_decay=1e3"]
    message = refused([*flags, *overflow, "--config.learning_rate=3e38"], workdir)
    assert "diverged at step 2" in message and f"{workdir}/checkpoints/1 is good" in message
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    train([*flags[:1], "--config.steps=8", "--config.mesh.fsdp=-1"], workdir)
    assert [line["step"] for line in metrics(workdir)] == list(range(1, 9))
    changes = {entry["key"]: entry["step"] for entry in report(workdir)["config_changes"]}
    assert changes.items() >= {"learning_rate": 1, "warmup_updates": 1, "steps": 1}.items()
    train([*flags[:1], "--config.steps=9"], workdir)  # it was complete, and is asked for more
    assert [line["step"] for line in metrics(workdir)] == list(range(1, 10))
    assert [entry["step"] for entry in report(workdir)["evals"]][-1] == 9


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_output_nobody_reads_any_more_is_saved_when_it_is_stopped(tmp_path, number):
    flags = ["--config=experiments/cpt.py:smoke", "--config.steps=400"]
    process = subprocess.Popen(
        command([*flags, "--config.checkpoint_every=1000"], tmp_path / "run"),
        cwd=ROOT,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    process.stdout.readline()
    process.stdout.close()  # as tee does when Ctrl-C ends it first
    ends = time.monotonic() + 240
    while len(metrics(tmp_path / "run")) < 2 and time.monotonic() < ends:
        time.sleep(0.05)
    process.send_signal(number)
    process.send_signal(number)  # as make forwards it
    assert process.wait(timeout=120) == 130
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name) == metrics(tmp_path / "run")[-1]["step"] >= 2


@pytest.mark.slow
def test_text_that_changed_under_a_checkpoint_is_refused_in_one_line(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number}" + " with words" * number)
    flags = [
        "--config=experiments/cpt.py:smoke",
        "--config.steps=2",
        "--config.held_out_share=0.2",
        f"--config.text={tmp_path}",
    ]
    workdir = tmp_path / ".run"
    train(flags, workdir)
    shutil.rmtree(workdir / "final")
    (tmp_path / "more.txt").write_text("one more")
    message = refused(flags, workdir)
    assert "is not what the checkpoint of step 2 was trained on" in message
