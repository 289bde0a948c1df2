"""Messages of a conversation: their types, their comparison, and their ids in a chat template.

A message is text, and text changes on its way through an agent and back: keys of arguments change
places, spaces and thoughts are dropped, calls get other ids. `differences` says what changed
between an answer and what came back of it, or that it is another message.

Ids are only appended: those of a conversation are the ids of its messages in a row, each of which
depends on that message and on the role of the one before it. Its words are never control tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from envs.gem import ToolCallError
from envs.gem.tool_call import OPEN, iterate_tool_calls, read_turn
from rome.model.tokenizer import Chat

Tool = Mapping[str, Any]  # the schema of a tool, as the chat template shows it
ROLES = ("system", "user", "assistant", "tool")
EXACT_INTEGER = 2**53  # from there on, agents written in JavaScript round integers


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call of a message.

    Args:
      id: by which a tool's answer names it.
      name: of the tool.
      arguments: JSON text, as it was written.
    """

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Args:
      role: one of ROLES.
      content: its text.
      reasoning: thoughts of an assistant, where they are told apart from its content.
      tool_calls: of an assistant.
      tool_call_id: the call that a tool answers.

    Raises:
      ValueError: the role is unknown, or calls stand in a message that is no assistant's.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[Call, ...] = ()
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"message role {self.role!r} unknown; known: {', '.join(ROLES)}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a {self.role} message makes no tool calls; only an assistant does")

    @property
    def size(self) -> int:
        """Return the characters of all its texts."""
        calls = sum(len(call.name) + len(call.arguments) for call in self.tool_calls)
        return len(self.content) + len(self.reasoning) + calls

    @property
    def key(self) -> tuple[str, ...]:
        """Return what tells it from other messages: all that the model is shown of it."""
        calls = [part for call in self.tool_calls for part in (call.name, canonical(call))]
        return (self.role, self.content, *calls)


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer of the policy.

    Args:
      text: what it says, without thoughts and calls.
      reasoning: its thoughts.
      tool_calls: its calls. Where one is malformed there are none, and `text` holds it as it is.
      finish_reason: "stop", "tool_calls" or "length".
      prompt_tokens: of the whole context.
      completion_tokens: sampled ones.
      chunk: number of its chunk in the session.
    """

    text: str
    reasoning: str
    tool_calls: tuple[Call, ...]
    finish_reason: Literal["stop", "tool_calls", "length"]
    prompt_tokens: int
    completion_tokens: int
    chunk: int


def read_answer(text: str, number: int) -> tuple[Message, bool]:
    """Return a sampled turn as a message, and whether a call in it is malformed.

    Where one is, the message has no calls, and its content is all that the turn says.

    Args:
      text: of the turn, without its end token.
      number: of its chunk, for the ids of its calls.
    """
    turn = read_turn(text)
    try:
        calls = [] if turn.is_thinking else [call for call, _ in iterate_tool_calls(text)]
    except ToolCallError:
        return Message("assistant", turn.spoken.strip(), turn.thoughts), True
    made = []
    for place, call in enumerate(calls):
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        made.append(Call(f"call_{number}_{place}", call.name, arguments))
    content = turn.spoken
    if made:
        opening = OPEN if OPEN in content else "<function="
        content = content[: content.index(opening)]
    return Message("assistant", content.strip(), turn.thoughts, tuple(made)), False


def differences(answer: Message, returned: Message) -> frozenset[str] | None:
    """Return what changed in an answer on its way back; None where it is another message.

    Changes are "spaces" around texts, "thoughts" (dropped), "arguments" (written in another way)
    and "call_ids".
    """
    found = set()
    if answer.content.strip() != returned.content.strip():
        returned = _split_thoughts(returned)
    if answer.content != returned.content:
        if answer.content.strip() != returned.content.strip():
            return None
        found.add("spaces")
    if answer.reasoning != returned.reasoning:
        if returned.reasoning and answer.reasoning.strip() != returned.reasoning.strip():
            return None
        found.add("spaces" if returned.reasoning else "thoughts")
    if len(answer.tool_calls) != len(returned.tool_calls):
        return None
    for ours, theirs in zip(answer.tool_calls, returned.tool_calls, strict=True):
        if ours.name != theirs.name:
            return None
        if ours.arguments != theirs.arguments:
            if canonical(ours) != canonical(theirs):
                return None
            found.add("arguments")
        if ours.id != theirs.id:
            found.add("call_ids")
    return frozenset(found)


def canonical(call: Call) -> str:
    """Return the arguments of a call in one spelling.

    As they are where they are no JSON, or nested too deep.
    """
    try:
        return json.dumps(_canonical_value(json.loads(call.arguments)), sort_keys=True)
    except (ValueError, RecursionError):
        return call.arguments


def opening_ids(messages: Sequence[Message], chat: Chat) -> list[int]:
    """Return the ids of a context of its own, up to where the model begins to write.

    Args:
      messages: all but the system text of the root. Thoughts of assistants are left out, as Qwen3's
        template leaves out those of earlier turns.
      chat: with the tools and the system text of the root.
    """
    return chat.render(_as_dictionaries(messages), hands_over=True, trusts_assistant=False)


def following_ids(turn_ids: Sequence[int], messages: Sequence[Message], chat: Chat) -> list[int]:
    """Return the ids that follow a sampled turn, up to where the model begins to write.

    Args:
      turn_ids: the sampled ids, which may lack the template's end.
      messages: since that turn.
      chat: with the tools and the system text of the root.
    """
    im_end = chat.tokenizer.im_end
    closing = [] if list(turn_ids[-1:]) == [im_end] else [im_end]
    return [*closing, *chat.reply(_as_dictionaries(messages))]


def readable(text: str) -> str:
    """Return the text with U+FFFD in place of lone surrogates, which no tokenizer encodes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _as_dictionaries(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them, without thoughts."""
    dictionaries = []
    for message in messages:
        as_dictionary: dict[str, Any] = {"role": message.role, "content": readable(message.content)}
        calls = []
        for call in message.tool_calls:
            function = {"name": readable(call.name), "arguments": readable(call.arguments)}
            calls.append({"type": "function", "function": function})
        if calls:
            as_dictionary["tool_calls"] = calls
        dictionaries.append(as_dictionary)
    return dictionaries


def _split_thoughts(message: Message) -> Message:
    """Return a message whose content holds its thoughts, as some agents send them, with both."""
    if message.reasoning or "</think>" not in message.content:
        return message
    turn = read_turn(message.content)
    return dataclasses.replace(message, content=turn.spoken.strip(), reasoning=turn.thoughts)


def _canonical_value(value: Any) -> Any:
    """Return a JSON value whose numbers are as an agent in any language would write them."""
    if isinstance(value, dict):
        return {key: _canonical_value(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_canonical_value(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if abs(value) < EXACT_INTEGER:
        return value
    try:
        return float(value)
    except OverflowError:
        return str(value)
