"""Sokoban rooms, made by playing backwards: boxes start on the targets and are pulled away, so that
pushing them back is a solution.

The number of backward moves is bounded by the turns that a player has, which bounds the shortest
solution too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Set
from typing import NamedTuple

Cell = tuple[int, int]  # row, column
MOVES: dict[str, Cell] = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
_STAMPS: list[
    list[Cell]
] = [  # what a step of the digger opens: lines and corners, as in gym-sokoban
    [(0, 0), (0, 1), (0, -1)],
    [(0, 0), (1, 0), (-1, 0)],
    [(0, 0), (0, 1), (1, 0)],
    [(0, 0), (0, 1), (1, 0), (1, 1)],
    [(0, 0), (0, -1), (1, 0)],
]
_ROOMS = 10  # the best of so many is taken
_MAX_ROOMS = 500


class Room(NamedTuple):
    """Where one can stand, and where boxes belong (cells of the floor)."""

    floor: frozenset[Cell]
    targets: frozenset[Cell]


def make_room(
    rng: random.Random, dim: tuple[int, int], num_boxes: int, max_moves: int
) -> tuple[Room, Cell, frozenset[Cell]]:
    """(room, player, boxes) with no box on a target and a solution of at most max_moves moves; of
    several the one with the longest pulls.

    Raises RuntimeError where none is found, which takes very few turns for very many boxes.
    """
    best = None
    for attempt in range(_MAX_ROOMS):
        floor = _dig(rng, dim, num_boxes)
        if len(floor) < num_boxes + 4:
            continue
        targets = frozenset(rng.sample(sorted(floor), num_boxes))
        score, player, boxes = _pull_apart(rng, Room(floor, targets), max_moves)
        if boxes is not None and (best is None or score > best[0]):
            best = (score, Room(floor, targets), player, boxes)
        if best is not None and attempt >= _ROOMS:
            break
    if best is None:
        raise RuntimeError(
            f"no room of {dim} with {num_boxes} boxes and a solution of {max_moves} moves was"
            " found; allow more turns or fewer boxes"
        )
    return best[1:]


def _dig(rng: random.Random, dim: tuple[int, int], num_boxes: int) -> frozenset[Cell]:
    """A connected floor inside the outer walls, left behind by a digger that walks straight and
    sometimes turns.
    """
    rows, columns = dim
    floor: set[Cell] = set()
    cell = (rng.randrange(1, rows - 1), rng.randrange(1, columns - 1))
    direction = rng.choice(list(MOVES.values()))
    for _ in range(int(1.7 * (rows + columns)) + 2 * num_boxes):
        if rng.random() < 0.35:
            direction = rng.choice(list(MOVES.values()))
        stamp = rng.choice(_STAMPS)
        floor |= {
            (cell[0] + down, cell[1] + right)
            for down, right in stamp
            if 0 < cell[0] + down < rows - 1 and 0 < cell[1] + right < columns - 1
        }
        cell = (
            min(max(cell[0] + direction[0], 1), rows - 2),
            min(max(cell[1] + direction[1], 1), columns - 2),
        )
        floor.add(cell)
    return frozenset(floor)


def _pull_apart(
    rng: random.Random, room: Room, max_moves: int
) -> tuple[int, Cell, frozenset[Cell] | None]:
    """Random pulls from the solved room.

    Of the positions on the way: the one with no box on a target and the largest displacement, or
    None.
    """
    boxes = {target: target for target in room.targets}  # where a box is -> where it began
    free = sorted(room.floor - room.targets)
    player = rng.choice(free)
    moves_left = max_moves
    best: tuple[int, Cell, frozenset[Cell] | None] = (-1, player, None)
    while moves_left > 0:
        far = distances(player, room.floor, boxes.keys())
        pulls = []
        for box in boxes:
            for down, right in MOVES.values():
                stand, back = (
                    (box[0] + down, box[1] + right),
                    (box[0] + 2 * down, box[1] + 2 * right),
                )
                if (
                    stand in far
                    and back in room.floor
                    and back not in boxes
                    and far[stand] + 1 <= moves_left
                ):
                    pulls.append((box, stand, back))
        if not pulls:
            break
        still = [
            pull for pull in pulls if pull[0] == boxes[pull[0]]
        ]  # first those that have not moved yet
        box, stand, back = rng.choice(still or pulls)
        moves_left -= far[stand] + 1
        boxes[stand] = boxes.pop(box)
        player = back
        if not room.targets & boxes.keys():
            score = sum(
                abs(at[0] - began[0]) + abs(at[1] - began[1]) for at, began in boxes.items()
            )
            best = max(best, (score, player, frozenset(boxes)), key=lambda one: one[0])
    return best


def distances(start: Cell, floor: Set[Cell], blocked: Set[Cell]) -> dict[Cell, int]:
    """Steps from start to each cell that can be reached without entering a blocked one."""
    found = {start: 0}
    queue = deque([start])
    while queue:
        row, column = queue.popleft()
        for down, right in MOVES.values():
            beside = (row + down, column + right)
            if beside in floor and beside not in blocked and beside not in found:
                found[beside] = found[(row, column)] + 1
                queue.append(beside)
    return found
