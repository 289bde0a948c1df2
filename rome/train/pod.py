"""Bash scripts that start launch.train on every host of a pod.

Each function takes what it needs to know of the pod and the arguments of launch.train, and returns
a script. The code that runs is the checked-out commit (TPU VMs) or this folder (xpk, SLURM).
"""

from __future__ import annotations

import argparse
import shlex

from rome.train.xla_flags import environment_of

# Images of the Cloud TPU API.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
PREFIXES = {
    "v4-": "v4",
    "v5litepod-": "v5e",
    "v5e-": "v5e",
    "v5p-": "v5p",
    "v6e-": "v6e",
    "tpu7x-": "tpu7x",
}
GRACE_SECONDS = 300  # to save, between the request to stop and the kill


class PodError(ValueError):
    """Arguments that cannot work: the message names them and what to give instead."""


def check_train(train: list[str]) -> None:
    """Raise PodError where launch.train's arguments lack what every pod needs."""
    for flag in ("--config", "--workdir"):
        if not any(argument.startswith(f"{flag}=") for argument in train):
            raise PodError(
                f"launch.train's {flag} is missing. Add it behind `--`, such as: --"
                " --config=experiments/ipa.py:qwen3_30b_a3b --workdir=/mnt/rome/run"
            )


def find_chip(accelerator: str) -> str:
    """Return the chip of an accelerator type: v5p-128 is a v5p."""
    for prefix, chip in PREFIXES.items():
        if accelerator.startswith(prefix):
            return chip
    raise PodError(
        f"accelerator type {accelerator!r} is unknown; types look like"
        f" {', '.join(f'{prefix}16' for prefix in PREFIXES)}."
    )


# -- the scripts
# -------------------------------------------------------------------------------------------------


def tpu_vm(arguments: argparse.Namespace, train: list[str]) -> str:
    """Return the script for one slice of TPU VMs."""
    chip = _cloud_chip(arguments.accelerator_type)
    where = _where(arguments)
    create = _command(
        "gcloud compute tpus tpu-vm create",
        arguments.name,
        *where,
        f"--accelerator-type={arguments.accelerator_type}",
        f"--version={RUNTIMES[chip]}",
        *_capacity(arguments),
    )
    describe = _command("gcloud compute tpus tpu-vm describe", arguments.name, *where)
    return _script(
        f"# {arguments.name}: one {arguments.accelerator_type} slice; created unless it is there",
        f"{describe} >/dev/null 2>&1 || {create}",
        *_start_on_hosts([arguments.name], arguments, chip, train),
        "# to delete it:",
        "# " + _command("gcloud compute tpus tpu-vm delete", arguments.name, *where),
    )


def queued(arguments: argparse.Namespace, train: list[str]) -> str:
    """Return the script for TPU VMs through queued resources."""
    chip = _cloud_chip(arguments.accelerator_type)
    where = _where(arguments)
    one = arguments.slices == 1
    nodes = (
        [f"--node-id={arguments.name}"]
        if one
        else [f"--node-count={arguments.slices}", f"--node-prefix={arguments.name}"]
    )
    create = _command(
        "gcloud compute tpus queued-resources create",
        arguments.name,
        *where,
        *nodes,
        f"--accelerator-type={arguments.accelerator_type}",
        f"--runtime-version={RUNTIMES[chip]}",
        *_capacity(arguments),
    )
    describe = _command(
        "gcloud compute tpus queued-resources describe",
        arguments.name,
        *where,
        "--format=value(state.state)",
    )
    names = (
        [arguments.name]
        if one
        else [f"{arguments.name}-{number}" for number in range(arguments.slices)]
    )
    return _script(
        f"# {arguments.name}: {arguments.slices} x {arguments.accelerator_type} in Google's queue;"
        " asked for unless it is there already",
        f"{describe} >/dev/null 2>&1 || {create}",
        "# wait for it, for hours or days; stopping this and starting it again does no harm",
        f'while state=$({describe}) && [ "$state" != ACTIVE ]; do',
        f'  case "$state" in FAILED|SUSPENDED|SUSPENDING) echo "queued resource {arguments.name} is'
        ' $state" >&2; exit 1;; esac',
        '  echo "$(date +%T) $state"',
        "  sleep 30",
        "done",
        *_start_on_hosts(names, arguments, chip, train),
        "# to delete it:",
        "# "
        + _command(
            "gcloud compute tpus queued-resources delete", arguments.name, *where, "--force"
        ),
    )


def xpk(arguments: argparse.Namespace, train: list[str]) -> str:
    """Return the script for a workload on GKE, through xpk."""
    chip = find_chip(arguments.accelerator_type)
    inside = (
        "ACCELERATOR=tpu bash launch/setup.sh requirements.txt && exec .venv/bin/python -m"
        f" launch.train {shlex.join(train)}"
    )
    environment = [f"--env={name}={value}" for name, value in environment_of(chip, {}).items()]
    optional = [
        f"--{name}={value}"
        for name, value in (
            ("project", arguments.project),
            ("zone", arguments.zone),
            ("storage", arguments.storage),
        )
        if value
    ]
    return _script(
        f"# {arguments.slices} x {arguments.accelerator_type} on GKE; this folder is put on top of"
        " the base image",
        _command(
            "xpk workload create",
            f"--cluster={arguments.cluster}",
            f"--workload={arguments.name}",
            f"--tpu-type={arguments.accelerator_type}",
            f"--num-slices={arguments.slices}",
            *optional,
            f"--base-docker-image={arguments.base_image}",
            "--script-dir=.",
            f"--priority={arguments.priority}",
            f"--max-restarts={arguments.restarts}",
            f"--termination-grace-period-seconds={GRACE_SECONDS}",
            *environment,
            f"--command={inside}",
        ),
        "# to see it, and to stop it:",
        "# "
        + _command(
            "xpk workload list",
            f"--cluster={arguments.cluster}",
            f"--filter-by-job={arguments.name}",
        ),
        "# "
        + _command(
            "xpk workload delete", f"--cluster={arguments.cluster}", f"--workload={arguments.name}"
        ),
    )


def slurm(arguments: argparse.Namespace, train: list[str]) -> str:
    """Return the script for a SLURM job."""
    tasks = (
        arguments.gpus_per_node if arguments.process_per == "gpu" and arguments.gpus_per_node else 1
    )
    accelerator = "cuda" if arguments.gpus_per_node else "cpu"
    environment = environment_of("gpu", {}) if arguments.gpus_per_node else {}
    optional = [
        f"--{name}={value}"
        for name, value in (("partition", arguments.partition), ("account", arguments.account))
        if value
    ]
    gpus = [f"--gpus-per-node={arguments.gpus_per_node}"] if arguments.gpus_per_node else []
    return _script(
        f"# {arguments.nodes} nodes, {tasks} process{'es' * (tasks > 1)} on each; the packages are"
        " installed here, in this folder, which the nodes share",
        _command(f"ACCELERATOR={accelerator} bash launch/setup.sh", "requirements.txt"),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        _command(
            "sbatch",
            f"--job-name={arguments.name}",
            f"--nodes={arguments.nodes}",
            f"--ntasks-per-node={tasks}",
            *gpus,
            "--exclusive",
            f"--time={arguments.time}",
            *optional,
            f"--signal=TERM@{GRACE_SECONDS}",
            "--requeue",
            "--open-mode=append",
            f"--output={arguments.name}-%j.log",
            "--export=ALL",
            "launch/pod/slurm.sh",
            *train,
        ),
    )


def _start_on_hosts(
    names: list[str], arguments: argparse.Namespace, chip: str, train: list[str]
) -> list[str]:
    """Return lines that copy the commit to every host of every slice and start it there.

    launch.train is detached: closing this terminal does not end it.
    """
    where = _where(arguments)
    flags = " ".join(
        f"{name}={shlex.quote(value)}" for name, value in environment_of(chip, {}).items()
    )
    remote = (
        f"tar -xzf rome.tar.gz && cd rome && {flags} bash launch/pod/host.sh"
        f" {shlex.quote(arguments.mount)} {shlex.join(train)}"
    )
    lines = [
        "# the commit that is checked out here, to every host",
        "git archive --format=tar.gz --prefix=rome/ --output=rome.tar.gz HEAD",
    ]
    for name in names:
        lines.append(
            _command(
                "gcloud compute tpus tpu-vm scp", "rome.tar.gz", f"{name}:", *where, "--worker=all"
            )
        )
    lines.append("rm rome.tar.gz")
    lines.append("# every host installs and starts its process; they wait for each other")
    for name in names:  # all slices must be started before any of them waits
        lines.append(
            _command(
                "gcloud compute tpus tpu-vm ssh",
                name,
                *where,
                "--worker=all",
                f"--command={remote}",
            )
        )
    follow = _command(
        "gcloud compute tpus tpu-vm ssh",
        names[0],
        *where,
        "--worker=0",
        "--command=tail -n +1 -F rome/train.log",
    )
    lines += [
        "# what process 0 says; Ctrl-C ends the view, not the run",
        follow,
        "# to stop the run at its next whole step:",
    ]
    lines += [
        "# "
        + _command(
            "gcloud compute tpus tpu-vm ssh",
            name,
            *where,
            "--worker=all",
            "--command=kill -TERM $(cat rome/train.pid)",
        )
        for name in names
    ]
    return lines


def _cloud_chip(accelerator: str) -> str:
    chip = find_chip(accelerator)
    if chip not in RUNTIMES:
        raise PodError(
            f"{accelerator} is not served by the Cloud TPU API that tpu-vm and queued use. Start it"
            " on GKE: python -m launch.pod xpk."
        )
    return chip


def _where(arguments: argparse.Namespace) -> list[str]:
    return [f"--zone={arguments.zone}"] + (
        [f"--project={arguments.project}"] if arguments.project else []
    )


def _capacity(arguments: argparse.Namespace) -> list[str]:
    return [f"--{arguments.capacity}"] if arguments.capacity != "on-demand" else []


def _command(program: str, *arguments: str) -> str:
    """Return a shell command.

    Args:
      program: one or several words, which are not quoted.
      arguments: quoted where they must be.
    """
    return " ".join([program, *map(shlex.quote, arguments)])


def _script(*lines: str) -> str:
    """Return a script that ends at the first error."""
    return "\n".join(["set -euo pipefail", *lines])
