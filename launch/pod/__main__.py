r"""Starts launch.train on every host of a pod.

Each command writes one bash script: --dry-run prints it, to read or to paste; without, it runs.

python -m launch.pod tpu-vm --name=rome --zone=us-east5-a --accelerator-type=v5p-128 --mount='sudo mount -t nfs 10.0.0.2:/share /mnt/rome' --dry-run \
    -- --config=experiments/ipa.py:qwen3_30b_a3b --workdir=/mnt/rome/run
    --config.engine.urls=http://a:30000
python -m launch.pod queued ... --slices=2 --spot         # the same, waiting in Google's queue for it; several slices
python -m launch.pod xpk --cluster=CLUSTER --accelerator-type=v5p-128 --storage=rome-share --dry-run -- --config=... --workdir=...    # GKE
python -m launch.pod slurm --nodes=4 --gpus-per-node=8 --partition=h100 --dry-run -- --config=... --workdir=...

What stands behind `--` is launch.train's. Its --workdir must lie on a file system that all hosts
share. The code that runs is the commit that is checked out here (tpu-vm, queued), or this folder
(xpk, slurm). The processes find each other as rome/train/distributed.py says.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys

from rome.train.xla_flags import environment_of

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}  # images of the Cloud TPU API
PREFIXES = {
    "v4-": "v4",
    "v5litepod-": "v5e",
    "v5e-": "v5e",
    "v5p-": "v5p",
    "v6e-": "v6e",
    "tpu7x-": "tpu7x",
}
TOOLS = {
    "gcloud": "Install the Google Cloud CLI and log in (gcloud auth login).",
    "xpk": "Install it with: pip install xpk.",
    "sbatch": "Run this on a login node of the SLURM cluster.",
    "git": "Install git.",
}
GRACE_SECONDS = 300  # between the wish to stop and the kill: time to save


class PodError(ValueError):
    """Arguments that cannot work: which, and what to give instead."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments, train = make_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    try:
        check_train(train)
        script = arguments.script(arguments, train)
        if arguments.dry_run:
            print(script)
            return 0
        for tool in arguments.tools:
            if shutil.which(tool) is None:
                raise PodError(
                    f"{tool} is not on this machine's PATH. {TOOLS[tool]} With --dry-run the"
                    " commands are only printed."
                )
    except PodError as error:
        print(f"launch.pod: {error}", file=sys.stderr)
        return 1
    return subprocess.run(["bash", "-c", script], check=False).returncode


def check_train(train: list[str]) -> None:
    for flag in ("--config", "--workdir"):
        if not any(argument.startswith(f"{flag}=") for argument in train):
            raise PodError(
                f"launch.train's {flag} is missing. Add it behind `--`, such as: --"
                " --config=experiments/ipa.py:qwen3_30b_a3b --workdir=/mnt/rome/run"
            )


def find_chip(accelerator: str) -> str:
    """The chip of an accelerator type: v5p-128 is a v5p."""
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
    """Copies the commit to every host of every slice and starts it there. launch.train is detached:
    closing this terminal does not end it.
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
    """One shell command.

    `program` is ours and may be several words; each argument is quoted where it must be.
    """
    return " ".join([program, *map(shlex.quote, arguments)])


def _script(*lines: str) -> str:
    return "\n".join(["set -euo pipefail", *lines])


# -- the command line
# -------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="tpu-vm | queued | xpk | slurm")

    def add(name: str, script, tools: list[str], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(script=script, tools=tools)
        command.add_argument("--name", default="rome", help="of the machine or job")
        command.add_argument("--dry-run", action="store_true", help="print the script, run nothing")
        return command

    for command in (
        add("tpu-vm", tpu_vm, ["gcloud", "git"], "one slice of TPU VMs"),
        add("queued", queued, ["gcloud", "git"], "TPU VMs through queued resources"),
    ):
        command.add_argument(
            "--accelerator-type", required=True, help="such as v5p-128, v5litepod-64, v6e-256"
        )
        command.add_argument("--zone", required=True)
        command.add_argument("--project", default="", help="otherwise gcloud's own")
        command.add_argument(
            "--capacity", choices=("on-demand", "spot", "reserved"), default="on-demand"
        )
        command.add_argument(
            "--mount",
            default="true",
            help="shell command that mounts the shared file system on a host",
        )
    command.add_argument(
        "--slices",
        type=_positive,
        default=1,
        help="slices, joined by the data-centre network (mesh axis replica)",
    )

    command = add("xpk", xpk, ["xpk"], "a workload on GKE, through xpk")
    command.add_argument("--cluster", required=True)
    command.add_argument(
        "--accelerator-type", required=True, help="such as v5p-128, v6e-256, tpu7x-128"
    )
    command.add_argument("--slices", type=_positive, default=1)
    command.add_argument("--project", default="", help="otherwise gcloud's own")
    command.add_argument("--zone", default="", help="otherwise gcloud's own")
    command.add_argument(
        "--storage", default="", help="of `xpk storage`: the file system that holds --workdir"
    )
    command.add_argument(
        "--base-image", default="python:3.12", help="image that this folder is put on"
    )
    command.add_argument(
        "--priority", choices=("very-low", "low", "medium", "high", "very-high"), default="medium"
    )
    command.add_argument(
        "--restarts", type=int, default=20, help="after lost hosts and preemptions; the run resumes"
    )

    command = add("slurm", slurm, ["sbatch"], "a SLURM job")
    command.add_argument("--nodes", type=_positive, required=True)
    command.add_argument("--gpus-per-node", type=int, default=8, help="0: CPU nodes")
    command.add_argument("--process-per", choices=("gpu", "node"), default="gpu")
    command.add_argument("--time", default="24:00:00")
    command.add_argument("--partition", default="")
    command.add_argument("--account", default="")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
