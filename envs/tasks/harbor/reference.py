"""Whose fault a doubtful grade is: the agent's, or that of tests which nobody passes here.

Tests that give no verdict, or that report a missing program, module or network, may be the agent's
doing: it shares its world with them and can delete, kill and print. So the agent's sandbox is not
asked. The reference solution is played in an environment of its own, which no agent has touched.
Where it earns its reward, everything that the tests need is there, and the agent's failure stands.
Where it meets the same lack, or no verdict either, the grade says nothing about the agent.

A task without a reference solution is graded untouched instead. That shows less, since a solution
may have to bring what is missing: only a lack counts of which the instruction says nothing.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import re
import time
import weakref
from collections.abc import Awaitable, Callable

from envs.tasks.harbor.grade import Grade
from envs.tasks.harbor.task import HarborTask, Step

MAX_KEPT = 64  # tasks whose reference is remembered
# A reference that failed, perhaps on a loaded machine, or whose verifier depends on something
# outside, is played again after this time.
RECENT_SECONDS = 600.0
NETWORK = "the network"
_PATTERNS = (
    r"(?<![\w.+-])(?P<name>[\w.+-]{1,60}): (?:command )?not found$",  # of a shell
    r"env: .(?P<name>[\w.+-]+).: No such file or directory",
    r"No module named '?(?P<name>[A-Za-z_]\w*)",
    r"FileNotFoundError: \[Errno 2\] No such file or directory: '(?P<name>[\w+-]+)'",
    r"exec: \"(?P<name>[\w.+-]+)\": executable file not found",
    r"Cannot find module '(?P<name>[\w@][\w@/.-]*)'",
)
_MISSING = tuple(re.compile(pattern, re.MULTILINE) for pattern in _PATTERNS)
_NO_NETWORK = re.compile(
    r"[Cc]ould not resolve host|[Tt]emporary failure (?:in name resolution|resolving)"
    r"|[Nn]etwork is unreachable|Failed to establish a new connection|dns error"
    r"|^E: (?:Unable to fetch|Failed to fetch|Unable to locate package)",
    re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a pristine environment was graded.

    Attributes:
      grades: one for each step that was reached.
      is_solution: whether the reference solution was played, and not nothing.
      played_at: monotonic time.
    """

    grades: tuple[Grade, ...]
    is_solution: bool
    played_at: float

    @property
    def is_solved(self) -> bool:
        """Whether the solution earned its full reward in every step."""
        return self.is_solution and all(graded.reward == 1.0 for graded in self.grades)


@dataclasses.dataclass
class _Entry:
    task: HarborTask  # keeps the task alive while its id is a key
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    reference: Reference | None = None


_entries: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, collections.OrderedDict[tuple[int, str], _Entry]
] = weakref.WeakKeyDictionary()


def lacks_in(output: str) -> set[str]:
    """Return the programs and modules that an output reports as missing, and perhaps NETWORK."""
    found = {match["name"] for pattern in _MISSING for match in pattern.finditer(output)}
    if _NO_NETWORK.search(output):
        found.add(NETWORK)
    return found


def is_doubtful(graded: Grade) -> bool:
    """Return whether a grade may be the fault of the tests or of what they run in."""
    return graded.reward < 1.0 and bool(graded.note or lacks_in(graded.output))


async def find_reference(
    task: HarborTask,
    settings: str,
    may_change: bool,
    play: Callable[[], Awaitable[tuple[list[Grade], bool]]],
) -> Reference:
    """Return the grades of a task's pristine environment; it is played once for all episodes.

    Args:
      task: the task.
      settings: everything else that the grades depend on, as text.
      may_change: whether the verifier depends on something outside, so that an old result does not
        count.
      play: plays the reference in an environment of its own, and returns its grades and whether it
        was a solution.

    Raises:
      Exception: whatever `play` raises.
    """
    entries = _entries.setdefault(asyncio.get_running_loop(), collections.OrderedDict())
    entry = entries.setdefault((id(task), settings), _Entry(task))
    entries.move_to_end((id(task), settings))
    if len(entries) > MAX_KEPT:
        entries.popitem(last=False)
    async with entry.lock:
        known = entry.reference
        is_old = known is not None and time.monotonic() - known.played_at > RECENT_SECONDS
        if known is None or (is_old and (may_change or not known.is_solved)):
            grades, is_solution = await play()
            known = Reference(tuple(grades), is_solution, time.monotonic())
            entry.reference = known
    return known


def fault_of(graded: Grade, reference: Reference, step: Step, index: int) -> str:
    """Return why a doubtful grade is not the agent's; "" where it is.

    Args:
      graded: the agent's.
      reference: of the pristine environment.
      step: which was graded.
      index: its number, from 0.
    """
    if index >= len(reference.grades):
        return ""  # it failed in an earlier step, which the agent has passed
    theirs = reference.grades[index]
    if theirs.reward == 1.0:
        return ""
    shared = lacks_in(graded.output) & lacks_in(theirs.output)
    if not reference.is_solution:
        shared = {name for name in shared if not _is_told(name, step.instruction)}
    if shared:
        player = "the reference solution" if reference.is_solution else "an untouched environment"
        names = ", ".join(sorted(shared))
        return f"the tests of {step.name} need {names}, which {player} does not find here either"
    if reference.is_solution and graded.note and theirs.note:
        return f"the tests give the reference solution no verdict here either: {theirs.note}"
    return ""


def _is_told(name: str, instruction: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", instruction) is not None
