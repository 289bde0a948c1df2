"""Readers that the published formats share.

They read JSON lines with places in their errors, and find worlds by the names that files use.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from envs.worlds import WORLDS
from envs.worlds.base import World

# What a tool raises on a database whose shape, given by a file, is not the world's.
BROKEN = (LookupError, TypeError, AttributeError)


class FormatError(ValueError):
    """A file violates its format, or needs a backend that does not exist here.

    The message names file and entry.
    """


def read_lines(path: pathlib.Path) -> list[tuple[str, Any]]:
    """Return (place, value) of each line of a JSON-lines file. Raises FormatError.

    BFCL calls such files .json.
    """
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
    """Return entry[name], checked to be of a type or one of several.

    A default makes the field optional; null counts as absent. Raises FormatError.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if value is None and default is not ...:
        return default
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise FormatError(f"{where}: {name!r} is {type(value).__name__} and must be {wanted}")
    return value


def known_world(name: str, where: str) -> World:
    """Return the world with this name. Raises FormatError where it has no backend here."""
    if name not in WORLDS:
        raise FormatError(
            f"{where}: {name!r} has no backend here; there are {', '.join(WORLDS)}. "
            "Backends of the published domains are their authors' and not part of this"
        )
    return WORLDS[name]
