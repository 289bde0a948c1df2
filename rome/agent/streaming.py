"""A chat completion that arrives in pieces, as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

OnText = Callable[[str, bool], None]  # a piece of text, and whether it is a thought


class StreamError(ValueError):
    """The stream is no chat completion, or ended before the completion did."""


class StreamedAnswer:
    """Puts the pieces of an answer together.

    Args:
      on_text: called with each piece of text and whether it is a thought.

    Attributes:
      usage: as the server reported it; {} where it did not.
    """

    def __init__(self, on_text: OnText) -> None:
        self.usage: dict[str, Any] = {}
        self._on_text = on_text
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish = ""

    def take(self, line: str) -> None:
        """Take one line of the stream.

        Raises:
          StreamError: it is no event of a chat completion, or the server reports an error.
        """
        if not line.startswith("data:"):
            return  # a comment, the name of an event, or the line between two events
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
            if event.get("error"):
                raise StreamError(f"the server broke off: {str(event['error'])[:300]}")
            usage = event.get("usage")
            if isinstance(usage, dict):
                self.usage = usage
            for choice in event.get("choices", [])[:1]:
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
        if not self._finish:
            raise StreamError("the stream ended before the answer did")
        message: dict[str, Any] = {"role": "assistant"}
        message |= {name: "".join(pieces) for name, pieces in self._texts.items()}
        if self._calls:
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        return {"message": message, "finish_reason": self._finish}

    def _take_delta(self, delta: Mapping[str, Any]) -> None:
        # Some servers name thoughts `reasoning`.
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        for name, text in (("reasoning_content", thought), ("content", delta.get("content"))):
            if text:
                self._texts[name].append(text)
                self._on_text(text, name == "reasoning_content")
        for place, piece in enumerate(delta.get("tool_calls") or []):
            index = piece.get("index")
            self._take_call(place if index is None else int(index), piece)

    def _take_call(self, index: int, piece: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(
            index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        given = piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        function = call["function"]
        function["name"] = given.get("name") or function["name"]
        arguments = given.get("arguments")
        if isinstance(arguments, dict):  # whole, as a table
            arguments = json.dumps(arguments, ensure_ascii=False)
        function["arguments"] += arguments or ""
