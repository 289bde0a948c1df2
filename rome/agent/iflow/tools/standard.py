"""The tools that an agent has unless it is told otherwise."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from rome.agent.iflow.specs.skills import Skill
from rome.agent.iflow.tools.ask import AskUserTool, ExitPlanModeTool
from rome.agent.iflow.tools.base import Tool
from rome.agent.iflow.tools.edit import EditTool, MultiEditTool, WriteFileTool
from rome.agent.iflow.tools.files import ListDirectoryTool, ReadFileTool
from rome.agent.iflow.tools.memory import SaveMemoryTool
from rome.agent.iflow.tools.search import GlobTool, SearchTool
from rome.agent.iflow.tools.shell import (
    DEFAULT_SECONDS,
    ShellKillTool,
    ShellListTool,
    ShellOutputTool,
    ShellTool,
)
from rome.agent.iflow.tools.skill import SkillTool
from rome.agent.iflow.tools.todo import TodoTool
from rome.agent.iflow.tools.web import WebFetchTool


def standard_tools(
    *,
    skills: Mapping[str, Skill] | None = None,
    shell_seconds: float = 0.0,
    user_memory: pathlib.Path | None = None,
    has_web: bool = False,
) -> list[Tool]:
    """Return new tools for one agent; a sub-agent gets its own.

    `shell_seconds` of 0 leaves the limit of a command to the tool; `user_memory` is the file of
    facts, ~/.iflow/IFLOW.md where None; `has_web` lets it fetch pages, from this machine.
    """
    tools: list[Tool] = [
        ShellTool(shell_seconds or DEFAULT_SECONDS),
        ShellOutputTool(),
        ShellKillTool(),
        ShellListTool(),
        ReadFileTool(),
        WriteFileTool(),
        EditTool(),
        MultiEditTool(),
        GlobTool(),
        SearchTool(),
        ListDirectoryTool(),
        TodoTool(),
        ExitPlanModeTool(),
        AskUserTool(),
        SaveMemoryTool(user_memory),
    ]
    if skills:
        tools.append(SkillTool(skills))
    if has_web:
        tools.append(WebFetchTool())
    return tools
