"""The JSON of the GEM service: errors, requests, and responses that may hold NumPy values."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from aiohttp import web

# code -> HTTP status; the closed set
ERRORS = {
    "bad_request": 400,
    "unauthorized": 401,
    "unknown_env": 404,
    "unknown_instance": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "too_large": 413,
    "too_many": 429,
    "env_error": 500,
    "internal": 500,
    "infrastructure": 503,
    "timeout": 504,
}
BODY_SECONDS = 30.0  # within which a request must arrive


class GemError(Exception):
    """A call failed; the caller gets the code, one of ERRORS, and the message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code if code in ERRORS else "internal"


class Field(NamedTuple):
    """One member of a request."""

    kind: type
    default: Any = None
    required: bool = True


async def read_body(request: web.Request, limit: int) -> bytes:
    """Return a request's body; GemError if it has more than `limit` bytes or comes too slowly."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.content.iter_any():
                data += piece
                if len(data) > limit:
                    raise GemError("too_large", f"the request has more than {limit} bytes")
    except TimeoutError:
        raise GemError("timeout", f"the request did not come within {BODY_SECONDS:g} s") from None
    return bytes(data)


def parse_body(data: bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the members of a request, with defaults for those that are missing or null.

    Raises:
      GemError: "bad_request" unless `data` is a JSON object of these members.
    """
    try:
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GemError("bad_request", f"the request is not JSON: {str(error)[:100]}") from error
    if not isinstance(given, dict):
        raise GemError(
            "bad_request", f"the request is a JSON {type(given).__name__}; send an object"
        )
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise GemError(
            "bad_request", f"unknown field {unknown[0][:60]!r}; known are {', '.join(fields)}"
        )
    return {name: _value(name, field, given.get(name)) for name, field in fields.items()}


def _value(name: str, field: Field, value: Any) -> Any:
    if value is None and not field.required:
        return field.default
    if not isinstance(value, field.kind) or isinstance(value, bool):
        raise GemError("bad_request", f"field {name!r} must be of type {field.kind.__name__}")
    return value


def encode(value: Any) -> bytes:
    """Return a value as JSON; NumPy's numbers and arrays, sets and tuples become JSON's.

    Raises:
      TypeError, ValueError: it holds something else, or a number that is not finite.
    """
    return json.dumps(value, default=_to_plain, allow_nan=False).encode()


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    raise TypeError(f"a value of type {type(value).__name__}")
