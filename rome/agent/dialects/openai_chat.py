"""OpenAI's chat completions: POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
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
from rome.agent.messages import Call, Message, Reply, Tool

_ROLES = {"developer": "system", "function": "tool"}
# Members that would change what is sampled in a way that the policy's record cannot show.
_REFUSED: Mapping[str, object] = {
    "n": 1,
    "stop": [],
    "logit_bias": {},
    "functions": [],
    "response_format": {"type": "text"},
    "logprobs": False,
    "modalities": ["text"],
    "audio": {},
}


def read(body: Mapping[str, Any]) -> Request:
    """Read a request.

    Raises:
      BadRequest: it cannot be honoured.
    """
    require_absent(body, _REFUSED)
    options = member(body, "stream_options", Mapping, {})
    return Request(
        model=member(body, "model", str, "policy"),
        messages=[
            read_message(one, f"messages[{place}]")
            for place, one in enumerate(objects(body, "messages"))
        ],
        tools=_tools(body),
        max_new_tokens=tokens_asked(body, "max_completion_tokens", "max_tokens"),
        stream=member(body, "stream", bool, False),
        stream_usage=bool(options.get("include_usage")),
    )


def answer(reply: Reply, request: Request, identity: str) -> dict[str, Any]:
    """Return the body of the response."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", **_content(reply)},
        "logprobs": None,
        "finish_reason": reply.finish_reason,
    }
    return _head("chat.completion", request, identity) | {
        "choices": [choice],
        "usage": _usage(reply),
    }


def events(reply: Reply, request: Request, identity: str) -> Iterator[bytes]:
    """Yield the frames of a streamed response: role, content, calls, reason, usage, [DONE]."""

    def chunk(delta: Mapping[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return frame(_head("chat.completion.chunk", request, identity) | {"choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    content = _content(reply)
    calls = content.pop("tool_calls", [])
    for name, text in content.items():
        if text:
            yield chunk({name: text})
    for index, call in enumerate(calls):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, reply.finish_reason)
    if request.stream_usage:
        head = _head("chat.completion.chunk", request, identity)
        yield frame(head | {"choices": [], "usage": _usage(reply)})
    yield b"data: [DONE]\n\n"


def error(status: int, code: str, message: str) -> dict[str, Any]:
    """Return the body of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


DIALECT = Dialect("/v1/chat/completions", read, answer, events, error)


def read_message(one: Mapping[str, Any], where: str) -> Message:
    """Read one message.

    Args:
      one: as OpenAI's API has it.
      where: it stands, for errors.

    Raises:
      BadRequest: it is none.
    """
    role = member(one, "role", str, "")
    if one.get("function_call") is not None:
        raise BadRequest(f"{where}.function_call is the form before tools; send tool_calls")
    calls = [_call(call, f"{where}.tool_calls") for call in objects(one, "tool_calls")]
    try:
        return Message(
            role=_ROLES.get(role, role),
            content=text_of(one.get("content"), f"{where}.content", ("text", "refusal")),
            reasoning=member(one, "reasoning_content", str, ""),
            tool_calls=tuple(calls),
            tool_call_id=member(one, "tool_call_id", str, ""),
        )
    except ValueError as error:
        raise BadRequest(f"{where}: {error}") from error


def write_message(message: Message) -> dict[str, Any]:
    """Return a message as OpenAI's API has it; thoughts only where its agent sent them back."""
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        written["reasoning_content"] = message.reasoning
    if message.tool_calls:
        written["tool_calls"] = _write_calls(message.tool_calls)
    if message.role == "tool":
        written["tool_call_id"] = message.tool_call_id
    return written


def _call(call: Mapping[str, Any], where: str) -> Call:
    function = member(call, "function", Mapping, {})
    return call_of({**function, "id": call.get("id")}, "id", where)


def _tools(body: Mapping[str, Any]) -> list[Tool]:
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise BadRequest(
            f"tool_choice={json.dumps(choice)[:100]} cannot be honoured: the policy chooses; leave"
            " it out"
        )
    tools = []
    for place, tool in enumerate(objects(body, "tools")):
        if tool.get("type", "function") != "function":
            raise BadRequest(f"tools[{place}] has type {tool['type']!r}; known: function")
        function = member(tool, "function", Mapping, {})
        tools.append(function_tool(function, "parameters", f"tools[{place}].function"))
    return [] if choice == "none" else tools


def _head(kind: str, request: Request, identity: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{identity}",
        "object": kind,
        "created": int(time.time()),
        "model": request.model,
    }


def _content(reply: Reply) -> dict[str, Any]:
    content: dict[str, Any] = {"content": reply.text or (None if reply.tool_calls else "")}
    if reply.reasoning:
        content["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        content["tool_calls"] = _write_calls(reply.tool_calls)
    return content


def _write_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }
