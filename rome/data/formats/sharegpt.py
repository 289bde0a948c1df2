"""ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...]}, with or without tools."""

from __future__ import annotations

import json
import re
from typing import Any

from rome.data.formats.conversation import (
    Conversation,
    Message,
    UnfitError,
    call_of,
    reward_of,
    text_of,
    tools_of,
)

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "tool": "tool",
    "observation": "tool",
}
_WRAPPED = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def read_sharegpt(record: dict[str, Any]) -> Conversation:
    """Read a record of ShareGPT."""
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise UnfitError(f"conversations are a {type(turns).__name__}, not a list")
    messages = [_read_turn(turn, number) for number, turn in enumerate(turns, 1)]
    system = record.get("system")
    if isinstance(system, str) and system:
        messages.insert(0, Message("system", system))
    return Conversation(
        tuple(messages), tools_of(record.get("tools")), reward_of(record.get("reward"))
    )


def _read_turn(turn: Any, number: int) -> Message:
    what = f"message {number}"
    if not isinstance(turn, dict):
        raise UnfitError(f"{what} is a {type(turn).__name__}, not an object")
    name = turn.get("from")
    if not isinstance(name, str) or name not in ROLES:
        raise UnfitError(f"{what} is from {str(name)[:40]!r}; known: {', '.join(ROLES)}")
    text = text_of(turn.get("value"), what)
    role = ROLES[name]
    learned = turn.get("weight") != 0
    if role == "call":
        return Message("assistant", "", calls=(_read_call(text, what),), learned=learned)
    if role == "tool":
        wrapped = _WRAPPED.fullmatch(text)  # the template wraps it
        return Message(role, wrapped[1] if wrapped else text)
    return Message(role, text, learned=learned)


def _read_call(text: str, what: str) -> Any:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict):
        raise UnfitError(f"{what} is a function_call that is no JSON object")
    return call_of(call.get("name"), call.get("arguments"), what)
