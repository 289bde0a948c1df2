"""What a tool is, and what it is given when it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from rome.agent.iflow.desk import Desk
from rome.agent.iflow.events import TodoItem, ToolCall, ToolFinished
from rome.agent.iflow.places.workspace import Workspace

# What a call may touch, for approval: nothing outside the session, files to read, files to write,
# commands, hosts outside, or a program that says nothing about it (a tool of an MCP server).
Access = Literal["none", "read", "write", "execute", "network", "unknown"]


class ToolError(Exception):
    """A call failed in a way that the model is told of; the message is its whole result."""


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """The result of a call; the attributes are those of `events.ToolFinished`."""

    output: str
    status: Literal["ok", "error", "denied", "cancelled", "infrastructure"] = "ok"
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
    """What a running call may use.

    Attributes:
      call: that runs.
      workspace: where it works.
      emit: appends an event to the session.
      asker: asks the user.
      session_folder: of this machine, where whole outputs and the like are kept.
      todo: the list of what is to do, as it is now.
      mode: of approval, as it is now.
      read_files: path -> (size, time of change) of each file as the agent last saw it; tools that
        read or write a file note it here.
      is_denied: whether a rule forbids to read a file, for tools that find files themselves.
    """

    call: ToolCall
    workspace: Workspace
    emit: Callable[[Any], Any]
    asker: Desk
    session_folder: str
    todo: tuple[TodoItem, ...] = ()
    mode: str = "default"
    read_files: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    is_denied: Callable[[str], bool] = lambda path: False


class Tool:
    """A tool that the model may call, to derive from.

    Attributes:
      name: as the model calls it.
      description: for the model.
      parameters: JSON schema of its arguments, an object.
      is_parallel: whether calls of it may run beside others: it changes nothing that they read.
      accesses: what a call may touch, unless `access` says more.
    """

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    parameters: ClassVar[Mapping[str, Any]] = {"type": "object", "properties": {}}
    is_parallel: ClassVar[bool] = False
    accesses: ClassVar[Access] = "none"

    def access(self, arguments: Mapping[str, Any]) -> Access:
        """Return what a call with these arguments may touch, at most."""
        return self.accesses

    def paths(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the files that such a call names, for rules on paths."""
        path = arguments.get("path", "")
        return (path,) if isinstance(path, str) and path else ()

    def summary(self, arguments: Mapping[str, Any]) -> str:
        """Return one line for people: what such a call does."""
        return " ".join([self.name, *self.paths(arguments)])

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


def takes(*required: str, **members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a tool's arguments.

    Args:
      *required: names of those that a call must have.
      **members: the schema of each.
    """
    schema: dict[str, Any] = {"type": "object", "properties": members}
    return schema | {"required": list(required)} if required else schema


def of(type: str, description: str = "", **rest: Any) -> dict[str, Any]:
    """Return the schema of one argument: its type, and what it means."""
    said = {"description": description} if description else {}
    return {"type": type, **said, **rest}


def schema_of(tool: Tool) -> dict[str, Any]:
    """Return the schema of a tool as chat templates and OpenAI's API have it."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def read_arguments(tool: Tool, text: str) -> dict[str, Any]:
    """Return the arguments of a call, checked against the tool's schema.

    Unknown members are refused, missing ones named, and a number or a boolean written as text is
    read as what the schema asks for: models often write them so.

    Args:
      tool: with the schema.
      text: JSON, as the model wrote it; empty counts as {}.

    Raises:
      ToolError: they do not fit; the message says what the tool takes.
    """
    try:
        given = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments of {tool.name} are no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ToolError(f"the arguments of {tool.name} must be an object, not {text[:80]}")
    properties = tool.parameters.get("properties", {})
    unknown = sorted(set(given) - set(properties))
    if unknown and not tool.parameters.get("additionalProperties", False):
        raise ToolError(
            f"{tool.name} takes no {', '.join(unknown)}; it takes"
            f" {', '.join(properties) or 'no arguments'}"
        )
    missing = [name for name in tool.parameters.get("required", ()) if name not in given]
    if missing:
        raise ToolError(f"{tool.name} needs {', '.join(missing)}")
    return {
        name: _read(tool.name, name, value, properties.get(name, {}))
        for name, value in given.items()
    }


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


def _read(tool: str, name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return one argument as its schema has it."""
    wanted = str(schema.get("type"))
    if wanted not in _TYPES:
        return value
    if isinstance(value, str) and wanted != "string":
        with contextlib.suppress(ValueError):
            value = json.loads(value.lower() if wanted == "boolean" else value)
    if wanted in ("integer", "number") and isinstance(value, bool):
        raise ToolError(f"{name} of {tool} must be of type {wanted}, not {json.dumps(value)}")
    if wanted == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, _TYPES[wanted]):
        shown = json.dumps(value, ensure_ascii=False)[:80]
        raise ToolError(f"{name} of {tool} must be of type {wanted}, not {shown}")
    choices = schema.get("enum")
    if choices is not None and value not in choices:
        raise ToolError(f"{name} of {tool} must be one of {', '.join(map(str, choices))}")
    return value
