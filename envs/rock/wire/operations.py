"""The operations of the ROCK protocol, one row each.

Servers check requests against these tables, and `/openapi.json` is written from them. Requests and
responses are JSON; only the contents of files travel as raw bytes, of any length.

An operation that may take long accepts `call`, a key that the caller makes up. Repeating a request
with the same key joins the running call, and status 202 means "not finished, ask again": a broken
connection costs nothing and never runs a command twice.
"""

from typing import Literal, NamedTuple

from envs.rock.config import MAX_SECONDS, SandboxStatus
from envs.rock.wire.fields import Field

# paths of the four groups of operations
SANDBOX = "/apis/envs/sandbox/v1/"
WORKER = "/apis/envs/worker/v1/"
HUB = "/apis/envs/hub/v1/"
TEMPLATE = "/apis/envs/template/v1/"

MAX_JSON_BYTES = 8 << 20
MAX_FILES_BYTES = 64 << 20  # of one verifier, all files together
MAX_WAIT_SECONDS = 30.0  # that one request may be held open
MAX_OFFSET = 1 << 62
GRACE_SECONDS = 30.0  # beyond the time that was asked for, until a response counts as lost
WORKER_USER = "worker"  # the user name whose token the admin and its workers share


class Operation(NamedTuple):
    """One route: what a request holds and what answers it.

    `shape` says how data travels. "json": JSON both ways; "read": a query in, bytes out; "write": a
    query and bytes in, JSON out; "connect": a WebSocket.
    """

    path: str
    shape: Literal["json", "read", "write", "connect"]
    summary: str
    fields: dict[str, Field]
    response: str
    # also accepted as multipart/form-data: "request" (the JSON), then one part "file" for each name
    # in its member "files"
    takes_files: bool = False

    @property
    def method(self) -> str:
        """The HTTP method of the route."""
        return "GET" if self.shape in ("read", "connect") else "POST"


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
        high=MAX_WAIT_SECONDS,
    ),
}
_KEY = {
    "call": Field(
        "string",
        "a key of the caller's making: a request that has succeeded is not carried out again",
        low=1,
        high=80,
    )
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
    path: str, summary: str, fields: dict[str, Field], response: str, takes_files: bool = False
) -> Operation:
    return Operation(path, "json", summary, fields, response, takes_files)


# operations in a sandbox: a worker serves it for its own sandboxes, the admin for all
IN_SANDBOX: dict[str, Operation] = {
    "execute": _json(
        SANDBOX + "execute",
        "Run a command and wait for its end.",
        _ID | _COMMAND | _POLL,
        _RESULT,
    ),
    "spawn": _json(
        SANDBOX + "spawn", "Start a command in the background.", _ID | _COMMAND | _POLL, "job"
    ),
    "wait": _json(
        SANDBOX + "wait",
        "The end of a job or of a call; 202 while it runs.",
        _ID | {"job": _JOB, "call": _JOB, "wait": _POLL["wait"]},
        _RESULT,
    ),
    "interrupt": _json(
        SANDBOX + "interrupt",
        "SIGINT for a job or for what a session runs.",
        _ID | {"job": _JOB, "session": _JOB} | _POLL,
        "nothing",
    ),
    "kill": _json(
        SANDBOX + "kill",
        "SIGKILL for a job, and its end.",
        _ID | {"job": _JOB._replace(required=True)} | _POLL,
        _RESULT,
    ),
    "kill_all": _json(
        SANDBOX + "kill_all", "Kill every process; files stay.", _ID | _POLL, "nothing"
    ),
    "cancel": _json(
        SANDBOX + "cancel",
        "Give up a call: what it runs is killed.",
        _ID | {"call": _JOB._replace(required=True)},
        "nothing",
    ),
    "create_session": _json(
        SANDBOX + "create_session",
        "A bash that keeps its state.",
        _ID | {"env": Field("map", "variables", high=1000)} | _POLL,
        "session",
    ),
    "run_in_session": _json(
        SANDBOX + "run_in_session",
        "Give a session a command.",
        _ID | _SESSION | {name: _COMMAND[name] for name in ("command", "timeout")} | _POLL,
        _RESULT + ", session_ended",
    ),
    "close_session": _json(
        SANDBOX + "close_session", "End a session.", _ID | _SESSION | _POLL, "nothing"
    ),
    "verify": _json(
        SANDBOX + "verify",
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
    "list_files": _json(
        SANDBOX + "list_files",
        "All below a directory.",
        _ID | _PATH,
        "entries: [path, kind, size, mode] each",
    ),
    "get_sandbox_statistics": _json(
        SANDBOX + "get_sandbox_statistics",
        "What it uses now.",
        _ID,
        ", ".join(SandboxStatus._fields),
    ),
    "denials": _json(
        SANDBOX + "denials",
        "Attempts to reach what is not granted.",
        _ID,
        "denials: [time, protocol, destination, port, label] each",
    ),
    "snapshot": _json(SANDBOX + "snapshot", "Keep its files as they are.", _ID | _POLL, "snapshot"),
    "restore": _json(
        SANDBOX + "restore",
        "Back to these files; every process ends.",
        _ID | {"snapshot": Field("string", "its id", required=True, low=1, high=80)} | _POLL,
        "tier, guarantees, workspace",
    ),
    "read_file": Operation(
        SANDBOX + "read_file",
        "read",
        "The content of a file.",
        _ID
        | _PATH
        | {"offset": Field("integer", "bytes to leave out at its beginning", high=MAX_OFFSET)},
        "the content",
    ),
    "write_file": Operation(
        SANDBOX + "write_file",
        "write",
        "The body becomes the content of a file.",
        _ID | _PATH | {"mode": Field("integer", "permission bits", high=0o777)} | _KEY,
        "bytes",
    ),
    "upload": Operation(
        SANDBOX + "upload",
        "write",
        "Unpack a tar archive; FIFOs and devices are skipped.",
        _ID | _PATH | _KEY,
        _TRANSFER,
    ),
    "download": Operation(
        SANDBOX + "download",
        "read",
        "A directory as a tar archive.",
        _ID | _PATH,
        "a tar archive",
    ),
    "connect": Operation(
        SANDBOX + "connect",
        "connect",
        "What listens on a port in the sandbox, or the next connection from it at a door, after one"
        ' byte; the text "eof" ends one direction.',
        _ID
        | {
            "port": Field("integer", "on 127.0.0.1 in the sandbox", low=1, high=65535),
            "door": Field("string", "a door of the sandbox, NAME:PORT", low=3, high=300),
        },
        "octets both ways",
    ),
}

# all that a worker serves
TO_WORKER: dict[str, Operation] = IN_SANDBOX | {
    "worker/create": _json(
        WORKER + "create",
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
    "worker/stop": _json(WORKER + "stop", "End a sandbox; fine if it has ended.", _ID, "nothing"),
    "worker/forget_snapshot": _json(
        WORKER + "forget_snapshot",
        "Nothing starts from it any more.",
        {"snapshot": _START["snapshot"]._replace(required=True)},
        "nothing",
    ),
    "worker/ping": _json(WORKER + "ping", "Whether it is there.", {}, "incarnation"),
}

_NAME = {"name": Field("string", "its name", required=True, low=1, high=200)}
# all that an admin serves
TO_ADMIN: dict[str, Operation] = IN_SANDBOX | {
    "start": _json(
        SANDBOX + "start",
        "A sandbox, waited for up to `wait` seconds (default: until it runs or fails).",
        _START | {"wait": _POLL["wait"]},
        _STATE,
    ),
    "start_async": _json(
        SANDBOX + "start_async", "A sandbox, not waited for: see get_status.", _START, _STATE
    ),
    "get_status": _json(
        SANDBOX + "get_status",
        "How far it is. Failed ones answer with the error that they ended with.",
        _ID
        | {
            "wait": Field(
                "number", "seconds to wait while it is queued or starting", high=MAX_WAIT_SECONDS
            )
        },
        _STATE,
    ),
    "is_alive": _json(SANDBOX + "is_alive", "Whether it runs.", _ID, "is_alive, state"),
    "stop": _json(SANDBOX + "stop", "End it; fine if it has ended.", _ID, "nothing"),
    "fork": _json(
        SANDBOX + "fork",
        "Another sandbox with its files.",
        _ID | {"key": _START["key"], "wait": _POLL["wait"]},
        _STATE,
    ),
    "commit": _json(
        SANDBOX + "commit",
        "Keep its workspace in the hub as an environment.",
        _ID | _NAME | {"tags": Field("strings", "any", high=50)} | _POLL,
        "digest, name, bytes",
    ),
    "keep_alive": _json(
        SANDBOX + "keep_alive",
        "These are in use, whatever their idle time.",
        {"ids": Field("strings", "sandboxes and snapshots", required=True, high=100_000)},
        "unknown",
    ),
    "delete_snapshot": _json(
        SANDBOX + "delete_snapshot",
        "Nothing starts from it any more.",
        {"snapshot": _START["snapshot"]._replace(required=True)},
        "nothing",
    ),
    "hub/register": _json(
        HUB + "register",
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
    "hub/get": _json(
        HUB + "get",
        "An entry by name or digest.",
        _NAME,
        "name, kind, digest, reference, owner, tags, bytes, created",
    ),
    "hub/list": _json(
        HUB + "list",
        "All entries.",
        {
            "tag": Field("string", "only those with it", high=200),
            "owner": Field("string", "only theirs", high=200),
        },
        "entries",
    ),
    "hub/delete": _json(
        HUB + "delete", "Remove a name; the blob goes with its last name.", _NAME, "nothing"
    ),
    "hub/store": Operation(
        HUB + "store",
        "write",
        "Keep a blob, a tar archive for an environment.",
        {},
        "digest, bytes",
    ),
    "hub/fetch": Operation(
        HUB + "fetch",
        "read",
        "A blob.",
        {"digest": Field("string", "sha256:...", required=True, low=71, high=71)},
        "the blob",
    ),
    "template/register": _json(
        TEMPLATE + "register",
        "What to start by a name, and how many to keep ready.",
        _NAME
        | {
            "config": Field("object", "limits", required=True),
            "environment": Field("string", "of the hub: files to start with", low=1, high=200),
            "ready": Field("integer", "kept started", high=1000),
        },
        "name, ready",
    ),
    "template/list": _json(TEMPLATE + "list", "All templates.", {}, "templates"),
    "template/delete": _json(
        TEMPLATE + "delete", "Remove it; those kept ready end.", _NAME, "nothing"
    ),
    "worker/register": _json(
        WORKER + "register",
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
    "worker/heartbeat": _json(
        WORKER + "heartbeat",
        "It is still there.",
        {
            "incarnation": Field("string", "as registered", required=True, high=80),
            "ended": Field("strings", "its sandboxes that have ended by themselves", high=100_000),
            "held": Field("strings", "all its sandboxes", high=100_000),
        },
        "forgotten: those held that are to end",
    ),
}
