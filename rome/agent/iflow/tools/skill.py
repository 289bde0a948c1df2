"""Loads the instructions of a skill when the model asks for them."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.events import SkillLoaded
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.specs.skills import Skill
from rome.agent.iflow.specs.spec_files import SpecError
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes

MAX_FILES = 100
MAX_BYTES = 2 << 20  # of a skill's files together


class SkillTool(Tool):
    """Loads a skill of those that are given by name."""

    name = "skill"
    description = "Load the instructions of a skill before work that it is for."
    parameters = takes("name", name=of("string"))
    shown = ("name",)

    def __init__(self, skills: Mapping[str, Skill]) -> None:
        self._skills = skills

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        name = arguments["name"]
        skill = self._skills.get(name)
        if skill is None:
            known = ", ".join(sorted(self._skills)) or "none"
            raise ToolError(f"there is no skill {name!r}; there are {known}")
        try:
            text = skill.read()
        except SpecError as error:
            raise ToolError(str(error)) from error
        if context.workspace.is_isolated:
            target = f"{context.workspace.outputs}/skills/{name}"
            await _copy(skill.folder, target, context.workspace)
            text = text.replace(str(skill.folder), target)
        context.emit(SkillLoaded(name=name))
        return ToolResult(text)


async def _copy(folder: pathlib.Path, target: str, workspace: Workspace) -> None:
    """Copy a skill's files; links, which may lead anywhere, are left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in paths)
    if len(paths) > MAX_FILES or size > MAX_BYTES:
        raise ToolError(
            f"the skill's folder has {len(paths)} files of {size} bytes; at most {MAX_FILES} files"
            f" of {MAX_BYTES} bytes are copied to a sandbox"
        )
    for path in paths:
        await workspace.write(f"{target}/{path.relative_to(folder)}", path.read_bytes())
