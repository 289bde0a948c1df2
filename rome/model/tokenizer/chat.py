"""Chats built by appending ids: a checkpoint's own chat template, never rendered twice.

What the template writes around a turn is cut out of its rendering of a short chat. So a rollout
that is built turn by turn has the ids that the template gives the whole chat, wherever the template
itself only appends. Some do not: Qwen3's thinking releases drop the thoughts before the last
question of a user. In a rollout they stay, since what was sampled is what is trained on; `render`
gives the template's own view of a finished chat.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rome.model.tokenizer.template import Message, Parts
from rome.model.tokenizer.tokenizer import Tokenizer

THINK = "<think>\n"
END_OF_THOUGHTS = "\n</think>\n\n"
_PROBE: list[Message] = [
    {"role": "user", "content": "Question"},
    {"role": "assistant", "content": "Answer"},
    {"role": "tool", "content": "Result"},
]


class Chat:
    """The chat format of a model: each method returns ids to append.

    Args:
      tokenizer: of the model.
      tools: schemas. The first turn tells them to the model with the form of a call, as the
        template does. Without tools and system text there is no system turn: a small model learns
        the form from its training data instead.
      system: system text.

    Raises:
      ValueError: the template ends turns otherwise than with `<|im_end|>`, or does not append.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[dict[str, Any]] | None = None,
        system: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._tools = tools
        self._system = system
        self._layout = _layout_of(tokenizer)

    @property
    def opened(self) -> str:
        """Return what the header of a turn has already written of it: `<think>`, or nothing."""
        return THINK if self._layout.opens_thoughts else ""

    def begin(self) -> list[int]:
        """Return the ids of the system turn; [] where there is none."""
        messages = [*self._system_message(), _PROBE[0]]
        parts = self.tokenizer.template.render(messages, self._tools)
        start, _ = _first_turn(parts, "user", self.tokenizer)
        return self.tokenizer.join(parts[: start - 1])

    def open(self, user: str) -> list[int]:
        """Return the ids of a new chat, up to the header of the assistant's turn.

        There the model begins to write.
        """
        return self.render([{"role": "user", "content": user}], hands_over=True)

    def turn(self, text: str) -> list[int]:
        """Return the ids of an assistant's turn that was not sampled, such as a demonstrator's.

        With the `<|im_end|>` that the model would sample. Where the header has opened the thoughts
        of a turn, a text without any ends them first.
        """
        if self._layout.opens_thoughts:
            if text.startswith(THINK):
                text = text.removeprefix(THINK)
            elif END_OF_THOUGHTS.strip() not in text:
                text = END_OF_THOUGHTS + text
        return [*self.tokenizer.encode_turn(text), self.tokenizer.im_end]

    def observe(self, results: Sequence[str]) -> list[int]:
        """Return the ids that follow a sampled `<|im_end|>`.

        Its newline, the tool results in one user turn, the next assistant header.
        """
        return self.reply([{"role": "tool", "content": result} for result in results])

    def reply(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that follow a sampled `<|im_end|>`, for messages that others wrote.

        Its newline, the messages, the next assistant header.
        """
        return self.tokenizer.join(_reply_parts(self.tokenizer, self._prepared(messages)))

    def follow(self, turn_ids: Sequence[int], results: Sequence[str]) -> list[int]:
        """Return the ids that follow a sampled turn: `observe`, after the end that it may lack.

        Args:
          turn_ids: the sampled ids. A turn that an engine ended at another token of the generation
            config, such as `<|endoftext|>`, gets the template's end as context.
          results: of the turn's tool calls.
        """
        im_end = self.tokenizer.im_end
        has_end = bool(turn_ids) and turn_ids[-1] == im_end
        observed = self.observe(results)
        return observed if has_end else [im_end, *observed]

    def say(self, content: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """Return the text of a turn with tool calls in the form that the model was trained on.

        Args:
          content: what is said before the calls.
          calls: name and arguments of each.
        """
        tool_calls = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
        message = {"role": "assistant", "content": content, "tool_calls": tool_calls}
        template = self.tokenizer.template
        parts = template.render([_PROBE[0], message, _PROBE[2]], hands_over=False)
        begin, end = _first_turn(parts, "assistant", self.tokenizer)
        return template.spell(parts[begin:end]).removeprefix("assistant").removeprefix("\n")

    def render(
        self,
        messages: Sequence[Message],
        *,
        hands_over: bool = False,
        trusts_assistant: bool = True,
    ) -> list[int]:
        """Return the ids of a whole chat as the template has it.

        Args:
          messages: as OpenAI's API has them. The chat's own tools and system text come first.
          hands_over: end with the header of the assistant's next turn.
          trusts_assistant: an assistant's texts may hold tool markers and thoughts.
        """
        parts = self.tokenizer.template.render(
            [*self._system_message(), *self._prepared(messages)],
            self._tools,
            hands_over=hands_over,
            trusts_assistant=trusts_assistant,
        )
        return self.tokenizer.join(parts)

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages whose calls have arguments as the template takes them.

        A JSON text stays as it was written where the template writes JSON.
        """
        if self._layout.takes_json:
            return list(messages)
        prepared = []
        for message in messages:
            calls = [_with_table(call) for call in message.get("tool_calls") or ()]
            prepared.append({**message, "tool_calls": calls} if calls else message)
        return prepared

    def _system_message(self) -> list[Message]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]


class _Layout(NamedTuple):
    """What a template does, beyond what its pieces say.

    Attributes:
      opens_thoughts: whether the header of an assistant's turn ends with `<think>`.
      takes_json: whether arguments of calls may be a JSON text.
    """

    opens_thoughts: bool
    takes_json: bool


@functools.lru_cache(maxsize=16)
def _layout_of(tokenizer: Tokenizer) -> _Layout:
    """Return the layout of a tokenizer's template, once it has passed a probe.

    Raises:
      ValueError: a chat that is built by appending is not what the template renders.
    """
    template = tokenizer.template
    whole = template.spell(template.render(_PROBE))
    header = template.spell(template.render(_PROBE[:1]))
    opens_thoughts = header.endswith(THINK)
    # A turn that results follow has no thoughts unless they are said.
    turn = f"{header.removesuffix(THINK)}Answer<|im_end|>"
    if turn + template.spell(_reply_parts(tokenizer, _PROBE[2:])) != whole:
        raise ValueError(
            "the chat template of this tokenizer cannot be appended to: a chat of a question, an"
            f" answer and a result is {whole!r}. Use a template that ends each turn with"
            " <|im_end|> and leaves earlier turns as they are."
        )
    return _Layout(opens_thoughts, _takes_json(tokenizer))


def _takes_json(tokenizer: Tokenizer) -> bool:
    """Return whether a template writes the arguments of a call as they are where they are text."""
    arguments = '{"a":1}'
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        parts = tokenizer.template.render([_PROBE[0], asked, _PROBE[2]])
    except ValueError:
        return False
    return f": {arguments}}}" in tokenizer.template.spell(parts)


def _with_table(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with the arguments of a JSON text as a table.

    Raises:
      ValueError: they are no table.
    """
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of a call of {function['name']!r} are no JSON object, and this"
                " model's template writes them one by one"
            )
    return {**call, "function": {**function, "arguments": arguments}}


def _reply_parts(tokenizer: Tokenizer, messages: Sequence[Message]) -> Parts:
    """Return what a template writes after the end of an assistant's turn."""
    parts = tokenizer.template.render([*_PROBE[:2], *messages], trusts_assistant=False)
    _, end = _first_turn(parts, "assistant", tokenizer)
    return parts[end + 1 :]


def _first_turn(parts: Parts, role: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return where the first turn of a role begins, its name included, and where its end stands.

    Raises:
      ValueError: the parts have no such turn.
    """
    for number, part in enumerate(parts[:-1]):
        after = parts[number + 1]
        if part == tokenizer.im_start and isinstance(after, str) and after.startswith(role):
            if tokenizer.im_end not in parts[number:]:
                break
            return number + 1, parts.index(tokenizer.im_end, number)
    raise ValueError(
        f"the chat template of this tokenizer has no turn from <|im_start|>{role} to <|im_end|>:"
        f" {tokenizer.template.spell(parts)!r}. Use the template of a Qwen3."
    )
