"""Runs the program `walk` where the files are."""

from __future__ import annotations

import json
import pathlib
import shlex
import sys
from typing import Any

from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.tools import walk
from rome.agent.iflow.tools.base import ToolError
from rome.agent.iflow.tools.text import key_of

SECONDS = 30.0
MAX_BYTES = 2_000_000  # of an answer
_NO_PROGRAM = "python3 is not there; use find, grep and ls in the shell"


async def list_entries(workspace: Workspace, path: str) -> list[dict[str, Any]]:
    """Return name, kind ("folder", "file" or "link") and size of what lies in a folder.

    Raises:
      ToolError: there is no such folder.
    """
    return await _ask(workspace, {"op": "list", "path": key_of(workspace, path)})


async def find_files(workspace: Workspace, path: str, glob: str, limit: int) -> list[str]:
    """Return the files below a folder that fit a pattern, relative to it.

    Raises:
      ToolError: there is no such folder.
    """
    request = {"op": "glob", "path": key_of(workspace, path), "glob": glob, "limit": limit}
    return [found["name"] for found in await _ask(workspace, request)]


async def find_lines(workspace: Workspace, path: str, **request: Any) -> list[dict[str, Any]]:
    """Return the lines that fit a regular expression, and those around them, in order.

    Args:
      workspace: with the files.
      path: where to look.
      **request: `pattern`, and as `walk.search` has them `glob`, `ignore_case`, `context`, `limit`.

    Returns:
      For each line: path (absolute), number, text, and whether it fits itself (is_match).

    Raises:
      ToolError: there is no such place, or the expression is none.
    """
    return await _ask(workspace, {"op": "search", "path": key_of(workspace, path), **request})


async def _ask(workspace: Workspace, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects that the program prints where the files are."""
    text = json.dumps(request | {"root": workspace.root})
    interpreter = "python3" if workspace.is_isolated else shlex.quote(sys.executable)
    program = shlex.quote(pathlib.Path(walk.__file__).read_text())
    command = (
        f"if ! command -v {interpreter} >/dev/null; then echo {_NO_PROGRAM!r}; else"
        f" {interpreter} -I -S -c {program} {shlex.quote(text)} | head -c {MAX_BYTES}; fi"
    )
    said = await workspace.run(command, timeout=SECONDS)
    is_cut = len(said.encode()) >= MAX_BYTES - 3
    lines = said.split("\n")
    if is_cut:
        lines.pop()  # only a part of it is there
    words = [line for line in lines if line and not line.startswith("{")]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    if words or not (is_cut or {"end": True} in found[-1:]):
        raise ToolError("; ".join(words)[:500] or "looking through the files failed")
    return [one for one in found if "end" not in one]
