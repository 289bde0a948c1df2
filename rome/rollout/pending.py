"""The queue of episodes that are to start."""

from __future__ import annotations

import dataclasses
import heapq

from rome.rollout.group import Group
from rome.rollout.journal import Journal


@dataclasses.dataclass(order=True)
class _Entry:
    """An episode, ordered by group number; in a group the newest attempt comes first."""

    group_number: int
    negative_attempt: int
    number: int
    group: Group = dataclasses.field(compare=False)


class PendingEpisodes:
    """Episodes that are to start, in the order of their groups.

    While a resumed run repeats recorded steps, the queue is restricted to the groups that those
    steps take. The other episodes are held until the restriction ends.

    Args:
      journal: the record of what steps took.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._heap: list[_Entry] = []
        self._held: list[_Entry] = []
        self._only: set[int] | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether some groups are held."""
        return self._only is not None

    def push(self, group: Group, number: int) -> None:
        """Add the n-th episode of a group."""
        heapq.heappush(self._heap, _Entry(group.number, -group.attempt, number, group))

    def pop(self) -> tuple[Group, int] | None:
        """Return the next episode that may start; None if there is none."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if entry.group.closed:
                continue
            if self._may_start(entry.group):
                return entry.group, entry.number
            self._held.append(entry)
        return None

    def restrict_to(self, numbers: set[int] | None) -> None:
        """Start only these groups, and groups that were replaced in the recorded steps.

        Args:
          numbers: numbers of the groups; None ends the restriction.
        """
        self._only = numbers
        for entry in self._held:
            heapq.heappush(self._heap, entry)
        self._held.clear()

    def _may_start(self, group: Group) -> bool:
        if self._only is None or group.number in self._only:
            return True
        return self._journal.episodes(group) is not None
