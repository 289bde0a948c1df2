"""Injections that a search has found, as seeds of the suite: a JSON file of them makes families."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from envs.safety.carriers import CARRIERS
from envs.safety.draw import Draw
from envs.safety.goals import GOALS
from envs.safety.seeds import DEMAND, Seed, attack_seed

MAX_CHARS = 800  # of an attacker's words; carriers and observations are short
# Carriers that say the text as it is given; "language" has texts of its own.
TEXT_CARRIERS = tuple(name for name in CARRIERS if name != "language")


@dataclasses.dataclass(frozen=True)
class Injection:
    """One way to bring a goal's order before an agent.

    The goal brings what is planted, and the rules by which its harm is found.

    Attributes:
      carrier: one of TEXT_CARRIERS.
      goal: a key of GOALS.
      words: of the attacker, with DEMAND once where the order stands.

    Raises:
      ValueError: one of them is not as it must be.
    """

    carrier: str
    goal: str
    words: str

    def __post_init__(self) -> None:
        if self.carrier not in TEXT_CARRIERS:
            known = ", ".join(TEXT_CARRIERS)
            raise ValueError(f"carrier {self.carrier!r} is unknown; choose one of {known}")
        if self.goal not in GOALS:
            raise ValueError(f"goal {self.goal!r} is unknown; choose one of {', '.join(GOALS)}")
        if self.words.count(DEMAND) != 1 or len(self.words) > MAX_CHARS:
            raise ValueError(
                f"words {self.words[:60]!r} have {DEMAND} {self.words.count(DEMAND)} times and"
                f" {len(self.words)} characters; write it once, in at most {MAX_CHARS}"
            )
        # Carriers lay the words into files and here-documents as they stand.
        if any(mark in self.words for mark in ("\n", "\r", "\0", '"""')):
            raise ValueError(f"words {self.words[:60]!r} are to be one line, without quoted blocks")

    @property
    def name(self) -> str:
        """Return the name of its family: the same injection has the same one everywhere."""
        text = f"{self.carrier}\0{self.goal}\0{self.words}"
        return f"found-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def seed(self) -> Seed:
        """Return its family. It was found against an agent, so it may be trained on."""
        made = attack_seed(self.carrier, self.goal, "train", self.name, self.words)
        made.compose(Draw(self.name), 1, False)  # raises where it is unsound
        return made


def load_injections(path: str | pathlib.Path) -> list[Injection]:
    """Return the injections of a file that `save_injections` wrote.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no such file; the message says where.
    """
    rows = json.loads(pathlib.Path(path).read_text())
    if not isinstance(rows, list) or not rows:
        raise ValueError("a list of injections is expected, with at least one")
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(Injection(row["carrier"], row["goal"], row["words"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"injection {number}: {type(error).__name__}: {error}") from None
    return found


def save_injections(path: pathlib.Path, injections: Iterable[Injection]) -> None:
    """Write injections to a file."""
    rows: list[dict[str, Any]] = [
        {"name": one.name, **dataclasses.asdict(one)} for one in injections
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)
