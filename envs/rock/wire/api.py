"""The protocol between the remote backend, the admin and its workers: one table of operations, and
the closed set of error codes.

Every operation is a row of OPERATIONS: the servers check requests by it, and /openapi.json is
written from it. Requests and answers are JSON but for the bodies of files, which are raw octets of
any length. What takes long takes a `call`, a key of the caller's making: the same request again
joins the one that runs, "202" means "not finished, come again", so that a broken connection costs
nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from envs.rock.config import CommandResult, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.errors import (
    IsolationError,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
)

SANDBOX, WORKER, HUB, TEMPLATE = (
    "/apis/envs/sandbox/v1/",
    "/apis/envs/worker/v1/",
    "/apis/envs/hub/v1/",
    "/apis/envs/template/v1/",
)
MAX_JSON_BYTES = 8 << 20
MAX_FILES_BYTES = 64 << 20  # of a verifier, all together
MAX_WAIT = 30.0  # seconds that one request may be held
MAX_SECONDS = 7 * 24 * 3600.0
GRACE = 30.0  # seconds beyond what was asked for until an answer counts as lost
WORKER_USER = "worker"  # the name whose token admin and workers know each other by


class Refusal(SandboxError):
    """A service said no. `code` is one of CODES."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Disconnected(SandboxError):
    """No answer: the other end cannot be reached, or the connection broke.

    Whether the request was carried out is not known.
    """


CODES: dict[
    str, tuple[int, type[Exception]]
] = {  # code -> (HTTP status, what the caller's side raises)
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
    "ended": (410, SandboxClosedError),  # the whole sandbox; "closed" may be a session
    "worker_lost": (410, SandboxClosedError),
    "too_large": (413, SandboxError),
    "file": (422, SandboxFileError),
    "queue_full": (429, SandboxStartError),
    "internal": (500, SandboxError),
    "start_failed": (503, SandboxStartError),
    "busy": (503, SandboxError),
    "start_timeout": (504, SandboxStartError),
}
_CODE_OF = (
    (SandboxFileError, "file"),
    (IsolationError, "isolation"),
    (SandboxClosedError, "closed"),
    (SandboxStartError, "start_failed"),
    (Disconnected, "worker_lost"),
    (SandboxError, "sandbox"),
    (ValueError, "bad_request"),
)


def encode_error(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body).

    What is no error of ours is told as "internal", without its text: that is for the log.
    """
    code = getattr(error, "code", None) if isinstance(error, SandboxError) else None
    code = (
        code
        if code in CODES
        else next((code for kind, code in _CODE_OF if isinstance(error, kind)), "internal")
    )
    body = {
        "code": code,
        "message": (
            str(error)[:2000] if code != "internal" else "the service failed; its log says how"
        ),
    }
    if isinstance(error, SandboxFileError):
        body["reason"] = error.reason
    return CODES[code][0], {"error": body}


def decode_error(status: int, body: Any) -> Exception:
    """The exception for an answer that is an error.

    What the other end says chooses among known types and never names one.
    """
    told = body.get("error") if isinstance(body, dict) else None
    code, message, reason = (
        told.get(name) if isinstance(told, dict) else None for name in ("code", "message", "reason")
    )
    message = (
        message[:2000]
        if isinstance(message, str)
        else f"the service answered with HTTP status {status}"
    )
    kind = CODES[code][1] if isinstance(code, str) and code in CODES else SandboxError
    if kind is SandboxFileError:
        return (
            SandboxFileError(reason, message)
            if reason in SandboxFileError.REASONS
            else SandboxError(message)
        )
    error = kind(message)
    if isinstance(error, SandboxError):
        error.code = code if isinstance(code, str) and code in CODES else "sandbox"
    return error


class Field(NamedTuple):
    """One member of a request.

    `low` and `high` bound a number, or the length of a string or the number of items.
    """

    kind: str  # of KINDS
    says: str
    required: bool = False
    low: float = 0
    high: float = 4096


class Operation(NamedTuple):
    path: str
    # "json": JSON both ways; "read": query in, octets out; "write": query and octets in, JSON out;
    # "connect": a WebSocket
    shape: str
    says: str
    fields: dict[str, Field]
    answers: str
    # also as multipart/form-data: "request" (the JSON), then one part "file" for each name in its
    # "files"
    takes_files: bool = False

    @property
    def method(self) -> str:
        return "GET" if self.shape in ("read", "connect") else "POST"


KINDS = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "strings": {"type": "array", "items": {"type": "string"}},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "object": {"type": "object"},
}


def check(fields: Mapping[str, Field], given: Any) -> dict[str, Any]:
    """The members of a request as they should be.

    ValueError names the first that is missing, unknown or wrong.
    """
    if not isinstance(given, dict):
        raise ValueError(f"the request is a JSON object, not {type(given).__name__}")
    if unknown := [name for name in given if name not in fields]:
        raise ValueError(
            f"{unknown[0][:100]!r} is unknown here; known: {', '.join(fields) or 'nothing'}"
        )
    for name, field in fields.items():
        if given.get(name) is None:
            if field.required:
                raise ValueError(f"{name!r} is missing: {field.says}")
            continue
        _check_value(name, field, given[name])
    return {name: value for name, value in given.items() if value is not None}


def _check_value(name: str, field: Field, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": number and isinstance(value, int),
        "number": number,
        "strings": isinstance(value, list) and all(isinstance(item, str) for item in value),
        "map": isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
        "object": isinstance(value, dict),
    }[field.kind]
    if not fits:
        raise ValueError(f"{name!r} is a {field.kind}, not {type(value).__name__}")
    if field.kind == "boolean":
        return
    size = value if number else len(value)
    if (number and not math.isfinite(value)) or not field.low <= size <= field.high:
        raise ValueError(
            f"{name!r} is {'' if number else 'of length '}{size}; it is between {field.low:g} and"
            f" {field.high:g}"
        )
    for text in (
        [value]
        if field.kind == "string"
        else (
            value
            if field.kind == "strings"
            else [*value, *value.values()]
            if field.kind == "map"
            else []
        )
    ):
        try:
            text.encode("utf-8", "surrogateescape")  # the way of file names that are not UTF-8
        except UnicodeEncodeError:
            raise ValueError(
                f"{name!r} holds a lone surrogate, which no program can be given"
            ) from None


def parse_query(fields: Mapping[str, Field], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """As `check`, from a query, whose values are all text."""
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name in given:
            raise ValueError(f"{name[:100]!r} is given twice")
        try:
            given[name] = (
                {"integer": int, "number": float}.get(fields[name].kind, str)(text)
                if name in fields
                else text
            )
        except ValueError:
            raise ValueError(f"{name!r} is a {fields[name].kind}, not {text[:100]!r}") from None
    return check(fields, given)


def parse_json(data: bytes) -> Any:
    """ValueError for what is no JSON, nested too deep for us, or no text."""
    try:
        return json.loads(data) if data.strip() else {}
    except RecursionError:
        raise ValueError("the JSON is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {str(error)[:200]}") from None


CONFIG = {
    "isolation": Field("string", '"required" or "best_available"', high=20),
    "tier": Field("string", "of the embedded backend", high=20),
    "image": Field(
        "string",
        "a template, an environment of the hub by name or digest, or a Docker image; none: the"
        " worker's own programs",
        low=1,
        high=400,
    ),
    "runtime": Field("string", 'of a Docker image: "runsc", ...', low=1, high=100),
    "label": Field("string", "what it is for; stands beside its denials", high=400),
    "egress": Field("strings", "what may be reached", high=100),
    "memory_mb": Field("integer", "of all processes together", low=1, high=1 << 24),
    "pids": Field("integer", "processes and threads", low=1, high=1 << 22),
    "cpus": Field("number", "processors", low=0.01, high=1024),
    "disk_mb": Field("integer", "workspace and /tmp together", low=1, high=1 << 24),
    "inodes": Field("integer", "files", low=1, high=1 << 30),
    "open_files": Field("integer", "of one process", low=64, high=1 << 20),
    "timeout": Field(
        "number", "seconds for a command that names none", low=0.001, high=MAX_SECONDS
    ),
    "start_timeout": Field(
        "number", "seconds in the queue and for the start together", low=0.001, high=MAX_SECONDS
    ),
    "max_output_bytes": Field(
        "integer", "kept of stdout and of stderr, each", low=1, high=16 << 20
    ),
    "env": Field("map", "variables of every command", high=1000),
}


def config_to_json(config: SandboxConfig) -> dict[str, Any]:
    """What differs from the defaults.

    Where the admin is, our token and our variables stay here: variables travel with each command.
    """
    plain = SandboxConfig(backend="remote", url="http://unused")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name in CONFIG
        if name != "env" and (value := getattr(config, name)) != getattr(plain, name)
    }


def config_from_json(given: Any, backend: str = "embedded") -> SandboxConfig:
    """ValueError for what makes no sense."""
    values = check(CONFIG, given)
    return SandboxConfig(backend=backend, **(values | {"egress": tuple(values.get("egress", ()))}))


def result_to_json(result: CommandResult) -> dict[str, Any]:
    return asdict(result)


_RESULT_TYPES = {
    "stdout": str,
    "stderr": str,
    "exit_code": int,
    "timed_out": bool,
    "truncated": bool,
    "seconds": (int, float),
    "limits_hit": list,
    "network_denials": int,
    "cut": list,
}


def result_from_json(body: Any) -> CommandResult:
    """SandboxError for what makes no sense: the other end may be anyone."""
    if not isinstance(body, dict) or any(
        not isinstance(body.get(name), kind) for name, kind in _RESULT_TYPES.items()
    ):
        raise SandboxError("the answer to a command makes no sense")
    if len(body["cut"]) != 2 or any(type(size) is not int for size in body["cut"]):
        raise SandboxError(
            "the answer to a command makes no sense: its `cut` is not two numbers of bytes"
        )
    return CommandResult(
        **{name: body[name] for name in _RESULT_TYPES}
        | {"limits_hit": tuple(map(str, body["limits_hit"])), "cut": tuple(body["cut"])}
    )


def status_from_json(body: Any) -> SandboxStatus:
    if not isinstance(body, dict) or any(
        not isinstance(body.get(name), (int, float, type(None))) for name in SandboxStatus._fields
    ):
        raise SandboxError("the answer about a sandbox's use makes no sense")
    return SandboxStatus(**{name: body.get(name) for name in SandboxStatus._fields})


def entries_from_json(body: Any) -> list[FileEntry]:
    try:
        entries = [FileEntry(*entry) for entry in body["entries"]]
        if not all(
            isinstance(one.path, str)
            and isinstance(one.kind, str)
            and type(one.size) is type(one.mode) is int
            for one in entries
        ):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise SandboxError("the answer to list_files makes no sense") from error
    return entries


_ID = {"sandbox": Field("string", "its id", required=True, low=1, high=80)}
_POLL = {
    "call": Field(
        "string",
        "a key of the caller's making: the same request again joins the first",
        low=1,
        high=80,
    ),
    "wait": Field(
        "number",
        "seconds to wait for the end before 202 is answered; only with call",
        high=MAX_WAIT,
    ),
}
_TIMEOUT = {
    "timeout": Field("number", "seconds; by default the sandbox's", low=0.001, high=MAX_SECONDS)
}
_COMMAND = {
    "command": Field("string", "for bash -c", required=True, high=MAX_JSON_BYTES),
    **_TIMEOUT,
    "env": Field("map", "variables", high=1000),
}
_PATH = {"path": Field("string", "below the workspace", required=True, high=4096)}
_SESSION = {"session": Field("string", "its id", required=True, low=1, high=80)}
_JOB = Field("string", "its id", low=1, high=80)
_RESULT = (
    "stdout, stderr, exit_code, timed_out, truncated, seconds, limits_hit, network_denials, cut"
)
_TRANSFER = "files, bytes, skipped"
_START = {
    "config": Field("object", "limits, as SandboxConfig has them"),
    "snapshot": Field("string", "files to start from", low=1, high=80),
    "experiment": Field(
        "string", "of the caller; experiments share a caller's turns fairly", high=200
    ),
    "key": Field(
        "string",
        "a key of the caller's making: the same start again is the same sandbox",
        low=1,
        high=80,
    ),
    "auto_clear_seconds": Field(
        "number", "idle time after which it is removed", low=1, high=MAX_SECONDS
    ),
}
_STATE = "sandbox, state (queued, starting, running), and once it runs: tier, guarantees, workspace"


def _json(
    prefix: str, name: str, says: str, fields: dict[str, Field], answers: str, **more: Any
) -> tuple[str, Operation]:
    return name, Operation(prefix + name.rpartition("/")[2], "json", says, fields, answers, **more)


IN_SANDBOX: dict[str, Operation] = dict(
    [  # served by a worker for its sandboxes, and by the admin for all
        _json(
            SANDBOX,
            "execute",
            "Run a command and wait for its end.",
            _ID | _COMMAND | _POLL,
            _RESULT,
        ),
        _json(
            SANDBOX, "spawn", "Start a command in the background.", _ID | _COMMAND | _POLL, "job"
        ),
        _json(
            SANDBOX,
            "wait",
            "The end of a job or of a call; 202 while it runs.",
            _ID | {"job": _JOB, "call": _JOB, "wait": _POLL["wait"]},
            _RESULT,
        ),
        _json(
            SANDBOX,
            "interrupt",
            "SIGINT for a job or for what a session runs.",
            _ID | {"job": _JOB, "session": _JOB},
            "nothing",
        ),
        _json(
            SANDBOX,
            "kill",
            "SIGKILL for a job, and its end.",
            _ID | {"job": _JOB._replace(required=True)},
            _RESULT,
        ),
        _json(SANDBOX, "kill_all", "Kill every process; files stay.", _ID, "nothing"),
        _json(
            SANDBOX,
            "cancel",
            "Give up a call: what it runs is killed.",
            _ID | {"call": _JOB._replace(required=True)},
            "nothing",
        ),
        _json(
            SANDBOX,
            "create_session",
            "A bash that keeps its state.",
            _ID | {"env": Field("map", "variables", high=1000)} | _POLL,
            "session",
        ),
        _json(
            SANDBOX,
            "run_in_session",
            "Give a session a command.",
            _ID | _SESSION | {name: _COMMAND[name] for name in ("command", "timeout")} | _POLL,
            _RESULT + ", session_ended",
        ),
        _json(SANDBOX, "close_session", "End a session.", _ID | _SESSION, "nothing"),
        _json(
            SANDBOX,
            "verify",
            "Kill what the agent left, then run a script that it can never read.",
            _ID
            | {"script": Field("string", "for bash", required=True, high=MAX_JSON_BYTES)}
            | _TIMEOUT
            | {
                "files": Field("strings", "names of the files sent along", high=1000),
                "keep": Field("boolean", "whether what it writes stays"),
            }
            | _POLL,
            _RESULT,
            takes_files=True,
        ),
        _json(
            SANDBOX,
            "list_files",
            "All below a directory.",
            _ID | _PATH,
            "entries: [path, kind, size, mode] each",
        ),
        _json(
            SANDBOX,
            "get_sandbox_statistics",
            "What it uses now.",
            _ID,
            ", ".join(SandboxStatus._fields),
        ),
        _json(
            SANDBOX,
            "denials",
            "Attempts to reach what is not granted.",
            _ID,
            "denials: [time, protocol, destination, port, label] each",
        ),
        _json(SANDBOX, "snapshot", "Keep its files as they are.", _ID | _POLL, "snapshot"),
        _json(
            SANDBOX,
            "restore",
            "Back to these files; every process ends.",
            _ID | {"snapshot": Field("string", "its id", required=True, low=1, high=80)} | _POLL,
            "tier, guarantees, workspace",
        ),
        (
            "read_file",
            Operation(
                SANDBOX + "read_file", "read", "The content of a file.", _ID | _PATH, "the content"
            ),
        ),
        (
            "write_file",
            Operation(
                SANDBOX + "write_file",
                "write",
                "The body becomes the content of a file.",
                _ID | _PATH | {"mode": Field("integer", "permission bits", high=0o777)},
                "bytes",
            ),
        ),
        (
            "upload",
            Operation(
                SANDBOX + "upload",
                "write",
                "Unpack a tar archive, links and devices skipped.",
                _ID | _PATH,
                _TRANSFER,
            ),
        ),
        (
            "download",
            Operation(
                SANDBOX + "download",
                "read",
                "A directory as a tar archive of its regular files.",
                _ID | _PATH,
                "a tar archive",
            ),
        ),
        (
            "connect",
            Operation(
                SANDBOX + "connect",
                "connect",
                'What listens on a port in the sandbox; the text "eof" ends one direction.',
                _ID
                | {
                    "port": Field(
                        "integer", "on 127.0.0.1 in the sandbox", required=True, low=1, high=65535
                    )
                },
                "octets both ways",
            ),
        ),
    ]
)

TO_WORKER: dict[str, Operation] = IN_SANDBOX | dict(
    [
        _json(
            WORKER,
            "worker/create",
            "Make a sandbox.",
            _ID
            | {
                "backend": Field("string", "embedded or docker", required=True, high=20),
                "config": Field("object", "limits", required=True),
                "snapshot": _START["snapshot"],
            }
            | _POLL,
            "tier, guarantees, workspace",
        ),
        _json(WORKER, "worker/stop", "End a sandbox; fine if it has ended.", _ID, "nothing"),
        _json(
            WORKER,
            "worker/forget_snapshot",
            "Nothing starts from it any more.",
            {"snapshot": _START["snapshot"]._replace(required=True)},
            "nothing",
        ),
        _json(WORKER, "worker/ping", "Whether it is there.", {}, "incarnation"),
    ]
)

_NAME = {"name": Field("string", "its name", required=True, low=1, high=200)}
TO_ADMIN: dict[str, Operation] = IN_SANDBOX | dict(
    [
        _json(
            SANDBOX,
            "start",
            "A sandbox, waited for up to `wait` seconds (default: until it runs or fails).",
            _START | {"wait": _POLL["wait"]},
            _STATE,
        ),
        _json(SANDBOX, "start_async", "A sandbox, not waited for: see get_status.", _START, _STATE),
        _json(
            SANDBOX,
            "get_status",
            "How far it is. Failed ones answer with the error that they ended with.",
            _ID
            | {
                "wait": Field(
                    "number", "seconds to wait while it is queued or starting", high=MAX_WAIT
                )
            },
            _STATE,
        ),
        _json(SANDBOX, "is_alive", "Whether it runs.", _ID, "is_alive, state"),
        _json(SANDBOX, "stop", "End it; fine if it has ended.", _ID, "nothing"),
        _json(
            SANDBOX,
            "fork",
            "Another sandbox with its files.",
            _ID | {"key": _START["key"], "wait": _POLL["wait"]},
            _STATE,
        ),
        _json(
            SANDBOX,
            "commit",
            "Keep its workspace in the hub as an environment.",
            _ID | _NAME | {"tags": Field("strings", "any", high=50)},
            "digest, name, bytes",
        ),
        _json(
            SANDBOX,
            "keep_alive",
            "These are in use, whatever their idle time.",
            {"ids": Field("strings", "sandboxes and snapshots", required=True, high=100_000)},
            "unknown",
        ),
        _json(
            SANDBOX,
            "delete_snapshot",
            "Nothing starts from it any more.",
            {"snapshot": _START["snapshot"]._replace(required=True)},
            "nothing",
        ),
        _json(
            HUB,
            "hub/register",
            "A name for an environment (a stored blob) or an image.",
            _NAME
            | {
                "kind": Field("string", '"environment" or "image"', required=True, high=20),
                "digest": Field("string", "sha256:...", required=True, low=71, high=71),
                "reference": Field("string", "an image's name for its engine", high=400),
                "tags": Field("strings", "any", high=50),
            },
            "the entry",
        ),
        _json(
            HUB,
            "hub/get",
            "An entry by name or digest.",
            _NAME,
            "name, kind, digest, reference, owner, tags, bytes, created",
        ),
        _json(
            HUB,
            "hub/list",
            "All entries.",
            {
                "tag": Field("string", "only those with it", high=200),
                "owner": Field("string", "only theirs", high=200),
            },
            "entries",
        ),
        _json(
            HUB, "hub/delete", "Remove a name; the blob goes with its last name.", _NAME, "nothing"
        ),
        (
            "hub/store",
            Operation(
                HUB + "store",
                "write",
                "Keep a blob, a tar archive for an environment.",
                {},
                "digest, bytes",
            ),
        ),
        (
            "hub/fetch",
            Operation(
                HUB + "fetch",
                "read",
                "A blob.",
                {"digest": Field("string", "sha256:...", required=True, low=71, high=71)},
                "the blob",
            ),
        ),
        _json(
            TEMPLATE,
            "template/register",
            "What to start by a name, and how many to keep ready.",
            _NAME
            | {
                "config": Field("object", "limits", required=True),
                "environment": Field("string", "of the hub: files to start with", low=1, high=200),
                "ready": Field("integer", "kept started", high=1000),
            },
            "name, ready",
        ),
        _json(TEMPLATE, "template/list", "All templates.", {}, "templates"),
        _json(TEMPLATE, "template/delete", "Remove it; those kept ready end.", _NAME, "nothing"),
        _json(
            WORKER,
            "worker/register",
            "A worker is there.",
            _NAME
            | {
                "url": Field("string", "where it answers", required=True, high=400),
                "incarnation": Field("string", "this process of it", required=True, low=8, high=80),
                "kinds": Field("strings", "backend:isolation each", required=True, high=20),
                "memory_mb": Field("integer", "to give out", required=True, low=1, high=1 << 40),
                "cpus": Field("number", "to give out", required=True, low=0.01, high=1 << 30),
                "pids": Field("integer", "to give out", required=True, low=1, high=1 << 30),
                "sandboxes": Field("integer", "at most", required=True, low=1, high=1 << 20),
            },
            "nothing",
        ),
        _json(
            WORKER,
            "worker/heartbeat",
            "It is still there.",
            {
                "incarnation": Field("string", "as registered", required=True, high=80),
                "ended": Field(
                    "strings", "its sandboxes that have ended by themselves", high=100_000
                ),
                "held": Field("strings", "all its sandboxes", high=100_000),
            },
            "forgotten: those held that are to end",
        ),
    ]
)
