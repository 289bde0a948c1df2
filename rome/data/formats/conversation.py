"""A conversation as text: what every reader of a format returns, where the record has no ids."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")


class UnfitError(ValueError):
    """A record cannot be trained on; the message says why."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool.

    Args:
      name: of the tool.
      arguments: as JSON text, kept as it was written.
    """

    name: str
    arguments: str

    def parsed(self) -> dict[str, Any] | None:
        """Return the arguments; None where they are no JSON object."""
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return None
        return arguments if isinstance(arguments, dict) else None


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Args:
      role: system, user, assistant or tool.
      text: what it says.
      reasoning: what an assistant thought before it.
      calls: of tools, by an assistant.
      learned: False for an assistant's message that is only read.
    """

    role: str
    text: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    learned: bool = True


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The messages of one record.

    Args:
      messages: in order; the first one may be the system's.
      tools: schemas of the tools in OpenAI's form.
      reward: of the episode; None where the record has none.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    reward: float | None = None


def text_of(content: Any, what: str) -> str:
    """Return the text of a message's content: text, a list of text parts, or nothing.

    Raises:
      UnfitError: it holds something else, such as an image.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UnfitError(f"{what} is a {type(content).__name__}, not text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UnfitError(f"{what} has a part of the type {str(kind)[:40]!r}; only text is read")
        texts.append(part["text"])
    return "".join(texts)


def call_of(name: Any, arguments: Any, what: str) -> Call:
    """Return a call, its arguments as text or as an object.

    Raises:
      UnfitError: it has no name, or arguments that are neither.
    """
    if not isinstance(name, str) or not name:
        raise UnfitError(f"{what} calls a tool without a name")
    if isinstance(arguments, str):
        return Call(name, arguments)
    if arguments is None:
        return Call(name, "{}")
    if isinstance(arguments, dict):
        return Call(name, json.dumps(arguments, ensure_ascii=False))
    raise UnfitError(f"{what} calls {name} with a {type(arguments).__name__} as arguments")


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the schemas of tools in OpenAI's form, given as a list or as its JSON text.

    A schema that lies flat, as in the Responses API, is put under "function".

    Raises:
      UnfitError: it is something else.
    """
    if isinstance(value, str):
        value = _parse_tools(value)
    if not value:
        return ()
    if not isinstance(value, list):
        raise UnfitError(f"tools are a {type(value).__name__}, not a list of schemas")
    return tuple(_tool_of(tool) for tool in value)


def reward_of(value: Any) -> float | None:
    """Return a reward; None where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None


def _parse_tools(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else []
    except (ValueError, RecursionError):
        raise UnfitError("tools are a text that is no JSON") from None


def _tool_of(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise UnfitError(f"a tool is a {type(tool).__name__}, not a schema")
    if isinstance(tool.get("function"), dict):
        return tool
    if not isinstance(tool.get("name"), str):
        raise UnfitError("a tool has no name")
    known = ("name", "description", "parameters")
    return {"type": "function", "function": {key: tool[key] for key in known if key in tool}}
