"""python -m launch.pod: what --dry-run prints is a bash script that means what was asked for;
without it the tools must be there.
"""

import os
import shlex
import shutil
import subprocess

import pytest

from launch.pod.__main__ import main
from rome.train.xla_flags import GPU_XLA_FLAGS, LIBTPU_ARGS
from tests.paths import ROOT

TRAIN = [
    "--config=experiments/ipa.py:qwen3_30b_a3b",
    "--workdir=/mnt/rome/a run",
    "--config.engine.urls=http://a:1,http://b:2",
]
CLOUD = [
    "--zone=us-east5-a",
    "--accelerator-type=v5p-128",
    "--project=lab",
    "--mount=sudo mount -t nfs 10.0.0.2:/x /mnt/rome",
]


def dry_run(capsys, *arguments: str) -> list[list[str]]:
    """The words of every command that --dry-run prints, comments left out. bash must be able to
    read the script.
    """
    assert main([*arguments, "--dry-run", "--", *TRAIN]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n", "-c", script], check=True)
    lines = script.splitlines()
    assert lines[0] == "set -euo pipefail"
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


def the_one(commands: list[list[str]], *words: str) -> list[str]:
    (found,) = [command for command in commands if all(word in command for word in words)]
    return found


def option(command: list[str], name: str) -> str:
    (value,) = [word.partition("=")[2] for word in command if word.startswith(f"--{name}=")]
    return value


def remote_parts(text: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Of a command for a host: the words, the variables set before bash, and what host.sh is given."""
    words = shlex.split(text)
    at = words.index("bash")
    return (
        words,
        dict(word.split("=", 1) for word in words[:at] if "=" in word and not word.startswith("-")),
        words[at + 2 :],
    )


def test_tpu_vm_creates_copies_and_starts_the_same_command_on_all_hosts(capsys):
    commands = dry_run(capsys, "tpu-vm", "--name=pod", *CLOUD, "--capacity=spot")
    create = the_one(commands, "create")
    assert create[: create.index("||")][:6] == [
        "gcloud",
        "compute",
        "tpus",
        "tpu-vm",
        "describe",
        "pod",
    ]
    create = create[create.index("||") + 1 :]
    assert (
        create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
        and "--spot" in create
    )
    assert (option(create, "zone"), option(create, "project")) == ("us-east5-a", "lab")
    assert (option(create, "accelerator-type"), option(create, "version")) == (
        "v5p-128",
        "v2-alpha-tpuv5",
    )
    copy = the_one(commands, "scp")
    assert "--worker=all" in copy and "pod:" in copy
    start = the_one(commands, "ssh", "--worker=all")
    words, variables, given = remote_parts(option(start, "command"))
    assert words[:3] == ["tar", "-xzf", "rome.tar.gz"] and given == [
        "sudo mount -t nfs 10.0.0.2:/x /mnt/rome",
        *TRAIN,
    ]
    assert variables["LIBTPU_INIT_ARGS"].split() == [
        f"{name}={value}" for name, value in LIBTPU_ARGS["v5p"].items()
    ]
    assert not any(command[0] == "xpk" or "nvidia" in " ".join(command) for command in commands)


def test_queued_resources_wait_for_all_slices_and_start_every_one(capsys):
    commands = dry_run(capsys, "queued", "--name=pod", *CLOUD, "--slices=2", "--capacity=reserved")
    create = the_one(commands, "create")
    create = create[create.index("||") + 1 :]
    assert (
        create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
        and "--reserved" in create
    )
    assert (
        option(create, "node-count"),
        option(create, "node-prefix"),
        option(create, "runtime-version"),
    ) == ("2", "pod", "v2-alpha-tpuv5")
    assert any(command[0] == "while" for command in commands)
    started = [command[5] for command in commands if "ssh" in command and "--worker=all" in command]
    assert started == ["pod-0", "pod-1"]


def test_one_queued_slice_has_a_node_id(capsys):
    create = the_one(dry_run(capsys, "queued", "--name=pod", *CLOUD), "create")
    assert "--node-id=pod" in create and not any(word.startswith("--node-count") for word in create)


def test_xpk_submits_one_workload_with_the_flags_of_its_chip(capsys):
    commands = dry_run(
        capsys,
        "xpk",
        "--cluster=c",
        "--accelerator-type=tpu7x-128",
        "--slices=3",
        "--storage=share",
    )
    create = the_one(commands, "workload", "create")
    assert create[:3] == ["xpk", "workload", "create"]
    found = {
        name: option(create, name)
        for name in ("cluster", "workload", "tpu-type", "num-slices", "storage")
    }
    assert found == {
        "cluster": "c",
        "workload": "rome",
        "tpu-type": "tpu7x-128",
        "num-slices": "3",
        "storage": "share",
    }
    name, _, flags = option(create, "env").partition("=")
    assert name == "LIBTPU_INIT_ARGS" and flags.split() == [
        f"{name}={value}" for name, value in LIBTPU_ARGS["tpu7x"].items()
    ]
    words = shlex.split(option(create, "command"))
    assert words[-len(TRAIN) :] == TRAIN and words[words.index("exec") + 1 :][:3] == [
        ".venv/bin/python",
        "-m",
        "launch.train",
    ]


@pytest.mark.parametrize("per, tasks", [("gpu", "8"), ("node", "1")])
def test_slurm_starts_one_process_a_gpu_or_a_node(capsys, per, tasks):
    commands = dry_run(capsys, "slurm", "--nodes=4", "--partition=h100", f"--process-per={per}")
    sbatch = the_one(commands, "sbatch")
    assert (
        option(sbatch, "nodes"),
        option(sbatch, "ntasks-per-node"),
        option(sbatch, "gpus-per-node"),
    ) == ("4", tasks, "8")
    assert option(sbatch, "partition") == "h100" and option(sbatch, "signal").startswith("TERM@")
    assert sbatch[sbatch.index("launch/pod/slurm.sh") + 1 :] == TRAIN
    exported = dict(
        word.split("=", 1) for command in commands if command[0] == "export" for word in command[1:]
    )
    assert exported["XLA_FLAGS"].split() == [
        f"{name}={value}" for name, value in GPU_XLA_FLAGS.items()
    ]


def test_slurm_without_gpus_asks_for_none(capsys):
    sbatch = the_one(dry_run(capsys, "slurm", "--nodes=2", "--gpus-per-node=0"), "sbatch")
    assert option(sbatch, "ntasks-per-node") == "1" and not any("gpus" in word for word in sbatch)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tpu-vm", "--zone=z", "--accelerator-type=v9-8", "--", *TRAIN], "'v9-8' is unknown"),
        (
            ["tpu-vm", "--zone=z", "--accelerator-type=tpu7x-8", "--", *TRAIN],
            "python -m launch.pod xpk",
        ),
        (["slurm", "--nodes=2", "--", "--config=experiments/ipa.py"], "--workdir is missing"),
        (["slurm", "--nodes=2"], "--config is missing"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_runs(capsys, arguments, message):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, tool",
    [
        (["tpu-vm", *CLOUD], "gcloud"),
        (["queued", *CLOUD], "gcloud"),
        (["xpk", "--cluster=c", "--accelerator-type=v6e-16"], "xpk"),
        (["slurm", "--nodes=1"], "sbatch"),
    ],
)
def test_a_missing_tool_is_named_and_nothing_runs(capsys, monkeypatch, arguments, tool):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    assert main([*arguments, "--", *TRAIN]) == 1
    assert f"{tool} is not on this machine's PATH" in capsys.readouterr().err


def test_without_dry_run_the_printed_script_is_what_runs_and_a_failure_stops_it(
    tmp_path, capsys, monkeypatch
):
    """Programs of these names that write down their arguments; the first of them fails."""
    for name, status in (("xpk", 3), ("gcloud", 1), ("sbatch", 0)):
        (tmp_path / name).write_text(
            f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >>{tmp_path}/calls\nexit {status}\n'
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["xpk", "--cluster=c", "--accelerator-type=v5p-8", "--", *TRAIN]) == 3
    (expected,) = dry_run(capsys, "xpk", "--cluster=c", "--accelerator-type=v5p-8")[1:]
    assert (tmp_path / "calls").read_text().splitlines() == expected
    (tmp_path / "calls").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["tpu-vm", "--zone=z", "--accelerator-type=v5p-8", "--", *TRAIN]) == 1
    assert (
        "scp" not in (tmp_path / "calls").read_text()
    )  # nothing is copied to a machine that could not be had


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["launch/setup.sh", "launch/pod/host.sh", "launch/pod/slurm.sh"])
def test_shell_scripts_are_clean(script):
    done = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
