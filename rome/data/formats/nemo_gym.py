"""Rollouts of NeMo Gym: a request and a response of the Responses API, with or without ids."""

from __future__ import annotations

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
from rome.data.formats.messages import ROLES
from rome.data.formats.tokens import Turn, ids_of, join_turns
from rome.data.trajectory import Trajectory

IDS = "generation_token_ids"


def read_nemo_gym(record: dict[str, Any]) -> Conversation | Trajectory:
    """Read a rollout; where its items have token ids, these are kept."""
    request = record["responses_create_params"]
    output = _items(record["response"].get("output"), "output")
    reward = reward_of(record.get("reward"))
    if any(IDS in item for item in output):
        return join_turns(_turns(output), reward)
    given = request.get("input")
    shown = [Message("user", given)] if isinstance(given, str) else _messages(given, False)
    if request.get("instructions"):
        shown.insert(0, Message("system", text_of(request["instructions"], "instructions")))
    messages = (*shown, *_messages(output, True))
    return Conversation(messages, tools_of(request.get("tools")), reward)


def _items(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UnfitError(f"the {what} is no list of items")
    return value


def _turns(output: list[dict[str, Any]]) -> list[Turn]:
    """Return the calls of the model: each ends at the item that has its ids."""
    turns = []
    pending = ""  # kind of an item of the model whose ids have not come yet
    for number, item in enumerate(output, 1):
        if IDS in item:
            what = f"the ids of item {number}"
            text = text_of(item.get("content"), what) if item.get("type") == "message" else ""
            turns.append(
                Turn(
                    ids_of(item.get("prompt_token_ids"), what),
                    ids_of(item[IDS], what),
                    item.get("generation_log_probs"),
                    text,
                )
            )
            pending = ""
        elif item.get("type") != "function_call_output":
            pending = f"item {number} ({item.get('type')})"
    if pending:
        raise UnfitError(f"{pending} belongs to no turn with token ids")
    return turns


def _messages(value: Any, learned: bool) -> list[Message]:
    """Return the messages of items: what the model wrote in one go is one message."""
    messages: list[Message] = []
    text = reasoning = ""
    calls: list[Call] = []

    def end_turn() -> None:
        nonlocal text, reasoning
        if text or reasoning or calls:
            messages.append(Message("assistant", text, reasoning, tuple(calls), learned))
        text = reasoning = ""
        calls.clear()

    for number, item in enumerate(_items(value, "input"), 1):
        what = f"item {number}"
        kind = item.get("type") or "message"
        if kind == "function_call":
            calls.append(call_of(item.get("name"), item.get("arguments"), what))
        elif kind == "reasoning":
            if text or calls:
                end_turn()
            reasoning += text_of(item.get("content") or item.get("summary"), what)
        elif kind == "function_call_output":
            end_turn()
            messages.append(Message("tool", text_of(item.get("output"), what)))
        elif kind == "message" and item.get("role") == "assistant":
            if text or calls:
                end_turn()
            text = text_of(item.get("content"), what)
        elif kind == "message" and ROLES.get(str(item.get("role"))) in ("system", "user"):
            end_turn()
            messages.append(Message(ROLES[item["role"]], text_of(item.get("content"), what)))
        else:
            raise UnfitError(f"{what} is a {str(kind)[:40]!r} of {str(item.get('role'))[:40]!r}")
    end_turn()
    return messages
