"""The tree of an episode's chunks: parents, paths and lines, on plain numbers.

Chunks are numbered in the order of time, so a parent's number is below its children's. A parent is
LAST (the chunk before this one; the first chunk has none), ROOT (a context of its own) or a number.
A line is a path from a root to a leaf: what one pass of the model reads from left to right.

Edges say why a chunk does not simply follow the one before it:

    continuation  the context goes on
    compaction    a context of its own that begins with a summary of another one
    subagent      a context of its own with its own task
    rewind        the context goes on from further back; what came after that place is taken back
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

LAST = -1
ROOT = -2
Edge = Literal["continuation", "compaction", "subagent", "rewind"]
EDGES: tuple[str, ...] = get_args(Edge)


def resolve_parents(parents: Sequence[int]) -> list[int]:
    """Return each chunk's parent as a number, or ROOT where it has none.

    Raises:
      ValueError: a parent is not an earlier chunk.
    """
    resolved = []
    for number, parent in enumerate(parents):
        if parent == LAST:
            parent = number - 1 if number else ROOT
        if parent != ROOT and not 0 <= parent < number:
            raise ValueError(
                f"chunk {number} has parent {parent}; it is LAST ({LAST}), ROOT ({ROOT}) or the"
                " number of an earlier chunk"
            )
        resolved.append(parent)
    return resolved


def path_to(number: int, resolved: Sequence[int]) -> list[int]:
    """Return the chunks from a root to this one, itself included; [] for ROOT."""
    path = []
    while number != ROOT:
        path.append(number)
        number = resolved[number]
    return path[::-1]


def lines_of(resolved: Sequence[int]) -> list[list[int]]:
    """Return the path to each leaf, in the order of the leaves."""
    inner = set(resolved)
    leaves = [number for number in range(len(resolved)) if number not in inner]
    return [path_to(leaf, resolved) for leaf in leaves]


def contract(resolved: Sequence[int], kept: Sequence[bool]) -> list[int]:
    """Return the parents of the chunks that are kept, numbered among themselves.

    A kept chunk's parent is the nearest of its ancestors that is kept, or ROOT.
    """
    place: list[int] = []  # of each chunk: the nearest kept one at or above it
    parents: list[int] = []
    for number, parent in enumerate(resolved):
        above = ROOT if parent == ROOT else place[parent]
        if kept[number]:
            parents.append(above)
            place.append(len(parents) - 1)
        else:
            place.append(above)
    return parents


def parse_credit(text: str) -> dict[str, float]:
    """Return the weights by edge that a text such as "subagent:0.5 rewind:0" gives; "" is none.

    Raises:
      ValueError: the text is anything else.
    """
    credit = {}
    for part in text.split():
        edge, colon, number = part.partition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if edge not in EDGES[1:] or not colon or edge in credit or not 0 <= weight < math.inf:
            raise ValueError(
                f"{part!r} is no credit of an edge; write each of {', '.join(EDGES[1:])} at most"
                ' once, with a weight of 0 or more, as in "subagent:0.5 rewind:0"'
            )
        credit[edge] = weight
    return credit


def credits_of(
    resolved: Sequence[int], edges: Sequence[str], credit: Mapping[str, float]
) -> list[float]:
    """Return the weight of each chunk's credit.

    The weights of "compaction" and "subagent" count for the chunks below such an edge, once for
    each of them on the way from the root. That of "rewind" counts, once, for the chunks that a
    later rewind took back: those below its parent that it does not go on from.

    Args:
      resolved: of `resolve_parents`.
      edges: one of EDGES for each chunk.
      credit: weights by edge; an edge that it does not name weighs 1.
    """
    weights: list[float] = []
    for parent, edge in zip(resolved, edges, strict=True):
        above = 1.0 if parent == ROOT else weights[parent]
        opens = edge in ("compaction", "subagent")
        weights.append(above * credit.get(edge, 1.0) if opens else above)
    for number in _taken_back(resolved, edges):
        weights[number] *= credit.get("rewind", 1.0)
    return weights


def _taken_back(resolved: Sequence[int], edges: Sequence[str]) -> set[int]:
    """Return the chunks below the parent of a rewind that were there before it."""
    found: set[int] = set()
    for rewind, edge in enumerate(edges):
        if edge != "rewind":
            continue
        below: set[int] = set()
        for number in range(resolved[rewind] + 1, rewind):
            if resolved[number] == resolved[rewind] or resolved[number] in below:
                below.add(number)
        found |= below
    return found
