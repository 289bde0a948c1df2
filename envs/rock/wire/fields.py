"""Members of requests: how each is described, and how a request is checked against them."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# JSON schema of each kind of field
KINDS: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "strings": {"type": "array", "items": {"type": "string"}},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "object": {"type": "object"},
}


class Field(NamedTuple):
    """One member of a request.

    `low` and `high` bound a number, the length of a string, or the number of items.
    """

    kind: str  # a key of KINDS
    description: str
    required: bool = False
    low: float = 0
    high: float = 4096


def check(fields: Mapping[str, Field], given: Any) -> dict[str, Any]:
    """Return the members of a request that are not null, after checking them.

    Args:
      fields: the members that a request may have.
      given: the request's parsed JSON, of any type.

    Raises:
      ValueError: names the first member that is missing, unknown or wrong.
    """
    if not isinstance(given, dict):
        raise ValueError(f"the request is a JSON object, not {type(given).__name__}")
    for name in given:
        if name not in fields:
            known = ", ".join(fields) or "nothing"
            raise ValueError(f"{name[:100]!r} is unknown here; known: {known}")
    for name, field in fields.items():
        value = given.get(name)
        if value is not None:
            _check_value(name, field, value)
        elif field.required:
            raise ValueError(f"{name!r} is missing: {field.description}")
    return {name: value for name, value in given.items() if value is not None}


def _check_value(name: str, field: Field, value: Any) -> None:
    if not _has_kind(value, field.kind):
        raise ValueError(f"{name!r} is a {field.kind}, not {type(value).__name__}")
    if field.kind == "boolean":
        return
    _check_size(name, field, value)
    for text in _texts_of(field.kind, value):
        _check_text(name, text)


def _has_kind(value: Any, kind: str) -> bool:
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        case "strings":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "map":
            is_object = isinstance(value, dict)
            return is_object and all(isinstance(item, str) for item in value.values())
        case "object":
            return isinstance(value, dict)
    raise AssertionError(f"a field has the unknown kind {kind!r}")


def _check_size(name: str, field: Field, value: Any) -> None:
    is_number = field.kind in ("integer", "number")
    size = value if is_number else len(value)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if is_finite and field.low <= size <= field.high:
        return
    what = "" if is_number else "of length "
    raise ValueError(f"{name!r} is {what}{size}; it is between {field.low:g} and {field.high:g}")


def _texts_of(kind: str, value: Any) -> list[str]:
    if kind == "string":
        return [value]
    if kind == "strings":
        return value
    if kind == "map":
        return [*value, *value.values()]
    return []


def _check_text(name: str, text: str) -> None:
    try:
        # file names that are not UTF-8 travel as surrogate escapes
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(
            f"{name!r} holds a lone surrogate, which no program can be given"
        ) from None


def parse_query(fields: Mapping[str, Field], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the checked members of a request that came as a URL's query.

    Args:
      fields: the members that the request may have.
      pairs: (name, text) of the query, in order; numbers are parsed by the kind of their field.

    Raises:
      ValueError: names the first member that is missing, unknown, wrong or given twice.
    """
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name in given:
            raise ValueError(f"{name[:100]!r} is given twice")
        given[name] = _parse_text(name, fields.get(name), text)
    return check(fields, given)


def _parse_text(name: str, field: Field | None, text: str) -> Any:
    if field is None or field.kind not in ("integer", "number"):
        return text
    try:
        return int(text) if field.kind == "integer" else float(text)
    except ValueError:
        raise ValueError(f"{name!r} is a {field.kind}, not {text[:100]!r}") from None


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text; an empty body counts as {}.

    Raises:
      ValueError: if `data` is not UTF-8, not JSON, or nested too deeply for the parser.
    """
    try:
        return json.loads(data) if data.strip() else {}
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {str(error)[:200]}") from None
