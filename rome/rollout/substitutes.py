"""Which group takes the place of one whose task cannot be played and was set aside.

A group and its siblings are episodes of one task: they share a number here, and change together.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable

from rome.rollout.episode import RolloutError, SpoiledTaskError
from rome.rollout.group import Group, GroupPlan
from rome.rollout.journal import Journal
from rome.rollout.rules import Rules
from rome.rollout.spoiled import Replacement, SpoiledTasks

MAX_DRAWS = 100  # of another task for a group, before none counts as left


class Substitutes:
    """Finds other tasks for groups, the same ones in a run that is resumed.

    Args:
      rules: of the scheduler.
      spoiled: the tasks that were set aside.
      replan: plans the group that replaces another one; None: no group is replaced.
      journal: the record of what steps took.
    """

    def __init__(
        self,
        rules: Rules,
        spoiled: SpoiledTasks,
        replan: Callable[[int, int], GroupPlan] | None,
        journal: Journal,
    ) -> None:
        self._rules = rules
        self._spoiled = spoiled
        self._replan = replan
        self._journal = journal
        self._spoiled_in_wave: collections.Counter[int] = collections.Counter()

    def siblings(self, group: Group, groups: Iterable[Group]) -> list[Group]:
        """Return the groups that play one task with this one, itself among them."""
        return [
            other
            for other in groups
            if self._task_group(other) == self._task_group(group)
            and other.plan.task == group.plan.task
        ]

    def set_aside(self, group: Group, fault: SpoiledTaskError) -> Group:
        """Set the task of a group aside, on disk too, and return the group that takes its place.

        Raises:
          RolloutError: no other task is left.
        """
        self._spoiled.note(fault)
        try:
            successor = self.playable(self._successor(group))
        except RolloutError:
            self._spoiled.add(fault)
            raise
        key = self._task_group(group), group.attempt
        self._spoiled.add(fault, key, Replacement(successor.plan.task, successor.attempt))
        return successor

    def count(self, group: Group) -> None:
        """Count a spoiled task of the group's wave.

        Raises:
          RolloutError: too many of them are.
        """
        wave = group.number // self._rules.groups_per_step
        self._spoiled_in_wave[wave] += 1
        number = self._spoiled_in_wave[wave]
        tasks_per_wave = self._rules.groups_per_step // self._rules.siblings
        if self._spoiled.too_many(number, tasks_per_wave):
            raise RolloutError(self._spoiled.failure(number, tasks_per_wave))

    def playable(self, group: Group) -> Group:
        """Return the group, or the one that replaces it where its task was set aside.

        A group that a step has taken stays as it was, so that a resumed run can repeat the step.

        Raises:
          RolloutError: no other task is left.
        """
        first_attempt = group.attempt
        while group.plan.task in self._spoiled and self._replan is not None:
            if self._journal.episodes(group) is not None:
                return group
            if group.attempt - first_attempt >= MAX_DRAWS:
                raise RolloutError(
                    f"the last {MAX_DRAWS} tasks that were drawn for group {group.number} are all"
                    f" set aside in {self._spoiled.path or 'the record'}: no task is left that can"
                    " be played"
                )
            group = self._successor(group)
        return group

    def _successor(self, group: Group) -> Group:
        """Return the group that takes the place of one whose task was set aside."""
        known = self._spoiled.replacement((self._task_group(group), group.attempt))
        if known is not None:
            return Group(group.number, GroupPlan(known.task), known.attempt)
        assert self._replan is not None
        attempt = group.attempt + 1
        first_sibling = self._task_group(group) * self._rules.siblings
        return Group(group.number, self._replan(first_sibling, attempt), attempt)

    def _task_group(self, group: Group) -> int:
        """Return the number that the group shares with its siblings."""
        return group.number // self._rules.siblings
