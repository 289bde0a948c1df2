"""TOML with lines: parsing that names the line of a fault, and the line where a key is set."""

from __future__ import annotations

import pathlib
import re
import tomllib

from envs.tasks.harbor.errors import TaskError

_FAULT_LINE = re.compile(r"\(at line (\d+), column \d+\)|at end of document")
_HEADER = re.compile(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?")
_DEEP_KEY = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){64}")


def parse_toml(file: pathlib.Path, text: str) -> dict:
    """Parse TOML. Raises TaskError with the line of a fault."""
    # The parser's time grows with the square of a key's length.
    if deep := _DEEP_KEY.search(text):
        raise TaskError(file, text.count("\n", 0, deep.start()) + 1, "a key of more than 64 parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _FAULT_LINE.search(str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        raise TaskError(file, line, f"not TOML: {error}") from error
    # Nested too deeply; a date or an integer beyond Python's range.
    except (RecursionError, ValueError, OverflowError) as error:
        raise TaskError(
            file, 1, f"not TOML that can be read: {type(error).__name__}: {str(error)[:80]}"
        ) from error


def line_in_toml(text: str, path: tuple[str, ...]) -> int:
    """Return the line where a key is set: first looked for in its own table, then anywhere.

    This is a search in the text, because the parser keeps no lines.
    """
    if not path:
        return 1
    wanted = ".".join(path)
    table = ".".join(path[:-1])
    key = re.escape(path[-1])
    assigned = re.compile(rf"\s*[\"']?{key}[\"']?\s*[=.]")
    inline = re.compile(rf"\s*{re.escape(path[-2])}\s*=\s*\{{.*\b{key}\b") if table else None
    header = ""
    candidates = []  # (rank, line): the lowest rank is the likeliest place
    for number, row in enumerate(text.splitlines(), 1):
        if match := _HEADER.match(row):
            header = match[1].replace('"', "").replace(" ", "")
            if header == wanted:
                candidates.append((0, number))
        if assigned.match(row):
            candidates.append((1 if header == table else 2, number))
        elif inline and inline.match(row):
            candidates.append((3, number))
        elif header == table and table:
            candidates.append((9, number))
    return min(candidates, default=(0, 1))[1]
