r"""Parsing of tool calls in a model's turn, in both forms that Qwen models write.

Qwen3:

    <tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>

Qwen3-Coder, where the outer tag is sometimes missing:

    <tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>

The text is not trusted. What cannot be parsed raises ToolCallError, whose message is written for
the model: it says what to change.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
_FUNCTION_OPEN = "<function="
_FUNCTION_CLOSE = "</function>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*\Z", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(.*?)</parameter>", re.DOTALL)


class ToolCallError(ValueError):
    """A malformed tool call; the message is the observation that the model gets."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool, by its name and arguments."""

    name: str
    arguments: dict[str, Any]


def format_tool_call(name: str, arguments: dict[str, Any]) -> str:
    """Return a call as Qwen3's chat template writes it."""
    encoded = json.dumps(arguments, ensure_ascii=False)
    return f'{OPEN}\n{{"name": "{name}", "arguments": {encoded}}}\n{CLOSE}'


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Return all tool calls of a turn, in order; [] for a turn without any.

    Raises:
      ToolCallError: one of them is malformed.
    """
    bodies = _tagged_bodies(text)
    if not bodies and _FUNCTION_OPEN in text:
        bodies = _untagged_bodies(text)
    return [_parse_body(body) for body in bodies]


def _tagged_bodies(text: str) -> list[str]:
    """Return what stands between each pair of outer tags."""
    bodies = []
    rest = text
    while OPEN in rest:
        _, _, rest = rest.partition(OPEN)
        body, close, rest = rest.partition(CLOSE)
        if not close:
            raise ToolCallError(f"tool call has no {CLOSE}")
        bodies.append(body)
    if CLOSE in rest:
        raise ToolCallError(f"{CLOSE} without {OPEN}")
    return bodies


def _untagged_bodies(text: str) -> list[str]:
    """Return each `<function=...>...</function>` of a text without outer tags."""
    start = text.index(_FUNCTION_OPEN)
    end = text.rfind(_FUNCTION_CLOSE)
    if end < start:
        raise ToolCallError(f"tool call has no {_FUNCTION_CLOSE}")
    return [part + _FUNCTION_CLOSE for part in text[start:end].split(_FUNCTION_CLOSE)]


def _parse_body(body: str) -> ToolCall:
    if body.lstrip().startswith(_FUNCTION_OPEN):
        return _parse_xml(body)
    return _parse_json(body)


def _parse_json(body: str) -> ToolCall:
    try:
        call = json.loads(body)
    except json.JSONDecodeError as error:
        raise ToolCallError(f"tool call is not JSON: {error.msg} at {error.pos}") from error
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, 10,000 brackets
        raise ToolCallError("tool call is not JSON: too deep or too long") from error
    if not isinstance(call, dict):
        call = {}
    name = call.get("name")
    arguments = call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ToolCallError('tool call needs "name" and "arguments": {...}')
    return ToolCall(name, arguments)


def _parse_xml(body: str) -> ToolCall:
    function = _FUNCTION.match(body)
    if function is None:
        raise ToolCallError("tool call has no </function>")
    name, inner = function.groups()
    arguments: dict[str, Any] = {}
    while inner.strip():
        parameter = _PARAMETER.match(inner)
        if parameter is None:
            raise ToolCallError("tool call has text that is not <parameter=name>value</parameter>")
        key, value = parameter.groups()
        # the template puts the value on lines of its own
        arguments[key] = value.removeprefix("\n").removesuffix("\n")
        inner = inner[parameter.end() :]
    return ToolCall(name, arguments)
