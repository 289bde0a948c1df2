"""A* for Sokoban: states are (player, boxes), one push is one step of the search, its cost the
moves that it takes.

The lower bound is the cheapest assignment of boxes to targets, in pushes of a lone box on the empty
floor; a position in which there is no such assignment is a dead end.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Set

from envs.games.sokoban_rooms import MOVES, Cell, Room

State = tuple[Cell, frozenset[Cell]]
_FAR = 1 << 20
MAX_STATES = 30_000  # about two seconds of proof; then a hasty search, as long again
HASTE = 4  # weight of the lower bound in it: a solution is found soon, and need not be the shortest


def solve(room: Room, player: Cell, boxes: frozenset[Cell]) -> list[str] | None:
    """Moves that bring all boxes onto targets, a shortest list unless that takes too long to prove;
    None where none was found.
    """
    proven, moves = _search(room, player, boxes, weight=1)
    return moves if proven else _search(room, player, boxes, weight=HASTE)[1]


def _search(
    room: Room, player: Cell, boxes: frozenset[Cell], weight: int
) -> tuple[bool, list[str] | None]:
    """(whether the search came to its end, the moves)."""
    bound = lower_bound(room)
    start: State = (player, boxes)
    cost: dict[State, int] = {start: 0}
    came: dict[State, tuple[State, list[str]]] = {}
    order = (
        itertools.count()
    )  # equal bounds in the order in which they were found: the same search every time
    queue = [(weight * bound(boxes), next(order), 0, start)] if bound(boxes) < _FAR else []
    while queue:
        _, _, spent, state = heapq.heappop(queue)
        if spent > cost[state]:
            continue
        player, boxes = state
        if boxes == room.targets:
            return True, _moves_to(state, came)
        if len(cost) > MAX_STATES:
            return False, None
        ways = _ways(player, room.floor, boxes)
        for box in sorted(boxes):
            for name, (down, right) in MOVES.items():
                stand, beyond = (box[0] - down, box[1] - right), (box[0] + down, box[1] + right)
                if stand not in ways or beyond not in room.floor or beyond in boxes:
                    continue
                after: State = (box, boxes - {box} | {beyond})
                left = bound(after[1])
                moves = [*_walk(stand, ways), name]
                total = spent + len(moves)
                if left < _FAR and total < cost.get(after, _FAR):
                    cost[after], came[after] = total, (state, moves)
                    heapq.heappush(queue, (total + weight * left, next(order), total, after))
    return True, None


def lower_bound(room: Room) -> Callable[[frozenset[Cell]], int]:
    """A function of the boxes: pushes that are needed at least, _FAR where a box can reach no
    target that is left for it.
    """
    to_target = [_pushes_to(target, room.floor) for target in sorted(room.targets)]
    known: dict[frozenset[Cell], int] = {}

    def bound(boxes: frozenset[Cell]) -> int:
        if boxes not in known:
            known[boxes] = _cheapest(
                [[pushes.get(box, _FAR) for pushes in to_target] for box in boxes]
            )
        return known[boxes]

    return bound


def _cheapest(costs: list[list[int]]) -> int:
    """The least sum with one entry of each row, no column twice (dynamic programming over the
    columns taken).
    """
    sums = {0: 0}
    for row in costs:
        longer: dict[int, int] = {}
        for taken, total in sums.items():
            for column, cost in enumerate(row):
                if cost < _FAR and not taken >> column & 1:
                    after = taken | 1 << column
                    longer[after] = min(longer.get(after, _FAR), total + cost)
        sums = longer
    return min(sums.values(), default=_FAR)


def _pushes_to(target: Cell, floor: Set[Cell]) -> dict[Cell, int]:
    """For each cell from which a lone box can be pushed to the target: in how many pushes."""
    found = {target: 0}
    queue = deque([target])
    while queue:
        row, column = queue.popleft()
        for down, right in MOVES.values():
            origin, stand = (row - down, column - right), (row - 2 * down, column - 2 * right)
            if origin in floor and stand in floor and origin not in found:
                found[origin] = found[(row, column)] + 1
                queue.append(origin)
    return found


def _ways(player: Cell, floor: Set[Cell], boxes: Set[Cell]) -> dict[Cell, tuple[Cell, str] | None]:
    """How each cell is reached without a push: from which cell, by which move."""
    ways: dict[Cell, tuple[Cell, str] | None] = {player: None}
    queue = deque([player])
    while queue:
        cell = queue.popleft()
        for name, (down, right) in MOVES.items():
            beside = (cell[0] + down, cell[1] + right)
            if beside in floor and beside not in boxes and beside not in ways:
                ways[beside] = (cell, name)
                queue.append(beside)
    return ways


def _walk(cell: Cell, ways: dict[Cell, tuple[Cell, str] | None]) -> list[str]:
    moves = []
    while (step := ways[cell]) is not None:
        moves.append(step[1])
        cell = step[0]
    return moves[::-1]


def _moves_to(state: State, came: dict[State, tuple[State, list[str]]]) -> list[str]:
    parts = []
    while state in came:
        state, moves = came[state]
        parts.append(moves)
    return [move for part in reversed(parts) for move in part]
