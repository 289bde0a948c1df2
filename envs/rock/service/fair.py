"""A queue that is fair to users, and among the experiments of each user.

Start-time fair queueing in two levels. Each user has a virtual time, the cost that it was given so
far, and the lowest goes first. Within a user the experiments take turns in the same way; within an
experiment the oldest goes first. A user or experiment that returns after a pause starts at the time
of those that waited, so a pause earns no credit.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
Flow = TypeVar("Flow")
MAX_REMEMBERED = 4096  # absent flows whose virtual time is kept


class _Level(Generic[Flow]):
    """Flows that share one resource, by name, with their virtual times."""

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self._times: dict[str, float] = {}
        self._absent: OrderedDict[str, float] = OrderedDict()
        self._clock = 0.0

    def arrive(self, name: str, flow: Flow) -> None:
        self.flows[name] = flow
        self._times[name] = max(self._clock, self._absent.pop(name, 0.0))

    def charge(self, name: str, cost: float) -> None:
        self._clock = max(self._clock, self._times[name])
        self._times[name] += cost

    def leave(self, name: str) -> None:
        del self.flows[name]
        self._absent[name] = self._times.pop(name)
        while len(self._absent) > MAX_REMEMBERED:
            self._absent.popitem(last=False)

    def in_turn(self) -> Iterator[str]:
        """Yield the names by virtual time, equal ones in order of arrival."""
        heap = [(time, number, name) for number, (name, time) in enumerate(self._times.items())]
        heapq.heapify(heap)
        while heap:
            _, _, name = heapq.heappop(heap)
            yield name


class FairQueue(Generic[T]):
    """Items that wait for a turn, each with a user, an experiment and a cost."""

    def __init__(self) -> None:
        self._users: _Level[_Level[deque[tuple[T, float]]]] = _Level()
        self._waiting: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def waiting(self, user: str) -> int:
        """Return the number of items of one user."""
        return self._waiting.get(user, 0)

    def users(self) -> dict[str, int]:
        """Return the number of items by user."""
        return dict(self._waiting)

    def add(self, item: T, user: str, experiment: str, cost: float, first: bool = False) -> None:
        """Append an item to its experiment's queue.

        Args:
          item: what waits.
          user: who is charged.
          experiment: a name of the user's choice.
          cost: what the user and the experiment are charged when the item is taken.
          first: put it before the others of its experiment, for an item that lost its place without
            a fault of its own.
        """
        experiments = self._users.flows.get(user)
        if experiments is None:
            experiments = _Level()
            self._users.arrive(user, experiments)
        if experiment not in experiments.flows:
            experiments.arrive(experiment, deque())
        line = experiments.flows[experiment]
        if first:
            line.appendleft((item, cost))
        else:
            line.append((item, cost))
        self._waiting[user] = self._waiting.get(user, 0) + 1

    def take(self, suits: Callable[[T], bool | None]) -> T | None:
        """Remove and return the next item in turn that suits; None if there is none.

        Args:
          suits: asked about the first item of each experiment, in turn; the items behind it wait
            for it. None means that no other item will suit either.
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
                    self._forget_one(user, experiment)
                    return item
        return None

    def remove(self, item: T, user: str, experiment: str) -> bool:
        """Remove an item without a charge; return False if it does not wait."""
        experiments = self._users.flows.get(user)
        line = experiments.flows.get(experiment) if experiments else None
        if line is None:
            return False
        for entry in line:
            if entry[0] is item:
                line.remove(entry)
                self._forget_one(user, experiment)
                return True
        return False

    def _forget_one(self, user: str, experiment: str) -> None:
        experiments = self._users.flows[user]
        if not experiments.flows[experiment]:
            experiments.leave(experiment)
        if not experiments.flows:
            self._users.leave(user)
        self._waiting[user] -= 1
        if not self._waiting[user]:
            del self._waiting[user]
