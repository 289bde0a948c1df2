"""What a run did after the checkpoint that it goes on from, where its schedule is another one now.

From that checkpoint on its weights will be others. Evaluations of the weights that are gone, and
episodes that they sampled, are no part of the run any more: kept, they would be reported as results
of the new weights, and trained on as if these had sampled them. Such a run is mostly one that
diverged and goes on with a lower learning rate.
"""

from __future__ import annotations

import pathlib
import re
import shutil
from collections.abc import Sequence

import ml_collections

from rome.data.trajectory import load_trajectory, routes_path
from rome.rollout.journal import Journal, drop_steps_after
from rome.train.report import outcomes_path
from rome.train.workdir import Change

# Schedule keys of which the weights depend. `steps` is one where something ends with the stage.
OF_WEIGHTS = (
    "learning_rate",
    "warmup_updates",
    "decay",
    "weight_decay",
    "clip",
    "skip_nonfinite_updates",
)


def is_outdated(
    config: ml_collections.ConfigDict,
    step: int,
    changes: Sequence[Change],
    earlier: Sequence[Change],
) -> bool:
    """Return whether what a run did after a checkpoint was done with another schedule.

    Args:
      config: of the run, as it goes on.
      step: of the checkpoint.
      changes: of this start.
      earlier: of earlier starts. Those at a later step count: checkpoints were deleted since.
    """
    ends_with_stage = config.decay or config.get("final_weight_decay", -1.0) >= 0
    keys = {*OF_WEIGHTS, "steps"} if ends_with_stage else {*OF_WEIGHTS}
    later = [change for change in earlier if change["step"] > step]
    return any(change["key"] in keys for change in (*changes, *later))


def forget_after(workdir: pathlib.Path, config: ml_collections.ConfigDict, step: int) -> None:
    """Delete what a run did with weights that are newer than a checkpoint.

    These are evaluations of later steps, the record of what later steps took, and the episodes with
    a token that later weights sampled. The step after the checkpoint keeps its own: the weights of
    the checkpoint have sampled them.

    Args:
      workdir: of the run.
      config: of the run.
      step: of the checkpoint; 0 where there is none.
    """
    stage = config.experiment
    for path in outcomes_path(workdir, stage, 0).parent.glob("*"):
        evaluated = re.fullmatch(rf"{re.escape(stage)}_(\d{{6,}})(\.json)?", path.name)
        if evaluated is None or int(evaluated[1]) <= step:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    journal = workdir / "steps.jsonl"
    if not journal.exists():
        return
    drop_steps_after(journal, step)
    rollout = config.rollout
    groups_per_step = config.groups * (1 if rollout.whole_groups else config.group_size)
    # Of earlier waves all groups were taken by the step after the checkpoint, or before it.
    first_wave = Journal(journal).first_left(step + 1) // groups_per_step
    sampled = re.compile(rf"{re.escape(stage)}_(\d{{6,}})_g\d+.*\.json")
    for path in (workdir / "trajectories").glob("*.json"):
        played = sampled.fullmatch(path.name)
        if played is None or int(played[1]) < first_wave or _newest_version(path) <= step:
            continue
        path.unlink()
        routes_path(path).unlink(missing_ok=True)


def _newest_version(path: pathlib.Path) -> int:
    """Return the newest weights that sampled a token of an episode; -1 where none did."""
    try:
        trajectory = load_trajectory(path, routes=False)
    except ValueError:  # a power failure cut it off: the episode is played again anyway
        return -1
    spans = (span for chunk in trajectory.chunks for span in chunk.versions)
    return max((version for version, _, _ in spans), default=-1)
