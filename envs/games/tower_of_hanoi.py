"""Tower of Hanoi from a random legal position: all disks must go to tower C.

The reward is 1 when they are there and 0 otherwise.
"""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

from envs.games.base import Move, TextGame, as_answer, tool

TOWERS = "ABC"
_TOWER = {"type": "string", "enum": list(TOWERS)}
_MOVE = re.compile(r"([A-Ca-c])\s*(?:,|->|to)?\s*([A-Ca-c])")


class TowerOfHanoi(TextGame):
    """A game with `num_disks` disks, 1 being the smallest.

    2 ** num_disks - 1 moves suffice from any position; max_turns defaults to twice that.
    """

    family = "tower_of_hanoi"
    tools: ClassVar = [
        tool("move", "Move the top disk of one tower onto another.", source=_TOWER, target=_TOWER)
    ]

    def __init__(
        self, seed: int = 0, num_disks: int = 3, max_turns: int | None = None, **settings: Any
    ) -> None:
        if not 1 <= num_disks <= 12:
            raise ValueError(f"num_disks is {num_disks}; it is between 1 and 12")
        needed = 2**num_disks - 1
        super().__init__(seed, 2 * needed if max_turns is None else max_turns, **settings)
        if self.max_turns < needed:
            raise ValueError(
                f"max_turns={max_turns} may be too few for {num_disks} disks; give at least"
                f" {needed}"
            )
        self.num_disks = num_disks

    def demonstrator_action(self) -> str | None:
        """Return the first move of a shortest solution as a turn."""
        source, target = next_move(self.towers)
        return as_answer(f"{source} {target}")

    def legal_actions(self) -> list[str]:
        """Return the moves that the rules allow now."""
        return [
            f"{source} {target}"
            for source in TOWERS
            for target in TOWERS
            if source != target and self._refusal(source, target) is None
        ]

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "num_disks": self.num_disks}

    def _new_game(self, rng: random.Random) -> None:
        solved = ["C"] * self.num_disks
        places = solved
        while places == solved:
            places = [rng.choice(TOWERS) for _ in solved]
        self.towers: dict[str, list[int]] = {tower: [] for tower in TOWERS}
        for disk in range(self.num_disks, 0, -1):
            self.towers[places[disk - 1]].append(disk)

    def _instructions(self) -> str:
        return (
            f"You are playing Tower of Hanoi with {self.num_disks} disks; disk 1 is the smallest."
            f" Move all disks to tower C within {self.max_turns} turns. Only the top disk of a"
            " tower can be moved (the last of its list), never onto a smaller one. Give one move"
            " in a turn, source and target, in the format <answer>A C</answer>."
        )

    def _board(self) -> str:
        rows = "".join(f"{tower}: {disks}\n" for tower, disks in self.towers.items())
        return f"Here is the current state of the towers:\n{rows}"

    def _read(self, content: str) -> str | None:
        match = _MOVE.fullmatch(content)
        return f"{match[1].upper()} {match[2].upper()}" if match else None

    def _act(self, action: str) -> Move:
        source, target = action.split()
        if refusal := self._refusal(source, target):
            return Move(
                f"At turn {self._turns}, you tried to move from {source} to {target}: {refusal}.",
                effective=False,
            )
        disk = self.towers[source].pop()
        self.towers[target].append(disk)
        won = len(self.towers["C"]) == self.num_disks
        if won:
            said = "Congratulations! All disks are on tower C."
        else:
            said = f"At turn {self._turns}, you moved disk {disk} from {source} to {target}."
        return Move(said, reward=1.0 if won else 0.0, won=won)

    def _refusal(self, source: str, target: str) -> str | None:
        """Return why a move is not allowed, or None."""
        if not self.towers[source]:
            return f"tower {source} is empty"
        if source == target:
            return "the towers are the same"
        disk = self.towers[source][-1]
        below = self.towers[target][-1] if self.towers[target] else None
        if below is not None and below < disk:
            return f"disk {disk} is larger than disk {below}"
        return None


def next_move(towers: dict[str, list[int]]) -> tuple[str, str]:
    """Return the first move (source, target) of a shortest solution.

    The largest misplaced disk must move to its tower. For that the smaller disks must be on the
    third tower, and so on down to the disk that can move.
    """
    place = {disk: tower for tower, disks in towers.items() for disk in disks}
    goal = "C"
    chosen = None
    for disk in range(len(place), 0, -1):
        if place[disk] != goal:
            chosen = disk
            target = goal
            (goal,) = set(TOWERS) - {place[disk], goal}
    if chosen is None:
        raise ValueError("all disks are on tower C; there is nothing to move")
    return place[chosen], target
