"""Typed tools over a database: JSON schemas, the checking of arguments, and the answers of calls.

A tool is a function (database, **arguments) -> plain data. It changes the database only when it
succeeds: a refusal (ToolRefusal) comes before the first change. Arguments are untrusted. They are
checked against the schema here, so tools see only values of the declared types.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.gem.tool_call import ToolCall

Database = dict[str, Any]
MAX_TEXT_CHARS = 1000  # length of one string argument; nothing in these worlds is longer
MAX_ITEMS = 50  # items of one array
_MAX_SHOWN_CHARS = 60  # of a value in an error
_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}


class ArgumentError(ValueError):
    """The call does not fit the tool's schema. The message is the model's observation."""


class ToolRefusal(Exception):
    """The tool refused: no such id, out of stock, or against the rules of the system.

    The message is the model's observation.
    """


@dataclasses.dataclass(frozen=True)
class Tool:
    """One function that the model can call.

    `parameters` maps names to JSON schemas of the types string, integer, number, boolean and array,
    with enum, minimum and maximum. Parameters in `optional` may be left out. `writes` is True where
    the tool may change the database.
    """

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    run: Callable[..., Any]
    writes: bool = False
    optional: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """Return the schema in the form that chat templates and chat-completions servers take."""
        needed = [name for name in self.parameters if name not in self.optional]
        properties = {name: dict(schema) for name, schema in self.parameters.items()}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {"type": "object", "properties": properties, "required": needed},
            },
        }

    def check(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments in the declared types.

        Raises:
          ArgumentError: an argument is unknown, missing or of another type.
        """
        if unknown := [name for name in arguments if name not in self.parameters]:
            raise ArgumentError(
                f"{self.name} has no argument {_shown(unknown[0])}; it takes"
                f" {', '.join(self.parameters) or 'none'}"
            )
        needed = [name for name in self.parameters if name not in self.optional]
        if missing := [name for name in needed if name not in arguments]:
            kind = self.parameters[missing[0]]["type"]
            raise ArgumentError(f"{self.name} needs the argument {missing[0]!r} ({kind})")
        return {
            name: _checked(f"{self.name}: {name}", value, self.parameters[name])
            for name, value in arguments.items()
        }


def _checked(where: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return a value in its schema's type, or raise ArgumentError."""
    kind = schema["type"]
    if isinstance(value, str) and kind != "string":  # Qwen3-Coder's form of a call has texts only
        value = _parsed(where, value, kind)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool) != (kind == "boolean"):
        raise ArgumentError(f"{where} is {_shown(value)}; it must be of type {kind}")
    if kind == "array":
        return _checked_items(where, value, schema["items"])
    if kind == "string" and len(value) > MAX_TEXT_CHARS:
        raise ArgumentError(f"{where} has {len(value)} characters; at most {MAX_TEXT_CHARS}")
    if kind in ("integer", "number"):
        _check_range(where, value, schema)
    if "enum" in schema and value not in schema["enum"]:
        options = ", ".join(map(str, schema["enum"]))
        raise ArgumentError(f"{where} is {_shown(value)}; it must be one of {options}")
    return value


def _checked_items(where: str, items: list[Any], schema: Mapping[str, Any]) -> list[Any]:
    if len(items) > MAX_ITEMS:
        raise ArgumentError(f"{where} has {len(items)} items; at most {MAX_ITEMS}")
    return [_checked(f"{where}[{number}]", item, schema) for number, item in enumerate(items)]


def _check_range(where: str, value: float, schema: Mapping[str, Any]) -> None:
    if not -1e12 < value < 1e12:  # false for nan, too
        raise ArgumentError(
            f"{where} is {_shown(value)}; it must be a finite number of sensible size"
        )
    if not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        low = schema.get("minimum", "any")
        high = schema.get("maximum", "any")
        raise ArgumentError(f"{where} is {_shown(value)}; it must be from {low} to {high}")


def _parsed(where: str, text: str, kind: str) -> Any:
    try:
        return json.loads(text if len(text) <= MAX_TEXT_CHARS else "")
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"{where} is {_shown(text)}; it must be of type {kind}") from error


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


class Toolbox:
    """The tools of a world by name; runs calls on a database."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.by_name = {tool.name: tool for tool in tools}

    def schemas(self) -> list[dict[str, Any]]:
        """Return the schemas of all tools."""
        return [tool.schema() for tool in self.by_name.values()]

    def call(self, database: Database, call: ToolCall) -> Any:
        """Run a call and return the tool's answer as plain data.

        Raises:
          ArgumentError: the call fits no tool's schema. The database is unchanged.
          ToolRefusal: the tool refused. The database is unchanged.
        """
        tool = self.by_name.get(call.name)
        if tool is None:
            raise ArgumentError(
                f"there is no tool {_shown(call.name)}; the tools are {', '.join(self.by_name)}"
            )
        return tool.run(database, **tool.check(call.arguments))

    def replay(self, database: Database, calls: Sequence[ToolCall]) -> list[Any]:
        """Run calls in order and return their answers.

        Raises:
          ValueError: a call failed; the message names it.
        """
        answers = []
        for number, call in enumerate(calls):
            try:
                answers.append(self.call(database, call))
            except (ArgumentError, ToolRefusal) as error:
                shown = f"{call.name}({json.dumps(call.arguments)})"
                raise ValueError(f"call {number + 1}, {shown}, fails: {error}") from error
        return answers


def told(answer: Any) -> str:
    """Return an answer as the observation."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def outcome(database: Database) -> Database:
    """Return the part of a state that counts: all keys that do not begin with an underscore.

    Such keys hold, for example, the page that is open. BFCL leaves out private attributes likewise.
    """
    return {name: value for name, value in database.items() if not name.startswith("_")}


def digest(database: Database) -> str:
    """Return a hash of what counts in a state, independent of the order of its keys."""
    text = json.dumps(outcome(database), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def find(table: Mapping[str, Any], key: str, what: str) -> Any:
    """Return an entry of a table, or refuse with the name of what is missing."""
    if key not in table:
        raise ToolRefusal(f"{what} {_shown(key)} does not exist")
    return table[key]


def text(description: str, **more: Any) -> dict[str, Any]:
    """Return the schema of a string argument."""
    return {"type": "string", "description": description, **more}


def texts(description: str) -> dict[str, Any]:
    """Return the schema of an argument that is an array of strings."""
    return {"type": "array", "items": {"type": "string"}, "description": description}


def whole(description: str, **more: Any) -> dict[str, Any]:
    """Return the schema of an integer argument."""
    return {"type": "integer", "description": description, **more}
