"""FrozenLake as in ROLL's agentic pipeline: cross a random lake without falling into a hole.

Symbols: P player, _ ice, O hole, G goal, X player in a hole, √ player on the goal. The reward is 1
on the goal and 0 otherwise. On slippery ice a move goes in the intended direction or to either
side, with probability 1/3 each (gymnasium's rule).
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any, ClassVar

from envs.games.base import Move, TextGame, as_answer, tool

Cell = tuple[int, int]  # row, column
# In gymnasium's order: the two neighbours of a direction are its sides.
MOVES: dict[str, Cell] = {"Left": (0, -1), "Down": (1, 0), "Right": (0, 1), "Up": (-1, 0)}
_NAMES = list(MOVES)
_MAX_LAKES = 100  # random lakes before one is made passable by force
_MAX_SWEEPS = 2_000  # sweeps of value iteration; a 16 x 16 lake needs fewer
_DISCOUNT = 0.9999


class FrozenLake(TextGame):
    """A square lake that can be crossed within max_turns.

    Each cell except start and goal is ice with probability `p`.
    """

    family = "frozen_lake"
    tools: ClassVar = [tool("move", "Move one cell.", direction={"type": "string", "enum": _NAMES})]

    def __init__(
        self,
        seed: int = 0,
        size: int = 4,
        p: float = 0.8,
        is_slippery: bool = False,
        max_turns: int = 20,
        **settings: Any,
    ) -> None:
        super().__init__(seed, max_turns, **settings)
        if not 2 <= size <= 32 or not 0.0 <= p <= 1.0:
            raise ValueError(f"size={size}, p={p}: size is between 2 and 32, p between 0 and 1")
        if max_turns < 2 * (size - 1):
            raise ValueError(
                f"max_turns={max_turns} may be too few to cross a lake of size {size}; give at"
                f" least {2 * (size - 1)}"
            )
        self.size = size
        self.p = p
        self.is_slippery = is_slippery

    def demonstrator_action(self) -> str | None:
        """Return the first move of a shortest path.

        On slippery ice, return the move with the best chance of ever reaching the goal.
        """
        if not self.is_slippery:
            way = shortest_way(self.player, self.goal, self.ice)
            return as_answer(way[0]) if way else None
        if self._chances is None:
            self._chances = self._best_chances()
        chances = self._chances
        if chances[self.player] == 0.0:
            return None
        best = max(_NAMES, key=lambda name: self._chance_after(self.player, name, chances))
        return as_answer(best)

    def legal_actions(self) -> list[str]:
        """Return the four directions."""
        return list(_NAMES)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "size": self.size,
            "p": self.p,
            "is_slippery": self.is_slippery,
        }

    def _new_game(self, rng: random.Random) -> None:
        self._chances: dict[Cell, float] | None = None  # of reaching the goal of this lake
        for _ in range(_MAX_LAKES):
            self._draw_lake(rng)
            way = shortest_way(self.player, self.goal, self.ice)
            if way is not None and len(way) <= self.max_turns:
                return
        self.ice |= _straight_way(self.player, self.goal)

    def _draw_lake(self, rng: random.Random) -> None:
        cells = self._cells()
        self.player, self.goal = rng.sample(cells, 2)
        self.ice = {cell for cell in cells if rng.random() < self.p} | {self.player, self.goal}

    def _cells(self) -> list[Cell]:
        return [(row, column) for row in range(self.size) for column in range(self.size)]

    def _instructions(self) -> str:
        slippery = ""
        if self.is_slippery:
            slippery = "The ice is slippery: you may move in an unintended direction. "
        return (
            "You are solving the FrozenLake puzzle. Avoid the holes and reach the goal. "
            + slippery
            + f"You have {self.max_turns} turns. Give one action in a turn, in the format"
            " <answer>Right</answer>.\nThe meaning of each symbol in the state is:\nP: player,"
            " _: empty, O: hole, G: goal, X: player in hole, √: player on goal\nYour available"
            f" actions are:\n{', '.join(_NAMES)}"
        )

    def _board(self) -> str:
        rows = []
        for row in range(self.size):
            rows.append("".join(self._symbol((row, column)) for column in range(self.size)))
        return "Here is the current state of the FrozenLake:\n" + "\n".join(rows) + "\n"

    def _symbol(self, cell: Cell) -> str:
        here = cell == self.player
        if cell == self.goal:
            return "√" if here else "G"
        if cell in self.ice:
            return "P" if here else "_"
        return "X" if here else "O"

    def _read(self, content: str) -> str | None:
        name = content.capitalize()
        return name if name in MOVES else None

    def _act(self, action: str) -> Move:
        taken = self._rng.choice(_with_sides(action)) if self.is_slippery else action
        before = self.player
        self.player = self._beside(before, taken)
        if self.player == before:
            return Move(
                f"At turn {self._turns}, you tried to move {action}, which is not effective yet.",
                effective=False,
            )
        won = self.player == self.goal
        return Move(
            f"At turn {self._turns}, you moved {action}, which is effective.",
            reward=1.0 if won else 0.0,
            won=won,
            lost=self.player not in self.ice,
        )

    def _beside(self, cell: Cell, name: str) -> Cell:
        """Return the neighbour in a direction, or the cell itself at the edge."""
        down, right = MOVES[name]
        row = cell[0] + down
        column = cell[1] + right
        inside = 0 <= row < self.size and 0 <= column < self.size
        return (row, column) if inside else cell

    def _best_chances(self) -> dict[Cell, float]:
        """Compute the probability of reaching the goal from each cell under the best policy.

        Value iteration; a slight discount makes standing still worse than moving.
        """
        chances = dict.fromkeys(self._cells(), 0.0)
        chances[self.goal] = 1.0
        for _ in range(_MAX_SWEEPS):
            change = 0.0
            for cell in self.ice - {self.goal}:
                best = max(self._chance_after(cell, name, chances) for name in _NAMES)
                best *= _DISCOUNT
                change = max(change, best - chances[cell])
                chances[cell] = best
            if change < 1e-9:
                break
        return chances

    def _chance_after(self, cell: Cell, name: str, chances: dict[Cell, float]) -> float:
        return sum(chances[self._beside(cell, taken)] for taken in _with_sides(name)) / 3


def shortest_way(start: Cell, goal: Cell, ice: set[Cell]) -> list[str] | None:
    """Return the moves from start to goal over ice by breadth-first search, or None."""
    steps = _search(start, goal, ice)
    if goal not in steps:
        return None
    way = []
    step = steps[goal]
    while step is not None:
        cell, name = step
        way.append(name)
        step = steps[cell]
    return way[::-1]


def _search(start: Cell, goal: Cell, ice: set[Cell]) -> dict[Cell, tuple[Cell, str] | None]:
    """Return how each cell is reached: the cell before it and the move; None for the start."""
    steps: dict[Cell, tuple[Cell, str] | None] = {start: None}
    queue = deque([start])
    while queue and goal not in steps:
        cell = queue.popleft()
        for name, (down, right) in MOVES.items():
            beside = (cell[0] + down, cell[1] + right)
            if beside in ice and beside not in steps:
                steps[beside] = (cell, name)
                queue.append(beside)
    return steps


def _with_sides(name: str) -> list[str]:
    """Return a direction with the directions to its left and right."""
    index = _NAMES.index(name)
    return [_NAMES[(index + turn) % 4] for turn in (-1, 0, 1)]


def _straight_way(start: Cell, goal: Cell) -> set[Cell]:
    """Return the cells of an L-shaped path."""
    rows = range(min(start[0], goal[0]), max(start[0], goal[0]) + 1)
    columns = range(min(start[1], goal[1]), max(start[1], goal[1]) + 1)
    return {(row, start[1]) for row in rows} | {(goal[0], column) for column in columns}
