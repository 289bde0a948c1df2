"""Tasks of the terminal curriculum, and the small language in which their families are written.

A family is a function `Draw -> TaskDraft`, registered by `@family(name)`. A draft holds the
instruction, the files, the checks of the final state and the demonstrator. `make_task(family,
seed)` turns it into a Task: the same name and seed give the same task on every machine.

The checks become one bash script that only reads. It runs once every process of the agent is dead,
and prints 1 or 0 as its last line. Anything unusual in place of an answer (a link, a pipe, a
folder, a gigabyte) makes a check fail; it cannot make the check wait.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
from collections.abc import Callable, Generator, Mapping

_COLOUR_WORDS = "red blue green gold pink gray black white brown"
_ANIMAL_WORDS = """
dog fox owl bear wolf frog duck goat lion crow deer hen bee pig horse sheep mouse tiger
"""
_THING_WORDS = """
apple lamp door book tree rock river cloud moon ship cup hat bell key leaf rain snow fire sand wind
hill lake milk salt rice corn plum ring rope road table chair
"""
COLOURS = _COLOUR_WORDS.split()
ANIMALS = _ANIMAL_WORDS.split()
THINGS = _THING_WORDS.split()
WORDS = COLOURS + ANIMALS + THINGS
# Names of files that a task reads from; all other files are named by words.
INPUTS = ("data.txt", "list.txt", "log.txt", "items.txt")

EVAL_SEED_START = 1_000_000  # seeds below are for training, seeds from here on for evaluation

# A running demonstrator: yields a command, receives its observation, returns when it is done.
Demonstration = Generator[str, str, None]


@dataclasses.dataclass(frozen=True)
class TaskDraft:
    """The result of a family's draw, before it becomes a Task.

    `files` maps a path to its text, or to (text, permissions).
    """

    instruction: str
    files: Mapping[str, str | tuple[str, int]]
    checks: list[str]
    demonstrator: Callable[[], Demonstration]
    # A bash script that runs once the files are there, for example to make a git repository.
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """One terminal task with everything that playing and grading it takes.

    `files` and `setup` enter the sandbox when an episode starts. `verifier` and `demonstrator` stay
    outside while the agent's processes live.
    """

    name: str
    family: str
    seed: int
    instruction: str
    files: dict[str, tuple[bytes, int]]
    verifier: str
    demonstrator: Callable[[], Demonstration] = dataclasses.field(compare=False, repr=False)
    setup: str = ""
    programs: tuple[str, ...] = ()  # needed in the sandbox beyond bash and coreutils
    # The verifier runs programs that the agent wrote, so its death counts as the agent's failure.
    runs_agent_code: bool = False


class Draw:
    """The random choices of one task.

    Words are drawn without replacement, so no two names in a task coincide.
    """

    def __init__(self, family: str, seed: int) -> None:
        # A seed of text goes through SHA-512, so it gives the same draws in every process.
        self.rng = random.Random(f"{family}/{seed}")
        self._words = self.rng.sample(WORDS, len(WORDS))
        self._inputs = self.rng.sample(INPUTS, len(INPUTS))

    def word(self) -> str:
        """Draw a word that this task has not used yet."""
        return self._words.pop()

    def words(self, count: int) -> list[str]:
        """Draw `count` different words."""
        return [self._words.pop() for _ in range(count)]

    def names(self, count: int, extension: str = ".txt") -> list[str]:
        """Draw names of files: different words with this extension."""
        return [word + extension for word in self.words(count)]

    def input(self) -> str:
        """Draw the name of a file to read from; the instruction mentions it."""
        return self._inputs.pop()

    def number(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def choose(self, *options: str) -> str:
        """Draw one of the options."""
        return self.rng.choice(options)

    def shuffled(self, items: list[str]) -> list[str]:
        """Return the items in a random order."""
        return self.rng.sample(items, len(items))


# -- Checks of the final state
# -------------------------------------------------------------------------------------------------

VERIFIER_PATH = "/usr/bin:/bin"  # nothing that the agent could write to
_PRELUDE = (
    f"export PATH={VERIFIER_PATH} LC_ALL=C\n"
    + """\
fail() { echo 0; exit 0; }
file() { [ -f "$1" ] && [ ! -L "$1" ] || fail; }
holds() { file "$1"; [ "$(head -c 4096 -- "$1" | tr -d '\\000')" = "$2" ] || fail; }
gone() { [ ! -e "$1" ] && [ ! -L "$1" ] || fail; }
folder() { [ -d "$1" ] && [ ! -L "$1" ] || fail; }
mode() { file "$1"; [[ "$(stat -c %A -- "$1")" == $2 ]] || fail; }
"""
)


def holds(path: str, text: str) -> str:
    """Return a check that a regular file has exactly this text, trailing newlines aside."""
    expected = text.rstrip("\n")
    return f"holds {shlex.quote(path)} {shlex.quote(expected)}"


def gone(path: str) -> str:
    """Return a check that nothing is at the path."""
    return f"gone {shlex.quote(path)}"


def folder(path: str) -> str:
    """Return a check that the path is a folder, and no link."""
    return f"folder {shlex.quote(path)}"


def mode(path: str, pattern: str) -> str:
    """Return a check that a regular file's mode, as `ls -l` writes it, matches the bash pattern.

    For example, "-??x*" matches a file that its owner may execute.
    """
    return f"mode {shlex.quote(path)} {shlex.quote(pattern)}"


def unchanged(files: Mapping[str, str], *changed: str) -> list[str]:
    """Return checks that all files but the changed ones still have their text."""
    return [holds(path, text) for path, text in files.items() if path not in changed]


def lines(*rows: str) -> str:
    """Join rows into a text in which each of them ends with a newline."""
    return "".join(f"{row}\n" for row in rows)


# -- Registration and lookup of families
# -------------------------------------------------------------------------------------------------


Build = Callable[[Draw], TaskDraft]


@dataclasses.dataclass(frozen=True)
class Family:
    """A registered generator of tasks.

    `kind` is "training" or "held_out" for the tiny model's curriculum and "wide" for the families
    beyond it.
    """

    build: Build
    kind: str
    programs: tuple[str, ...] = ()
    runs_agent_code: bool = False


_families: dict[str, Family] = {}


def add_family(name: str, entry: Family) -> None:
    """Add a family to the registry. Raises ValueError if the name is taken."""
    if name in _families:
        raise ValueError(f"family {name!r} is defined twice; choose another name")
    _families[name] = entry


def family(name: str, held_out: bool = False) -> Callable[[Build], Build]:
    """Register a family of the tiny model's curriculum under a name.

    Training never uses a held-out family; it composes skills of the others in a new way.
    """

    kind = "held_out" if held_out else "training"

    def register(build: Build) -> Build:
        add_family(name, Family(build, kind))
        return build

    return register


def training_families() -> tuple[str, ...]:
    """Return the names of the families for training, in the order of their registration."""
    return _of_kind("training")


def held_out_families() -> tuple[str, ...]:
    """Return the names of the held-out families, in the order of their registration."""
    return _of_kind("held_out")


def wide_families() -> tuple[str, ...]:
    """Return the names of the wide families, in the order of their registration."""
    return _of_kind("wide")


def _of_kind(kind: str) -> tuple[str, ...]:
    return tuple(name for name, entry in _families.items() if entry.kind == kind)


def train_seed(index: int) -> int:
    """Return the index-th seed for training (0 to 999,999)."""
    if not 0 <= index < EVAL_SEED_START:
        raise ValueError(
            f"training seed {index} is outside 0..{EVAL_SEED_START - 1}; larger ones are kept for"
            " evaluation"
        )
    return index


def eval_seed(index: int) -> int:
    """Return the index-th seed for evaluation; no training seed equals it."""
    if index < 0:
        raise ValueError(f"evaluation index {index} is negative; count from 0")
    return EVAL_SEED_START + index


def make_task(family: str, seed: int) -> Task:
    """Return the task of a family and a seed; the same arguments always give the same task.

    Raises:
      ValueError: the family is unknown.
    """
    if family not in _families:
        raise ValueError(f"task family {family!r} is unknown; known: {', '.join(_families)}")
    entry = _families[family]
    draft = entry.build(Draw(family, seed))
    files = {}
    for path, content in draft.files.items():
        text, permissions = content if isinstance(content, tuple) else (content, 0o644)
        files[path] = (text.encode(), permissions)
    return Task(
        name=f"{family}/{seed}",
        family=family,
        seed=seed,
        instruction=draft.instruction,
        files=files,
        verifier=_PRELUDE + lines(*draft.checks, "echo 1"),
        demonstrator=draft.demonstrator,
        setup=draft.setup,
        programs=entry.programs,
        runs_agent_code=entry.runs_agent_code,
    )
