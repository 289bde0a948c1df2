"""Groups of episodes: what a group plays, how far it is, and what a step takes."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from rome.data.costs import rewards_differ
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.episode import Episode
from rome.rollout.forks import Forks
from rome.rollout.rules import Rules


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """The task of a group and where its episodes begin.

    Args:
      task: name of the task.
      prefixes: chunks that the n-th episode replays before the policy takes over; () if all
        episodes begin at the beginning.
      source: file name of the trajectory that the prefixes are taken from, or "".
      forks: environments in which the prefixes were replayed. They are closed with the group.
    """

    task: str
    prefixes: tuple[tuple[Chunk, ...], ...] = ()
    source: str = ""
    forks: Forks | None = dataclasses.field(default=None, compare=False)

    def prefix(self, number: int) -> tuple[Chunk, ...]:
        """Return the chunks that the n-th episode replays."""
        if not self.prefixes:
            return ()
        return self.prefixes[number % len(self.prefixes)]


@dataclasses.dataclass(eq=False)
class Group:
    """A group that was started and that no step has taken yet.

    Args:
      number: its place among all groups of the run.
      plan: what its episodes play.
      attempt: how many groups it replaces: without spread (of equal rewards), or of a task that
        was set aside.
      running: asyncio tasks of the episodes in play, by episode number.
      versions: the weight version that started each running or finished episode.
      finished: trajectories by episode number.
      retries: how often each episode was played again because its sample was too old.
      closed: the group is complete; none of its episodes is started any more.
    """

    number: int
    plan: GroupPlan
    attempt: int = 0
    running: dict[int, asyncio.Task] = dataclasses.field(default_factory=dict)
    versions: dict[int, int] = dataclasses.field(default_factory=dict)
    finished: dict[int, Trajectory] = dataclasses.field(default_factory=dict)
    retries: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    closed: bool = False

    @property
    def key(self) -> tuple[int, int]:
        """Number and attempt, which identify the group across restarts of the run."""
        return self.number, self.attempt

    def has_spread(self, costs: Mapping[str, float]) -> bool:
        """Return whether its episodes earned different rewards, less the costs of harm by kind."""
        return rewards_differ(self.finished.values(), costs)

    def to_json(self) -> dict[str, Any]:
        """Return what a resumed run makes the group of."""
        return {
            "number": self.number,
            "attempt": self.attempt,
            "task": self.plan.task,
            "source": self.plan.source,
            "prefixes": [len(prefix) for prefix in self.plan.prefixes],
        }

    def age(self, version: int) -> int:
        """Return the staleness of its oldest sample if it were trained on at `version`."""
        return version - min(self.versions.values(), default=version)

    def trajectories(self) -> list[Trajectory]:
        """Return the finished trajectories in the order of their episodes."""
        return [self.finished[number] for number in sorted(self.finished)]


def episode_of(rules: Rules, group: Group, number: int) -> Episode:
    """Return the n-th episode of a group. It does not depend on when it is asked for."""
    wave, index = divmod(group.number, rules.groups_per_step)
    again: list[Any] = []  # what makes a second try another sample
    if group.attempt:
        again += ["again", group.attempt]
    if group.retries[number]:
        again += ["stale", group.retries[number]]
    if rules.siblings > 1:
        index, number = divmod(index, rules.siblings)
    replacement = f"r{group.attempt}" if group.attempt else ""
    return Episode(
        task=group.plan.task,
        group=group.number // rules.siblings,
        episode=number,
        seed=derive_seed(rules.seed, group.plan.task, wave, index, number, *again),
        name=f"{wave:06d}_g{index:03d}{replacement}_e{number:02d}",
        prefix=group.plan.prefix(number),
        forks=group.plan.forks,
    )


@dataclasses.dataclass
class Taken:
    """The groups that a step trains on, and what it cost to get them.

    Args:
      groups: trajectories of each group.
      names: names of the episodes, in the same shape.
      sources: for each group, the file its prefixes were taken from; "" without prefixes.
      replaced: trajectories of groups without spread that were replaced since the step before, in
        the order of their groups.
      replaced_names: names of these episodes.
      seconds: time since the step before took its groups.
      waited: the part of `seconds` in which the trainer had nothing to do.
      open_episodes: episodes that were running when the groups were taken.
    """

    groups: list[list[Trajectory]]
    names: list[list[str]]
    sources: list[str]
    replaced: list[Trajectory]
    replaced_names: list[str]
    seconds: float
    waited: float
    open_episodes: int
