"""Anthropic's messages: POST /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rome.agent.dialects.base import (
    BadRequest,
    Dialect,
    Request,
    call_of,
    frame,
    function_tool,
    member,
    objects,
    require_absent,
    text_of,
    tokens_asked,
)
from rome.agent.messages import Message, Reply, Tool

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CHOICES = (None, "auto", "none")


def read(body: Mapping[str, Any]) -> Request:
    """Read a request.

    Raises:
      BadRequest: it cannot be honoured.
    """
    require_absent(body, {"stop_sequences": []})
    messages = []
    system = text_of(body.get("system"), "system")
    if system:
        messages.append(Message("system", system))
    for place, one in enumerate(objects(body, "messages")):
        messages += _messages(one, f"messages[{place}]")
    return Request(
        model=member(body, "model", str, "policy"),
        messages=messages,
        tools=_tools(body),
        max_new_tokens=tokens_asked(body, "max_tokens"),
        stream=member(body, "stream", bool, False),
    )


def answer(reply: Reply, request: Request, identity: str) -> dict[str, Any]:
    """Return the body of the response."""
    return {
        "id": f"msg_{identity}",
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": _blocks(reply),
        "stop_reason": _STOP_REASONS[reply.finish_reason],
        "stop_sequence": None,
        "usage": {"input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens},
    }


def events(reply: Reply, request: Request, identity: str) -> Iterator[bytes]:
    """Yield the frames of a streamed response: the start, each block, the end."""
    whole = answer(reply, request, identity)
    usage = {"input_tokens": reply.prompt_tokens, "output_tokens": 0}
    start = whole | {"content": [], "stop_reason": None, "usage": usage}
    yield _event("message_start", message=start)
    for index, block in enumerate(whole["content"]):
        empty, deltas = _pieces(block)
        yield _event("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    end = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield _event("message_delta", delta=end, usage={"output_tokens": reply.completion_tokens})
    yield _event("message_stop")


def error(status: int, code: str, message: str) -> dict[str, Any]:
    """Return the body of an error; `code` stands in the message, which is all that there is."""
    kind = _ERROR_TYPES.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": f"{code}: {message}"}}


DIALECT = Dialect("/v1/messages", read, answer, events, error, ping=frame({"type": "ping"}, "ping"))


def _event(kind: str, **members: Any) -> bytes:
    return frame({"type": kind, **members}, kind)


def _messages(one: Mapping[str, Any], where: str) -> list[Message]:
    """Return one message of Anthropic's as ours: results of tools are messages of their own."""
    role = member(one, "role", str, "")
    if role not in ("user", "assistant", "system"):
        raise BadRequest(f"{where}.role is {role!r}; known: user, assistant")
    content = one.get("content")
    if content is None or isinstance(content, str):
        return [Message(role, content or "")]
    blocks = objects(one, "content")
    return [_assistant(blocks, where)] if role == "assistant" else _user(role, blocks, where)


def _assistant(blocks: list[Mapping[str, Any]], where: str) -> Message:
    texts = []
    thoughts = []
    calls = []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(member(block, "text", str, ""))
        elif kind == "thinking":
            thoughts.append(member(block, "thinking", str, ""))
        elif kind == "tool_use":
            given = member(block, "input", Mapping, {})
            calls.append(call_of({**block, "arguments": given}, "id", where))
        elif kind != "redacted_thinking":
            raise BadRequest(
                f"{where} has a block of type {kind!r}, which no assistant of ours has"
            )
    return Message("assistant", "".join(texts), "".join(thoughts), tuple(calls))


def _user(role: str, blocks: list[Mapping[str, Any]], where: str) -> list[Message]:
    results = []
    texts = []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = text_of(block.get("content"), f"{where}: the result of a tool")
            results.append(
                Message("tool", content, tool_call_id=member(block, "tool_use_id", str, ""))
            )
        else:
            texts.append(text_of([block], where))
    said = [Message(role, "\n".join(texts))] if texts or not results else []
    return [*results, *said]


def _tools(body: Mapping[str, Any]) -> list[Tool]:
    choice = member(body, "tool_choice", Mapping, {}).get("type")
    if choice not in _CHOICES:
        raise BadRequest(
            f"tool_choice.type={choice!r} cannot be honoured: the policy chooses; leave it out"
        )
    tools = []
    for place, tool in enumerate(objects(body, "tools")):
        if tool.get("type", "custom") not in ("custom", None):
            raise BadRequest(
                f"tools[{place}] has type {tool['type']!r}, a tool of Anthropic's servers; known:"
                " custom"
            )
        tools.append(function_tool(tool, "input_schema", f"tools[{place}]"))
    return [] if choice == "none" else tools


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.reasoning:
        blocks.append({"type": "thinking", "thinking": reply.reasoning, "signature": ""})
    if reply.text or not (reply.tool_calls or reply.reasoning):
        blocks.append({"type": "text", "text": reply.text})
    for call in reply.tool_calls:
        given = json.loads(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


def _pieces(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as it begins, and the deltas that fill it."""
    if block["type"] == "text":
        return block | {"text": ""}, [{"type": "text_delta", "text": block["text"]}]
    if block["type"] == "thinking":
        deltas = [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": ""},
        ]
        return block | {"thinking": ""}, deltas
    text = json.dumps(block["input"], ensure_ascii=False)
    return block | {"input": {}}, [{"type": "input_json_delta", "partial_json": text}]
