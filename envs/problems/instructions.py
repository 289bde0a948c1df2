"""Instructions about a short text, graded by the exact answer; JSON objects by their value."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from envs.gem import StepResult, read_turn
from envs.problems.base import ProblemEnv

WORDS = (
    *("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jetty"),
    *("kayak", "lemon", "maple", "north", "olive", "pearl", "quilt", "raven", "slate", "tulip"),
    *("umber", "vivid", "wheat", "xenon", "yield", "zebra"),
)
FIRST_NAMES = ("Ada", "Bela", "Chen", "Dara", "Emil", "Fay", "Goran", "Hina", "Ines", "Jonas")
CITIES = ("Lagos", "Lima", "Oslo", "Pune", "Quito", "Riga", "Seoul", "Turin")
Drawn = tuple[str, str]  # the instruction, and the answer that follows it


def repeat(rng: random.Random, size: int) -> Drawn:
    """Repeat words as they are."""
    words = " ".join(rng.sample(WORDS, size + 1))
    return f"Repeat these words and add nothing: {words}.", words


def upper_case(rng: random.Random, size: int) -> Drawn:
    """Write words in capital letters."""
    words = " ".join(rng.sample(WORDS, size))
    return f"Write in capital letters: {words}.", words.upper()


def reverse_order(rng: random.Random, size: int) -> Drawn:
    """Write words in the opposite order."""
    words = rng.sample(WORDS, size + 2)
    return f"Write these words in the opposite order: {' '.join(words)}.", " ".join(words[::-1])


def alphabetical(rng: random.Random, size: int) -> Drawn:
    """Sort words."""
    words = rng.sample(WORDS, size + 2)
    return f"Sort these words by the alphabet: {' '.join(words)}.", " ".join(sorted(words))


def without(rng: random.Random, size: int) -> Drawn:
    """Leave out a word."""
    words = rng.sample(WORDS, size + 2)
    gone = rng.choice(words)
    left = " ".join(word for word in words if word != gone)
    return f"Write these words without {gone}: {' '.join(words)}.", left


def extract(rng: random.Random, size: int) -> Drawn:
    """Answer a question with a fact of the text."""
    names = rng.sample(FIRST_NAMES, size + 1)
    cities = rng.sample(CITIES, size + 1)
    facts = " ".join(f"{name} is in {city}." for name, city in zip(names, cities, strict=True))
    place = rng.randrange(len(names))
    return f"{facts} Where is {names[place]}? One word.", cities[place]


def as_json(rng: random.Random, size: int) -> Drawn:
    """Put facts into a JSON object."""
    names = rng.sample(FIRST_NAMES, size)
    ages = {name: rng.randint(18, 90) for name in names}
    facts = ", ".join(f"{name} is {age}" for name, age in ages.items())
    return f"Write as one JSON object, name to age: {facts}.", json.dumps(ages)


FAMILIES: dict[str, Callable[[random.Random, int], Drawn]] = {
    family.__name__: family
    for family in (repeat, upper_case, reverse_order, alphabetical, without, extract, as_json)
}


class InstructionEnv(ProblemEnv):
    """An instruction whose answer is one exact text; see ProblemEnv."""

    subject = "text"
    families = tuple(FAMILIES)
    system = "Do what the text says and answer with the result alone. Call no tool."

    def step(self, action: str) -> StepResult:
        """Grade the answer; see `envs.gem.Env.step`."""
        self._take_turn()
        answer = read_turn(action).spoken
        if not answer.strip():
            return self._graded(action, "malformed", "the answer is empty")
        if _plain(answer) == _plain(self.truth) or _is_same_object(answer, self.truth):
            return self._graded(action, "success")
        return self._graded(action, "failure", f"the answer is {self.truth}")

    async def astep(self, action: str) -> StepResult:
        """Grade the answer, for callers in an event loop."""
        return self.step(action)

    def demonstrator_action(self) -> str | None:
        """Return the right answer as a turn."""
        return self.truth

    def cheats(self) -> dict[str, list[str]]:
        """Return answers that must earn nothing, by name of the trick."""
        return {
            "the instruction itself": [self.problem],
            "all words": [" ".join((*WORDS, *FIRST_NAMES, *CITIES))],
            "the answer among others": [f"{self.truth} or {self.truth} or neither"],
        }

    def _draw(self, family: str, rng: random.Random, size: int) -> str:
        text, self.truth = FAMILIES[family](rng, size)
        return text


def _plain(text: str) -> str:
    """Return a text without what does not count: spaces at its ends and a final full stop."""
    return " ".join(text.split()).removesuffix(".")


def _is_same_object(text: str, truth: str) -> bool:
    """Return whether both texts are JSON objects of one value, whatever their layout."""
    text = text.strip().removesuffix(".")
    if not (truth.startswith("{") and text.startswith("{")):
        return False
    try:
        pairs = json.loads(text, object_pairs_hook=sorted)  # pairs: a key given twice is wrong
        return json.dumps(pairs) == json.dumps(sorted(json.loads(truth).items()))
    except (ValueError, TypeError, RecursionError):
        return False
