"""Typed tools over a database: JSON schemas, the checking of arguments, and what a call answers.

A tool is a function (database, **arguments) -> plain data. It changes the database only when it
succeeds: what it refuses it refuses with ToolRefusal before the first change. Arguments are
untrusted; they are checked against the schema here, so that tools see values of the declared types
only.
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
MAX_TEXT_CHARS = 1000  # of one string in the arguments; nothing in these worlds is longer
MAX_ITEMS = 50  # of one array
_SHOWN = 60
_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}


class ArgumentError(ValueError):
    """The call does not fit the tool's schema.

    The message is the observation that the model gets.
    """


class ToolRefusal(Exception):
    """The tool's own no: no such id, out of stock, against the rules of the system.

    The message is the observation.
    """


@dataclasses.dataclass(frozen=True)
class Tool:
    """One function that the model can call. `writes`: it may change the database.

    parameters: JSON schemas by name, of the types string, integer, number, boolean and array, with
    enum, minimum and maximum; `optional` may be left out.
    """

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    run: Callable[..., Any]
    writes: bool = False
    optional: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """The form that chat templates and chat-completions servers take."""
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
        """The arguments in the declared types. Raises ArgumentError."""
        if unknown := [name for name in arguments if name not in self.parameters]:
            raise ArgumentError(
                f"{self.name} has no argument {_shown(unknown[0])}; it takes"
                f" {', '.join(self.parameters) or 'none'}"
            )
        if missing := [
            name for name in self.parameters if name not in arguments and name not in self.optional
        ]:
            raise ArgumentError(
                f"{self.name} needs the argument {missing[0]!r}"
                f" ({self.parameters[missing[0]]['type']})"
            )
        return {
            name: _checked(f"{self.name}: {name}", value, self.parameters[name])
            for name, value in arguments.items()
        }


def _checked(where: str, value: Any, schema: Mapping[str, Any]) -> Any:
    kind = schema["type"]
    if isinstance(value, str) and kind != "string":  # Qwen3-Coder's form of a call has texts only
        value = _parsed(where, value, kind)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, _TYPES[kind]) or isinstance(value, bool) != (kind == "boolean"):
        raise ArgumentError(f"{where} is {_shown(value)}; it must be of type {kind}")
    if kind == "array":
        if len(value) > MAX_ITEMS:
            raise ArgumentError(f"{where} has {len(value)} items; at most {MAX_ITEMS}")
        return [
            _checked(f"{where}[{number}]", item, schema["items"])
            for number, item in enumerate(value)
        ]
    if kind == "string" and len(value) > MAX_TEXT_CHARS:
        raise ArgumentError(f"{where} has {len(value)} characters; at most {MAX_TEXT_CHARS}")
    if kind in ("integer", "number"):
        if not -1e12 < value < 1e12:  # false for nan, too
            raise ArgumentError(
                f"{where} is {_shown(value)}; it must be a finite number of sensible size"
            )
        if not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
            raise ArgumentError(
                f"{where} is {_shown(value)}; it must be from {schema.get('minimum', 'any')} to"
                f" {schema.get('maximum', 'any')}"
            )
    if "enum" in schema and value not in schema["enum"]:
        raise ArgumentError(
            f"{where} is {_shown(value)}; it must be one of {', '.join(map(str, schema['enum']))}"
        )
    return value


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
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class Toolbox:
    """The tools of a world by name; runs calls on a database."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.by_name = {tool.name: tool for tool in tools}

    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema() for tool in self.by_name.values()]

    def call(self, database: Database, call: ToolCall) -> Any:
        """What the tool answers, as plain data.

        Raises ArgumentError, ToolRefusal; the database is then as it was.
        """
        tool = self.by_name.get(call.name)
        if tool is None:
            raise ArgumentError(
                f"there is no tool {_shown(call.name)}; the tools are {', '.join(self.by_name)}"
            )
        return tool.run(database, **tool.check(call.arguments))

    def replay(self, database: Database, calls: Sequence[ToolCall]) -> list[Any]:
        """All calls in order, each of which must succeed: ValueError names the one that does not."""
        answers = []
        for number, call in enumerate(calls):
            try:
                answers.append(self.call(database, call))
            except (ArgumentError, ToolRefusal) as error:
                raise ValueError(
                    f"call {number + 1}, {call.name}({json.dumps(call.arguments)}), fails: {error}"
                ) from error
        return answers


def told(answer: Any) -> str:
    """An answer as the observation."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def outcome(database: Database) -> Database:
    """What counts of a state: all but keys that begin with an underscore (which page is open, say),
    as BFCL leaves out private attributes.
    """
    return {name: value for name, value in database.items() if not name.startswith("_")}


def digest(database: Database) -> str:
    """Of what counts of a state; equal for equal ones, whatever the order of their keys."""
    return hashlib.sha256(
        json.dumps(outcome(database), sort_keys=True, allow_nan=False).encode()
    ).hexdigest()


def find(table: Mapping[str, Any], key: str, what: str) -> Any:
    """The entry, or a refusal that names it."""
    if key not in table:
        raise ToolRefusal(f"{what} {_shown(key)} does not exist")
    return table[key]


def text(description: str, **more: Any) -> dict[str, Any]:
    """The schema of a string argument."""
    return {"type": "string", "description": description, **more}


def texts(description: str) -> dict[str, Any]:
    """The schema of an array of strings."""
    return {"type": "array", "items": {"type": "string"}, "description": description}


def whole(description: str, **more: Any) -> dict[str, Any]:
    """The schema of an integer argument."""
    return {"type": "integer", "description": description, **more}
