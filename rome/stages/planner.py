"""Which tasks the groups of a step play, and from where: the curriculum's, or from an anchor on."""

from __future__ import annotations

import functools
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import ml_collections

from envs.sources import TRAIN_SEEDS
from rome.data.trajectory import load_trajectory
from rome.rollout.anchors import Anchors
from rome.rollout.curriculum import Curriculum
from rome.rollout.forks import Forks
from rome.rollout.group import GroupPlan
from rome.stages.players import Players
from rome.stages.tasks import tasks_of


class Planner:
    """The plans of one run's groups, in the order in which the scheduler asks for them.

    Args:
      config: of the experiment.
      players: make the environments in which a prefix is replayed.
      files: the folder of the trajectories that groups are resampled from.

    Attributes:
      curriculum: draws the families of new tasks; it is told how episodes ended.
      anchors: choose the hard tasks that are resampled; they are told how groups ended.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, players: Players, files: pathlib.Path
    ) -> None:
        self._config = config
        self._players = players
        self._files = files
        tasks = tasks_of(config)
        self._source = tasks.train
        self._evaluated = tasks.evaluation.instances(config.eval_tasks)
        self.curriculum = self._make_curriculum()
        self.anchors = Anchors(config.rollout.resampling, config.group_size)

    def set_state(self, success_rates: dict[str, float], anchors: dict[str, Any]) -> None:
        """Continue with what the curriculum and the anchors had learned."""
        self.curriculum = self._make_curriculum(success_rates)
        self.anchors.load(anchors)

    def _make_curriculum(self, rates: dict[str, float] | None = None) -> Curriculum:
        shares = [(share.weight, share.families) for share in self._source.shares]
        return Curriculum(self._source.families, rates, shares)

    def plan_wave(self, wave: int) -> list[GroupPlan]:
        """Plan the groups of one step.

        Hard tasks are resampled from their anchors, up to `resample_share` of the groups; the
        curriculum draws the others.
        """
        config = self._config
        rollout = config.rollout
        rng = random.Random(f"tasks/{config.seed}/{wave}")
        resampled = []
        if rollout.resampling != "off":
            budget = round(rollout.resample_share * config.groups)
            anchor_rng = random.Random(f"anchors/{config.seed}/{wave}")
            resampled = self.anchors.choose(budget, anchor_rng)
        plans = [self._plan_resampled(*chosen) for chosen in resampled]
        for family in self.curriculum.draw(config.groups - len(resampled), rng):
            plans.append(self._plan_new_task(family, rng))
        if rollout.whole_groups:
            return plans
        return [plan for plan in plans for _ in range(config.group_size)]

    def plan_replacement(self, number: int, attempt: int) -> GroupPlan:
        """Plan the group that takes the place of one without spread, or of a spoiled task."""
        rng = random.Random(f"tasks/{self._config.seed}/{number}/{attempt}")
        family = self.curriculum.draw(1, rng)[0]
        return self._plan_new_task(family, rng)

    def _plan_new_task(self, family: str, rng: random.Random) -> GroupPlan:
        """Plan a group of a task of this family that is drawn at random and not evaluated."""
        index = rng.randrange(TRAIN_SEEDS)
        return GroupPlan(self._source.train(family, index, self._evaluated).name)

    def plan_of_entry(self, entry: dict[str, Any]) -> GroupPlan:
        """Plan a group again from its entry in the state of the rollouts."""
        return self._plan_resampled(entry["task"], entry["source"], entry["prefixes"])

    def _plan_resampled(self, task: str, source: str, anchors: Sequence[int]) -> GroupPlan:
        """Plan a group of a task whose episodes start after so many chunks of a source."""
        if not source:
            return GroupPlan(task)
        chunks = load_trajectory(self._files / source, routes=False).chunks
        prefixes = tuple(tuple(chunks[:anchor]) for anchor in anchors)
        forks = Forks(functools.partial(self._players.make_env, task), prefixes)
        return GroupPlan(task, prefixes, source, forks)
