"""ATIF, the agent trajectory interchange format: our own files, Harbor's and anybody's."""

from __future__ import annotations

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
from rome.data.formats.tokens import Turn, ids_of, join_turns
from rome.data.trajectory import Trajectory, from_atif


def read_atif(record: dict[str, Any]) -> Conversation | Trajectory:
    """Read a document of ATIF; where its steps have token ids, these are kept."""
    steps = record["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UnfitError("steps are no list of objects")
    written = [step for step in steps if step.get("source") == "agent"]
    if written and all("prompt_token_ids" in _table(step, "extra") for step in written):
        return from_atif(record)  # our own
    own = [step for step in written if not step.get("is_copied_context")]
    if own and all(_table(step, "metrics").get("completion_token_ids") for step in own):
        return join_turns([_turn(step) for step in own], _reward(record))
    messages: list[Message] = []
    for number, step in enumerate(steps, 1):
        messages += _messages(step, f"step {number}")
    tools = tools_of(_table(record, "agent").get("tool_definitions"))
    return Conversation(tuple(messages), tools, _reward(record))


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    return value if isinstance(value, dict) else {}


def _reward(record: dict[str, Any]) -> float | None:
    return reward_of(_table(record, "extra").get("reward"))


def _turn(step: dict[str, Any]) -> Turn:
    what = f"the token ids of step {step.get('step_id')}"
    metrics = _table(step, "metrics")
    return Turn(
        ids_of(metrics.get("prompt_token_ids"), what),
        ids_of(metrics["completion_token_ids"], what),
        metrics.get("logprobs"),
    )


def _messages(step: dict[str, Any], what: str) -> list[Message]:
    """Return the message of a step, and the results of the tools that it called."""
    source = step.get("source")
    text = text_of(step.get("message"), what)
    if source in ("system", "user"):
        return [Message(source, text)]
    if source != "agent":
        raise UnfitError(f"{what} has the source {str(source)[:40]!r}; known: system, user, agent")
    calls = []
    for call in step.get("tool_calls") or []:
        if not isinstance(call, dict):
            raise UnfitError(f"{what} has a tool call that is no object")
        calls.append(call_of(call.get("function_name"), call.get("arguments"), what))
    reasoning = text_of(step.get("reasoning_content"), what)
    learned = not step.get("is_copied_context")
    messages = [Message("assistant", text, reasoning, tuple(calls), learned)]
    results = _table(step, "observation").get("results") or []
    shown = [text_of(result.get("content"), what) for result in results if isinstance(result, dict)]
    # What nobody called for is shown as a user's message.
    messages += [
        Message("tool" if calls else "user", result) for result in shown if calls or result
    ]
    return messages
