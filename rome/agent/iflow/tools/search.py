"""Finds files by name, and lines by what they say."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes
from rome.agent.iflow.tools.walking import look

MAX_FILES = 500
MAX_MATCHES = 200
MAX_CHARACTERS = 30_000
MAX_LINE = 300
_PATH = of("string", "Folder or file to look in; default the project.")


class GlobTool(Tool):
    """Finds files by name."""

    name = "glob"
    description = (
        "Find files by name, such as **/*.py, src/**/test_*.{ts,tsx} or *.md (in any folder)."
        " What .gitignore and .iflowignore name is left out."
    )
    parameters = takes("pattern", pattern=of("string"), path=_PATH)
    is_parallel = True
    accesses = "read"
    shown = ("pattern", "path")

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        path = arguments.get("path") or "."
        pattern = arguments["pattern"]
        root = context.workspace.root
        if posixpath.isabs(pattern) and pattern.startswith(f"{root}/"):
            pattern = pattern[len(root) + 1 :]
        found = await look(context.workspace, "glob", path, glob=pattern, limit=MAX_FILES + 1)
        lines = [posixpath.normpath(posixpath.join(path, one["name"])) for one in found[:MAX_FILES]]
        if len(found) > MAX_FILES:
            lines.append(f"[more than {MAX_FILES} files; narrow the pattern or the path]")
        return ToolResult("\n".join(lines) or f"no file fits {pattern}")


class SearchTool(Tool):
    """Finds lines by a regular expression."""

    name = "search"
    description = (
        "Search the lines of files by a regular expression. Binary files, and what .gitignore and"
        " .iflowignore name, are left out."
    )
    parameters = takes(
        "pattern",
        pattern=of("string", "Regular expression."),
        path=_PATH,
        glob=of("string", "Only files that fit, such as *.py."),
        ignore_case=of("boolean"),
        context=of("integer", "Lines to show around each match.", minimum=0, maximum=20),
        files_only=of("boolean", "Show only the names of files."),
    )
    is_parallel = True
    accesses = "read"
    shown = ("pattern", "path")

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        pattern = arguments["pattern"]
        if "\n" in pattern:
            raise ToolError("the pattern has a new line; lines are searched one by one")
        path = arguments.get("path") or "."
        found = await look(
            context.workspace,
            "search",
            path,
            pattern=pattern,
            glob=arguments.get("glob", ""),
            ignore_case=arguments.get("ignore_case", False),
            context=arguments.get("context", 0),
            limit=10_000 if arguments.get("files_only") else MAX_MATCHES + 1,
        )
        root = context.workspace.root
        for line in found:
            line["path"] = line["path"].removeprefix(f"{root}/")
        denied = {name for name in {line["path"] for line in found} if context.is_denied(name)}
        lines = [line for line in found if line["path"] not in denied]
        if not lines:
            return ToolResult(f"no line fits {pattern}")
        if arguments.get("files_only"):
            names = list(dict.fromkeys(line["path"] for line in lines))
            return ToolResult(_bounded(names, len(names) > MAX_FILES, MAX_FILES))
        matches = 0
        shown = []
        for line in lines:
            matches += line["is_match"]
            if matches > MAX_MATCHES:
                break
            mark = ":" if line["is_match"] else "-"
            shown.append(f"{line['path']}{mark}{line['number']}{mark}{line['text'][:MAX_LINE]}")
        return ToolResult(_bounded(shown, matches > MAX_MATCHES, MAX_MATCHES))


def _bounded(lines: list[str], is_cut: bool, limit: int) -> str:
    text = "\n".join(lines[: limit if is_cut else None])
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS].rpartition("\n")[0]
        is_cut = True
    return f"{text}\n[more; narrow the pattern, the glob or the path]" if is_cut else text
