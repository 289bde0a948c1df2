"""Which groups a step may take: those that it took once, or those that leave nothing too old."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rome.rollout.group import Group
from rome.rollout.rules import Rules


def can_repeat(
    recorded: list[tuple[int, int]], groups: Mapping[int, Group], complete: Sequence[int]
) -> bool:
    """Whether the step can still take what it took once.

    It cannot if files were lost and a group went another way: it is gone, was replaced more
    often than then, or is complete where it was replaced then.
    """
    for number, attempt in recorded:
        group = groups.get(number)
        if group is None or group.attempt > attempt:
            return False
        if group.attempt < attempt and number in complete:
            return False
    return True


def find_recorded(
    recorded: list[tuple[int, int]], groups: Mapping[int, Group], complete: Sequence[int]
) -> list[Group] | None:
    """Return the recorded groups; None until all of them are complete."""
    found = [groups[number] for number, _ in recorded]
    if [group.key for group in found] != recorded:
        return None
    if any(group.number not in complete for group in found):
        return None
    return found


def would_exceed_bound(
    chosen: Sequence[Group], groups: Iterable[Group], rules: Rules, version: int
) -> bool:
    """Whether another group would exceed the staleness bound if `chosen` were taken now.

    The other groups are taken in their order by the steps after this one.
    """
    if rules.stale_samples != "wait":
        return False
    numbers = {group.number for group in chosen}
    others = [group for group in groups if group.number not in numbers]
    for place, group in enumerate(others):
        steps_until_taken = 1 + place // rules.groups_per_step
        if group.age(version) + steps_until_taken > rules.async_ratio:
            return True
    return False
