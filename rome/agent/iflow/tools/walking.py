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


async def look(workspace: Workspace, op: str, path: str, **request: Any) -> list[dict[str, Any]]:
    """Return what `walk` finds: one object for each entry of a folder, file or line.

    Args:
      workspace: with the files.
      op: "list" (objects with name, kind, size), "glob" (name), or "search" (path, number, text,
        is_match).
      path: where to look.
      **request: `limit`, `glob`, `pattern`, `ignore_case` and `context`, as `walk` has them.

    Raises:
      ToolError: there is no such place, or the pattern is none.
    """
    about = {"op": op, "path": key_of(workspace, path), "root": workspace.root}
    text = shlex.quote(json.dumps(about | request))
    interpreter = "python3" if workspace.is_isolated else shlex.quote(sys.executable)
    program = shlex.quote(pathlib.Path(walk.__file__).read_text())
    said = await workspace.run(
        f"if ! command -v {interpreter} >/dev/null; then echo {_NO_PROGRAM!r}; else"
        f" {interpreter} -I -S -c {program} {text} | head -c {MAX_BYTES}; fi",
        timeout=SECONDS,
    )
    is_cut = len(said.encode()) >= MAX_BYTES - 3
    lines = said.split("\n")
    if is_cut:
        lines.pop()  # only a part of it is there
    words = [line for line in lines if line and not line.startswith("{")]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    if words or not (is_cut or {"end": True} in found[-1:]):
        raise ToolError("; ".join(words)[:500] or "looking through the files failed")
    return [one for one in found if "end" not in one]
