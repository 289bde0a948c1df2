"""Lists of messages in OpenAI's form, and the formats that are made of them.

{"messages": [...], "tools": [...]}    OpenAI; mini-swe-agent with its "info"
[{"role": ..., "content": ...}, ...]   mini-swe-agent's older files
{"traj": [...], "reward": ...}         tau-bench
{"trajectory": [...], "history": [...], "info": ...}   SWE-agent
{"prompt": [...], "chosen": [...], "rejected": [...]}   pairs, as DPO reads them
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rome.data.formats.conversation import (
    Call,
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
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
NOT_SHOWN = ("exit",)  # roles of notes that the model never saw (mini-swe-agent)


def read_openai(record: dict[str, Any]) -> Conversation:
    """Read a record of OpenAI messages with its tools; mini-swe-agent's files have its form."""
    tools = tools_of(record.get("tools") or record.get("functions"))
    return Conversation(read_messages(record["messages"]), tools, reward_of(record.get("reward")))


def read_list(record: list[Any]) -> Conversation:
    """Read a list of messages without anything around it."""
    return Conversation(read_messages(record))


def read_tau_bench(record: dict[str, Any]) -> Conversation:
    """Read a result of tau-bench, whose tools are not in it."""
    messages = read_messages(record["traj"])
    return Conversation(messages, tools_of(record.get("tools")), reward_of(record.get("reward")))


def read_swe_agent(record: dict[str, Any]) -> Conversation:
    """Read a .traj of SWE-agent: its history, of which demonstrations are only read."""
    return Conversation(read_messages(record["history"]), tools_of(record.get("tools")))


def read_preference(record: dict[str, Any]) -> Conversation:
    """Read the better answer of a pair; the answers of its prompt are only read."""
    prompt, chosen = (
        [{"role": role, "content": value}] if isinstance(value, str) else value
        for role, value in (("user", record["prompt"]), ("assistant", record["chosen"]))
    )
    read = [dataclasses.replace(message, learned=False) for message in read_messages(prompt)]
    return Conversation((*read, *read_messages(chosen)), tools_of(record.get("tools")))


def read_messages(messages: Any) -> tuple[Message, ...]:
    """Return messages in OpenAI's form.

    Raises:
      UnfitError: one of them is not understood; the message says which.
    """
    if not isinstance(messages, list):
        raise UnfitError(f"messages are a {type(messages).__name__}, not a list")
    read = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise UnfitError(f"message {number} is a {type(message).__name__}, not an object")
        if message.get("role") not in NOT_SHOWN:
            read.append(_read_message(message, f"message {number}"))
    return tuple(read)


def _read_message(message: dict[str, Any], what: str) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise UnfitError(f"{what} has the role {str(role)[:40]!r}; known: {', '.join(ROLES)}")
    text = text_of(message.get("content"), what)
    if ROLES[role] != "assistant":
        return Message(ROLES[role], text)
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    is_demonstration = bool(message.get("is_demo")) or message.get("weight") == 0
    return Message(
        "assistant",
        text,
        text_of(reasoning, f"the reasoning of {what}"),
        tuple(_read_calls(message, what)),
        learned=not is_demonstration,
    )


def _read_calls(message: dict[str, Any], what: str) -> list[Call]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UnfitError(f"{what} has {type(calls).__name__} as tool_calls, not a list")
    if not calls and message.get("function_call"):
        calls = [message["function_call"]]
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UnfitError(f"{what} has a tool call that is no object")
        read.append(call_of(function.get("name"), function.get("arguments"), what))
    return read
