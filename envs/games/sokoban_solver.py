"""A* search for Sokoban over states (player, boxes); one step is a push and costs its moves.

The lower bound is the cheapest assignment of boxes to targets, counted in pushes of a single box on
an otherwise empty floor. A position without such an assignment is a dead end.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Set

from envs.games.sokoban_rooms import MOVES, Cell, Room, moved

State = tuple[Cell, frozenset[Cell]]
_FAR = 1 << 20
MAX_STATES = 30_000  # limit of each search, about two seconds
# Weight of the lower bound in the second search, which need not find a shortest solution.
HASTE = 4


def solve(room: Room, player: Cell, boxes: frozenset[Cell]) -> list[str] | None:
    """Return moves that bring all boxes onto targets, or None where no solution was found.

    The list is a shortest one unless that takes too long to prove.
    """
    proven, moves = _search(room, player, boxes, weight=1)
    return moves if proven else _search(room, player, boxes, weight=HASTE)[1]


def _search(
    room: Room, player: Cell, boxes: frozenset[Cell], weight: int
) -> tuple[bool, list[str] | None]:
    """Run A* and return (whether the search finished, the moves)."""
    bound = lower_bound(room)
    start: State = (player, boxes)
    cost: dict[State, int] = {start: 0}
    came: dict[State, tuple[State, list[str]]] = {}
    order = itertools.count()  # breaks ties by age, so that every search runs the same way
    queue = []
    if bound(boxes) < _FAR:
        queue.append((weight * bound(boxes), next(order), 0, start))
    while queue:
        _, _, spent, state = heapq.heappop(queue)
        if spent > cost[state]:
            continue
        if state[1] == room.targets:
            return True, _moves_to(state, came)
        if len(cost) > MAX_STATES:
            return False, None
        for moves, after in _pushes(state, room.floor):
            left = bound(after[1])
            total = spent + len(moves)
            if left < _FAR and total < cost.get(after, _FAR):
                cost[after] = total
                came[after] = (state, moves)
                heapq.heappush(queue, (total + weight * left, next(order), total, after))
    return True, None


def _pushes(state: State, floor: Set[Cell]) -> Iterator[tuple[list[str], State]]:
    """Yield each push that is possible: the moves up to it and the state after it."""
    player, boxes = state
    ways = _ways(player, floor, boxes)
    for box in sorted(boxes):
        for name, direction in MOVES.items():
            stand = moved(box, direction, -1)
            beyond = moved(box, direction)
            if stand in ways and beyond in floor and beyond not in boxes:
                moves = [*_walk(stand, ways), name]
                yield moves, (box, boxes - {box} | {beyond})


def lower_bound(room: Room) -> Callable[[frozenset[Cell]], int]:
    """Return a function from boxes to the pushes that are needed at least.

    The function returns _FAR where a box cannot reach any target that is left for it.
    """
    to_target = [_pushes_to(target, room.floor) for target in sorted(room.targets)]
    known: dict[frozenset[Cell], int] = {}

    def bound(boxes: frozenset[Cell]) -> int:
        if boxes not in known:
            costs = [[pushes.get(box, _FAR) for pushes in to_target] for box in boxes]
            known[boxes] = _cheapest(costs)
        return known[boxes]

    return bound


def _cheapest(costs: list[list[int]]) -> int:
    """Return the least sum of one entry from each row with no column used twice.

    Dynamic programming over the sets of used columns.
    """
    sums = {0: 0}  # set of used columns as a bit mask -> least sum
    for row in costs:
        longer: dict[int, int] = {}
        for used, total in sums.items():
            for column, cost in enumerate(row):
                bit = 1 << column
                if cost < _FAR and not used & bit:
                    after = used | bit
                    longer[after] = min(longer.get(after, _FAR), total + cost)
        sums = longer
    return min(sums.values(), default=_FAR)


def _pushes_to(target: Cell, floor: Set[Cell]) -> dict[Cell, int]:
    """Return, for each cell, the pushes that bring a single box from there to the target."""
    found = {target: 0}
    queue = deque([target])
    while queue:
        cell = queue.popleft()
        for direction in MOVES.values():
            origin = moved(cell, direction, -1)
            stand = moved(cell, direction, -2)
            if origin in floor and stand in floor and origin not in found:
                found[origin] = found[cell] + 1
                queue.append(origin)
    return found


def _ways(player: Cell, floor: Set[Cell], boxes: Set[Cell]) -> dict[Cell, tuple[Cell, str] | None]:
    """Return how the player reaches each cell without a push: the cell before it and the move."""
    ways: dict[Cell, tuple[Cell, str] | None] = {player: None}
    queue = deque([player])
    while queue:
        cell = queue.popleft()
        for name, direction in MOVES.items():
            beside = moved(cell, direction)
            if beside in floor and beside not in boxes and beside not in ways:
                ways[beside] = (cell, name)
                queue.append(beside)
    return ways


def _walk(cell: Cell, ways: dict[Cell, tuple[Cell, str] | None]) -> list[str]:
    """Return the moves that lead to a cell."""
    moves = []
    while (step := ways[cell]) is not None:
        moves.append(step[1])
        cell = step[0]
    return moves[::-1]


def _moves_to(state: State, came: dict[State, tuple[State, list[str]]]) -> list[str]:
    """Return the moves that lead to a state."""
    parts = []
    while state in came:
        state, moves = came[state]
        parts.append(moves)
    return [move for part in reversed(parts) for move in part]
