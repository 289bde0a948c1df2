"""OpenAI's responses: POST /v1/responses.

Agents send the whole conversation, or name what they had before: `Responses` keeps the items of one
episode's answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rome.agent.dialects import openai_chat
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

_TEXTS = ("input_text", "output_text", "text", "refusal")
_ROLES = {"developer": "system"}
MAX_KEPT_BYTES = 32 << 20  # of the requests whose conversations are remembered
_REFUSED: Mapping[str, object] = {
    "conversation": "",
    "background": False,
    "prompt": {},
}


def read(body: Mapping[str, Any]) -> Request:
    """Read a request.

    Raises:
      BadRequest: it cannot be honoured.
    """
    require_absent(body, _REFUSED)
    form = member(member(body, "text", Mapping, {}), "format", Mapping, {}).get("type")
    if form not in (None, "text"):
        raise BadRequest(f"text.format.type={form!r} cannot be honoured; leave it out")
    messages = []
    instructions = member(body, "instructions", str, "")
    if instructions:
        messages.append(Message("system", instructions))
    given = body.get("input")
    if isinstance(given, str):
        messages.append(Message("user", given))
    else:
        messages += _messages(objects(body, "input"))
    return Request(
        model=member(body, "model", str, "policy"),
        messages=messages,
        tools=_tools(body),
        max_new_tokens=tokens_asked(body, "max_output_tokens"),
        stream=member(body, "stream", bool, False),
    )


def answer(reply: Reply, request: Request, identity: str) -> dict[str, Any]:
    """Return the body of the response."""
    is_cut = reply.finish_reason == "length"
    return {
        "id": f"resp_{identity}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": None,
        "metadata": {},
        "model": request.model,
        "output": output_items(reply, identity),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }


def events(reply: Reply, request: Request, identity: str) -> Iterator[bytes]:
    """Yield the frames of a streamed response: the start, each item, the end."""
    whole = answer(reply, request, identity)
    number = -1

    def event(kind: str, **members: Any) -> bytes:
        nonlocal number
        number += 1
        return frame({"type": kind, "sequence_number": number, **members}, kind)

    begun = whole | {"status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for index, item in enumerate(whole["output"]):
        place = {"output_index": index, "item_id": item["id"]}
        empty = item | {"status": "in_progress"}
        if item["type"] == "message":
            yield event(
                "response.output_item.added", output_index=index, item=empty | {"content": []}
            )
            part = item["content"][0]
            where = place | {"content_index": 0}
            yield event("response.content_part.added", **where, part=part | {"text": ""})
            text = part["text"]
            yield event("response.output_text.delta", **where, delta=text, logprobs=[])
            yield event("response.output_text.done", **where, text=text, logprobs=[])
            yield event("response.content_part.done", **where, part=part)
        elif item["type"] == "function_call":
            bare = empty | {"arguments": ""}
            yield event("response.output_item.added", output_index=index, item=bare)
            text = item["arguments"]
            yield event("response.function_call_arguments.delta", **place, delta=text)
            yield event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=text
            )
        else:
            yield event("response.output_item.added", output_index=index, item=item)
        yield event("response.output_item.done", output_index=index, item=item)
    end = "response.incomplete" if whole["status"] == "incomplete" else "response.completed"
    yield event(end, response=whole)


DIALECT = Dialect("/v1/responses", read, answer, events, openai_chat.error)


class Responses:
    """The conversations behind one episode's responses, the oldest of which are forgotten."""

    def __init__(self) -> None:
        self._conversations: dict[str, tuple[list[Any], int]] = {}  # and bytes of its last request
        self._items: dict[str, Mapping[str, Any]] = {}  # of answers, by id
        self._bytes = 0

    def resolve(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a request with the items of the response and of the answers that it names.

        Raises:
          BadRequest: it names one that is not known.
        """
        given = body.get("input")
        if isinstance(given, list):
            given = [self._item(one, f"input[{place}]") for place, one in enumerate(given)]
        name = member(body, "previous_response_id", str, "")
        if not name:
            return {**body, "input": given}
        if name not in self._conversations:
            raise BadRequest(
                f"previous_response_id={name[:100]!r} is no response of this episode, or an old"
                " one; send the whole conversation as input"
            )
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
        return {**body, "input": [*self._conversations[name][0], *items]}

    def keep(self, body: Mapping[str, Any], size: int, reply: Reply, identity: str) -> None:
        """Remember an answer and the conversation before it.

        Args:
          body: of the request, resolved.
          size: bytes of the request as it came.
          reply: the answer.
          identity: that it was given.
        """
        given = body.get("input")
        items = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
        answered = output_items(reply, identity)
        self._items |= {item["id"]: item for item in answered}
        self._conversations[f"resp_{identity}"] = ([*items, *answered], size)
        self._bytes += size
        while self._bytes > MAX_KEPT_BYTES:
            oldest = next(iter(self._conversations))
            self._bytes -= self._conversations.pop(oldest)[1]

    def _item(self, item: Any, where: str) -> Any:
        """Return an item, or the one that it refers to."""
        if not isinstance(item, Mapping) or item.get("type") != "item_reference":
            return item
        name = member(item, "id", str, "")
        if name not in self._items:
            raise BadRequest(
                f"{where} refers to {name[:100]!r}, which is no item of this episode's answers;"
                " send the item itself"
            )
        return self._items[name]


def _messages(items: list[Mapping[str, Any]]) -> list[Message]:
    """Return the items of an input as messages: calls and thoughts join the assistant's text."""
    messages: list[Message] = []
    turn = _Turn()
    for place, item in enumerate(items):
        where = f"input[{place}]"
        kind = member(item, "type", str, "message")
        if kind == "reasoning":
            turn.add_thoughts(item, messages, where)
        elif kind == "function_call":
            turn.calls.append(call_of(item, "call_id", where))
        elif kind == "message" and item.get("role") == "assistant":
            turn.add_text(text_of(item.get("content"), where, _TEXTS), messages)
        elif kind == "message":
            turn.end(messages)
            role = member(item, "role", str, "")
            content = text_of(item.get("content"), where, _TEXTS)
            messages.append(_made(_ROLES.get(role, role), content, where))
        elif kind == "function_call_output":
            turn.end(messages)
            content = text_of(item.get("output"), where, _TEXTS)
            messages.append(Message("tool", content, tool_call_id=member(item, "call_id", str, "")))
        else:
            raise BadRequest(f"{where} has type {kind!r}, which the policy cannot be shown")
    turn.end(messages)
    return messages


class _Turn:
    """The items of one assistant's turn, which stand one after the other."""

    def __init__(self) -> None:
        self._text = ""
        self._thoughts = ""
        self.calls: list[Call] = []

    def add_thoughts(self, item: Mapping[str, Any], messages: list[Message], where: str) -> None:
        if self._text or self.calls:
            self.end(messages)
        content = item.get("content") or item.get("summary") or []
        self._thoughts += text_of(content, where, ("reasoning_text", "summary_text"))

    def add_text(self, text: str, messages: list[Message]) -> None:
        if self._text or self.calls:
            self.end(messages)
        self._text = text

    def end(self, messages: list[Message]) -> None:
        if self._text or self._thoughts or self.calls:
            turn = Message("assistant", self._text, self._thoughts, tuple(self.calls))
            messages.append(turn)
        self._text = ""
        self._thoughts = ""
        self.calls = []


def _made(role: str, content: str, where: str) -> Message:
    try:
        return Message(role, content)
    except ValueError as error:
        raise BadRequest(f"{where}: {error}") from error


def _tools(body: Mapping[str, Any]) -> list[Tool]:
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise BadRequest(
            f"tool_choice={json.dumps(choice)[:100]} cannot be honoured: the policy chooses; leave"
            " it out"
        )
    tools = []
    for place, tool in enumerate(objects(body, "tools")):
        if tool.get("type") != "function":
            raise BadRequest(f"tools[{place}] has type {tool.get('type')!r}; known: function")
        tools.append(function_tool(tool, "parameters", f"tools[{place}]"))
    return [] if choice == "none" else tools


def output_items(reply: Reply, identity: str) -> list[dict[str, Any]]:
    """Return what an answer says as items."""
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        content = [{"type": "reasoning_text", "text": reply.reasoning}]
        items.append(
            {"type": "reasoning", "id": f"rs_{identity}", "summary": [], "content": content}
        )
    if reply.text or not reply.tool_calls:
        text = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": []}
        items.append(
            {
                "type": "message",
                "id": f"msg_{identity}",
                "role": "assistant",
                "status": "completed",
                "content": [text],
            }
        )
    for place, call in enumerate(reply.tool_calls):
        items.append(
            {
                "type": "function_call",
                "id": f"fc_{identity}_{place}",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
        )
    return items
