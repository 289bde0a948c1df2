"""The tasks that a run has set aside because they cannot be played, one line each in a file.

A build that fails, a demonstrator that fails its own task, a verifier that always breaks: such a
task costs itself only. Its groups go on with another task, it is not drawn again, and a run that
resumes replaces it by the same one.
"""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any, NamedTuple

from rome.files import append_line
from rome.rollout.episode import SpoiledTaskError

LARGEST_SHARE = 0.25  # of the tasks of a wave; where more are spoiled, something else is broken
log = logging.getLogger(__name__)


class Replacement(NamedTuple):
    """What a group went on with."""

    task: str
    attempt: int


class SpoiledTasks:
    """The tasks that were set aside, by name.

    Args:
      path: the file, WORKDIR/spoiled.jsonl; an existing one is read first. Removing a line of it
        lets its task be played again. None keeps the record in memory.
    """

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self.path = path
        self.causes: dict[str, str] = {}  # by task
        self._replacements: dict[tuple[int, int], Replacement] = {}
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, task: object) -> bool:
        return task in self.causes

    def __len__(self) -> int:
        return len(self.causes)

    def note(self, fault: SpoiledTaskError) -> None:
        """Set a task aside in memory; `add` writes it."""
        if fault.task in self:
            return
        cause = f"{fault.ending}: {fault.note}"
        self.causes[fault.task] = cause
        log.warning("task %s cannot be played and is set aside: %s", fault.task, cause)

    def add(
        self,
        fault: SpoiledTaskError,
        group: tuple[int, int] | None = None,
        replacement: Replacement | None = None,
    ) -> None:
        """Set a task aside. The line is on disk when this returns.

        Args:
          fault: says which task, and why.
          group: number and attempt of the group of episodes that played it, if one did.
          replacement: what the group goes on with.
        """
        entry: dict[str, Any] = {"task": fault.task, "ending": fault.ending, "note": fault.note}
        if group is not None and replacement is not None:
            entry |= {"group": group, "replacement": replacement}
        self.note(fault)
        self._keep(entry)
        if self.path is not None:
            append_line(self.path, json.dumps(entry))

    def replacement(self, group: tuple[int, int]) -> Replacement | None:
        """Return what a group went on with; None if it was not replaced so far."""
        return self._replacements.get(group)

    def too_many(self, number: int, of: int) -> bool:
        """Return whether so many spoiled tasks are more than single tasks' faults.

        One is always allowed.
        """
        return number > max(1.0, LARGEST_SHARE * of)

    def failure(self, number: int, of: int) -> str:
        """Return the message of a run that ends because too many tasks are spoiled."""
        newest = [f"{task} ({cause})" for task, cause in list(self.causes.items())[-3:]]
        return (
            f"{number} of {of} tasks could not be played, so not the tasks but what they need may"
            f" be broken; the last: {'; '.join(newest)}. Finished trajectories are kept: remove the"
            f" cause, remove the lines of {self.path or 'the record'} whose tasks are to be played"
            " again, and run the same command."
        )

    def _keep(self, entry: dict[str, Any]) -> None:
        replacement = None
        if "replacement" in entry:
            task, attempt = entry["replacement"]
            replacement = Replacement(task, attempt)
            number, tried = entry["group"]
        self.causes.setdefault(entry["task"], f"{entry['ending']}: {entry['note']}")
        if replacement is not None:
            self._replacements[number, tried] = replacement

    def _read(self, path: pathlib.Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # a kill cut the line off
