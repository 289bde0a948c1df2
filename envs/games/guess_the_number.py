"""Guess the number: each guess is answered with "higher" or "lower".

The reward is 1 for the right number and 0 otherwise.
"""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

from envs.games.base import Move, TextGame, as_answer, tool

_INTEGER = re.compile(r"[+-]?[0-9]{1,12}")


class GuessTheNumber(TextGame):
    """A game about a number between min_number and max_number, both included.

    max_turns defaults to the number of guesses that bisection needs in the worst case.
    """

    family = "guess_the_number"
    tools: ClassVar = [tool("guess", "Guess the number.", number={"type": "integer"})]

    def __init__(
        self,
        seed: int = 0,
        min_number: int = 1,
        max_number: int = 100,
        max_turns: int | None = None,
        **settings: Any,
    ) -> None:
        if not -(10**9) <= min_number < max_number <= 10**9:
            raise ValueError(
                f"min_number={min_number}, max_number={max_number}: the first is smaller, and both"
                " are within a billion"
            )
        needed = (max_number - min_number + 1).bit_length()
        super().__init__(seed, needed if max_turns is None else max_turns, **settings)
        if self.max_turns < needed:
            raise ValueError(
                f"max_turns={max_turns} may be too few for {max_number - min_number + 1} numbers;"
                f" give at least {needed}"
            )
        self.min_number = min_number
        self.max_number = max_number

    def demonstrator_action(self) -> str | None:
        """Return the middle of the numbers that the answers so far leave possible."""
        return as_answer(str((self.low + self.high) // 2))

    def legal_actions(self) -> list[str]:
        """Return the smallest, the middle and the largest number as examples."""
        middle = (self.min_number + self.max_number) // 2
        return [str(number) for number in sorted({self.min_number, middle, self.max_number})]

    def sample_random_action(self) -> str:
        """Return a random guess as a turn."""
        return as_answer(str(self._random_actions.randint(self.min_number, self.max_number)))

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "min_number": self.min_number, "max_number": self.max_number}

    def _new_game(self, rng: random.Random) -> None:
        self.number = rng.randint(self.min_number, self.max_number)
        self.low = self.min_number
        self.high = self.max_number
        self.guesses: list[tuple[int, str]] = []

    def _instructions(self) -> str:
        return (
            f"You are playing Guess The Number. Guess the number between {self.min_number} and"
            f" {self.max_number} (inclusive) within {self.max_turns} turns. After each guess you"
            " are told whether the number is higher or lower. Give one guess in a turn, in the"
            " format <answer>42</answer>."
        )

    def _board(self) -> str:
        told = ", ".join(f"{guess} ({answer})" for guess, answer in self.guesses)
        return f"Guesses so far: {told or 'none'}\nEnter your next guess.\n"

    def _read(self, content: str) -> str | None:
        return str(int(content)) if _INTEGER.fullmatch(content) else None

    def _act(self, action: str) -> Move:
        guess = int(action)
        if guess == self.number:
            return Move(
                f"Congratulations! You guessed the number {guess} in {self._turns} turns.",
                reward=1.0,
                won=True,
            )
        if not self.min_number <= guess <= self.max_number:
            return Move(
                f"At turn {self._turns}, you guessed {guess}, which is outside the range"
                f" {self.min_number} to {self.max_number}.",
                effective=False,
            )
        answer = "lower" if guess > self.number else "higher"
        repeated = guess in dict(self.guesses)
        self.guesses.append((guess, answer))
        if guess > self.number:
            self.high = min(self.high, guess - 1)
        else:
            self.low = max(self.low, guess + 1)
        return Move(
            f"At turn {self._turns}, you guessed {guess}, and the number is {answer} than {guess}.",
            effective=not repeated,
        )
