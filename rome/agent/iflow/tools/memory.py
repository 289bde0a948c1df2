"""Keeps facts for later sessions, in the files of instructions that every session reads."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes
from rome.agent.iflow.tools.text import MAX_FILE_BYTES, Text, decode_text, note_file, unified_diff
from rome.files import write_atomically

HEADING = "## Memories"
MAX_CHARACTERS = 2000  # of one fact
PROJECT_FILES = ("AGENTS.md", "IFLOW.md", "CLAUDE.md")


class SaveMemoryTool(Tool):
    """Adds a fact to the user's instructions, on this machine, or to the project's."""

    name = "save_memory"
    description = (
        "Remember a fact in later sessions: of the user everywhere (scope user), or of this project"
        " for all who work on it (scope project). Only what the user asks for, or will surely want."
    )
    parameters = takes(
        "fact",
        fact=of("string", "One sentence that stands alone."),
        scope=of("string", enum=["user", "project"]),
    )
    accesses = "write"
    shown = ("scope", "fact")

    def __init__(self, user_file: pathlib.Path | None = None) -> None:
        self._user_file = user_file or pathlib.Path.home() / ".iflow" / "IFLOW.md"

    def paths(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the files that a call may change; of a project's, the first that is there."""
        is_user = arguments.get("scope", "user") == "user"
        return (str(self._user_file),) if is_user else PROJECT_FILES

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        fact = " ".join(arguments["fact"].split())
        if not fact or len(fact) > MAX_CHARACTERS:
            raise ToolError(f"a fact has 1 to {MAX_CHARACTERS} characters, not {len(fact)}")
        if arguments.get("scope", "user") == "user":
            self._add_for_user(fact)
            return ToolResult(f"remembered in {self._user_file}")
        return await self._add_to_project(fact, context)

    def _add_for_user(self, fact: str) -> None:
        path = self._user_file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
            after = add_fact(decode_text(before, str(path)), fact)
            write_atomically(path.resolve(), after.encode())
        except OSError as error:
            raise ToolError(f"{path} cannot be written: {error.strerror}") from error

    async def _add_to_project(self, fact: str, context: ToolContext) -> ToolResult:
        workspace = context.workspace
        path = PROJECT_FILES[0]
        before = Text("")
        for name in PROJECT_FILES:
            if await workspace.stat(name) is not None:
                path = name
                before = decode_text(await workspace.read(name, MAX_FILE_BYTES), name)
                break
        after = add_fact(before, fact)
        await workspace.write(path, after.encode())
        note_file(context, path, await workspace.stat(path))
        diff = unified_diff(path, before.text, after.text)
        return ToolResult(f"remembered in {path}", changed=(path,), diff=diff)


def add_fact(content: Text, fact: str) -> Text:
    """Return a file of instructions with one more fact, the first under the heading of memories."""
    entry = f"- {fact}"
    if entry in content.text.split("\n"):
        return content
    text = content.text.rstrip("\n") + "\n"
    before, heading, facts = text.partition(f"{HEADING}\n")
    if not heading:
        before = f"{before.rstrip()}\n\n".lstrip()
    facts = facts.lstrip("\n")
    gap = "\n" if facts.startswith("#") else ""
    return content.with_text(f"{before}{HEADING}\n\n{entry}\n{gap}{facts}")
