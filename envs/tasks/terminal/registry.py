"""The table of all families: domain, difficulty and the programs that a sandbox must have.

The families of the tiny model's curriculum stand here by name. The wide ones, which larger models
are trained and measured on, are entered by `wide_family` where they are defined; `FAMILIES` of the
package, which the experiments train on, does not grow by them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from envs.tasks.terminal import checks
from envs.tasks.terminal.task import Draw, Family, TaskDraft, add_family

DOMAINS = ("files", "text", "data", "debugging", "system", "software")
WIDE_LIMITS = {
    "max_turns": 16,
    "max_observation_chars": 2000,
}  # of TerminalEnv, for families whose files are more than a few words


@dataclasses.dataclass(frozen=True)
class FamilyInfo:
    """difficulty: 1 (one look, one command) to 5 (several files, a plan, and a result that must be
    checked).
    """

    domain: str
    difficulty: int
    programs: tuple[str, ...] = ()


FAMILY_TABLE: dict[str, FamilyInfo] = {
    name: FamilyInfo(domain, difficulty)
    for domain, difficulty, names in (
        ("files", 1, "find rename delete_named delete_empty move find_delete"),
        (
            "text",
            1,
            (
                "line count filter replace append combine drop lookup note_count note_filter"
                " find_append"
            ),
        ),
        ("data", 1, "extreme sum largest_file"),
        ("debugging", 1, "typo path"),
        ("system", 1, "chmod config"),
        ("files", 2, "obey chain"),
    )
    for name in names.split()
}


def wide_family(
    name: str, domain: str, difficulty: int, *programs: str, runs_agent_code: bool = False
) -> Callable[[Callable[[Draw], TaskDraft]], Callable[[Draw], TaskDraft]]:
    """Registers a wide family. `programs` are refused by name where the sandbox lacks them.

    runs_agent_code: its verifier runs what the agent wrote, so a verifier that dies counts as the
    agent's failure.
    """
    if domain not in DOMAINS or not 1 <= difficulty <= 5:
        raise ValueError(
            f"family {name!r} has domain {domain!r} and difficulty {difficulty}; domains are"
            f" {', '.join(DOMAINS)}, difficulties 1 to 5"
        )

    def add(build: Callable[[Draw], TaskDraft]) -> Callable[[Draw], TaskDraft]:
        def with_prelude(draw: Draw) -> TaskDraft:
            plan = build(draw)
            return dataclasses.replace(plan, checks=[checks.PRELUDE, *plan.checks])

        add_family(name, Family(with_prelude, "wide", programs, runs_agent_code))
        FAMILY_TABLE[name] = FamilyInfo(domain, difficulty, programs)
        return build

    return add


def write_file(path: str, text: str) -> str:
    """The command by which an demonstrator writes a file."""
    return f"cat > {path} <<'END'\n{text.rstrip(chr(10))}\nEND"
