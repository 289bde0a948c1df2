"""A chat completion that arrives in pieces, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

OnText = Callable[[str, bool], None]  # a piece of text, and whether it is a thought


class StreamError(ValueError):
    """The stream is no chat completion, or ended before the completion did."""


class ListenerError(Exception):
    """What is told of the pieces failed; its cause says how. The stream is well."""


class StreamedAnswer:
    """Puts the pieces of an answer together.

    Args:
      on_text: called with each piece of text and whether it is a thought.

    Attributes:
      usage: as the server reported it; {} where it did not.
      has_ended: whether the server said that nothing more comes.
    """

    def __init__(self, on_text: OnText) -> None:
        self.usage: dict[str, Any] = {}
        self.has_ended = False
        self._on_text = on_text
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: list[dict[str, Any]] = []
        self._newest: dict[int, dict[str, Any]] = {}  # by the index of its pieces
        self._finish = ""

    def take(self, line: str) -> None:
        """Take one line of the stream.

        Raises:
          StreamError: it is no event of a chat completion, or the server reports an error.
          ListenerError: `on_text` failed.
        """
        if not line.startswith("data:"):
            return  # a comment, the name of an event, or the line between two events
        data = line[5:].strip()
        if data == "[DONE]":
            self.has_ended = True
        if self.has_ended or not data:
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise StreamError(f"the server broke off: {str(event['error'])[:300]}")
            usage = event.get("usage")
            if isinstance(usage, dict):
                self.usage = usage
            for choice in (event.get("choices") or [])[:1]:
                self._take_delta(choice.get("delta") or {})
                self._finish = choice.get("finish_reason") or self._finish
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, StreamError):
                raise
            raise StreamError(f"no event of a chat completion: {data[:200]!r}") from error

    def choice(self) -> dict[str, Any]:
        """Return the whole answer as a choice of a completion that was not streamed.

        Raises:
          StreamError: the stream ended too early.
        """
        has_said = self._calls or any(self._texts.values())
        if not self._finish and not (self.has_ended and has_said):
            raise StreamError("the stream ended before the answer did")
        message: dict[str, Any] = {"role": "assistant"}
        message |= {name: "".join(pieces) for name, pieces in self._texts.items()}
        if self._calls:
            message["tool_calls"] = self._calls
        return {"message": message, "finish_reason": self._finish or "stop"}

    def _take_delta(self, delta: Mapping[str, Any]) -> None:
        # Some servers name thoughts `reasoning`.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for name, text in (("reasoning_content", thought), ("content", delta.get("content"))):
            if text and not isinstance(text, str):
                raise TypeError(f"{name} is no text")
            if text:
                self._texts[name].append(text)
                self._tell(text, name == "reasoning_content")
        for place, piece in enumerate(delta.get("tool_calls") or []):
            self._take_call(place, piece)

    def _tell(self, text: str, is_thought: bool) -> None:
        try:
            self._on_text(text, is_thought)
        except Exception as error:
            raise ListenerError from error

    def _take_call(self, place: int, piece: Mapping[str, Any]) -> None:
        """Take a piece of a call.

        It is of the newest call with its index. Some servers give no index, or the same one for all
        calls: there a name begins another call, unless it comes with the id of that one.
        """
        given = piece.get("function") or {}
        id, name = piece.get("id"), given.get("name")
        if id is not None and not isinstance(id, str):
            raise TypeError("the id of a call is no text")
        has_index = piece.get("index") is not None
        index = int(piece["index"]) if has_index else place
        call = self._newest.get(index)
        if call is not None and name and call["function"]["name"]:
            is_other = call["id"] and id != call["id"] if id else not has_index
            call = None if is_other else call
        if call is None:
            call = {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            self._newest[index] = call
            self._calls.append(call)
        call["id"] = id or call["id"]
        function = call["function"]
        function["name"] = name or function["name"]
        arguments = given.get("arguments")
        if isinstance(arguments, dict):  # whole, as a table
            arguments = json.dumps(arguments, ensure_ascii=False)
        function["arguments"] += arguments or ""
