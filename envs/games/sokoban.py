"""Sokoban as in ROLL's agentic pipeline: push every box onto a target.

Symbols: # wall, _ floor, O target, X box, √ box on a target, P player, S player on a target. The
rewards are those of gym-sokoban, which ROLL uses: -0.1 for each turn, +1 for a box pushed onto a
target, -1 for one pushed off, +10 when all boxes are on targets. With shaped=False the reward is 1
when the room is solved and 0 otherwise.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

from envs.games.base import Move, TextGame, as_answer, tool
from envs.games.sokoban_rooms import MOVES, Cell, make_room, moved
from envs.games.sokoban_solver import solve

STEP_REWARD = -0.1
ON_TARGET_REWARD = 1.0
OFF_TARGET_REWARD = -1.0
SOLVED_REWARD = 10.0
_NAMES = list(MOVES)
Position = tuple[Cell, frozenset[Cell]]  # player, boxes


class Sokoban(TextGame):
    """A room that can be solved within max_turns.

    `dim_room` is (rows, columns) with the outer walls included; `num_boxes` is the number of boxes.
    """

    family = "sokoban"
    tools: ClassVar = [
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
        max_boxes = min(6, (rows - 2) * (columns - 2) // 6)
        if not 1 <= num_boxes <= max_boxes:
            raise ValueError(
                f"num_boxes is {num_boxes}; a room of {rows} x {columns} takes 1 to {max_boxes}"
            )
        if max_turns < 3 * num_boxes:
            raise ValueError(
                f"max_turns={max_turns} may be too few for {num_boxes} boxes; give at least"
                f" {3 * num_boxes}"
            )
        self.dim_room = (rows, columns)
        self.num_boxes = num_boxes
        self.shaped = shaped
        # The demonstrator's plan: the position that it is for, and the moves from there.
        self._plan: tuple[Position, list[str]] | None = None

    def demonstrator_action(self) -> str | None:
        """Return the first move of a solution as a turn.

        The solution is a shortest one unless the position is too large to prove that (see `solve`).
        """
        position = self._position()
        if self._plan is None or self._plan[0] != position:
            moves = solve(self.room, *position)
            if moves is None:
                return None
            self._plan = (position, moves)
        _, moves = self._plan
        return as_answer(moves[0]) if moves else None

    def _success_reward(self) -> float:
        """Return what no unsolved room earns: all boxes but one are on targets there."""
        return self.num_boxes - 0.5 if self.shaped else 1.0

    def _position(self) -> Position:
        return self.player, frozenset(self.boxes)

    def legal_actions(self) -> list[str]:
        """Return the four directions."""
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
        self.boxes = set(boxes)
        self._plan = None

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
        lines = []
        for row in range(rows):
            lines.append("".join(self._symbol((row, column)) for column in range(columns)))
        return "Here is the current state of the Sokoban puzzle:\n" + "\n".join(lines) + "\n"

    def _symbol(self, cell: Cell) -> str:
        on_target = cell in self.room.targets
        if cell == self.player:
            return "S" if on_target else "P"
        if cell in self.boxes:
            return "√" if on_target else "X"
        if on_target:
            return "O"
        return "_" if cell in self.room.floor else "#"

    def _read(self, content: str) -> str | None:
        name = content.capitalize()
        return name if name in MOVES else None

    def _without_action(self, complaint: str) -> Move:
        move = super()._without_action(complaint)
        return Move(move.observation, STEP_REWARD if self.shaped else 0.0, effective=False)

    def _act(self, action: str) -> Move:
        cell = moved(self.player, MOVES[action])
        behind = moved(cell, MOVES[action])
        reward = STEP_REWARD
        if not self._can_enter(cell, behind):
            return Move(
                f"At turn {self._turns}, you tried to move {action}, which is not effective yet.",
                reward if self.shaped else 0.0,
                effective=False,
            )
        if cell in self.boxes:
            self.boxes.remove(cell)
            self.boxes.add(behind)
            onto_target = ON_TARGET_REWARD * (behind in self.room.targets)
            off_target = OFF_TARGET_REWARD * (cell in self.room.targets)
            reward += onto_target + off_target
        self.player = cell
        self._follow_plan(action)
        won = self.boxes == self.room.targets
        reward += SOLVED_REWARD * won
        return Move(
            f"At turn {self._turns}, you moved {action}, which is effective.",
            reward if self.shaped else float(won),
            won=won,
        )

    def _can_enter(self, cell: Cell, behind: Cell) -> bool:
        """Return whether the player can enter a cell, pushing a box there to the one behind."""
        if cell not in self.room.floor:
            return False
        if cell not in self.boxes:
            return True
        return behind in self.room.floor and behind not in self.boxes

    def _follow_plan(self, action: str) -> None:
        """Advance the demonstrator's plan if the action was its next move, else drop it."""
        if self._plan is None:
            return
        _, moves = self._plan
        if moves[:1] == [action]:
            self._plan = (self._position(), moves[1:])
        else:
            self._plan = None
