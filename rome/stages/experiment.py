"""Run an experiment: first the one that it starts from, then its own stage, each in a workdir."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
from rich.console import Console

from envs.rock import SandboxError
from rome.engine.errors import EngineError
from rome.own_code import OwnCodeError
from rome.rollout.player import RolloutError
from rome.stages.base import StageContext, TrainingStage
from rome.stages.config import check_config, init_config, key_rules
from rome.stages.cpt import CPTStage
from rome.stages.dry_run import try_own_code
from rome.stages.isolation import find_isolation
from rome.stages.outdated import forget_after, is_outdated
from rome.stages.own_code import own_code_digest
from rome.stages.rl import RLStage
from rome.stages.schema import fill_own_keys, kind_of
from rome.stages.settings import sandbox_config
from rome.stages.sft import SFTStage
from rome.stopping import ShouldStop, Stopped
from rome.train.alarms import TrainingAlarm
from rome.train.chain import table_of_stages
from rome.train.checkpoint import CheckpointError
from rome.train.display import Display
from rome.train.distributed import DistributedError, choose, start
from rome.train.ownership import Ownership
from rome.train.plots import plot_curves
from rome.train.report import before_and_after, print_table, read_report
from rome.train.team import LeaderError, Team
from rome.train.workdir import (
    Change,
    ConfigError,
    claim_workdir,
    config_digest,
    experiment_before,
    is_complete,
    read_changes,
    start_directory,
)

STAGES: dict[str, type[TrainingStage]] = {
    "cpt": CPTStage,
    "sft": SFTStage,
    "rl": RLStage,
}  # by kind
# Errors that every process raises as the leader did.
SHARED_ERRORS = (
    Stopped,
    RolloutError,
    EngineError,
    SandboxError,
    ConfigError,
    OwnCodeError,
    CheckpointError,
    TrainingAlarm,
)
# Errors that mean a wrong input or a broken machine, not a fault of the program.
KNOWN_ERRORS = (*SHARED_ERRORS, DistributedError, LeaderError)


def start_team(
    coordinator: str, num_processes: int, process_id: int, should_stop: Callable[[], bool]
) -> Team:
    """Find the other processes of this job; without any sign of them, this process is alone.

    Args:
      coordinator: HOST:PORT of process 0, or "".
      num_processes: of the job, or -1.
      process_id: of this process, or -1.
      should_stop: whether this process was asked to stop.
    """
    layout = choose(coordinator, num_processes, process_id)
    return start(layout, stop=should_stop, errors=SHARED_ERRORS)


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path, team: Team) -> bool:
    """Run an experiment to its end and print its result.

    Returns:
      False where the user stopped it; what was reached is saved then.
    """
    try:
        isolation = team.share("isolation", lambda: isolation_of(config, team.wants_to_stop))
    except Stopped:
        return False
    is_complete = run_stages(config, workdir, isolation, team)
    if is_complete and team.leads:
        show_result(workdir)
    return is_complete


def isolation_of(config: ml_collections.ConfigDict, should_stop: ShouldStop) -> str:
    """Return the tier of the sandboxes of an experiment, "no sandbox" where it has none."""
    if "sandbox" not in config or not config.eval_tasks:
        return "no sandbox"
    return find_isolation(sandbox_config(config), should_stop)


def run_stages(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, isolation: str, team: Team
) -> bool:
    """Train the stage of a config, after the stage that it starts from where that has no result.

    Returns:
      False where the user stopped it.
    """
    fill_own_keys(config)
    check_config(config)
    team.require_same("config", config_digest(config))
    team.require_same("own code", own_code_digest(config))
    try_own_code(config)
    ownership, _ = team.share_part(f"owner of {workdir}", lambda: (Ownership(workdir), None))
    with ownership or contextlib.nullcontext():  # only the leader's
        return _run_owned(config, workdir, isolation, team)


def _run_owned(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, isolation: str, team: Team
) -> bool:
    """Do what run_stages promises, in a workdir that is ours alone."""
    opened = team.share(f"workdir {workdir}", lambda: open_workdir(workdir, config))
    changed = ", ".join(opened["changes"])
    if opened["is_complete"]:
        _say(team, f"{config.experiment} in {workdir} is complete")
        if changed:
            _say(team, f"it ran before this change: {changed}; give another --workdir to run anew")
        return True
    if changed:
        _say(team, f"{config.experiment} in {workdir} goes on with {changed}")
    for step in opened["outdated_after"]:
        _say(
            team,
            f"episodes and evaluations of the weights after step {step} were of another schedule"
            " and are deleted; they are made anew",
        )
    start = start_directory(config, workdir)
    earlier: dict[str, Any] = {}
    if start is not None and experiment_before(config.init_from):
        init_workdir = start.parent
        if not team.share(f"start {start}", start.exists):
            _say(
                team,
                f"{config.experiment} starts from {config.init_from}, which has no result in"
                f" {init_workdir} yet: running it first",
            )
            if not run_stages(init_config(config), init_workdir, isolation, team):
                return False
        earlier = read_report(init_workdir) if team.leads else {}
    with make_display(config, team) as display:
        context = StageContext(
            config,
            workdir,
            isolation,
            team,
            display,
            start,
            earlier.get("evals", ()),
            earlier.get("stages", ()),
        )
        try:
            return STAGES[kind_of(config.loss)](context).train()
        except Stopped as error:
            team.part(error)  # unless all processes were stopped here
            return False


def open_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Claim a workdir for a config, and forget what it did after its checkpoint otherwise.

    Returns:
      Whether its run is complete, what was changed, and the step after which the run is forgotten.
    """
    outdated_after: list[int] = []

    def forget_outdated(step: int, changes: list[Change]) -> None:
        if is_outdated(config, step, changes, read_changes(workdir)):
            forget_after(workdir, config, step)
            outdated_after.append(step)

    changes = claim_workdir(workdir, config, key_rules(config), forget_outdated)
    texts = [f"{change['key']} {change['before']!r} -> {change['after']!r}" for change in changes]
    return {
        "is_complete": is_complete(workdir, config),
        "changes": texts,
        "outdated_after": outdated_after,
    }


def make_display(config: ml_collections.ConfigDict, team: Team) -> Display:
    """Return the display of a stage; only the leader's shows anything."""
    return Display(
        config.experiment,
        config.steps,
        quiet=not team.leads,
        evaluate_every=config.eval_every,
        may_end_early=bool(config.get("until_success", 0.0)),
    )


def show_result(workdir: pathlib.Path) -> None:
    """Print the evaluations before and after training, and where report and curves are."""
    report = read_report(workdir)
    before, after = before_and_after(report["evals"])
    print_table(before, after)
    stages = report.get("stages", ())
    if len(stages) > 1:
        Console(highlight=False).print(table_of_stages(stages))
    try:
        curves = " ".join(os.path.relpath(path) for path in plot_curves(workdir))
    except Exception as error:  # the run is complete without pictures
        curves = f"none ({type(error).__name__}: {error})"
    steps = report["steps"]
    minutes = report["wall_seconds"] / 60
    print(f"{steps} steps in {minutes:.1f} min, isolation: {report['isolation']}")
    print(f"report: {workdir / 'report.json'}   curves: {curves}")


def _say(team: Team, text: str) -> None:
    if team.leads:
        print(text, flush=True)
