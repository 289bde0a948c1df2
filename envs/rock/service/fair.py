"""A queue that is fair to users, and among a user's experiments: whoever has been given the least
is next.

Start-time fair queueing in two levels: each user has a virtual time, the cost it was given so far,
and the lowest goes first; within a user each experiment likewise; within an experiment the first
that came. Who comes back after a pause starts at the time of those that waited, so a pause saves
nothing up.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
MAX_REMEMBERED = 4096  # absent flows, whose debts are kept


class _Level:
    """Flows beside each other, by name, with their virtual times."""

    def __init__(self):
        self.flows: dict[str, object] = {}
        self.times: dict[str, float] = {}
        self._absent: OrderedDict[str, float] = OrderedDict()
        self._clock = 0.0

    def arrive(self, name: str, flow: object) -> None:
        self.flows[name] = flow
        self.times[name] = max(self._clock, self._absent.pop(name, 0.0))

    def charge(self, name: str, cost: float) -> None:
        self._clock = max(self._clock, self.times[name])
        self.times[name] += cost

    def leave(self, name: str) -> None:
        del self.flows[name]
        self._absent[name] = self.times.pop(name)
        while len(self._absent) > MAX_REMEMBERED:
            self._absent.popitem(last=False)

    def in_turn(self) -> Iterator[str]:
        heap = [(time, number, name) for number, (name, time) in enumerate(self.times.items())]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[2]


class FairQueue(Generic[T]):
    def __init__(self):
        self._users = _Level()
        self._waiting: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def waiting(self, user: str) -> int:
        return self._waiting.get(user, 0)

    def users(self) -> dict[str, int]:
        return dict(self._waiting)

    def add(self, item: T, user: str, experiment: str, cost: float, first: bool = False) -> None:
        """first: before the others of its experiment, for what was turned away through no fault of
        its own.
        """
        experiments = self._users.flows.get(user)
        if experiments is None:
            experiments = _Level()
            self._users.arrive(user, experiments)
        if experiment not in experiments.flows:
            experiments.arrive(experiment, deque())
        entry = (item, cost)
        line = experiments.flows[experiment]
        line.appendleft(entry) if first else line.append(entry)
        self._waiting[user] = self._waiting.get(user, 0) + 1

    def take(self, suits: Callable[[T], bool | None]) -> T | None:
        """The next in turn that suits, removed.

        Each experiment's first is asked for; those behind it wait for it. None from `suits`: none
        will.
        """
        for user in self._users.in_turn():
            experiments = self._users.flows[user]
            for experiment in experiments.in_turn():
                item, cost = experiments.flows[experiment][0]
                verdict = suits(item)
                if verdict is None:
                    return None
                if verdict:
                    experiments.charge(experiment, cost)
                    self._users.charge(user, cost)
                    experiments.flows[experiment].popleft()
                    self._removed(user, experiment)
                    return item
        return None

    def remove(self, item: T, user: str, experiment: str) -> bool:
        """Without a charge; False if it does not wait."""
        experiments = self._users.flows.get(user)
        line = experiments.flows.get(experiment) if experiments else None
        for entry in line or ():
            if entry[0] is item:
                line.remove(entry)
                self._removed(user, experiment)
                return True
        return False

    def _removed(self, user: str, experiment: str) -> None:
        experiments = self._users.flows[user]
        if not experiments.flows[experiment]:
            experiments.leave(experiment)
        if not experiments.flows:
            self._users.leave(user)
        self._waiting[user] -= 1
        if not self._waiting[user]:
            del self._waiting[user]
