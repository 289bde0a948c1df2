"""Reads tool calls out of a model's turn, in both forms that Qwen models write.

Qwen3:        <tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>
Qwen3-Coder:  <tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>   (the outer tag is sometimes missing)

The text is untrusted. What cannot be read raises ToolCallError, whose message is written for the
model: it says what to change.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*\Z", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(.*?)</parameter>", re.DOTALL)


class ToolCallError(ValueError):
    """A malformed tool call; the message is the observation that the model gets."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


def format_tool_call(name: str, arguments: dict[str, Any]) -> str:
    """The call as Qwen3's chat template writes it."""
    return (
        f'{OPEN}\n{{"name": "{name}", "arguments":'
        f" {json.dumps(arguments, ensure_ascii=False)}}}\n{CLOSE}"
    )


def parse_tool_calls(text: str) -> list[ToolCall]:
    """All calls of a turn, in order; [] for a turn that only speaks. Raises ToolCallError."""
    bodies, rest = [], text
    while OPEN in rest:
        rest = rest.split(OPEN, 1)[1]
        if CLOSE not in rest:
            raise ToolCallError(f"tool call has no {CLOSE}")
        body, rest = rest.split(CLOSE, 1)
        bodies.append(body)
    if CLOSE in rest:
        raise ToolCallError(f"{CLOSE} without {OPEN}")
    if not bodies and "<function=" in text:
        start = text.index("<function=")
        end = text.rfind("</function>")
        if end < start:
            raise ToolCallError("tool call has no </function>")
        bodies = [part + "</function>" for part in text[start:end].split("</function>")]
    return [_parse_body(body) for body in bodies]


def _parse_body(body: str) -> ToolCall:
    if body.lstrip().startswith("<function="):
        return _parse_xml(body)
    return _parse_json(body)


def _parse_json(body: str) -> ToolCall:
    try:
        call = json.loads(body)
    except json.JSONDecodeError as error:
        raise ToolCallError(f"tool call is not JSON: {error.msg} at {error.pos}") from error
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, 10,000 brackets
        raise ToolCallError("tool call is not JSON: too deep or too long") from error
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not isinstance(call.get("arguments"), dict)
    ):
        raise ToolCallError('tool call needs "name" and "arguments": {...}')
    return ToolCall(call["name"], call["arguments"])


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
        value = parameter[2]
        arguments[parameter[1]] = value.removeprefix("\n").removesuffix(
            "\n"
        )  # the template puts the value on lines of its own
        inner = inner[parameter.end() :]
    return ToolCall(name, arguments)
