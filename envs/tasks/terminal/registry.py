"""The table of all families: domain, difficulty and the programs that a sandbox must have.

The families of the tiny model's curriculum are listed here by name. `wide_family` adds the wide
ones, for larger models, where they are defined. The package's `FAMILIES`, which the experiments
train on, does not include wide families.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from envs.tasks.terminal import checks
from envs.tasks.terminal.task import Build, Draw, Family, TaskDraft, add_family

DOMAINS = ("files", "text", "data", "debugging", "system", "software")
# Settings of TerminalEnv for the wide families, whose files are more than a few words.
WIDE_LIMITS = {"max_turns": 16, "max_observation_chars": 2000}


@dataclasses.dataclass(frozen=True)
class FamilyInfo:
    """The domain, difficulty and required programs of a family.

    `difficulty` ranges from 1 (one look and one command) to 5 (several files, a plan, and a result
    that must be checked).
    """

    domain: str
    difficulty: int
    programs: tuple[str, ...] = ()


_TEXT_FAMILIES = (
    "line count filter replace append combine drop lookup note_count note_filter find_append"
)
_SMALL_FAMILIES = (
    ("files", 1, "find rename delete_named delete_empty move find_delete"),
    ("text", 1, _TEXT_FAMILIES),
    ("data", 1, "extreme sum largest_file"),
    ("debugging", 1, "typo path"),
    ("system", 1, "chmod config"),
    ("files", 2, "obey chain"),
)
FAMILY_TABLE: dict[str, FamilyInfo] = {
    name: FamilyInfo(domain, difficulty)
    for domain, difficulty, names in _SMALL_FAMILIES
    for name in names.split()
}


def wide_family(
    name: str, domain: str, difficulty: int, *programs: str, runs_agent_code: bool = False
) -> Callable[[Build], Build]:
    """Register a wide family under a name.

    Args:
      name: the family's name.
      domain: one of DOMAINS.
      difficulty: 1 to 5, see FamilyInfo.
      *programs: programs that the sandbox must have; a sandbox without one refuses the task by
        name.
      runs_agent_code: the verifier runs code that the agent wrote, so a verifier that dies counts
        as the agent's failure.
    """
    if domain not in DOMAINS or not 1 <= difficulty <= 5:
        raise ValueError(
            f"family {name!r} has domain {domain!r} and difficulty {difficulty}; domains are"
            f" {', '.join(DOMAINS)}, difficulties 1 to 5"
        )

    def register(build: Build) -> Build:
        def with_prelude(draw: Draw) -> TaskDraft:
            draft = build(draw)
            return dataclasses.replace(draft, checks=[checks.PRELUDE, *draft.checks])

        add_family(name, Family(with_prelude, "wide", programs, runs_agent_code))
        FAMILY_TABLE[name] = FamilyInfo(domain, difficulty, programs)
        return build

    return register


def write_file(path: str, text: str) -> str:
    """Return the command by which a demonstrator writes a file."""
    content = text.rstrip("\n")
    return f"cat > {path} <<'END'\n{content}\nEND"
