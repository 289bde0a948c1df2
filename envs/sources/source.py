"""Sources of tasks: generated ones, finite ones, and mixtures.

What is trained on is never evaluated: generated tasks have seeds below EVAL_SEED_START in training
and others in evaluations; the tasks of a finite set are split by a hash of their content, so a task
stays on its side when the set grows or is reordered, and a copy under another name is on the same.
Where a family has few instances, two seeds may make the same one: training is told which instances
are evaluated, and steps over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from envs.sources.task import SourceError, Task
from envs.tasks.terminal import EVAL_SEED_START, eval_seed, train_seed

TRAIN_SEEDS = EVAL_SEED_START  # number of training tasks that a family has
EVAL_SHARE = 0.2  # of a finite set
TRIES = 64  # training seeds in a row that are looked at for an instance which is not evaluated
NO_INSTANCES: frozenset[bytes] = frozenset()
# Seeds that belong to one seed of a run or of an evaluation; the next one's follow them.
LISTED_APART = 100_000
EVALUATED_APART = 10_000


@dataclasses.dataclass(frozen=True)
class Share:
    """Families that together get a share of the groups that training draws."""

    weight: float
    families: tuple[str, ...]


class Source(Protocol):
    """Tasks for training and for evaluation.

    Attributes:
      spec: what it was opened by.
      families: kinds of task that training draws from.
      held_out: kinds that evaluations play and training never sees.
      shares: the families once more, by their share of training: one entry unless it is a mixture.
    """

    spec: str
    families: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def shares(self) -> tuple[Share, ...]: ...

    def train(self, family: str, index: int, evaluated: frozenset[bytes] = NO_INSTANCES) -> Task:
        """Return a task of a family to train on; any index from 0 to 999,999 names one.

        Args:
          family: one of `families`.
          index: names the task.
          evaluated: content digests of instances to step over, see `instances`.
        """
        ...

    def instances(self, per_family: int) -> frozenset[bytes]:
        """Return the content digests of an evaluation's tasks that training seeds may make, too."""
        ...

    def evaluation(self, per_family: int) -> list[Task]:
        """Return the tasks of an evaluation during training, at most so many of a family."""
        ...

    def tasks(self) -> list[Task]:
        """Return all tasks that the spec names, as `launch.eval` plays and proves them."""
        ...

    def task(self, name: str) -> Task:
        """Return the task of this name."""
        ...

    def finite(self, *, is_trained: bool) -> list[Task]:
        """Return the tasks of finite sets that are trained on, or those that are evaluated."""
        ...


class Generated:
    """Tasks that are made from a family and a seed; their names are FAMILY/SEED.

    Args:
      spec: what it was opened by.
      make: makes the task of a family and a seed.
      families: that training draws from.
      held_out: that only evaluations play.
      listed: families of `tasks`, where these are others than the two together.
      count: number of tasks of each kind; None for as many as there are seeds.
      seed: chooses the tasks of evaluations.
      compares: whether instances are told apart by content; not where reading one may take long.
    """

    def __init__(
        self,
        spec: str,
        make: Callable[[str, int], Task],
        families: Sequence[str],
        held_out: Sequence[str] = (),
        *,
        listed: Sequence[str] = (),
        count: int | None = None,
        seed: int = 0,
        compares: bool = True,
    ) -> None:
        self.spec = spec
        self._make = make
        self._compares = compares
        self._listed = tuple(listed) or (*families, *held_out)
        self._count = len(self._listed) if count is None else count
        self._bounds: dict[str, int] = {}  # tasks of a family, where their number is given
        if count is not None:
            order = (*families, *held_out)
            rounds, more = divmod(count, len(order))
            self._bounds = {name: rounds + (place < more) for place, name in enumerate(order)}
        self.families = tuple(name for name in families if self._bounds.get(name, 1))
        self.held_out = tuple(name for name in held_out if self._bounds.get(name, 1))
        self._seed = seed

    @property
    def shares(self) -> tuple[Share, ...]:
        """All families together."""
        return (Share(1.0, self.families),)

    def train(self, family: str, index: int, evaluated: frozenset[bytes] = NO_INSTANCES) -> Task:
        """Return a task with a training seed; a source with a count repeats its tasks.

        A family is trained on all the same where TRIES seeds in a row make evaluated instances.
        """
        bound = self._bounds.get(family, TRAIN_SEEDS)
        for step in range(TRIES):
            task = self._make(family, train_seed((index + step) % bound))
            is_compared = bool(evaluated) and self._compares
            if not is_compared or task.content_digest() not in evaluated:
                return task
        return self._make(family, train_seed(index % bound))

    def instances(self, per_family: int) -> frozenset[bytes]:
        """Return the content digests of an evaluation's tasks; see `Source.instances`."""
        if not self._compares:
            return NO_INSTANCES
        found: dict[str, set[bytes]] = {}
        for task in self.evaluation(max(per_family, 2)):
            found.setdefault(task.family, set()).add(task.content_digest())
        # Games that hide what differs look all the same.
        return NO_INSTANCES.union(*(digests for digests in found.values() if len(digests) > 1))

    def evaluation(self, per_family: int) -> list[Task]:
        """Return tasks with evaluation seeds, the same for the same seed."""
        tasks = []
        for family in (*self.families, *self.held_out):
            for index in range(min(per_family, self._bounds.get(family, per_family))):
                seed = eval_seed(index) + EVALUATED_APART * self._seed
                tasks.append(self._make(family, seed))
        return tasks

    def tasks(self) -> list[Task]:
        """Return the tasks of the spec, spread evenly over its families; see `Source.tasks`."""
        tasks = []
        for number in range(self._count):
            round_number, place = divmod(number, len(self._listed))
            seed = eval_seed(self._seed * LISTED_APART + round_number)
            tasks.append(self._make(self._listed[place], seed))
        return tasks

    def task(self, name: str) -> Task:
        """Return the task of this name."""
        family, _, seed = name.rpartition("/")
        if family not in {*self._listed, *self.families, *self.held_out} or not seed.isdecimal():
            raise SourceError(f"task {name!r} is none of {self.spec!r}: FAMILY/SEED is missing")
        return self._make(family, int(seed))

    def finite(self, *, is_trained: bool) -> list[Task]:
        """Return no tasks: training and evaluations have other seeds."""
        return []


class Finite:
    """A set of tasks, split by their content into those for training and those for evaluation.

    Args:
      spec: what it was opened by.
      tasks: all of them.
      eval_share: of the tasks that are evaluated and never trained on; 0 and 1 are allowed.
    """

    def __init__(self, spec: str, tasks: Sequence[Task], eval_share: float = EVAL_SHARE) -> None:
        self.spec = spec
        self._tasks = list(tasks)
        self._by_name = {task.name: task for task in self._tasks}
        self._evaluated: list[Task] = []
        self._trained: dict[str, list[Task]] = {}
        for task in self._tasks:
            if falls_below(task.content_digest(), eval_share):
                self._evaluated.append(task)
            else:
                self._trained.setdefault(task.family, []).append(task)
        self.families = tuple(sorted(self._trained))
        evaluated = {task.family for task in self._evaluated}
        # A set that is only evaluated has no families that training could have seen.
        self.held_out = tuple(sorted(evaluated - set(self.families))) if self.families else ()

    @property
    def shares(self) -> tuple[Share, ...]:
        """All families together."""
        return (Share(1.0, self.families),)

    def train(self, family: str, index: int, evaluated: frozenset[bytes] = NO_INSTANCES) -> Task:
        """Return a task of the training part, none of which is evaluated; see `Source.train`."""
        members = self._trained[family]
        return members[index % len(members)]

    def instances(self, per_family: int) -> frozenset[bytes]:
        """Return nothing: the set is split by content."""
        return NO_INSTANCES

    def evaluation(self, per_family: int) -> list[Task]:
        """Return tasks of the evaluation part, in the order of their hashes."""
        counts: dict[str, int] = {}
        chosen = []
        for task in sorted(self._evaluated, key=Task.content_digest):
            counts[task.family] = counts.get(task.family, 0) + 1
            if counts[task.family] <= per_family:
                chosen.append(task)
        return chosen

    def tasks(self) -> list[Task]:
        """Return all tasks, whichever part they are in."""
        return list(self._tasks)

    def task(self, name: str) -> Task:
        """Return the task of this name."""
        if name not in self._by_name:
            raise SourceError(f"task {name!r} is not among the {len(self._tasks)} of {self.spec!r}")
        return self._by_name[name]

    def finite(self, *, is_trained: bool) -> list[Task]:
        """Return the tasks of one side of the split."""
        if not is_trained:
            return list(self._evaluated)
        return [task for members in self._trained.values() for task in members]


def falls_below(digest: bytes, share: float) -> bool:
    """Return whether a hash is within the lowest share of all hashes."""
    return int.from_bytes(digest, "big") < share * 2.0 ** (8 * len(digest))


class Mixture:
    """Several sources; each gets a share of what training draws, and its name before its tasks'.

    Args:
      spec: what it was opened by.
      parts: the sources with their weights, which add up to 1.
    """

    def __init__(self, spec: str, parts: Sequence[tuple[float, Source]]) -> None:
        self.spec = spec
        self._parts = {source.spec: (weight, source) for weight, source in parts}
        if len(self._parts) < len(parts):
            raise SourceError(f"{spec!r} names a source twice; add their weights")
        self.families = self._marked(lambda source: source.families)
        self.held_out = self._marked(lambda source: source.held_out)

    @property
    def shares(self) -> tuple[Share, ...]:
        """The families of each source, with its weight."""
        found = []
        for name, (weight, source) in self._parts.items():
            found.append(Share(weight, tuple(f"{name}#{family}" for family in source.families)))
        return tuple(found)

    def train(self, family: str, index: int, evaluated: frozenset[bytes] = NO_INSTANCES) -> Task:
        """Return a task of a source's family; see `Source.train`."""
        name, rest = self._split(family)
        return self._mark(name, self._parts[name][1].train(rest, index, evaluated))

    def instances(self, per_family: int) -> frozenset[bytes]:
        """Return the instances of all sources; see `Source.instances`."""
        return NO_INSTANCES.union(*(part.instances(per_family) for _, part in self._parts.values()))

    def evaluation(self, per_family: int) -> list[Task]:
        """Return the evaluation tasks of all sources."""
        return self._all(lambda source: source.evaluation(per_family))

    def tasks(self) -> list[Task]:
        """Return the tasks of all sources."""
        return self._all(lambda source: source.tasks())

    def task(self, name: str) -> Task:
        """Return the task of this name."""
        part, rest = self._split(name)
        return self._mark(part, self._parts[part][1].task(rest))

    def finite(self, *, is_trained: bool) -> list[Task]:
        """Return the tasks of all finite parts."""
        return self._all(lambda source: source.finite(is_trained=is_trained))

    def _split(self, name: str) -> tuple[str, str]:
        for part in self._parts:
            if name.startswith(f"{part}#"):
                return part, name.removeprefix(f"{part}#")
        raise SourceError(f"{name!r} is of none of the sources of {self.spec!r}")

    def _all(self, tasks_of: Callable[[Source], list[Task]]) -> list[Task]:
        found = []
        for name, (_, source) in self._parts.items():
            found += [self._mark(name, task) for task in tasks_of(source)]
        return found

    def _marked(self, families_of: Callable[[Source], tuple[str, ...]]) -> tuple[str, ...]:
        found = []
        for name, (_, source) in self._parts.items():
            found += [f"{name}#{family}" for family in families_of(source)]
        return tuple(found)

    def _mark(self, name: str, task: Task) -> Task:
        return dataclasses.replace(
            task,
            name=f"{name}#{task.name}",
            family=f"{name}#{task.family}",
            cluster=f"{name}#{task.cluster}",
            source=name,
        )


def overlap(train: Source, evaluation: Source) -> list[str]:
    """Return the names of the evaluated tasks of finite sets that training may draw, too."""
    trained = {task.content_digest() for task in train.finite(is_trained=True)}
    evaluated = evaluation.finite(is_trained=False)
    return [task.name for task in evaluated if task.content_digest() in trained]
