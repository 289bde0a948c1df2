"""What a task of the terminal curriculum is, and the small language in which its families are
written.

A family is a function `Draw -> TaskDraft`, registered by `@family(name)`. A plan has the instruction,
the files, the checks of the final state and the demonstrator. `make_task(family, seed)` turns it into a
Task: the same name and seed give the same task on every machine.

The checks become one bash script that only reads: it runs when every process of the agent is dead,
and prints 1 or 0 as its last line. Whatever lies where an answer should be (a link, a pipe, a
folder, a gigabyte) makes a check fail; it cannot make it wait.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
from collections.abc import Callable, Generator, Mapping

COLOURS = ["red", "blue", "green", "gold", "pink", "gray", "black", "white", "brown"]
ANIMALS = [
    "dog",
    "fox",
    "owl",
    "bear",
    "wolf",
    "frog",
    "duck",
    "goat",
    "lion",
    "crow",
    "deer",
    "hen",
    "bee",
    "pig",
    "horse",
    "sheep",
    "mouse",
    "tiger",
]
THINGS = [
    "apple",
    "lamp",
    "door",
    "book",
    "tree",
    "rock",
    "river",
    "cloud",
    "moon",
    "ship",
    "cup",
    "hat",
    "bell",
    "key",
    "leaf",
    "rain",
    "snow",
    "fire",
    "sand",
    "wind",
    "hill",
    "lake",
    "milk",
    "salt",
    "rice",
    "corn",
    "plum",
    "ring",
    "rope",
    "road",
    "table",
    "chair",
]
WORDS = COLOURS + ANIMALS + THINGS
INPUTS = (
    "data.txt",
    "list.txt",
    "log.txt",
    "items.txt",
)  # files that a task reads; the others are named by words

EVAL_SEED_START = 1_000_000  # seeds below are for training, seeds from here on for evaluation

# Sends a command, receives the observation. It ends when the work is done.
Demonstration = Generator[str, str, None]


@dataclasses.dataclass(frozen=True)
class TaskDraft:
    """What a family draws. A file is its text, or (text, mode)."""

    instruction: str
    files: Mapping[str, str | tuple[str, int]]
    checks: list[str]
    demonstrator: Callable[[], Demonstration]
    # a bash script that prepares the sandbox once the files are there (a git repository, an
    # archive)
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """One exercise.

    `files` and `setup` enter the sandbox; `verifier` and `demonstrator` never do while the agent lives.
    """

    name: str
    family: str
    seed: int
    instruction: str
    files: dict[str, tuple[bytes, int]]
    verifier: str
    demonstrator: Callable[[], Demonstration] = dataclasses.field(compare=False, repr=False)
    setup: str = ""
    programs: tuple[str, ...] = ()  # what the sandbox must have beyond bash and coreutils
    # a verifier that is killed while it runs what the agent wrote was killed by that
    runs_agent_code: bool = False


class Draw:
    """Random choices of one task.

    Words are drawn without replacement: two names in one task never coincide.
    """

    def __init__(self, family: str, seed: int) -> None:
        self.rng = random.Random(
            f"{family}/{seed}"
        )  # a text seed goes through SHA-512, so it is the same in every process
        self._words = self.rng.sample(WORDS, len(WORDS))
        self._inputs = self.rng.sample(INPUTS, len(INPUTS))

    def word(self) -> str:
        return self._words.pop()

    def words(self, count: int) -> list[str]:
        return [self._words.pop() for _ in range(count)]

    def names(self, count: int, extension: str = ".txt") -> list[str]:
        return [word + extension for word in self.words(count)]

    def input(self) -> str:
        """A file to read from, named in the instruction."""
        return self._inputs.pop()

    def number(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def choose(self, *options: str) -> str:
        return self.rng.choice(options)

    def shuffled(self, items: list[str]) -> list[str]:
        return self.rng.sample(items, len(items))


# -- checks of the final state
# -------------------------------------------------------------------------------------------------

_PRELUDE = """\
export PATH=/usr/bin:/bin LC_ALL=C
fail() { echo 0; exit 0; }
file() { [ -f "$1" ] && [ ! -L "$1" ] || fail; }
holds() { file "$1"; [ "$(head -c 4096 -- "$1" | tr -d '\\000')" = "$2" ] || fail; }
gone() { [ ! -e "$1" ] && [ ! -L "$1" ] || fail; }
folder() { [ -d "$1" ] && [ ! -L "$1" ] || fail; }
mode() { file "$1"; [[ "$(stat -c %A -- "$1")" == $2 ]] || fail; }
"""


def holds(path: str, text: str) -> str:
    """A regular file with exactly this text; newlines at its end do not count."""
    return f"holds {shlex.quote(path)} {shlex.quote(text.rstrip(chr(10)))}"


def gone(path: str) -> str:
    return f"gone {shlex.quote(path)}"


def folder(path: str) -> str:
    return f"folder {shlex.quote(path)}"


def mode(path: str, pattern: str) -> str:
    """A regular file whose mode, as `ls -l` writes it, matches the pattern: "-??x*" is executable
    by its owner.
    """
    return f"mode {shlex.quote(path)} {shlex.quote(pattern)}"


def unchanged(files: Mapping[str, str], *changed: str) -> list[str]:
    """Every file but the changed ones is as it was."""
    return [holds(path, text) for path, text in files.items() if path not in changed]


def lines(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


# -- the families
# -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """A registered generator.

    `kind` is "training" or "held_out" for the tiny model's curriculum, "wide" for the families
    beyond it.
    """

    build: Callable[[Draw], TaskDraft]
    kind: str
    programs: tuple[str, ...] = ()
    runs_agent_code: bool = False


_families: dict[str, Family] = {}


def add_family(name: str, entry: Family) -> None:
    if name in _families:
        raise ValueError(f"family {name!r} is defined twice; choose another name")
    _families[name] = entry


def family(
    name: str, held_out: bool = False
) -> Callable[[Callable[[Draw], TaskDraft]], Callable[[Draw], TaskDraft]]:
    """Registers a family.

    A held-out one is never trained on: it asks for a new composition of what the others teach.
    """

    def add(build: Callable[[Draw], TaskDraft]) -> Callable[[Draw], TaskDraft]:
        add_family(name, Family(build, "held_out" if held_out else "training"))
        return build

    return add


def training_families() -> tuple[str, ...]:
    return _of_kind("training")


def held_out_families() -> tuple[str, ...]:
    return _of_kind("held_out")


def wide_families() -> tuple[str, ...]:
    return _of_kind("wide")


def _of_kind(kind: str) -> tuple[str, ...]:
    return tuple(name for name, entry in _families.items() if entry.kind == kind)


def train_seed(index: int) -> int:
    """The index-th seed for training, 0 .. 999,999."""
    if not 0 <= index < EVAL_SEED_START:
        raise ValueError(
            f"training seed {index} is outside 0..{EVAL_SEED_START - 1}; larger ones are kept for"
            " evaluation"
        )
    return index


def eval_seed(index: int) -> int:
    """The index-th seed for evaluation; no training seed equals it."""
    if index < 0:
        raise ValueError(f"evaluation index {index} is negative; count from 0")
    return EVAL_SEED_START + index


def make_task(family: str, seed: int) -> Task:
    """The task of this family and seed, always the same one."""
    if family not in _families:
        raise ValueError(f"task family {family!r} is unknown; known: {', '.join(_families)}")
    entry = _families[family]
    plan = entry.build(Draw(family, seed))
    files = {
        path: content if isinstance(content, tuple) else (content, 0o644)
        for path, content in plan.files.items()
    }
    return Task(
        name=f"{family}/{seed}",
        family=family,
        seed=seed,
        instruction=plan.instruction,
        files={path: (text.encode(), permissions) for path, (text, permissions) in files.items()},
        verifier=_PRELUDE + lines(*plan.checks, "echo 1"),
        demonstrator=plan.demonstrator,
        setup=plan.setup,
        programs=entry.programs,
        runs_agent_code=entry.runs_agent_code,
    )
