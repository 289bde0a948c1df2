"""Chats built by appending ids: a checkpoint's own chat template, never rendered twice.

What the template writes around a turn is cut out of its rendering of a short chat. So a rollout
that is built turn by turn has the ids that the template gives the whole chat, wherever the template
itself only appends. Some do not: Qwen3's thinking releases drop the thoughts before the last
question of a user. In a rollout they stay, since what was sampled is what is trained on; `render`
gives the template's own view of a finished chat.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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

    def begin(self) -> list[int]:
        """Return the ids of the system turn; [] where there is none."""
        messages: list[Message] = [{"role": "user", "content": ""}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        parts = self.tokenizer.template.render(messages, self._tools, hands_over=False)
        users = len(parts) - 1 - parts[::-1].index(self.tokenizer.im_start)
        return self.tokenizer.join(parts[:users])

    def open(self, user: str) -> list[int]:
        """Return the ids of a new chat, up to the header of the assistant's turn.

        There the model begins to write.
        """
        messages: list[Message] = [{"role": "user", "content": user}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        return self.render(messages, hands_over=True)

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
        """Return the ids that follow a sampled `<|im_end|>`, for messages of others.

        Its newline, the messages (of users, tools or the system), the next assistant header.
        """
        return self.tokenizer.join(_reply_parts(self.tokenizer, messages))

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
        begin, end = _assistant_turn(parts, self.tokenizer)
        return template.spell(parts[begin:end]).removeprefix("assistant").removeprefix("\n")

    def render(self, messages: Sequence[Message], *, hands_over: bool = False) -> list[int]:
        """Return the ids of a whole chat as the template has it, with this chat's tools.

        Args:
          messages: as OpenAI's API has them, the system's included.
          hands_over: end with the header of the assistant's next turn.
        """
        parts = self.tokenizer.template.render(messages, self._tools, hands_over=hands_over)
        return self.tokenizer.join(parts)


class _Layout(NamedTuple):
    """What a template does, beyond what its pieces say.

    Attributes:
      opens_thoughts: whether the header of an assistant's turn ends with `<think>`.
    """

    opens_thoughts: bool


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
    return _Layout(opens_thoughts)


def _reply_parts(tokenizer: Tokenizer, messages: Sequence[Message]) -> Parts:
    """Return what a template writes after the end of an assistant's turn."""
    parts = tokenizer.template.render([*_PROBE[:2], *messages])
    _, end = _assistant_turn(parts, tokenizer)
    return parts[end + 1 :]


def _assistant_turn(parts: Parts, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return where the first assistant's turn begins, and where its end token stands.

    Raises:
      ValueError: the parts have no such turn.
    """
    for number, part in enumerate(parts[:-1]):
        after = parts[number + 1]
        if part == tokenizer.im_start and isinstance(after, str) and after.startswith("assistant"):
            if tokenizer.im_end not in parts[number:]:
                break
            return number + 1, parts.index(tokenizer.im_end, number)
    raise ValueError(
        "the chat template of this tokenizer has no turn from <|im_start|>assistant to <|im_end|>:"
        f" {tokenizer.template.spell(parts)!r}. Use the template of a Qwen3."
    )
