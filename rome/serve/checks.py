"""Checks of single values of a request's body: a wrong type is told in one sentence."""

from __future__ import annotations

import math
from typing import Any

from rome.serve.device import MEMORY_TAGS

MAX_INTEGER = 2**63 - 1
MAX_DIGITS = 19  # of a number that is spelled out


class BadRequest(ValueError):
    """A mistake of the client, described in one sentence; answered as HTTP 400."""


def check_flag(name: str, value: Any) -> bool:
    """Return a value that must be true or false.

    Raises:
      BadRequest: it is something else.
    """
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, got {value!r}")
    return value


def check_text(name: str, value: Any) -> str:
    """Return a value that must be a string.

    Raises:
      BadRequest: it is something else.
    """
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise BadRequest(f"{name} is not valid Unicode: {value!r}") from None
    return value


def parse_memory_tags(body: dict[str, Any]) -> list[str]:
    """Return the tags of a body; all where it has none.

    Raises:
      BadRequest: one is unknown.
    """
    tags = body.get("tags") or list(MEMORY_TAGS)
    if not isinstance(tags, list) or any(tag not in MEMORY_TAGS for tag in tags):
        raise BadRequest(f"tags must be of {', '.join(MEMORY_TAGS)}, got {tags!r}")
    return tags


def parse_row_count(given: Any) -> int:
    """Return truncate_size; a query string has it as text.

    Raises:
      BadRequest: it is no number of rows.
    """
    if isinstance(given, str) and given.isdecimal() and len(given) < MAX_DIGITS:
        given = int(given)
    if type(given) is not int or given < 0:
        raise BadRequest(f"truncate_size must be a number of rows, got {given!r}")
    return given


def check_integer(name: str, value: Any) -> int:
    """Return a value that must be an integer of 64 bits.

    Raises:
      BadRequest: it is something else.
    """
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise BadRequest(f"{name} must be an integer of 64 bits, got {value!r}")
    return value


def check_number(name: str, value: Any) -> float:
    """Return a value that must be a finite number.

    Raises:
      BadRequest: it is something else.
    """
    is_number = type(value) is float or (type(value) is int and abs(value) <= MAX_INTEGER)
    if not is_number or not math.isfinite(value):
        raise BadRequest(f"{name} must be a finite number, got {value!r}")
    return float(value)
