"""Skills: folders with a SKILL.md, whose name and description the model always sees.

The instructions below them are read only when the model asks for the skill, and files beside it
only when the instructions say so.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from rome.agent.iflow.specs.spec_files import Place, SpecError, load_named, read_document, text_in

MAX_DESCRIPTION = 1024  # characters, as agentskills.io has it


@dataclasses.dataclass(frozen=True)
class Skill:
    """A skill."""

    name: str  # by which the model asks for it
    description: str  # what it does and when it is of use
    folder: pathlib.Path  # with SKILL.md and the files that it names
    # Directory that its files may not lead out of; None for anywhere.
    boundary: pathlib.Path | None = None

    def read(self) -> str:
        """Return its instructions, and where the files lie that they name; SpecError for none."""
        _, body = read_document(self.folder / "SKILL.md", self.boundary)
        return f"# Skill {self.name}\nPaths below are relative to {self.folder}.\n\n{body}"


def load_skills(where: Iterable[Place]) -> tuple[dict[str, Skill], list[str]]:
    """Return the skills by name, and what was wrong with files; see `load_named`."""
    return load_named(where, "skills/*/SKILL.md", _read_skill)


def _read_skill(path: pathlib.Path, place: Place, table: dict[str, Any], body: str) -> Skill:
    name = text_in(table, "name") or path.parent.name
    description = " ".join(text_in(table, "description").split())
    if not re.fullmatch(r"[\w.-]{1,64}", name):
        raise SpecError(f"{path}: name {name[:80]!r} must be 1 to 64 letters, digits, '-' or '_'")
    if not description:
        raise SpecError(f"{path} has no description, by which the model would choose it")
    return Skill(name, description[:MAX_DESCRIPTION], path.parent, place.boundary)


def describe_skills(skills: Iterable[Skill]) -> str:
    """Return the lines of the system text that list skills; "" for none."""
    lines = [f"- {skill.name}: {skill.description}" for skill in skills]
    head = "Skills: before work that one of them is for, load it with the tool `skill`."
    return "\n".join([head, *lines]) if lines else ""
