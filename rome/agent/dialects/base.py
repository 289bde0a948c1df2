"""What the dialects share: the parsed request, and reading of untrusted JSON.

A request is read strictly where it decides what the policy is asked, and its sampling settings are
passed over: an episode is sampled as its run says, whoever asks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rome.agent.messages import Call, Message, Reply, Tool


class BadRequest(ValueError):
    """A request that the proxy cannot honour; the message names the member and the remedy."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A call of the model, whatever its dialect.

    Attributes:
      model: name that the agent asked for, which is given back.
      messages: the whole conversation.
      tools: their schemas in OpenAI's chat form.
      max_new_tokens: of the answer; None for the episode's own.
      stream: whether the answer is wanted as events.
      stream_usage: whether a stream of chat chunks ends with one that has the usage.
    """

    model: str
    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    max_new_tokens: int | None = None
    stream: bool = False
    stream_usage: bool = False


@dataclasses.dataclass(frozen=True)
class Dialect:
    """One form of requests and answers.

    Attributes:
      path: of its route.
      read: the body of a request -> Request; BadRequest where it cannot be honoured.
      answer: a reply -> the body of the response.
      events: a reply -> the frames of a streamed response.
      error: (HTTP status, code, message) -> the body of an error.
      ping: a frame that keeps a stream alive while the policy works.
    """

    path: str
    read: Callable[[Mapping[str, Any]], Request]
    answer: Callable[[Reply, Request, str], dict[str, Any]]
    events: Callable[[Reply, Request, str], Iterator[bytes]]
    error: Callable[[int, str, str], dict[str, Any]]
    ping: bytes = b": working\n\n"


def frame(data: Mapping[str, Any], event: str = "") -> bytes:
    """Return one server-sent event, in ASCII: its texts may hold half of a surrogate pair."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def member(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """Return a member of a JSON object; null counts as absent.

    Raises:
      BadRequest: it has another type.
    """
    value = body.get(name)
    if value is None:
        return default
    is_number_asked = kind in (int, float)
    if not isinstance(value, kind) or (is_number_asked and isinstance(value, bool)):
        raise BadRequest(f"{name} has the wrong type: {json.dumps(value)[:100]}")
    return value


def objects(body: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return a member that is a list of objects."""
    found = member(body, name, list, [])
    for place, one in enumerate(found):
        if not isinstance(one, Mapping):
            raise BadRequest(f"{name}[{place}] is not an object: {json.dumps(one)[:100]}")
    return found


def require_absent(body: Mapping[str, Any], names: Mapping[str, object]) -> None:
    """Raise BadRequest for members that ask for what is not there; `names` has harmless values."""
    for name, harmless in names.items():
        value = body.get(name)
        if value is not None and value != harmless:
            raise BadRequest(f"{name}={json.dumps(value)[:100]} cannot be honoured; leave it out")


def tokens_asked(body: Mapping[str, Any], *names: str) -> int | None:
    """Return the limit of the answer's tokens from the first member that is there."""
    for name in names:
        value = member(body, name, int, None)
        if value is not None:
            if value < 1:
                raise BadRequest(f"{name} is {value}; ask for 1 or more")
            return value
    return None


def call_of(call: Mapping[str, Any], id_name: str, where: str) -> Call:
    """Return a call of an assistant.

    Args:
      call: with its name and its arguments, as JSON text or, from some agents, as an object.
      id_name: the member with the id by which a tool's answer names it.
      where: it stands, for messages.

    Raises:
      BadRequest: it has no name.
    """
    name = member(call, "name", str, "")
    if not name:
        raise BadRequest(f"{where} has a call without a name")
    given = call.get("arguments")
    arguments = {} if given is None else given
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(member(call, id_name, str, ""), name, text)


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """Return the text of a content: a string, null, or a list of parts with text.

    Raises:
      BadRequest: a part is no text; pictures and files cannot be shown to the policy.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where} is neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise BadRequest(f"{where} has a part of type {kind!r}; the policy reads text only")
        texts.append(part["text"])
    return "".join(texts)


def function_tool(tool: Mapping[str, Any], parameters: str, where: str) -> Tool:
    """Return a tool's schema in OpenAI's chat form.

    Args:
      tool: as its dialect describes it.
      parameters: name of the member with the schema of its arguments.
      where: the tool stands, for messages.
    """
    name = member(tool, "name", str, "")
    if not name:
        raise BadRequest(f"{where} has no name")
    function: dict[str, Any] = {"name": name}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    function["parameters"] = tool.get(parameters) or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}
