"""Resampling from anchors (IPA, Sec. 3.2 of "Let It Flow"): hard tasks are begun in the middle of a
trajectory that solved them.

    source    an expert-like trajectory c*_1 .. c*_K of a task: a success of the policy's own, else a teacher's; newer and not longer ones take its place
    anchor f  f chunks of the source are replayed in the environment, then the policy plays; 0 is the beginning
    parallel  Parallelized Initialization: the episodes of a group begin at anchors spread over the source, half of them before a crucial chunk
    rollback  Sequential Rollback: all begin before the last chunk, and one chunk earlier whenever the group's success rate reaches RECOVERED

A chunk is crucial when episodes that begin before it succeed less often than those that begin after
it: Fisher's exact test, one-sided, P_CRUCIAL. A task is entered when a group of it had no success,
and is done with when the policy solves it from the beginning.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rome.data.trajectory import Trajectory

Resampling = Literal["off", "parallel", "rollback"]
# success rate at which a rollback moves on, and from the beginning at which a task is done with
RECOVERED = 0.5
P_CRUCIAL = 0.05
MEMORY = 64  # outcomes of an anchor that count; older ones are of another policy
MOST_TASKS = 256
MOST_EARLIER = 8  # sources of a task that groups may still be led along


@dataclasses.dataclass
class Hard:
    """A task that is resampled.

    `outcomes`: wins and losses by anchor, the newest last; `position`: the rollback's anchor;
    `earlier`: sources as long as this one that it took the place of.
    """

    source: str
    chunks: int
    position: int
    outcomes: dict[int, list[bool]] = dataclasses.field(default_factory=dict)
    earlier: list[str] = dataclasses.field(default_factory=list)

    def rate(self, anchor: int, newest: int) -> float:
        outcomes = self.outcomes.get(anchor, [])[-newest:]
        return sum(outcomes) / len(outcomes) if outcomes else 0.0


class Anchors:
    """The hard tasks of a run and where their next episodes begin.

    Deterministic: what it is told, in order, decides.
    """

    def __init__(self, mode: Resampling, group_size: int) -> None:
        self.mode, self.group_size = mode, group_size
        self.tasks: dict[str, Hard] = {}

    def choose(self, number: int, rng: random.Random) -> list[tuple[str, str, tuple[int, ...]]]:
        """(task, source, anchors of the group's episodes) of up to `number` tasks; none twice."""
        chosen = rng.sample(list(self.tasks), min(number, len(self.tasks)))
        return [(task, self.tasks[task].source, self._anchors(self.tasks[task])) for task in chosen]

    def enter(self, task: str, source: str, chunks: int) -> None:
        """A group of `task` had no success, and `source` solves it in `chunks` turns.

        The oldest task makes room.
        """
        if task in self.tasks or chunks < 2:
            return
        if len(self.tasks) == MOST_TASKS:
            del self.tasks[next(iter(self.tasks))]
        self.tasks[task] = Hard(source, chunks, chunks - 1)

    def observe(
        self, group: Sequence[Trajectory], source: str, source_of: Callable[[Trajectory], str]
    ) -> None:
        """Takes in what a group of one task did.

        `source`: what it was led along; `source_of` names the file of a trajectory.

        A group that was begun before its task had another source says nothing about the anchors of
        this one, which may have fewer chunks.
        """
        hard = self.tasks.get(group[0].task) if group else None
        if hard is None:
            return
        current = source == hard.source or source in hard.earlier
        for trajectory in (
            trajectory for trajectory in group if current or not anchor_of(trajectory)
        ):
            outcomes = hard.outcomes.setdefault(anchor_of(trajectory), [])
            outcomes.append(trajectory.reward > 0)
            del outcomes[:-MEMORY]
        if self.mode == "rollback" and hard.rate(hard.position, len(group)) >= RECOVERED:
            hard.position -= 1
        if hard.position < 0 or hard.rate(0, self.group_size) >= RECOVERED:
            del self.tasks[group[0].task]
            return
        best = min((t for t in group if t.reward > 0), key=lambda t: len(t.chunks), default=None)
        if best is not None and len(best.chunks) <= hard.chunks:
            if (
                len(best.chunks) < hard.chunks
            ):  # other chunks: what was learnt about the old ones says nothing about these
                hard.outcomes = {
                    anchor: outcomes for anchor, outcomes in hard.outcomes.items() if anchor == 0
                }
                hard.position, hard.earlier = min(hard.position, len(best.chunks) - 1), []
            else:
                hard.earlier = [*hard.earlier[1 - MOST_EARLIER :], hard.source]
            hard.source, hard.chunks = source_of(best), len(best.chunks)

    def crucial(self) -> int:
        """How many crucial chunks are known, over all tasks."""
        return sum(len(crucial_chunks(hard.outcomes)) for hard in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        return {task: dataclasses.asdict(hard) for task, hard in self.tasks.items()}

    def load(self, document: Mapping[str, Any]) -> None:
        self.tasks = {
            task: Hard(
                entry["source"],
                entry["chunks"],
                entry["position"],
                {int(anchor): list(seen) for anchor, seen in entry["outcomes"].items()},
                entry.get("earlier", []),
            )
            for task, entry in document.items()
        }

    def _anchors(self, hard: Hard) -> tuple[int, ...]:
        if self.mode == "rollback":
            return (hard.position,) * self.group_size
        spread = [number * hard.chunks // self.group_size for number in range(self.group_size)]
        crucial = crucial_chunks(hard.outcomes)
        for place in range(1, self.group_size, 2):
            if crucial:
                spread[place] = crucial[place // 2 % len(crucial)]
        return tuple(spread)


def anchor_of(trajectory: Trajectory) -> int:
    """How many chunks of another trajectory it began with."""
    return next(
        (number for number, chunk in enumerate(trajectory.chunks) if chunk.kind != "context"),
        len(trajectory.chunks),
    )


def crucial_chunks(outcomes: Mapping[int, Sequence[bool]]) -> list[int]:
    """The chunks (counted from 0) that change the outlook.

    Chunk f lies between the anchors f and f + 1; where an anchor was not played, between it and the
    next that was, and then the first chunk of that stretch is named.
    """
    played = sorted(outcomes)
    return [
        before
        for before, after in zip(played, played[1:])
        if fisher_less(
            sum(outcomes[before]), len(outcomes[before]), sum(outcomes[after]), len(outcomes[after])
        )
        <= P_CRUCIAL
    ]


def fisher_less(wins: int, tries: int, other_wins: int, other_tries: int) -> float:
    """P(at most `wins` of the wins fall to the first sample) where both have one success rate:
    Fisher's exact test, one-sided.
    """
    total = wins + other_wins
    ways = lambda k: (
        math.comb(tries, k) * math.comb(other_tries, total - k)
        if 0 <= total - k <= other_tries
        else 0
    )
    return sum(ways(k) for k in range(wins + 1)) / math.comb(tries + other_tries, total)


def fork_imitation(source: Trajectory, group: Iterable[Trajectory]) -> Trajectory | None:
    """Eq. 10's imitation for a group that was resampled from `source`: its chunks up to the last
    fork from which nobody succeeded, c*_1 .. c*_f.

    The chunks after them stay as context, so that G of those before counts the whole way. None
    where every fork had a success.
    """
    won: dict[int, bool] = collections.defaultdict(bool)
    for trajectory in group:
        won[anchor_of(trajectory)] |= trajectory.reward > 0
    failed = [anchor for anchor, success in won.items() if not success]
    if not failed:
        return None
    shown = max(failed) + 1
    chunks = [
        dataclasses.replace(
            chunk,
            kind="imitation" if number < shown and chunk.status == "ok" else "context",
            logprobs=[0.0] * len(chunk.action_ids),
            versions=[],
            routes=None,
        )
        for number, chunk in enumerate(source.chunks)
    ]
    return dataclasses.replace(source, chunks=chunks)
