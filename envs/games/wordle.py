"""A game like Wordle: find a five-letter word by guesses that are marked letter by letter.

G: the right letter in the right place. Y: the word has that letter elsewhere. X: the word has no
(further) such letter. The reward is 1 for the word and 0 otherwise.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import Any, ClassVar

from envs.games.base import Move, TextGame, as_answer, tool
from envs.games.wordle_words import WORDS

LENGTH = 5


class Wordle(TextGame):
    """A game whose secret is one of WORDS; any five letters are a guess."""

    family = "wordle"
    tools: ClassVar = [tool("guess", "Guess the word.", word={"type": "string"})]

    def __init__(self, seed: int = 0, max_turns: int = 6, **settings: Any) -> None:
        super().__init__(seed, max_turns, **settings)

    def demonstrator_action(self) -> str | None:
        """Return the candidate that splits the remaining words best.

        The demonstrator knows WORDS and the marks so far, and nothing else.
        """
        candidates = [word for word in WORDS if self._fits(word)]
        return as_answer(best_guess(tuple(candidates)))

    def _fits(self, word: str) -> bool:
        return all(mark(word, guess) == marks for guess, marks in self.guesses)

    def legal_actions(self) -> list[str]:
        """Return all words of the list."""
        return list(WORDS)

    def _new_game(self, rng: random.Random) -> None:
        self.secret = rng.choice(WORDS)
        self.guesses: list[tuple[str, str]] = []

    def _instructions(self) -> str:
        return (
            f"You are playing Wordle. Guess the secret {LENGTH}-letter word within {self.max_turns}"
            " turns. Each guess is marked letter by letter:\nG: correct letter in the correct"
            " position\nY: letter exists in the word but in another position\nX: letter is not in"
            f" the word\nGive one guess in a turn, in the format <answer>{WORDS[0]}</answer>."
        )

    def _board(self) -> str:
        lines = "".join(f"{guess}\n{marks}\n" for guess, marks in self.guesses)
        return f"Guesses so far:\n{lines or 'none'}".rstrip("\n") + "\nEnter your next guess.\n"

    def _read(self, content: str) -> str | None:
        word = content.lower()
        return word if len(word) == LENGTH and word.isascii() and word.isalpha() else None

    def _act(self, action: str) -> Move:
        marks = mark(self.secret, action)
        repeated = (action, marks) in self.guesses
        self.guesses.append((action, marks))
        if action == self.secret:
            return Move(
                f"Congratulations! You guessed the word {action} in {self._turns} turns.",
                reward=1.0,
                won=True,
            )
        return Move(
            f"At turn {self._turns}, you guessed {action}. Feedback:\n{action}\n{marks}",
            effective=not repeated,
        )


def mark(secret: str, guess: str) -> str:
    """Return G, Y or X for each letter of a guess.

    A letter is marked G or Y at most as often as the secret has it, right places first.
    """
    pairs = list(zip(secret, guess, strict=True))
    left = Counter(letter for letter, guessed in pairs if letter != guessed)
    marks = []
    for letter, guessed in pairs:
        if letter == guessed:
            marks.append("G")
        elif left[guessed] > 0:
            left[guessed] -= 1
            marks.append("Y")
        else:
            marks.append("X")
    return "".join(marks)


@functools.lru_cache(maxsize=4096)
def best_guess(candidates: tuple[str, ...]) -> str:
    """Return the first candidate whose marks leave the fewest candidates on average."""
    if not candidates:
        raise ValueError("no word of the list fits the marks; the secret is not one of WORDS")
    # With all words left, as at the opening, a sample of guesses is as good.
    guesses = candidates[::8] if len(candidates) > 200 else candidates
    return min(guesses, key=lambda guess: _expected_left(guess, candidates))


def _expected_left(guess: str, candidates: tuple[str, ...]) -> int:
    """Return the sum of squared group sizes, proportional to the words left on average."""
    group_sizes = Counter(mark(secret, guess) for secret in candidates).values()
    return sum(size * size for size in group_sizes)
