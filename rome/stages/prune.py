"""Deletes files of a run that nothing reads again: a pod would write terabytes.

The routes of an episode are replayed by the step that trains on it, and again where the run resumes
from a checkpoint before that step. Trajectories are read as long, as sources of resampled groups
for longer, and may be kept for people (`config.keep_trajectories`).
"""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

from rome.data.trajectory import routes_path


class Pruner:
    """Deletes the files of steps that no checkpoint goes back to.

    Files whose names it does not know stay.

    Args:
      directory: WORKDIR/trajectories.
      experiment: what the names of the run's files begin with.
      keep: newest trained steps whose trajectories stay; 0: those of all steps.
    """

    def __init__(self, directory: pathlib.Path, experiment: str, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._names = re.compile(
            rf"{re.escape(experiment)}_(?P<number>\d{{6,}})_(?P<kind>g\d|expert_|earlier_|fork_)"
        )
        self._last_used: dict[str, int] = {}  # by source: the last step at which it was one
        self._pruned: tuple[int, int] | None = None  # the steps of the last time

    def get_state(self) -> dict[str, int]:
        """Return what a checkpoint carries: sources, and when they were ones last."""
        return dict(self._last_used)

    def set_state(self, document: dict[str, int]) -> None:
        """Continue from what `get_state` returned."""
        self._last_used = dict(document)

    def prune(
        self,
        step: int,
        oldest_checkpoint: int,
        sources: Collection[str],
        first_wave_left: Callable[[int], int],
    ) -> None:
        """Delete the files that may go.

        Args:
          step: the step that is about to be collected.
          oldest_checkpoint: the earliest step at which the run can resume.
          sources: names of files that groups are, or will be, resampled from.
          first_wave_left: returns the first wave that a run resumed at a step may still play.
        """
        self._last_used |= dict.fromkeys(sources, step)
        self._last_used = {
            name: used for name, used in self._last_used.items() if used >= oldest_checkpoint
        }
        kept_from = min(step - self._keep, oldest_checkpoint) if self._keep else 0
        if self._pruned == (kept_from, oldest_checkpoint):
            return
        bounds = {
            bound: {"wave": first_wave_left(bound), "step": bound}
            for bound in (kept_from, oldest_checkpoint)
        }
        for path in list(self._directory.iterdir()):
            name = self._names.match(path.name)
            if name is None:
                continue
            # The name of a sampled episode has the wave that it was planned in, that of an imitated
            # one the step that showed it.
            unit = "wave" if name["kind"].startswith("g") else "step"
            number = int(name["number"])
            if number >= bounds[oldest_checkpoint][unit]:
                continue
            is_old = number < bounds[kept_from][unit]
            is_source = path.with_suffix(".json").name in self._last_used
            is_routes = path == routes_path(path)
            if is_routes or (is_old and not is_source):
                path.unlink(missing_ok=True)
        self._pruned = kept_from, oldest_checkpoint


def sources_of(state: dict[str, Any]) -> set[str]:
    """Return the files that groups are resampled from, as the state of the rollouts has them."""
    tasks = state["anchors"].values()
    groups = state["rollouts"]["groups"]
    of_tasks = itertools.chain.from_iterable((task["source"], *task["earlier"]) for task in tasks)
    solutions = state["solutions"].values()
    return {*solutions, *of_tasks, *(group["source"] for group in groups if group["source"])}
