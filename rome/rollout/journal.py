"""The record of which groups and episodes each training step took.

A run that resumes from a checkpoint repeats the steps after it. The record makes a repeated step
take the same groups with the same trajectories, so the run reaches the same weights.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rome.files import append_line, write_atomically
from rome.rollout.group import Group

GroupKey = tuple[int, int]  # Group.key: number and attempt


class Journal:
    """One JSON line for each step, on disk before the step is trained.

    Args:
      path: the file; an existing one is read first. None keeps the record in memory.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self._path = path
        self._groups: dict[int, list[GroupKey]] = {}
        self._episodes: dict[GroupKey, list[int]] = {}
        if path is not None and path.exists():
            self._read(path)

    def groups(self, step: int) -> list[GroupKey] | None:
        """Return the groups that `step` took; None if it has not taken any yet."""
        return self._groups.get(step)

    def groups_from(self, step: int) -> set[int]:
        """Return the numbers of the groups that `step` or a later one took."""
        return {
            number
            for recorded, groups in self._groups.items()
            if recorded >= step
            for number, _ in groups
        }

    def first_left(self, step: int) -> int:
        """Return the lowest number of a group that no step before this one has taken.

        All groups below it were taken; every group is, by one step.
        """
        taken = {
            number
            for recorded, groups in self._groups.items()
            if recorded < step
            for number, _ in groups
        }
        number = 0
        while number in taken:
            number += 1
        return number

    def episodes(self, group: Group) -> list[int] | None:
        """Return the episodes that were taken of a group; None if the group is not recorded.

        Other episodes of the group may be on disk as well: redundant ones.
        """
        return self._episodes.get(group.key)

    def add(self, step: int, groups: Sequence[Group], replaced: Sequence[Group]) -> None:
        """Record what a step takes. Nothing is written if it repeats what is recorded already.

        Args:
          step: number of the training step.
          groups: the groups that it takes.
          replaced: groups without spread that were replaced since the step before.
        """
        if self._is_recorded(step, groups):
            return
        entry = {
            "step": step,
            "groups": [group.key for group in groups],
            "episodes": [sorted(group.finished) for group in groups],
            "replaced": [(*group.key, sorted(group.finished)) for group in replaced],
        }
        self._keep(entry)
        if self._path is not None:
            append_line(self._path, json.dumps(entry))

    def _is_recorded(self, step: int, groups: Sequence[Group]) -> bool:
        if self.groups(step) != [group.key for group in groups]:
            return False
        return all(self.episodes(group) == sorted(group.finished) for group in groups)

    def _read(self, path: pathlib.Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a kill cut the line off, so its step was not trained

    def _keep(self, entry: dict[str, Any]) -> None:
        step = entry["step"]
        groups = [(number, attempt) for number, attempt in entry["groups"]]
        episodes = dict(zip(groups, entry["episodes"], strict=True))
        for number, attempt, played in entry["replaced"]:
            episodes[number, attempt] = played
        # Nothing was kept so far, so nothing is kept of an entry that is incomplete.
        self._groups[step] = groups
        self._episodes.update(episodes)


def drop_steps_after(path: pathlib.Path, step: int) -> None:
    """Drop the record of all steps after this one from a file, and lines that are no record."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a kill cut the line off
    write_atomically(path, "".join(kept))
