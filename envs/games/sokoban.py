"""Sokoban as in ROLL's agentic pipeline: push every box onto a target.

Symbols: # wall, _ floor, O target, X box, √ box on a target, P player, S player on a target.
Rewards are gym-sokoban's, which ROLL uses: -0.1 for each turn, +1 for a box pushed onto a target,
-1 for one pushed off, +10 when all boxes are on targets. shaped=False: 1 when solved, 0 otherwise.
"""

from __future__ import annotations

import random
from typing import Any

from envs.games.base import Move, TextGame, as_answer, tool
from envs.games.sokoban_rooms import MOVES, Cell, make_room
from envs.games.sokoban_solver import solve

STEP_REWARD, ON_TARGET_REWARD, OFF_TARGET_REWARD, SOLVED_REWARD = -0.1, 1.0, -1.0, 10.0
_NAMES = list(MOVES)


class Sokoban(TextGame):
    """A room of dim_room (rows, columns, outer walls included) with num_boxes boxes, solvable
    within max_turns.
    """

    family = "sokoban"
    tools = [
        tool(
            "move",
            "Move one cell, pushing a box that is there.",
            direction={"type": "string", "enum": _NAMES},
        )
    ]

    def __init__(
        self,
        seed: int = 0,
        dim_room: tuple[int, int] = (6, 6),
        num_boxes: int = 1,
        max_turns: int = 20,
        shaped: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(seed, max_turns, **settings)
        rows, columns = dim_room
        if not (5 <= rows <= 16 and 5 <= columns <= 16):
            raise ValueError(f"dim_room is {dim_room}; rows and columns are between 5 and 16")
        if not 1 <= num_boxes <= min(6, (rows - 2) * (columns - 2) // 6):
            raise ValueError(
                f"num_boxes is {num_boxes}; a room of {rows} x {columns} takes 1 to"
                f" {min(6, (rows - 2) * (columns - 2) // 6)}"
            )
        if max_turns < 3 * num_boxes:
            raise ValueError(
                f"max_turns={max_turns} may be too few for {num_boxes} boxes; give at least"
                f" {3 * num_boxes}"
            )
        self.dim_room, self.num_boxes, self.shaped = (rows, columns), num_boxes, shaped
        # the demonstrator's, and the position that it is for
        self._plan: tuple[Cell, frozenset[Cell], list[str]] | None = None

    def demonstrator_action(self) -> str | None:
        """The first move of a shortest solution, or of a solution where the position is too large
        to prove that (see solve).
        """
        position = (self.player, frozenset(self.boxes))
        if self._plan is None or self._plan[:2] != position:
            moves = solve(self.room, *position)
            if moves is None:
                return None
            self._plan = (*position, moves)
        return as_answer(self._plan[2][0]) if self._plan[2] else None

    def legal_actions(self) -> list[str]:
        return list(_NAMES)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "dim_room": self.dim_room,
            "num_boxes": self.num_boxes,
            "shaped": self.shaped,
        }

    def _new_game(self, rng: random.Random) -> None:
        self.room, self.player, boxes = make_room(
            rng, self.dim_room, self.num_boxes, self.max_turns
        )
        self.boxes, self._plan = set(boxes), None

    def _instructions(self) -> str:
        return (
            "You are solving the Sokoban puzzle. You are the player and you need to push all boxes"
            " to targets. When you are right next to a box, you can push it by moving in the same"
            " direction. You cannot push a box through a wall or another box, and you cannot pull"
            f" a box. You have {self.max_turns} turns. Give one action in a turn, in the format"
            " <answer>Right</answer>.\nThe meaning of each symbol in the state is:\n#: wall, _:"
            " empty, O: target, √: box on target, X: box, P: player, S: player on target\nYour"
            f" available actions are:\n{', '.join(_NAMES)}"
        )

    def _board(self) -> str:
        rows, columns = self.dim_room
        lines = (
            "".join(self._symbol((row, column)) for column in range(columns)) for row in range(rows)
        )
        return "Here is the current state of the Sokoban puzzle:\n" + "\n".join(lines) + "\n"

    def _symbol(self, cell: Cell) -> str:
        on_target = cell in self.room.targets
        if cell == self.player:
            return "S" if on_target else "P"
        if cell in self.boxes:
            return "√" if on_target else "X"
        return "O" if on_target else "_" if cell in self.room.floor else "#"

    def _read(self, content: str) -> str | None:
        name = content.capitalize()
        return name if name in MOVES else None

    def _without_action(self, complaint: str) -> Move:
        move = super()._without_action(complaint)
        return Move(move.observation, STEP_REWARD if self.shaped else 0.0, effective=False)

    def _act(self, action: str) -> Move:
        down, right = MOVES[action]
        cell = (self.player[0] + down, self.player[1] + right)
        behind = (cell[0] + down, cell[1] + right)
        reward = STEP_REWARD
        pushes = cell in self.boxes
        if cell not in self.room.floor or (
            pushes and (behind not in self.room.floor or behind in self.boxes)
        ):
            return Move(
                f"At turn {self._turns}, you tried to move {action}, which is not effective yet.",
                reward if self.shaped else 0.0,
                effective=False,
            )
        if pushes:
            self.boxes.remove(cell)
            self.boxes.add(behind)
            reward += ON_TARGET_REWARD * (behind in self.room.targets) + OFF_TARGET_REWARD * (
                cell in self.room.targets
            )
        self.player = cell
        self._follow_plan(action)
        won = self.boxes == self.room.targets
        reward += SOLVED_REWARD * won
        return Move(
            f"At turn {self._turns}, you moved {action}, which is effective.",
            reward if self.shaped else float(won),
            won=won,
        )

    def _follow_plan(self, action: str) -> None:
        """What is left of the demonstrator's plan, if that was its next move."""
        if self._plan is not None:
            moves = self._plan[2]
            self._plan = (
                (self.player, frozenset(self.boxes), moves[1:]) if moves[:1] == [action] else None
            )
