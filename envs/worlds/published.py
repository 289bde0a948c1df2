"""What the readers of published formats share: JSON lines with places in their errors, and the
worlds here by the names that files use.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from envs.worlds.base import World

BROKEN = (
    LookupError,
    TypeError,
    AttributeError,
)  # what a tool raises on a database that a file gives another shape than the world's


class FormatError(ValueError):
    """A file that does not say what its format says, or that needs a backend which is not here.

    The message names file and entry.
    """


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error})") from error


def read_lines(path: pathlib.Path) -> list[tuple[str, Any]]:
    """(place, value) of each line of a JSON-lines file; BFCL calls such files .json."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not readable ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append((f"{path}:{number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{path}:{number}: not JSON ({error})") from error
    return found


def field(
    entry: Any, name: str, kind: type | tuple[type, ...], where: str, default: Any = ...
) -> Any:
    """entry[name], of a kind or one of several.

    A default makes it optional; null counts as absent.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if value is None and default is not ...:
        return default
    if not isinstance(value, kind):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise FormatError(f"{where}: {name!r} is {type(value).__name__} and must be {wanted}")
    return value


def known_world(name: str, where: str) -> World:
    from envs.worlds import WORLDS

    if name not in WORLDS:
        raise FormatError(
            f"{where}: {name!r} has no backend here; there are {', '.join(WORLDS)}. "
            "Backends of the published domains are their authors' and not part of this"
        )
    return WORLDS[name]
