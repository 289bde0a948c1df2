"""Finds the text that an edit means: as it stands, then with other white space, then the nearest.

Only whole lines match with other white space, and only where their indents differ in one way: the
replacement is then indented as the file is.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from typing import NamedTuple

from rome.agent.iflow.tools.base import ToolError

SHOWN_LINES = 12  # of a near match
SHOWN_PLACES = 10  # of an ambiguous one
_COMPARED = 200  # characters of a line
_CANDIDATES = 1000  # lines that are compared letter by letter
_WORD = re.compile(r"\w{3,}")
_NUMBERED = re.compile(r" *\d+\t")  # a line as read_file shows it


class Match(NamedTuple):
    """A place in a text, and what stands there after the edit."""

    start: int
    end: int
    replacement: str


def apply_edit(text: str, old: str, new: str, *, replace_all: bool = False) -> tuple[str, str]:
    """Return a text after an edit, and a note for the model, "" where all was as it said.

    Raises:
      ToolError: the old text is not there or stands in several places; the message shows where.
    """
    if not old:
        raise ToolError("old_string is empty; give the text that is to be replaced")
    if old == new:
        raise ToolError("old_string and new_string are equal, so there is nothing to change")
    note = ""
    matches = _find_exact(text, old, new)
    if not matches:
        matches = _find_loosely(text, old, new)
        note = "matched with other white space than in old_string"
    if not matches and (bare := _without_numbers(old)) is not None:
        bare_new = _without_numbers(new)
        matches = _find_exact(text, bare, new if bare_new is None else bare_new)
        note = "matched without the line numbers of read_file"
    if not matches:
        raise ToolError(f"old_string is not in the file.{_describe_nearest(text, old)}")
    if len(matches) > 1 and not replace_all:
        lines = [str(_line_of(text, match.start)) for match in matches[:SHOWN_PLACES]]
        more = ", ..." if len(matches) > SHOWN_PLACES else ""
        raise ToolError(
            f"old_string stands {len(matches)} times in the file, at lines {', '.join(lines)}"
            f"{more}; add lines around it until it is unique, or set replace_all"
        )
    for match in reversed(matches):
        text = text[: match.start] + match.replacement + text[match.end :]
    return text, note


def _find_exact(text: str, old: str, new: str) -> list[Match]:
    return [Match(*found.span(), new) for found in re.finditer(re.escape(old), text)]


def _find_loosely(text: str, old: str, new: str) -> list[Match]:
    """Return where the lines of `old` stand with other white space around them."""
    lines = text.split("\n")
    wanted = old.removesuffix("\n").split("\n")
    bare = [line.strip() for line in lines]
    bare_wanted = [line.strip() for line in wanted]
    if not any(bare_wanted):
        return []
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    matches: list[Match] = []
    first = 0
    while first + len(wanted) <= len(lines):
        last = first + len(wanted)
        if bare[first:last] == bare_wanted:
            indents = _map_indents(wanted, lines[first:last])
            if indents is not None:
                end = starts[last] - 1
                if old.endswith("\n") and end < len(text):
                    end += 1
                matches.append(Match(starts[first], end, _indent(new, indents)))
                first = last
                continue
        first += 1
    return matches


def _map_indents(wanted: list[str], found: list[str]) -> dict[str, str] | None:
    """Return the file's indent for each of the edit's; None where they contradict each other."""
    indents: dict[str, str] = {}
    for want, have in zip(wanted, found, strict=True):
        if not want.strip():
            continue
        if indents.setdefault(_indent_of(want), _indent_of(have)) != _indent_of(have):
            return None
    return indents


def _indent(text: str, indents: dict[str, str]) -> str:
    """Return a text with the file's indents."""
    width = _tab_width(indents)
    lines = []
    for line in text.split("\n"):
        own = _indent_of(line)
        known = max((one for one in indents if own.startswith(one)), key=len, default=None)
        if not line.strip() or known is None:
            lines.append(line)
            continue
        more = own[len(known) :]
        if width and set(more) == {" "} and len(more) % width == 0:
            more = "\t" * (len(more) // width)
        lines.append(indents[known] + more + line[len(own) :])
    return "\n".join(lines)


def _tab_width(indents: dict[str, str]) -> int:
    """Return for how many spaces of the edit the file has a tab; 0 where it has none."""
    for want, have in indents.items():
        if set(want) == {" "} and set(have) == {"\t"} and len(want) % len(have) == 0:
            return len(want) // len(have)
    return 0


def _without_numbers(text: str) -> str | None:
    """Return a text without the line numbers of read_file; None where a line has none."""
    lines = text.removesuffix("\n").split("\n")
    if not all(_NUMBERED.match(line) for line in lines):
        return None
    return "\n".join(_NUMBERED.sub("", line, count=1) for line in lines)


def _describe_nearest(text: str, old: str) -> str:
    """Return the place that is most like `old`, for the model; "" where nothing is."""
    lines = text.split("\n")
    wanted = old.removesuffix("\n").split("\n")
    first = _nearest_line(lines, wanted)
    if first is None:
        return " Nothing like it is there; read the file again."
    last = min(len(lines), first + len(wanted))
    shown = [f"{n + 1:>6}\t{lines[n]}" for n in range(first, min(last, first + SHOWN_LINES))]
    difference = ""
    for number, want in enumerate(wanted):
        have = lines[first + number] if first + number < len(lines) else None
        if have != want:
            place = f"line {first + number + 1}" if have is not None else "the end of the file"
            has = f" has {have[:_COMPARED]!r}," if have is not None else " comes, and"
            difference = f"\nFirst difference: {place}{has} old_string {want[:_COMPARED]!r}."
            break
    more = "\n..." if last - first > SHOWN_LINES else ""
    return " The nearest text is:\n" + "\n".join(shown) + more + difference


def _nearest_line(lines: list[str], wanted: list[str]) -> int | None:
    """Return the index of the line at which `wanted` would fit best; None for nowhere."""
    places: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        if bare := line.strip():
            places.setdefault(bare, []).append(number)
    votes: Counter[int] = Counter()
    for offset, want in enumerate(wanted):
        for number in places.get(want.strip(), ()):
            if number >= offset:
                votes[number - offset] += 1
    if votes:
        most = max(votes.values())
        return min(place for place, count in votes.items() if count == most)
    offset, want = max(enumerate(wanted), key=lambda one: len(one[1].strip()))
    words = set(_WORD.findall(want))
    like = [bare for bare in places if not words.isdisjoint(_WORD.findall(bare))] or list(places)
    shortened = {bare[:_COMPARED]: bare for bare in reversed(like[:_CANDIDATES])}
    close = difflib.get_close_matches(want.strip()[:_COMPARED], shortened, n=1, cutoff=0.5)
    if not close:
        return None
    return max(0, places[shortened[close[0]]][0] - offset)


def _indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
