"""The grammar of a mixture: "A + B", or with weights "0.7*A + 0.3*B"."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

GRAMMAR = 'Write "A", "A + B", or with a weight for each "0.7*A + 0.3*B".'
_SEPARATOR = re.compile(r"\s*,\s*|(?:^|\s+)\+(?:\s+|$)")  # a plus inside a name is none: c++
_WEIGHTED = re.compile(r"([0-9][0-9.eE+-]*|\.[0-9]+)\s*\*\s*(.*)", re.DOTALL)


class Part(NamedTuple):
    """One part of a mixture.

    Attributes:
      name: of what is mixed, such as a path.
      weight: its share of what is drawn, all weights adding up to 1; None in a mixture without
        weights, whose parts are one set.
    """

    name: str
    weight: float | None


def parse_mixture(text: str) -> list[Part]:
    """Return the parts of a mixture in their order.

    Raises:
      ValueError: a part is empty, only some have a weight, or a weight is no number above 0.
    """
    parts = [_parse_part(part, text) for part in _SEPARATOR.split(text.strip())]
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return parts
    if len(weights) < len(parts):
        raise ValueError(f"{text!r} gives a weight to some of its parts only. {GRAMMAR}")
    total = sum(weights)
    return [Part(name, weight / total) for name, weight in parts if weight is not None]


def _parse_part(part: str, text: str) -> Part:
    match = _WEIGHTED.fullmatch(part)
    name = match[2] if match else part
    if not name or name.startswith("*"):
        raise ValueError(f"{text!r} has an empty part. {GRAMMAR}")
    if match is None:
        return Part(name, None)
    try:
        weight = float(match[1])
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"{text!r}: the weight {match[1]!r} is no number above 0. {GRAMMAR}")
    return Part(name, weight)
