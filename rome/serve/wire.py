"""What all HTTP routes of the engine share: bodies, errors, server-sent events."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from rome.serve.checks import BadRequest

RETRY_AFTER_SECONDS = 1  # what a client that met a full queue is told to wait
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Busy(Exception):
    """The server cannot take a request now, or did not end it in time; answered as HTTP 503."""


async def read_body(http: web.Request) -> dict[str, Any]:
    """Return the JSON object of a request; a missing body is an empty object.

    Raises:
      BadRequest: it is something else.
    """
    data = await http.read()
    try:
        body = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as error:  # no JSON, no Unicode, or nested too deeply
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error, in the form that clients of SGLang and of OpenAI read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error(status: int, message: str) -> web.Response:
    """Return an error."""
    return web.json_response(error_body(status, message), status=status)


def busy(reason: Busy) -> web.Response:
    """Return the answer that asks a client to come back later."""
    response = error(503, f"{reason}; ask again later")
    response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


async def open_stream(http: web.Request) -> web.StreamResponse:
    """Begin an answer of server-sent events."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    )
    await response.prepare(http)
    return response


async def send_event(response: web.StreamResponse, data: str) -> None:
    """Send one server-sent event."""
    await response.write(f"data: {data}\n\n".encode())
