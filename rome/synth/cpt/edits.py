"""Changes of files as search-and-replace blocks, which a program can apply to the character.

    path/of/file.py
    <<<<<<< SEARCH
    lines that the file holds once
    =======
    lines that take their place
    >>>>>>> REPLACE

Blocks are applied in order. A block that searches for nothing makes a new file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

SEARCH = "<<<<<<< SEARCH"
MIDDLE = "======="
REPLACE = ">>>>>>> REPLACE"
MAX_LINES = 4000  # of a file that is compared; the time grows with its square
CONTEXT_LINES = 2


class EditError(ValueError):
    """A change cannot be written as blocks, or blocks do not apply."""


class _Hunk(NamedTuple):
    """Lines start to end of the old file become `new`."""

    start: int
    end: int
    new: list[str]


def write_edits(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return the blocks that turn some files into others.

    Args:
      before: path -> text; a path that is missing is made new.
      after: path -> text.

    Raises:
      EditError: a file is deleted or too long, does not end with a newline, or holds a marker.
    """
    if deleted := sorted(set(before) - set(after)):
        raise EditError(f"{deleted[0]} is deleted, which blocks cannot say")
    blocks = []
    for path in sorted(after):
        if path not in before:
            _check_lines(path, after[path])
            blocks.append(_block(path, "", after[path]))
        elif before[path] != after[path]:
            blocks += _edits_of(path, before[path], after[path])
    text = "\n".join(blocks)
    if apply_edits(before, text) != dict(after):  # a proof, not an expectation
        raise EditError("its blocks do not make the files again")
    return text


def apply_edits(before: Mapping[str, str], text: str) -> dict[str, str]:
    """Return the files after the blocks of a text.

    Raises:
      EditError: the text is malformed, or a block does not apply at exactly one place.
    """
    files = dict(before)
    lines = text.split("\n")
    place = 0
    while place < len(lines):
        if not lines[place]:
            place += 1
            continue
        path = lines[place]
        if place + 1 >= len(lines) or lines[place + 1] != SEARCH:
            raise EditError(f"line {place + 1} should be a path with {SEARCH!r} below it")
        middle = _find(lines, MIDDLE, place + 2)
        end = _find(lines, REPLACE, middle + 1)
        old = "".join(f"{line}\n" for line in lines[place + 2 : middle])
        new = "".join(f"{line}\n" for line in lines[middle + 1 : end])
        files[path] = _replace(path, files.get(path), old, new)
        place = end + 1
    return files


def _find(lines: list[str], marker: str, start: int) -> int:
    try:
        return lines.index(marker, start)
    except ValueError:
        raise EditError(f"no {marker!r} after line {start}") from None


def _replace(path: str, content: str | None, old: str, new: str) -> str:
    if not old:
        if content:
            raise EditError(f"{path} is there already, and a block without SEARCH makes a file")
        return new
    places = [] if content is None else _line_places(content, old)
    if content is None or len(places) != 1:
        raise EditError(f"{path} holds the searched lines {len(places)} times, not once")
    return content[: places[0]] + new + content[places[0] + len(old) :]


def _line_places(content: str, old: str) -> list[int]:
    """Return where lines begin that are these; two are enough to know."""
    places: list[int] = []
    place = content.find(old)
    while place >= 0 and len(places) < 2:
        if place == 0 or content[place - 1] == "\n":
            places.append(place)
        place = content.find(old, place + 1)
    return places


def _edits_of(path: str, before: str, after: str) -> list[str]:
    """Return the blocks of one file; the context around each grows until it is found once."""
    for text in (before, after):
        _check_lines(path, text)
    old = before.split("\n")[:-1]
    new = after.split("\n")[:-1]
    if max(len(old), len(new)) > MAX_LINES:
        raise EditError(f"{path} has more than {MAX_LINES} lines")
    if not old:
        return [_block(path, "", after)]
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    changes = [
        _Hunk(i1, i2, new[j1:j2])
        for kind, i1, i2, j1, j2 in matcher.get_opcodes()
        if kind != "equal"
    ]
    context = CONTEXT_LINES
    while True:
        hunks = _widen(changes, old, context)
        blocks = [
            _block(path, _join(old[hunk.start : hunk.end]), _join(hunk.new)) for hunk in hunks
        ]
        try:
            if apply_edits({path: before}, "\n".join(blocks)) == {path: after}:
                return blocks
        except EditError:
            pass
        if context > len(old):
            raise EditError(f"no blocks of {path} apply at one place each")
        context *= 2


def _widen(changes: list[_Hunk], old: list[str], context: int) -> list[_Hunk]:
    """Return hunks with unchanged lines around the changes; changes that come close share one."""
    groups: list[list[_Hunk]] = []
    for change in changes:
        if groups and change.start - context <= groups[-1][-1].end + context:
            groups[-1].append(change)
        else:
            groups.append([change])
    hunks = []
    for group in groups:
        start = max(0, group[0].start - context)
        end = min(len(old), group[-1].end + context)
        new = []
        place = start
        for change in group:
            new += [*old[place : change.start], *change.new]
            place = change.end
        hunks.append(_Hunk(start, end, [*new, *old[place:end]]))
    return hunks


def _join(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _block(path: str, old: str, new: str) -> str:
    return f"{path}\n{SEARCH}\n{old}{MIDDLE}\n{new}{REPLACE}\n"


def _check_lines(path: str, text: str) -> None:
    if text and not text.endswith("\n"):
        raise EditError(f"{path} does not end with a newline")
    if {SEARCH, MIDDLE, REPLACE} & set(text.split("\n")):
        raise EditError(f"{path} holds a marker of the blocks")
    if "\n" in path or not path:
        raise EditError(f"the path {path!r} is no line")
