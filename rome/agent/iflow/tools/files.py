"""Reads files, and lists folders."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes
from rome.agent.iflow.tools.edit import PATH
from rome.agent.iflow.tools.text import MAX_FILE_BYTES, decode_text, key_of, note_file
from rome.agent.iflow.tools.walking import look

DEFAULT_LINES = 2000
MAX_LINE = 2000  # characters that are shown
MAX_CHARACTERS = 60_000  # of one answer
MAX_ENTRIES = 500
SECONDS = 30.0


class ReadFileTool(Tool):
    """Shows lines of a text file."""

    name = "read_file"
    description = (
        f"Read a text file. Lines are numbered; at most {DEFAULT_LINES} are shown, from `offset`"
        " on."
    )
    parameters = takes(
        "path",
        path=PATH,
        offset=of("integer", "First line; default 1.", minimum=1),
        limit=of("integer", f"Number of lines; default {DEFAULT_LINES}.", minimum=1),
    )
    is_parallel = True
    accesses = "read"

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        path = arguments["path"]
        offset = arguments.get("offset", 1)
        limit = arguments.get("limit", DEFAULT_LINES)
        status = await context.workspace.stat(path)
        if status is None:
            raise ToolError(await _describe_missing(context, path))
        if status[0] > MAX_FILE_BYTES:
            output = await self._read_part(context, path, status[0], offset, limit)
        else:
            data = await context.workspace.read(path, MAX_FILE_BYTES)
            output = _show(path, decode_text(data, path).text, offset, limit)
        note_file(context, path, status)  # as it was before: it may have changed while it was read
        return ToolResult(output)

    async def _read_part(
        self, context: ToolContext, path: str, size: int, offset: int, limit: int
    ) -> str:
        """Return lines of a file that is too long to be read whole."""
        last = offset + limit - 1
        target = shlex.quote(key_of(context.workspace, path))
        command = f"sed -n '{offset},{last}p;{last}q' -- {target} | head -c {MAX_CHARACTERS}"
        text = await context.workspace.run(command, timeout=SECONDS)
        if "\0" in text:
            raise ToolError(f"{path} is binary data of {size} bytes, and no text")
        lines = text.removesuffix("\n").split("\n") if text else []
        shown = "\n".join(_numbered(lines, offset))
        following = offset + len(lines)
        return f"{shown}\n[{path} has {size} bytes; continue with offset {following}, or search it]"


class ListDirectoryTool(Tool):
    """Lists a folder."""

    name = "list_directory"
    description = "List a folder: names, folders with a slash, and sizes of files in bytes."
    parameters = takes(path=of("string", "Folder; default the project's."))
    is_parallel = True
    accesses = "read"

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        path = arguments.get("path") or "."
        entries = await look(context.workspace, "list", path)
        lines = [
            f"{entry['name']}/" if entry["kind"] == "folder" else f"{entry['name']} {entry['size']}"
            for entry in entries[:MAX_ENTRIES]
        ]
        if len(entries) > MAX_ENTRIES:
            lines.append(f"[{len(entries) - MAX_ENTRIES} more; glob finds them by name]")
        return ToolResult("\n".join(lines) or "(empty folder)")


def _show(path: str, text: str, offset: int, limit: int) -> str:
    """Return numbered lines of a text, and how it goes on."""
    if not text:
        return f"({path} is empty)"
    lines = text.removesuffix("\n").split("\n")
    if offset > len(lines):
        raise ToolError(f"{path} has {len(lines)} lines, so none at offset {offset}")
    shown = []
    length = 0
    for line in _numbered(lines[offset - 1 : offset - 1 + limit], offset):
        length += len(line) + 1
        if length > MAX_CHARACTERS:
            break
        shown.append(line)
    following = offset + len(shown)
    if following <= len(lines):
        shown.append(f"[{path} has {len(lines)} lines; continue with offset {following}]")
    return "\n".join(shown)


def _numbered(lines: list[str], first: int) -> list[str]:
    return [
        f"{number:>6}\t{line[:MAX_LINE]}{' [...]' if len(line) > MAX_LINE else ''}"
        for number, line in enumerate(lines, first)
    ]


async def _describe_missing(context: ToolContext, path: str) -> str:
    """Return that there is no such file, and what lies where it was looked for."""
    folder, name = posixpath.split(path)
    try:
        entries = await look(context.workspace, "list", folder or ".")
    except (ToolError, WorkspaceError):
        return f"there is no file {path}, nor its folder"
    like = [e["name"] for e in entries if e["name"].lower() == name.lower()]
    like = like or [e["name"] for e in entries if name.partition(".")[0] in e["name"]]
    also = f"; in its folder there are {', '.join(like[:5])}" if like else ""
    return f"there is no file {path}{also}"
