"""The tasks of a config: the sources that it trains on and evaluates, opened and checked once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ml_collections

from envs.sources import Settings, Source, SourceError, Task, open_source, overlap
from envs.tasks.harbor import TaskError
from rome.train.workdir import ConfigError


class Tasks(NamedTuple):
    """What a run plays.

    Attributes:
      train: the source that training draws from.
      evaluation: the source of evaluations; the same one unless the config names another.
      demonstrated: the source that demonstrators of SFT play; `train` unless the config names
        another.
      faults: of tasks that cannot be used.
    """

    train: Source
    evaluation: Source
    demonstrated: Source
    faults: Sequence[TaskError]

    def unseen_families(self) -> set[str]:
        """Return the families that evaluations play and training never sees.

        Another source may train on a family that the source of evaluations keeps to itself.
        """
        families = (*self.train.families, *self.demonstrated.families)
        trained = {name.rpartition("#")[2] for name in families}  # without the part of a mixture
        held_out = self.evaluation.held_out
        return {name for name in held_out if name.rpartition("#")[2] not in trained}

    def find(self, name: str) -> Task:
        """Return the task of this name, of any of the sources."""
        for source in (self.train, self.evaluation):
            try:
                return source.task(name)
            except SourceError:
                continue
        return self.demonstrated.task(name)

    def examples(self) -> Iterator[Task]:
        """Yield a task of every kind that the policy plays, and every task of finite sets."""
        yield from (self.train.train(family, 0) for family in self.train.families)
        yield from self.evaluation.evaluation(1)
        yield from self.train.finite(is_trained=True)
        yield from self.evaluation.finite(is_trained=False)

    def shown(self) -> bool:
        """Return whether a script solves some of the tasks that are to be demonstrated."""
        source = self.demonstrated
        kinds = (source.train(family, 0) for family in source.families)
        finite = source.finite(is_trained=True)
        return any(task.has_demonstrator for task in (*kinds, *finite))


def tasks_of(config: ml_collections.ConfigDict) -> Tasks:
    """Return the tasks of a config; a second call with the same keys opens nothing.

    Raises:
      ConfigError: a spec is unknown, or names no tasks that can be used.
    """
    return _open(
        config.task,
        config.eval_task,
        config.demonstration_task if "demonstration_task" in config else "",
        config.seed,
        config.max_turns,
        config.sandbox.command_timeout,
    )


@functools.lru_cache(maxsize=8)
def _open(
    task: str,
    eval_task: str,
    demonstration_task: str,
    seed: int,
    max_turns: int,
    command_timeout: float,
) -> Tasks:
    settings = Settings(max_turns=max_turns, command_timeout=command_timeout)
    faults: list[TaskError] = []

    def open_one(key: str, spec: str, **options: float) -> Source:
        try:
            source = open_source(spec, seed=seed, settings=settings, faults=faults, **options)
        except (SourceError, TaskError, ValueError) as error:
            raise ConfigError(f"config.{key}={spec!r}: {error}") from error
        if faults and not source.families and not source.evaluation(1):
            raise ConfigError(
                f"config.{key}={spec!r}: none of its {len(faults)} tasks can be used; the first:"
                f" {faults[0]}"
            )
        return source

    if eval_task:
        train = open_one("task", task, eval_share=0.0)
        evaluation = open_one("eval_task", eval_task, eval_share=1.0)
    else:
        train = evaluation = open_one("task", task)
    _check_split("task", task, train, evaluation)
    demonstrated = train
    if demonstration_task:
        demonstrated = open_one("demonstration_task", demonstration_task)
        _check_split("demonstration_task", demonstration_task, demonstrated, evaluation)
    for source in (train, demonstrated):
        both = [] if source is evaluation else overlap(source, evaluation)
        if both:
            raise ConfigError(
                f"config.eval_task={eval_task!r}: {len(both)} of its tasks are trained on, too,"
                f" such as {both[0]}. Leave eval_task empty, so that config.task is split, or name"
                " other tasks."
            )
    return Tasks(train, evaluation, demonstrated, tuple(faults))


def _check_split(key: str, spec: str, train: Source, evaluation: Source) -> None:
    """Raise ConfigError where nothing is left to train on, or to evaluate."""
    if not train.families:
        raise ConfigError(
            f"config.{key}={spec!r}: all of its {len(evaluation.tasks())} tasks fall into the part"
            " that is kept for evaluations. Name more tasks, or others in config.eval_task."
        )
    if not evaluation.evaluation(1):
        raise ConfigError(
            f"config.{key}={spec!r}: none of its {len(train.tasks())} tasks fall into the part that"
            " is kept for evaluations. Name more tasks, or others in config.eval_task."
        )


def check_tasks(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError for tasks that this config cannot train on, before anything is started."""
    try:
        tasks = tasks_of(config)
        examples = list(tasks.examples())
    except ConfigError:
        raise
    except ValueError as error:  # settings that an environment refuses
        raise ConfigError(f"config.task={config.task!r}: {error}") from error
    for task in examples:
        if task.max_turns > config.chunks_per_row:
            raise ConfigError(
                f"chunks_per_row={config.chunks_per_row} is less than the {task.max_turns} turns of"
                f" {task.name}, and no trajectory is cut. Raise --config.chunks_per_row, or set"
                " --config.max_turns."
            )
    if config.loss == "sft" and not config.trajectories and not tasks.shown():
        raise ConfigError(
            f"config.task={config.task!r} has no demonstrators, whose turns loss=sft learns. Choose"
            " a task that has some, name your own --config.trajectories, or start reinforcement"
            " learning from --config.init_from=DIR."
        )
