"""Sokoban rooms made by reverse play, so that each of them has a solution.

Boxes start on the targets and are pulled away; pushing them back solves the room. The number of
reverse moves is bounded by the player's turns, which bounds the shortest solution too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Set
from typing import NamedTuple

Cell = tuple[int, int]  # row, column
MOVES: dict[str, Cell] = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
# The cells that a step of the digger opens: lines and corners, as in gym-sokoban.
_STAMPS: list[list[Cell]] = [
    [(0, 0), (0, 1), (0, -1)],
    [(0, 0), (1, 0), (-1, 0)],
    [(0, 0), (0, 1), (1, 0)],
    [(0, 0), (0, 1), (1, 0), (1, 1)],
    [(0, 0), (0, -1), (1, 0)],
]
_ROOMS = 10  # attempts of which the best room is taken
_MAX_ROOMS = 500


class Room(NamedTuple):
    """The cells where one can stand, and the cells where boxes belong (a part of the floor)."""

    floor: frozenset[Cell]
    targets: frozenset[Cell]


def moved(cell: Cell, direction: Cell, steps: int = 1) -> Cell:
    """Return the cell that many steps away in a direction."""
    return cell[0] + steps * direction[0], cell[1] + steps * direction[1]


class _Pull(NamedTuple):
    """One pull: the player walks to `stand`, then steps to `back`, and the box follows."""

    box: Cell
    stand: Cell
    back: Cell
    moves: int


def make_room(
    rng: random.Random, dim: tuple[int, int], num_boxes: int, max_moves: int
) -> tuple[Room, Cell, frozenset[Cell]]:
    """Make a room with no box on a target and a solution of at most max_moves moves.

    Of several rooms, the one with the longest pulls is taken.

    Returns:
      (room, player, boxes).

    Raises:
      RuntimeError: no room was found, which takes very few turns for very many boxes.
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
    """Return a connected floor inside the outer walls.

    A digger walks straight ahead, sometimes turns, and leaves the floor behind.
    """
    rows, columns = dim
    inner = {(row, column) for row in range(1, rows - 1) for column in range(1, columns - 1)}
    directions = list(MOVES.values())
    floor: set[Cell] = set()
    cell = (rng.randrange(1, rows - 1), rng.randrange(1, columns - 1))
    direction = rng.choice(directions)
    for _ in range(int(1.7 * (rows + columns)) + 2 * num_boxes):
        if rng.random() < 0.35:
            direction = rng.choice(directions)
        opened = [moved(cell, offset) for offset in rng.choice(_STAMPS)]
        floor.update(one for one in opened if one in inner)
        ahead = moved(cell, direction)
        if ahead in inner:
            cell = ahead
        floor.add(cell)
    return frozenset(floor)


def _pull_apart(
    rng: random.Random, room: Room, max_moves: int
) -> tuple[int, Cell, frozenset[Cell] | None]:
    """Pull boxes at random from the solved room.

    Returns:
      (score, player, boxes) of the position on the way with no box on a target and the largest
      displacement; boxes is None where there is no such position.
    """
    boxes = {target: target for target in room.targets}  # where a box is -> where it began
    free = sorted(room.floor - room.targets)
    player = rng.choice(free)
    moves_left = max_moves
    best: tuple[int, Cell, frozenset[Cell] | None] = (-1, player, None)
    while moves_left > 0:
        pulls = _possible_pulls(room, player, boxes.keys(), moves_left)
        if not pulls:
            break
        # Pull boxes that have not moved yet first.
        unmoved = [pull for pull in pulls if pull.box == boxes[pull.box]]
        pull = rng.choice(unmoved or pulls)
        moves_left -= pull.moves
        boxes[pull.stand] = boxes.pop(pull.box)
        player = pull.back
        if not room.targets & boxes.keys():
            score = _displacement(boxes)
            if score > best[0]:
                best = (score, player, frozenset(boxes))
    return best


def _possible_pulls(room: Room, player: Cell, boxes: Set[Cell], max_moves: int) -> list[_Pull]:
    far = distances(player, room.floor, boxes)
    pulls = []
    for box in boxes:
        for direction in MOVES.values():
            stand = moved(box, direction)
            back = moved(box, direction, 2)
            if stand not in far or back not in room.floor or back in boxes:
                continue
            moves = far[stand] + 1
            if moves <= max_moves:
                pulls.append(_Pull(box, stand, back, moves))
    return pulls


def _displacement(boxes: dict[Cell, Cell]) -> int:
    """Return the sum of the boxes' distances from where they began."""
    total = 0
    for at, began in boxes.items():
        total += abs(at[0] - began[0]) + abs(at[1] - began[1])
    return total


def distances(start: Cell, floor: Set[Cell], blocked: Set[Cell]) -> dict[Cell, int]:
    """Return the steps from start to each cell that is reachable without entering a blocked one."""
    found = {start: 0}
    queue = deque([start])
    while queue:
        cell = queue.popleft()
        for direction in MOVES.values():
            beside = moved(cell, direction)
            if beside in floor and beside not in blocked and beside not in found:
                found[beside] = found[cell] + 1
                queue.append(beside)
    return found
