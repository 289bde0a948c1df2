r"""A chat template in Jinja, rendered so that no text of others becomes a control token.

A template writes control tokens as text, and so may a user's message, a tool's result or its
schema. Those of the messages are broken up by a mark before the template sees them. What is whole
afterwards is the template's own; the marks are taken out again.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2.ext
import jinja2.sandbox

Message = Mapping[str, Any]
Parts = list[str | int]  # plain texts, and ids of control tokens

# For tokenizers that bring no template. Calls and tools have Qwen3's JSON form.
DEFAULT = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (system ~ '\n\n' if system is not none else '') }}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' ~ (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": ' }}
    {{- '<function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif system is not none %}
    {{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' }}
{%- endif %}
{%- for message in (messages if system is none else messages[1:]) %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n' if message.content or not loop.first }}
            {{- '<tool_call>\n{"name": ' ~ (call.function.name | tojson) }}
            {%- set given = call.function.arguments %}
            {{- ', "arguments": ' ~ (given if given is string else given | tojson) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""


class ChatTemplate:
    """A compiled template.

    Args:
      source: the template.
      control: control token -> id.
      special: those of them that an assistant's turn may not hold either, such as `<|im_end|>`.

    Raises:
      ValueError: the source is no template.
    """

    def __init__(self, source: str, control: Mapping[str, int], special: Iterable[str]) -> None:
        self._control = dict(control)
        self._any_control = _alternatives(control)
        self._any_special = _alternatives(special)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = datetime.datetime.now().strftime
        try:
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not one ({error}). Fetch it again.") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        hands_over: bool = True,
        trusts_assistant: bool = True,
    ) -> Parts:
        """Return a chat as plain texts and control ids.

        Args:
          messages: as OpenAI's API has them. Special tokens that they spell are text.
          tools: schemas.
          hands_over: end with the header of the assistant's next turn.
          trusts_assistant: an assistant's texts may hold tool markers and thoughts.

        Raises:
          ValueError: the template cannot render these messages.
        """
        mark = _unused_character([messages, tools])
        guarded = []
        for message in messages:
            is_own = trusts_assistant and message["role"] == "assistant"
            pattern = self._any_special if is_own else self._any_control
            guarded.append(self._guard(message, pattern, mark))
        try:
            text = self._compiled.render(
                messages=guarded,
                tools=self._guard(tools, self._any_control, mark) if tools else None,
                add_generation_prompt=hands_over,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"the chat template cannot render this chat ({type(error).__name__}: {error})."
                " Change the messages or their tools."
            ) from None
        return self._split(text, mark)

    def spell(self, parts: Sequence[str | int]) -> str:
        """Return parts as one text."""
        texts = {number: content for content, number in self._control.items()}
        return "".join(part if isinstance(part, str) else texts[part] for part in parts)

    def _guard(self, value: Any, pattern: re.Pattern[str], mark: str) -> Any:
        """Return a value with the tokens in its texts, and in the keys of its tables, broken up."""
        if isinstance(value, str):
            return pattern.sub(lambda found: _broken(found[0], mark), value)
        if isinstance(value, Mapping):
            guarded = {}
            for key, inner in value.items():
                guarded[self._guard_key(key, pattern, mark)] = self._guard(inner, pattern, mark)
            return guarded
        if isinstance(value, (list, tuple)):
            return [self._guard(inner, pattern, mark) for inner in value]
        return value

    def _guard_key(self, key: str, pattern: re.Pattern[str], mark: str) -> str:
        """Return a key that a template may put in angle brackets."""
        if f"<{key}>" in self._control or f"</{key}>" in self._control:
            return _broken(key, mark)
        return pattern.sub(lambda found: _broken(found[0], mark), key)

    def _split(self, text: str, mark: str) -> Parts:
        parts: Parts = []
        end = 0
        for found in self._any_control.finditer(text):
            parts.append(text[end : found.start()].replace(mark, ""))
            parts.append(self._control[found[0]])
            end = found.end()
        parts.append(text[end:].replace(mark, ""))
        return [part for part in parts if part != ""]


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _broken(token: str, mark: str) -> str:
    return token[:1] + mark + token[1:]


def _unused_character(values: Any) -> str:
    """Return a character that stands nowhere in the values: a noncharacter, as a rule.

    Raises:
      ValueError: they hold every character.
    """
    text = json.dumps(values, ensure_ascii=False, default=str)
    first = chr(0xFDD0)
    if first not in text:
        return first
    used = set(text)  # a search for each character would take a hostile text's length squared
    for mark in map(chr, range(0xFDD0, 0x110000)):
        if mark not in used:
            return mark
    raise ValueError("the messages hold every character there is; send fewer")


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
