"""What a tool is, and what it is given when it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rome.agent.iflow.desk import Desk
from rome.agent.iflow.events import Status, TodoItem, ToolCall, ToolFinished
from rome.agent.iflow.places.workspace import Workspace

# What a call may touch, for approval: nothing outside the session, files to read, files to write,
# commands, hosts outside, or a program that says nothing about it (a tool of an MCP server).
Access = Literal["none", "read", "write", "execute", "network", "unknown"]


class ToolError(Exception):
    """A call failed in a way that the model is told of; the message is its whole result."""


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """The result of a call; the members are those of `events.ToolFinished`."""

    output: str
    status: Status = "ok"
    exit_code: int | None = None
    file: str = ""
    changed: tuple[str, ...] = ()
    diff: str = ""
    denials: int = 0
    ends_turn: bool = False

    def finished(self, call_id: str, seconds: float = 0.0) -> ToolFinished:
        """Return the event of a call that has this result."""
        values = dataclasses.asdict(self)
        del values["ends_turn"]
        return ToolFinished(call_id=call_id, seconds=round(seconds, 3), **values)


@dataclasses.dataclass
class ToolContext:
    """What a running call may use."""

    call: ToolCall  # that runs
    workspace: Workspace
    emit: Callable[[Any], Any]  # appends an event to the session
    asker: Desk  # asks the user
    session_folder: str  # of this machine, where whole outputs and the like are kept
    todo: tuple[TodoItem, ...] = ()  # the list of what is to do, as it is now
    mode: str = "default"  # of approval, as it is now
    # path -> (size, time of change) of each file as the agent last saw it; tools that read or write
    # a file note it here
    read_files: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    # Whether a rule forbids to read a file, for tools that find files themselves
    is_denied: Callable[[str], bool] = lambda path: False


def takes(*required: str, **members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object: the names that it must have, and each member's."""
    schema: dict[str, Any] = {"type": "object", "properties": members}
    return schema | {"required": list(required)} if required else schema


def of(type: str, description: str = "", **rest: Any) -> dict[str, Any]:
    """Return the schema of one argument: its type, and what it means."""
    said = {"description": description} if description else {}
    return {"type": type, **said, **rest}


class Tool:
    """A tool that the model may call, to derive from."""

    name: str = ""  # as the model calls it
    description: str = ""  # for the model
    # JSON schema of its arguments, an object
    parameters: Mapping[str, Any] = takes()
    # Whether calls of it may run beside others: it changes nothing that they read
    is_parallel: bool = False
    accesses: Access = "none"  # what a call may touch, unless `access` says more
    shown: tuple[str, ...] = ("path",)  # arguments that tell people what a call does

    def access(self, arguments: Mapping[str, Any]) -> Access:
        """Return what a call with these arguments may touch, at most."""
        return self.accesses

    def paths(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the files that such a call names, for rules on paths."""
        path = arguments.get("path", "")
        return (path,) if isinstance(path, str) and path else ()

    def summary(self, arguments: Mapping[str, Any]) -> str:
        """Return one line for people: what such a call does."""
        return " ".join(
            [self.name, *(str(arguments[key]) for key in self.shown if key in arguments)]
        )

    async def preview(self, arguments: Mapping[str, Any], context: ToolContext) -> str:
        """Return the diff that such a call would make; "" where it makes none."""
        return ""

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Run a call.

        Raises:
          ToolError: it failed, as the model is told.
          WorkspaceError: the place failed.
        """
        raise NotImplementedError(f"{type(self).__name__} does not run")


def schema_of(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool as chat templates and OpenAI's API have it."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def read_arguments(tool: Tool, text: str) -> dict[str, Any]:
    """Return the arguments of a call, JSON text, checked against the tool's schema.

    Unknown members are refused, missing ones named, and a number or a boolean written as text is
    read as what the schema asks for: models often write them so.

    Raises:
      ToolError: they do not fit; the message says what the tool takes.
    """
    try:
        given = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments of {tool.name} are no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ToolError(f"the arguments of {tool.name} must be an object, not {text[:80]}")
    names = tool.parameters.get("properties", {})
    unknown = sorted(set(given) - set(names))
    if unknown and not tool.parameters.get("additionalProperties", False):
        known = ", ".join(names) or "no arguments"
        raise ToolError(f"{tool.name} takes no {', '.join(unknown)}; it takes {known}")
    return _read_members(tool.name, given, tool.parameters)


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def _read_members(what: str, given: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object as its schema has it; `what` it is, for the model."""
    missing = [name for name in schema.get("required", ()) if name not in given]
    if missing:
        raise ToolError(f"{what} needs {', '.join(missing)}")
    members = schema.get("properties", {})
    return {
        name: _read(f"{name} of {what}", value, members.get(name, {}))
        for name, value in given.items()
    }


def _read(what: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return one argument, or a part of it, as its schema has it."""
    wanted = str(schema.get("type"))
    if wanted not in _TYPES:
        return value
    if isinstance(value, str) and wanted != "string":
        with contextlib.suppress(ValueError):
            value = json.loads(value.lower() if wanted == "boolean" else value)
    if wanted == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    is_number_wanted = wanted in ("integer", "number")
    if not isinstance(value, _TYPES[wanted]) or (is_number_wanted and isinstance(value, bool)):
        shown = json.dumps(value, ensure_ascii=False)[:80]
        raise ToolError(f"{what} must be of type {wanted}, not {shown}")
    low, high = schema.get("minimum"), schema.get("maximum")
    if (low is not None and value < low) or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low or 0} and {high}"
        raise ToolError(f"{what} must be {limit}, not {value}")
    choices = schema.get("enum")
    if choices is not None and value not in choices:
        raise ToolError(f"{what} must be one of {', '.join(map(str, choices))}")
    if isinstance(value, dict):
        return _read_members(what, value, schema)
    if isinstance(value, list):
        each = schema.get("items", {})
        return [_read(f"item {n} of {what}", one, each) for n, one in enumerate(value, 1)]
    return value
