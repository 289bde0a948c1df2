"""Errors of the ROCK protocol: the closed set of codes, and how each travels as JSON.

An error response is `{"error": {"code", "message", "reason"?}}`. The code decides the HTTP status
and the exception type that the caller sees.
"""

from typing import Any

from envs.rock.errors import (
    AgentFault,
    IsolationError,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
    SessionEndedError,
)

MAX_MESSAGE_CHARS = 2000


# Statuses with which proxies report that the service did not answer; from 520 on Cloudflare does.
NO_ANSWER = (408, 425, 429, 500, 502, 503, 504)
_REMEDIES = {
    404: "; is this the address of an admin, with the proxy's path?",
    413: ": it takes no body of this size; raise its limit",
}


class Refusal(SandboxError):
    """A service refused a request; `code` is one of CODES."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Disconnected(SandboxError):
    """The other end could not be reached, or the connection broke before the response arrived.

    Whether the request was carried out is unknown.
    """


# code -> (HTTP status, exception type that the client raises)
CODES: dict[str, tuple[int, type[Exception]]] = {
    "bad_request": (400, ValueError),
    "unauthorized": (401, SandboxError),
    "forbidden": (403, SandboxError),
    "no_such_route": (404, SandboxError),
    "not_found": (404, SandboxError),
    "unknown_sandbox": (404, SandboxClosedError),
    "slow_request": (408, SandboxError),
    "conflict": (409, SandboxError),
    "isolation": (409, IsolationError),
    "no_capacity": (409, SandboxStartError),
    "sandbox": (409, SandboxError),
    "closed": (410, SandboxClosedError),
    "ended": (410, SandboxClosedError),  # the whole sandbox
    "session_ended": (410, SessionEndedError),
    "worker_lost": (410, SandboxClosedError),
    "too_large": (413, SandboxError),
    "file": (422, SandboxFileError),
    "agent_fault": (422, AgentFault),
    "queue_full": (429, SandboxStartError),
    "internal": (500, SandboxError),
    "start_failed": (503, SandboxStartError),
    "busy": (503, SandboxError),
    # of a worker that lives: whether the request was carried out is unknown
    "no_answer": (503, Disconnected),
    "start_timeout": (504, SandboxStartError),
}
# Code of an exception that carries none. The first match wins, so subclasses come first.
_CODE_BY_TYPE: tuple[tuple[type[Exception], str], ...] = (
    (SandboxFileError, "file"),
    (SessionEndedError, "session_ended"),
    (AgentFault, "agent_fault"),
    (IsolationError, "isolation"),
    (SandboxClosedError, "closed"),
    (SandboxStartError, "start_failed"),
    (Disconnected, "worker_lost"),
    (SandboxError, "sandbox"),
    (ValueError, "bad_request"),
)


def encode_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the JSON body that report an exception.

    An exception of no known type becomes "internal", and its text is withheld: it belongs in the
    service's log only.
    """
    code = _code_of(error)
    message = str(error)[:MAX_MESSAGE_CHARS]
    if code == "internal":
        message = "the service failed; its log says how"
    body: dict[str, Any] = {"code": code, "message": message}
    if isinstance(error, SandboxFileError):
        body["reason"] = error.reason
    status, _ = CODES[code]
    return status, {"error": body}


def _code_of(error: Exception) -> str:
    code = error.code if isinstance(error, SandboxError) else None
    if code is not None and code in CODES:
        return code
    for kind, code in _CODE_BY_TYPE:
        if isinstance(error, kind):
            return code
    return "internal"


def is_ours(status: int, body: Any) -> bool:
    """Return whether a response comes from a ROCK service, and not from a proxy in between.

    Args:
      status: HTTP status of the response.
      body: parsed JSON of the response; None if it was not JSON.
    """
    if status == 200:
        return isinstance(body, dict)
    fields = body.get("error") if isinstance(body, dict) else None
    return isinstance(fields, dict) and isinstance(fields.get("code"), str)


def decode_foreign(status: int, url: str) -> SandboxError:
    """Return the exception that a response of something between here and the service stands for.

    Disconnected for what a proxy answers when it has no answer of the service: the request may or
    may not have been carried out, as after a broken connection. The same for a page instead of an
    answer.
    """
    said = f"HTTP status {status} from something between here and {url}, not ROCK's answer"
    if status < 300 or status in NO_ANSWER or status >= 520:
        return Disconnected(said)
    return SandboxError(f"{said}{_REMEDIES.get(status, '')}")


def decode_error(status: int, body: Any) -> Exception:
    """Return the exception that an error response stands for.

    The response is not trusted: its code selects one of the known exception types, anything else
    becomes a plain SandboxError.

    Args:
      status: HTTP status of the response, named in the message if the body has none.
      body: parsed JSON of the response; None if it was not JSON.
    """
    fields = body.get("error") if isinstance(body, dict) else None
    if not isinstance(fields, dict):
        fields = {}
    message = fields.get("message")
    if not isinstance(message, str):
        message = f"the service answered with HTTP status {status}"
    message = message[:MAX_MESSAGE_CHARS]

    code = fields.get("code")
    if not isinstance(code, str) or code not in CODES:
        code = "sandbox"
    _, kind = CODES[code]
    if kind is SandboxFileError:
        reason = fields.get("reason")
        if reason in SandboxFileError.REASONS:
            return SandboxFileError(reason, message)
        return SandboxError(message)
    error = kind(message)
    if isinstance(error, SandboxError):
        error.code = code
    return error
