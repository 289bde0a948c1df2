"""JSON forms of the values that requests and responses carry.

The other end is not trusted: a response of the wrong shape raises SandboxError.
"""

import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from envs.rock.backend import check_listed_path
from envs.rock.config import (
    FILE_KINDS,
    MAX_SECONDS,
    CommandResult,
    FileEntry,
    SandboxConfig,
    SandboxStatus,
)
from envs.rock.doors import Door
from envs.rock.errors import SandboxError
from envs.rock.wire.fields import Field, check

# members of SandboxConfig that a request may set; the others stay with the caller
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
    "doors": Field("strings", "names that the client answers, NAME:PORT", high=16),
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


async def _end_at_once(connection: socket.socket) -> None:
    connection.close()


_UNANSWERED = Door(_end_at_once)


def config_to_json(config: SandboxConfig) -> dict[str, Any]:
    """Return the members of a config that differ from the defaults.

    The admin's URL, the token and the variables are left out: variables travel with each command.
    """
    defaults = SandboxConfig(backend="remote", url="http://unused")
    changed: dict[str, Any] = {}
    for name in CONFIG:
        value = getattr(config, name)
        if name != "env" and value != getattr(defaults, name):
            changed[name] = list(value) if isinstance(value, tuple | Mapping) else value
    return changed


def config_from_json(
    given: Any, backend: str = "embedded", doors: Mapping[str, Door] | None = None
) -> SandboxConfig:
    """Return the config that a request asks for.

    Args:
      given: the request's.
      backend: of the sandbox.
      doors: what the names of its doors stand for; by default nobody answers.

    Raises:
      ValueError: names the first member that is unknown or out of range.
    """
    values = check(CONFIG, given)
    values["egress"] = tuple(values.get("egress", ()))
    names = values.get("doors", ())
    values["doors"] = {name: (doors or {}).get(name, _UNANSWERED) for name in names}
    return SandboxConfig(backend=backend, **values)


def result_to_json(result: CommandResult) -> dict[str, Any]:
    """Return a command's result as a JSON object."""
    return asdict(result)


_RESULT_TYPES: dict[str, type | tuple[type, ...]] = {
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
    """Return the command's result that a response holds; SandboxError if it holds none."""
    if not isinstance(body, dict):
        raise SandboxError("the answer to a command is malformed: it is not a JSON object")
    for name, kind in _RESULT_TYPES.items():
        if not isinstance(body.get(name), kind):
            raise SandboxError(f"the answer to a command is malformed: see its `{name}`")
    cut = body["cut"]
    if len(cut) != 2 or any(type(size) is not int for size in cut):
        raise SandboxError(
            "the answer to a command is malformed: its `cut` is not two numbers of bytes"
        )
    values = {name: body[name] for name in _RESULT_TYPES}
    values["limits_hit"] = tuple(map(str, body["limits_hit"]))
    values["cut"] = tuple(cut)
    return CommandResult(**values)


def status_from_json(body: Any) -> SandboxStatus:
    """Return the resource use that a response holds; SandboxError if it holds none."""
    if not isinstance(body, dict):
        raise SandboxError("the answer to get_sandbox_statistics is not a JSON object")
    values: dict[str, Any] = {}
    for name in SandboxStatus._fields:
        value = body.get(name)
        if not isinstance(value, (int, float, type(None))):
            raise SandboxError(
                f"the answer to get_sandbox_statistics is malformed: see its `{name}`"
            )
        values[name] = value
    return SandboxStatus(**values)


def entries_from_json(body: Any) -> list[FileEntry]:
    """Return the files that a response lists.

    Raises:
      SandboxError: it lists none, or (SandboxFileError) a path leaves the listed directory.
    """
    try:
        return [_entry(fields) for fields in body["entries"]]
    except (KeyError, TypeError) as error:
        raise SandboxError("the answer to list_files is malformed") from error


def _entry(fields: Any) -> FileEntry:
    entry = FileEntry(*fields)
    has_texts = isinstance(entry.path, str) and isinstance(entry.kind, str)
    has_numbers = type(entry.size) is int and type(entry.mode) is int
    if not has_texts or not has_numbers or entry.size < 0 or entry.kind not in FILE_KINDS:
        raise TypeError(f"{entry!r} is not a file entry")
    check_listed_path(entry.path)
    return entry
