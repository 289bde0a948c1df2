"""FrozenLake as in ROLL's agentic pipeline: cross a random lake without falling into a hole.

Symbols: P player, _ ice, O hole, G goal, X player in a hole, √ player on the goal. Reward: 1 on the
goal, 0 otherwise. On slippery ice a move goes as meant, or to either side, with probability 1/3
each (gymnasium's rule).
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from envs.games.base import Move, TextGame, as_answer, tool

Cell = tuple[int, int]  # row, column
MOVES: dict[str, Cell] = {
    "Left": (0, -1),
    "Down": (1, 0),
    "Right": (0, 1),
    "Up": (-1, 0),
}  # in gymnasium's order: neighbours are the two sides
_NAMES = list(MOVES)
_TRIES = 100  # random lakes before one is made passable by force
_SWEEPS = 2_000  # of value iteration; a 16 x 16 lake needs fewer


class FrozenLake(TextGame):
    """A square lake of `size`; each cell but start and goal is ice with probability `p`, and the
    goal can be reached within max_turns.
    """

    family = "frozen_lake"
    tools = [tool("move", "Move one cell.", direction={"type": "string", "enum": _NAMES})]

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
        self.size, self.p, self.is_slippery = size, p, is_slippery

    def demonstrator_action(self) -> str | None:
        """The shortest way; on slippery ice the move with the best chance of ever reaching the
        goal.
        """
        if self.is_slippery:
            chances = self._chances = self._chances or self._best_chances()
            if chances[self.player] == 0.0:
                return None
            return as_answer(
                max(_NAMES, key=lambda name: self._chance_after(self.player, name, chances))
            )
        way = shortest_way(self.player, self.goal, self.ice)
        return as_answer(way[0]) if way else None

    def legal_actions(self) -> list[str]:
        return list(_NAMES)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "size": self.size,
            "p": self.p,
            "is_slippery": self.is_slippery,
        }

    def _new_game(self, rng: random.Random) -> None:
        self._chances: dict[Cell, float] | None = None  # the demonstrator's, of this lake
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        for _ in range(_TRIES):
            self.player, self.goal = rng.sample(cells, 2)
            self.ice = {cell for cell in cells if rng.random() < self.p} | {self.player, self.goal}
            way = shortest_way(self.player, self.goal, self.ice)
            if way is not None and len(way) <= self.max_turns:
                return
        self.ice |= _straight_way(self.player, self.goal)

    def _instructions(self) -> str:
        slippery = (
            "The ice is slippery: you may move in an unintended direction. "
            if self.is_slippery
            else ""
        )
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
        if cell == self.player:
            return "√" if cell == self.goal else "P" if cell in self.ice else "X"
        return "G" if cell == self.goal else "_" if cell in self.ice else "O"

    def _read(self, content: str) -> str | None:
        name = content.capitalize()
        return name if name in MOVES else None

    def _act(self, action: str) -> Move:
        taken = self._rng.choice(_with_sides(action)) if self.is_slippery else action
        before, self.player = self.player, self._beside(self.player, taken)
        if self.player == before:
            return Move(
                f"At turn {self._turns}, you tried to move {action}, which is not effective yet.",
                effective=False,
            )
        won, lost = self.player == self.goal, self.player not in self.ice
        return Move(
            f"At turn {self._turns}, you moved {action}, which is effective.",
            reward=1.0 if won else 0.0,
            won=won,
            lost=lost,
        )

    def _beside(self, cell: Cell, name: str) -> Cell:
        row, column = cell[0] + MOVES[name][0], cell[1] + MOVES[name][1]
        return (row, column) if 0 <= row < self.size and 0 <= column < self.size else cell

    def _best_chances(self) -> dict[Cell, float]:
        """By value iteration: the probability of ever reaching the goal under the best policy
        (slightly discounted, so that standing still is worse).
        """
        chances = {(row, column): 0.0 for row in range(self.size) for column in range(self.size)}
        chances[self.goal] = 1.0
        for _ in range(_SWEEPS):
            change = 0.0
            for cell in self.ice - {self.goal}:
                best = 0.9999 * max(self._chance_after(cell, name, chances) for name in _NAMES)
                change, chances[cell] = max(change, best - chances[cell]), best
            if change < 1e-9:
                break
        return chances

    def _chance_after(self, cell: Cell, name: str, chances: dict[Cell, float]) -> float:
        return sum(chances[self._beside(cell, taken)] for taken in _with_sides(name)) / 3


def shortest_way(start: Cell, goal: Cell, ice: set[Cell]) -> list[str] | None:
    """Moves from start to goal over ice, by breadth-first search; None where there is no way."""
    before: dict[Cell, tuple[Cell, str] | None] = {start: None}
    queue = deque([start])
    while queue and goal not in before:
        cell = queue.popleft()
        for name, (down, right) in MOVES.items():
            beside = (cell[0] + down, cell[1] + right)
            if beside in ice and beside not in before:
                before[beside] = (cell, name)
                queue.append(beside)
    if goal not in before:
        return None
    way, step = [], before[goal]
    while step is not None:
        way.append(step[1])
        step = before[step[0]]
    return way[::-1]


def _with_sides(name: str) -> list[str]:
    index = _NAMES.index(name)
    return [_NAMES[(index + turn) % 4] for turn in (-1, 0, 1)]


def _straight_way(start: Cell, goal: Cell) -> set[Cell]:
    """The cells of an L-shaped way."""
    rows = range(min(start[0], goal[0]), max(start[0], goal[0]) + 1)
    columns = range(min(start[1], goal[1]), max(start[1], goal[1]) + 1)
    return {(row, start[1]) for row in rows} | {(goal[0], column) for column in columns}
