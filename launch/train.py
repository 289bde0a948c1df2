"""Trains an experiment: python -m launch.train --config=experiments/ipa.py[:PRESET] [--workdir=DIR]
[--config.key=value ...]

The same command again resumes where a run stopped. Ctrl-C once: saves and says how to go on; twice:
leaves at once.

On a pod the same command runs in every process (rome/train/distributed.py says how they find each
other; `python -m launch.pod` starts them).
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import config_flags

if TYPE_CHECKING:
    from envs.rock import SandboxConfig

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    "experiments/ipa.py",
    "An experiment file, with :PRESET after it where it has several.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where the run lives. Default: runs/EXPERIMENT-PRESET-HASH OF THE CONFIG."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where several processes are started by hand."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", -1, "How many processes train together. SLURM and TPU pods say it themselves."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", -1, "Which of them this is: 0 to num_processes - 1."
)


class StopRequest:
    """Ctrl-C (or SIGTERM) as a wish that the loop asks for; the second one interrupts."""

    def __init__(self) -> None:
        self.made = False
        self.listen()

    def listen(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        print(
            "\nstopping: the last whole step is saved (again: leave at once)",
            file=sys.stderr,
            flush=True,
        )

    def __call__(self) -> bool:
        return self.made


def run_experiment(config, workdir: pathlib.Path, isolation: str, team):
    """Runs one experiment, first the one that it starts from where its result is missing.

    Returns False when the user stopped it.
    """
    from rome.rollout.player import Stopped
    from rome.stages.base import start_run, train
    from rome.stages.config import check_config, default_workdir, init_config
    from rome.train.display import Display
    from rome.train.report import read_report

    check_config(config)
    team.require_same("config", str(default_workdir(config)))  # a hash of it
    if team.share(f"workdir {workdir}", lambda: open_workdir(workdir, config)):
        if team.leads:
            print(f"{config.experiment} in {workdir} is complete", flush=True)
        return True
    earlier, start = [], pathlib.Path(config.init_from) if config.init_from else None
    if start is not None and start.suffix == ".py":
        start = workdir / "init" / "final"
        if not team.share(f"start {start}", start.exists):
            if team.leads:
                print(
                    f"{config.experiment} starts from {config.init_from}, which has no result in"
                    f" {workdir / 'init'} yet: running it first",
                    flush=True,
                )
            if not run_experiment(init_config(config), workdir / "init", isolation, team):
                return False
        earlier = read_report(workdir / "init")["evals"] if team.leads else []
    with Display(config.experiment, config.steps, quiet=not team.leads) as display:
        run = start_run(
            config, workdir, isolation=isolation, team=team, display=display, earlier_evals=earlier
        )
        try:
            train(run, start)
        except Stopped:
            return False
    return run.complete


def open_workdir(workdir: pathlib.Path, config) -> bool:
    """Claims it for this config. Returns whether its run is complete."""
    from rome.stages.config import claim_workdir

    claim_workdir(workdir, config)
    return (workdir / "final").exists()


def start_team(stop: StopRequest):
    """This process among those of the job, which is one where nothing says otherwise."""
    from envs.rock import SandboxError
    from rome.engine.client import EngineError
    from rome.rollout.player import RolloutError, Stopped
    from rome.stages.config import ConfigError
    from rome.train.alarms import TrainingAlarm
    from rome.train.checkpoint import CheckpointError
    from rome.train.distributed import choose, start

    plan = choose(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    team = start(
        plan,
        stop=stop,
        errors=(
            Stopped,
            RolloutError,
            EngineError,
            SandboxError,
            ConfigError,
            CheckpointError,
            TrainingAlarm,
        ),
    )
    stop.listen()  # jax.distributed has put a handler of its own in our place
    return team


def show_result(workdir: pathlib.Path) -> None:
    from rome.train.plots import plot_curves
    from rome.train.report import before_and_after, print_table, read_report

    report = read_report(workdir)
    print_table(*before_and_after(report["evals"]))
    paths = [os.path.relpath(path) for path in plot_curves(workdir)]
    print(
        f"{report['steps']} steps in {report['wall_seconds'] / 60:.1f} min, isolation:"
        f" {report['isolation']}"
    )
    print(f"report: {workdir / 'report.json'}   curves: {' '.join(paths)}")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(
            f"argument {argv[1]!r} is not understood; flags look like --config.key=value"
        )
    logging.set_verbosity(logging.WARNING)  # orbax narrates every save
    stop = StopRequest()  # before JAX and all else is imported: an early Ctrl-C is heard too
    from rome.stages.config import default_workdir, sandbox_config
    from rome.train.memory import keep_freed_memory
    from rome.train.xla_flags import apply_flags

    keep_freed_memory()  # before JAX starts its threads
    apply_flags()
    config = _CONFIG.value
    workdir = pathlib.Path(_WORKDIR.value or default_workdir(config))
    team = start_team(stop)
    try:
        isolation = team.share(
            "isolation",
            lambda: find_isolation(sandbox_config(config)) if "sandbox" in config else "no sandbox",
        )
        if not run_experiment(config, workdir, isolation, team):
            command = " ".join(
                [os.path.relpath(sys.executable), "-m", "launch.train", *sys.argv[1:]]
            )
            if team.leads:
                print(
                    f"stopped; everything earned is kept in {workdir}. To go on:\n  {command}",
                    flush=True,
                )
            return 130
        if team.leads:
            show_result(workdir)
        return 0
    except BaseException as error:
        team.part(error)
        raise
    finally:
        team.close()


def find_isolation(config: SandboxConfig) -> str:
    """The tier of sandboxes that are to be had; says what a weaker one lacks, raises where what is
    wanted is not to be had.
    """
    from envs.rock import probe
    from envs.rock.docker.probe import probe_docker
    from envs.rock.sync import SyncSandbox

    if config.backend == "remote":  # the admin's to say
        with SyncSandbox(config) as sandbox:
            return sandbox.tier
    tier = probe_docker() if config.backend == "docker" else probe(config.isolation)
    tier.require(config.isolation)
    if tier.missing:
        print(tier.banner(), flush=True)
    return tier.tier


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with one clear line for what it does not understand."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = " ".join(
            str(error.args[0] if error.args else error)
            .strip("'\"")
            .replace("\\'", "'")
            .replace("\\n", " ")
            .split()
        )
        sys.exit(f"launch.train: {text}")


def run_main(argv: list[str]) -> int:
    """`main`; a known kind of failure becomes one line. ROME_DEBUG=1 keeps the traceback."""
    from envs.rock import SandboxError
    from rome.engine.client import EngineError
    from rome.rollout.player import RolloutError
    from rome.train.alarms import TrainingAlarm
    from rome.train.checkpoint import CheckpointError
    from rome.train.distributed import DistributedError
    from rome.train.team import LeaderError

    try:
        return main(argv)
    except (
        ValueError,
        OSError,
        SandboxError,
        EngineError,
        RolloutError,
        CheckpointError,
        DistributedError,
        LeaderError,
        TrainingAlarm,
    ) as error:
        if os.environ.get("ROME_DEBUG"):
            raise
        print(f"launch.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(".cache/jax").absolute()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    app.run(run_main, flags_parser=parse)
