r"""Start launch.train on every host of a pod.

Each command writes one bash script: --dry-run prints it, to read or to paste; without, it runs.

A slice of TPU VMs:
    python -m launch.pod tpu-vm --name=rome --zone=us-east5-a --accelerator-type=v5p-128 \
        --mount='sudo mount -t nfs 10.0.0.2:/share /mnt/rome' --dry-run \
        -- --config=experiments/ipa.py:qwen3_30b_a3b --workdir=/mnt/rome/run \
        --config.engine.urls=http://a:30000
The same, waiting in Google's queue for it; several slices:
    python -m launch.pod queued ... --slices=2 --spot
GKE:
    python -m launch.pod xpk --cluster=CLUSTER --accelerator-type=v5p-128 --storage=rome-share \
        --dry-run -- --config=... --workdir=...
SLURM:
    python -m launch.pod slurm --nodes=4 --gpus-per-node=8 --partition=h100 --dry-run \
        -- --config=... --workdir=...

The arguments after `--` are launch.train's. Its --workdir must lie on a file system that all hosts
share. The code that runs is the checked-out commit (tpu-vm, queued), or this folder (xpk, slurm).
rome/train/distributed.py describes how the processes find each other.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable

from rome.train.pod import PodError, check_train, queued, slurm, tpu_vm, xpk

TOOLS = {
    "gcloud": "Install the Google Cloud CLI and log in (gcloud auth login).",
    "xpk": "Install it with: pip install xpk.",
    "sbatch": "Run this on a login node of the SLURM cluster.",
    "git": "Install git.",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = make_parser().parse_args(argv[:cut])
    train = argv[cut + 1 :]
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


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the four commands."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="tpu-vm | queued | xpk | slurm")

    def add(name: str, script: Callable, tools: list[str], text: str) -> Callable:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(script=script, tools=tools)
        command.add_argument("--name", default="rome", help="of the machine or job")
        command.add_argument("--dry-run", action="store_true", help="print the script, run nothing")
        return command.add_argument

    _add_tpu_options(add("tpu-vm", tpu_vm, ["gcloud", "git"], "one slice of TPU VMs"))
    option = add("queued", queued, ["gcloud", "git"], "TPU VMs through queued resources")
    _add_tpu_options(option)
    slices = "slices, joined by the data-centre network (mesh axis replica)"
    option("--slices", type=_positive, default=1, help=slices)

    option = add("xpk", xpk, ["xpk"], "a workload on GKE, through xpk")
    priorities = ("very-low", "low", "medium", "high", "very-high")
    option("--cluster", required=True)
    option("--accelerator-type", required=True, help="such as v5p-128, v6e-256, tpu7x-128")
    option("--slices", type=_positive, default=1)
    option("--project", default="", help="otherwise gcloud's own")
    option("--zone", default="", help="otherwise gcloud's own")
    option("--storage", default="", help="of `xpk storage`: the file system that holds --workdir")
    option("--base-image", default="python:3.12", help="image that this folder is put on")
    option("--priority", choices=priorities, default="medium")
    option("--restarts", type=int, default=20, help="after lost hosts and preemptions")

    option = add("slurm", slurm, ["sbatch"], "a SLURM job")
    option("--nodes", type=_positive, required=True)
    option("--gpus-per-node", type=int, default=8, help="0: CPU nodes")
    option("--process-per", choices=("gpu", "node"), default="gpu")
    option("--time", default="24:00:00")
    option("--partition", default="")
    option("--account", default="")
    return parser


def _add_tpu_options(option: Callable) -> None:
    option("--accelerator-type", required=True, help="such as v5p-128, v5litepod-64, v6e-256")
    option("--zone", required=True)
    option("--project", default="", help="otherwise gcloud's own")
    option("--capacity", choices=("on-demand", "spot", "reserved"), default="on-demand")
    mount = "shell command that mounts the shared file system on a host"
    option("--mount", default="true", help=mount)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
