"""Resampling from anchors (IPA, Sec. 3.2 of "Let It Flow"): hard tasks start inside a solution.

  source    an expert-like trajectory c*_1 .. c*_K of a task: a success of the policy's own, or a
            demonstration. Later successes that are not longer take its place.
  anchor f  f chunks of the source are replayed in the environment, then the policy plays. Anchor 0
            is the beginning of the task.
  parallel  Parallelized Initialization: the episodes of a group start at anchors spread over the
            source, half of them before a crucial chunk.
  rollback  Sequential Rollback: all episodes start before the last chunk, and one chunk earlier
            whenever the success rate of a group reaches RECOVERED.

A chunk is crucial if episodes that start before it succeed less often than those that start after
it (Fisher's exact test, one-sided, P_CRUCIAL). A task is resampled from when a group of it has no
success until the policy solves it from the beginning.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rome.data.trajectory import Chunk, Trajectory

Resampling = Literal["off", "parallel", "rollback"]
RECOVERED = 0.5  # success rate that moves a rollback on; at anchor 0, that ends resampling
P_CRUCIAL = 0.05
MAX_OUTCOMES = 64  # newest outcomes of an anchor that count; older policies played the others
MAX_TASKS = 256
MAX_EARLIER_SOURCES = 8  # of a task, along which groups that started earlier may still be led


@dataclasses.dataclass
class HardTask:
    """A task that is resampled.

    Args:
      source: file name of its source.
      chunks: number of chunks of the source.
      position: anchor of the rollback.
      outcomes: successes (True) and failures by anchor, the newest last.
      earlier: former sources with the same number of chunks.
    """

    source: str
    chunks: int
    position: int
    outcomes: dict[int, list[bool]] = dataclasses.field(default_factory=dict)
    earlier: list[str] = dataclasses.field(default_factory=list)

    def success_rate(self, anchor: int, newest: int) -> float:
        """Return the success rate of the newest outcomes of an anchor; 0 without any."""
        outcomes = self.outcomes.get(anchor, [])[-newest:]
        return sum(outcomes) / len(outcomes) if outcomes else 0.0

    def add_outcome(self, anchor: int, success: bool) -> None:
        """Add the outcome of one episode and forget the oldest beyond MAX_OUTCOMES."""
        outcomes = self.outcomes.setdefault(anchor, [])
        outcomes.append(success)
        del outcomes[:-MAX_OUTCOMES]

    def replace_source(self, source: str, chunks: int) -> None:
        """Continue with another source, which has at most as many chunks."""
        if chunks < self.chunks:
            # Its chunks are others, so what is known about the old anchors does not apply.
            self.outcomes = {
                anchor: outcomes for anchor, outcomes in self.outcomes.items() if anchor == 0
            }
            self.position = min(self.position, chunks - 1)
            self.earlier = []
        else:
            self.earlier = [*self.earlier[1 - MAX_EARLIER_SOURCES :], self.source]
        self.source = source
        self.chunks = chunks


class Anchors:
    """The hard tasks of a run and where their next episodes start.

    The state depends only on the calls and their order.

    Args:
      mode: how anchors are chosen.
      group_size: episodes of a group.
    """

    def __init__(self, mode: Resampling, group_size: int) -> None:
        self.mode = mode
        self.group_size = group_size
        self.tasks: dict[str, HardTask] = {}

    def choose(self, number: int, rng: random.Random) -> list[tuple[str, str, tuple[int, ...]]]:
        """Choose up to `number` different tasks to resample.

        Returns:
          For each task its name, its source, and the anchor of each episode of a group.
        """
        names = rng.sample(list(self.tasks), min(number, len(self.tasks)))
        chosen = []
        for name in names:
            task = self.tasks[name]
            chosen.append((name, task.source, self._anchors(task)))
        return chosen

    def enter(self, task: str, source: str, chunks: int) -> None:
        """Start to resample a task of which a group had no success.

        Beyond MAX_TASKS the oldest task makes room. A source of one chunk has no anchor.

        Args:
          task: name of the task.
          source: file name of a trajectory that solves it.
          chunks: number of chunks of the source.
        """
        if task in self.tasks or chunks < 2:
            return
        if len(self.tasks) == MAX_TASKS:
            oldest = next(iter(self.tasks))
            del self.tasks[oldest]
        self.tasks[task] = HardTask(source, chunks, position=chunks - 1)

    def observe(
        self, group: Sequence[Trajectory], source: str, source_of: Callable[[Trajectory], str]
    ) -> None:
        """Learn from a finished group of one task.

        Args:
          group: its trajectories.
          source: file name of the trajectory that the group was led along; "" for none.
          source_of: returns the file name of a trajectory of the group.
        """
        if not group:
            return
        name = group[0].task
        task = self.tasks.get(name)
        if task is None:
            return
        # A group that was led along another source says nothing about the anchors of this one.
        source_fits = source == task.source or source in task.earlier
        for trajectory in group:
            anchor = anchor_of(trajectory)
            if source_fits or anchor == 0:
                task.add_outcome(anchor, trajectory.succeeded)
        if self.mode == "rollback" and self._has_recovered(task, task.position, len(group)):
            task.position -= 1
        if task.position < 0 or self._has_recovered(task, 0, self.group_size):
            del self.tasks[name]
            return
        # The turns of a source are replayed one after the other: it has no branches.
        successes = [one for one in group if one.succeeded and one.is_linear]
        shortest = min(successes, key=lambda success: len(success.chunks), default=None)
        if shortest is not None and len(shortest.chunks) <= task.chunks:
            task.replace_source(source_of(shortest), len(shortest.chunks))

    def crucial(self) -> int:
        """Return the number of crucial chunks that are known, over all tasks."""
        return sum(len(crucial_chunks(task.outcomes)) for task in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        """Return the state, for a checkpoint."""
        return {name: dataclasses.asdict(task) for name, task in self.tasks.items()}

    def load(self, document: Mapping[str, Any]) -> None:
        """Restore the state that `to_json` returned, also after it was JSON text."""
        self.tasks = {}
        for name, entry in document.items():
            outcomes = {int(anchor): list(seen) for anchor, seen in entry["outcomes"].items()}
            self.tasks[name] = HardTask(
                source=entry["source"],
                chunks=entry["chunks"],
                position=entry["position"],
                outcomes=outcomes,
                earlier=entry.get("earlier", []),
            )

    def _has_recovered(self, task: HardTask, anchor: int, newest: int) -> bool:
        return task.success_rate(anchor, newest) >= RECOVERED

    def _anchors(self, task: HardTask) -> tuple[int, ...]:
        """Return the anchor of each episode of a group."""
        if self.mode == "rollback":
            return (task.position,) * self.group_size
        anchors = [number * task.chunks // self.group_size for number in range(self.group_size)]
        crucial = crucial_chunks(task.outcomes)
        if crucial:
            for number in range(1, self.group_size, 2):
                anchors[number] = crucial[number // 2 % len(crucial)]
        return tuple(anchors)


def anchor_of(trajectory: Trajectory) -> int:
    """Return how many chunks of another trajectory it started with."""
    for number, chunk in enumerate(trajectory.chunks):
        if chunk.kind != "context":
            return number
    return len(trajectory.chunks)


def crucial_chunks(outcomes: Mapping[int, Sequence[bool]]) -> list[int]:
    """Return the chunks, counted from 0, after which the success rate is higher than before.

    Chunk f lies between the anchors f and f + 1. Where anchors in between were not played, the
    first chunk of the stretch is returned.

    Args:
      outcomes: successes and failures by anchor.
    """
    crucial = []
    for before, after in itertools.pairwise(sorted(outcomes)):
        p_value = fisher_less(
            wins=sum(outcomes[before]),
            tries=len(outcomes[before]),
            other_wins=sum(outcomes[after]),
            other_tries=len(outcomes[after]),
        )
        if p_value <= P_CRUCIAL:
            crucial.append(before)
    return crucial


def fisher_less(wins: int, tries: int, other_wins: int, other_tries: int) -> float:
    """Return the p-value of Fisher's exact test, one-sided, for a lower rate in the first sample.

    That is the probability that at most `wins` of all wins fall to the first sample if both have
    the same success rate.
    """
    all_wins = wins + other_wins
    ways = 0
    for first_wins in range(wins + 1):
        second_wins = all_wins - first_wins
        if 0 <= second_wins <= other_tries:
            ways += math.comb(tries, first_wins) * math.comb(other_tries, second_wins)
    return ways / math.comb(tries + other_tries, all_wins)


def fork_imitation(source: Trajectory, group: Iterable[Trajectory]) -> Trajectory | None:
    """Return the imitation term's trajectory (Eq. 10) for a group that was resampled.

    It is the source with the chunks c*_1 .. c*_f to imitate, up to the last anchor from which no
    episode succeeded. The later chunks stay as context, so that the discounted return of the
    imitated ones counts the whole trajectory.

    Args:
      source: the trajectory that the group was led along.
      group: its trajectories.

    Returns:
      None if every anchor had a success.
    """
    succeeded: dict[int, bool] = collections.defaultdict(bool)
    for trajectory in group:
        succeeded[anchor_of(trajectory)] |= trajectory.succeeded
    failed = [anchor for anchor, success in succeeded.items() if not success]
    return imitated(source, max(failed) + 1) if failed else None


def imitated(source: Trajectory, chunks: int | None = None) -> Trajectory:
    """Return a trajectory whose first chunks are imitated, as far as their calls were sound.

    Args:
      source: the trajectory; what the engine said about its tokens is left out.
      chunks: how many; None for all of them.
    """
    last = len(source.chunks) if chunks is None else chunks
    lesson = [
        _without_samples(chunk, is_imitated=number < last and chunk.status == "ok")
        for number, chunk in enumerate(source.chunks)
    ]
    return dataclasses.replace(source, chunks=lesson)


def _without_samples(chunk: Chunk, is_imitated: bool) -> Chunk:
    """Return the chunk without what the engine said about its tokens."""
    return dataclasses.replace(
        chunk,
        kind="imitation" if is_imitated else "context",
        logprobs=[0.0] * len(chunk.action_ids),
        versions=[],
        routes=None,
    )
