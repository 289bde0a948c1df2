"""Runs the program `walk`, or ripgrep, where the files are."""

from __future__ import annotations

import functools
import json
import pathlib
import posixpath
import shlex
import sys
from typing import Any

from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.tools import walk
from rome.agent.iflow.tools.base import ToolError
from rome.agent.iflow.tools.text import key_of

SECONDS = 30.0
MAX_BYTES = 2_000_000  # of an answer
_NO_PROGRAM = "neither rg nor python3 is there; use find, grep and ls in the shell"


async def list_entries(workspace: Workspace, path: str) -> list[dict[str, Any]]:
    """Return name, kind ("folder", "file" or "link") and size of what lies in a folder.

    Raises:
      ToolError: there is no such folder.
    """
    return await _ask(workspace, {"op": "list", "path": key_of(workspace, path)}, "")


async def find_files(workspace: Workspace, path: str, glob: str, limit: int) -> list[str]:
    """Return the files below a folder that fit a pattern, relative to it.

    Raises:
      ToolError: there is no such folder.
    """
    request = {"op": "glob", "path": key_of(workspace, path), "glob": glob, "limit": limit}
    return [found["name"] for found in await _ask(workspace, request, "")]


async def find_lines(
    workspace: Workspace,
    path: str,
    pattern: str,
    *,
    glob: str = "",
    ignore_case: bool = False,
    context: int = 0,
    limit: int,
) -> list[dict[str, Any]]:
    """Return lines that fit a regular expression, in the form of `rg --json`.

    Raises:
      ToolError: there is no such place, or the expression is none.
    """
    place = key_of(workspace, path)
    request = {
        "op": "search",
        "path": place,
        "pattern": pattern,
        "glob": glob,
        "ignore_case": ignore_case,
        "context": context,
        "limit": limit,
    }
    ripgrep = ""
    if not glob:  # a glob of ripgrep's brings back what is ignored
        options = [
            *("--no-config", "--json", "--sort=path", "--hidden", "--no-require-git"),
            *("--glob=!.git", f"--context={context}"),
            *(["--ignore-case"] if ignore_case else []),
            "--ignore-file=.iflowignore",
        ]
        # Rules of an ignore file are about names relative to where ripgrep runs.
        inside = posixpath.relpath(place, workspace.root)
        is_inside = inside.split("/")[0] != ".."
        arguments = [*options, "--regexp", pattern, "--", inside if is_inside else place]
        ripgrep = f"rg {shlex.join(arguments)} 2>&1"
    return await _ask(workspace, request, ripgrep)


async def _ask(workspace: Workspace, request: dict[str, Any], ripgrep: str) -> list[dict[str, Any]]:
    """Return the objects that a program prints where the files are."""
    text = json.dumps(request | {"root": workspace.root})
    interpreter = "python3" if workspace.is_isolated else shlex.quote(sys.executable)
    python = f"{interpreter} -I -S -c {shlex.quote(_program())} {shlex.quote(text)}"
    command = (
        f"if command -v {interpreter} >/dev/null; then {python}; else echo {_NO_PROGRAM!r}; fi"
    )
    if ripgrep:
        command = f"if command -v rg >/dev/null; then {ripgrep}; else {command}; fi"
    parts = workspace.stream(f"{{ {command}; }} | head -c {MAX_BYTES}", timeout=SECONDS)
    said = "".join([part async for part in parts])
    *lines, rest = said.split("\n")
    is_cut = len(said.encode()) >= MAX_BYTES - 3
    words = [line for line in lines if not line.startswith("{")]
    if rest and not is_cut:
        words.append(rest)
    found = [json.loads(line) for line in lines if line.startswith("{")]
    is_whole = is_cut or any(one.get("type") == "summary" for one in found)
    if words or not is_whole:
        raise ToolError("; ".join(words)[:500] or "looking through the files failed")
    return [one for one in found if one.get("type") != "summary"]


@functools.cache
def _program() -> str:
    return pathlib.Path(walk.__file__).read_text()
