r"""What a model says in a turn, and the tool calls in it.

A turn is thoughts, which end with `</think>`, and then what the model says. Only what it says is a
call, an answer or a hand-in: `read_turn` is the one place that tells them apart. Calls are read in
three forms. Qwen3's, Qwen3-Coder's, where the outer tag is sometimes missing, and gem-llm's:

    <tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>

    <tool_call>\n<function=bash>\n<parameter=command>\nls\n</parameter>\n</function>\n</tool_call>

    <tool_call>\n<tool_name>bash</tool_name>\n<arguments>{"command": "ls"}</arguments>\n</tool_call>

A call ends where its JSON or its function ends, not at the first tag that looks like an end: an
argument may spell any of these tags. Only Qwen3-Coder's form, whose values are plain text, cannot
carry its own last three closing tags.

The text is not trusted. What cannot be read raises ToolCallError, whose message is one sentence for
the model: it says what to change.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
THINK = "<think>"
END_OF_THOUGHTS = "</think>"
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
MAX_DRAFTS = 30  # broken calls in the thoughts of a turn that are looked at; bounds the work
_QWEN3 = '{"name": ..., "arguments": {...}}'
# Names are bounded, so that reading takes linear time whatever the text.
_FUNCTION = re.compile(r"<function=([^<>\s]{1,200})>\s*")
_FUNCTION_CLOSE = "</function>"
_PARAMETER = re.compile(r"<parameter=([^<>\s]{1,200})>\n?")
_PARAMETER_CLOSE = "</parameter>"
# The end of a value: what follows it shows that it is not a part of the value.
_VALUE_END = re.compile(
    r"</parameter>\s*(?=<parameter=[^<>\s]{1,200}>|</function>\s*</tool_call>)", re.DOTALL
)
_UNTAGGED_VALUE_END = re.compile(
    r"</parameter>\s*(?=<parameter=[^<>\s]{1,200}>|</function>)", re.DOTALL
)
_TOOL_NAME = re.compile(r"<tool_name>([^<]{1,200})</tool_name>\s*<arguments>\s*")
_ARGUMENTS_CLOSE = "</arguments>"
_SPACE = re.compile(r"\s*")
_EVENT = re.compile(r"<tool_call>|<function=[^<>\s]{1,200}>|</think>")
# strict=False: a line break in a string is what it seems to be
_DECODER = json.JSONDecoder(strict=False)


class ToolCallError(ValueError):
    """A malformed tool call; the message is the observation that the model gets."""


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool, by its name and arguments.

    The arguments of a parsed call are plain JSON: they hold no NaN and no infinity.
    """

    name: str
    arguments: dict[str, Any]


class Turn(NamedTuple):
    """The two parts of a turn.

    Attributes:
      thoughts: without the tags around them.
      spoken: everything after the thoughts, without chat marks at its ends.
      start: where `spoken` begins in the turn.
      is_thinking: whether the turn ends within its thoughts; nothing is spoken then.
    """

    thoughts: str
    spoken: str
    start: int
    is_thinking: bool


def format_tool_call(name: str, arguments: dict[str, Any]) -> str:
    """Return a call as Qwen3's chat template writes it."""
    encoded = json.dumps(arguments, ensure_ascii=False)
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {encoded}}}\n{CLOSE}'


def read_turn(action: str) -> Turn:
    """Split a turn into thoughts and speech.

    Thoughts end with the last `</think>` that is not within a whole tool call. A turn that begins
    with `<think>` and never ends its thoughts says nothing.
    """
    start = _end_of_thoughts(action)
    if start == 0 and action.lstrip().startswith(THINK):
        return Turn(_without_tags(action), "", len(action), True)
    begin, end = _without_marks(action, start)
    thoughts = _without_tags(action[:start]) if start else ""
    return Turn(thoughts, action[begin:end], begin, False)


def parse_tool_calls(action: str) -> list[ToolCall]:
    """Return all tool calls that a turn says, in order; [] for a turn without any.

    Raises:
      ToolCallError: one of them is malformed, or the turn ends within its thoughts.
    """
    return [call for call, _ in iterate_tool_calls(action)]


def iterate_tool_calls(action: str) -> Iterator[tuple[ToolCall, int]]:
    """Yield each tool call that a turn says, and where it ends in the turn.

    Raises:
      ToolCallError: as `parse_tool_calls`, once the calls before the malformed one are yielded.
    """
    turn = read_turn(action)
    if turn.is_thinking:
        raise ToolCallError(f"the turn ends within its thoughts; write {END_OF_THOUGHTS} and go on")
    text = turn.spoken
    is_tagged = OPEN in text
    position = 0
    closers: tuple[str, ...] = (CLOSE,)
    while True:
        opening = text.find(OPEN, position) if is_tagged else _find_function(text, position)
        if opening < 0:
            break
        _refuse_closers(text[position:opening], closers)
        call, position, closers = _read_call(text, opening)
        yield call, turn.start + position
    _refuse_closers(text[position:], closers)


def decode_json(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and where it ends.

    Line breaks within strings are taken as they are.

    Raises:
      ToolCallError: there is none; the message says what to change.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        json.dumps(value, allow_nan=False)  # calls go into records
    except json.JSONDecodeError as error:
        raise ToolCallError(f"the tool call is not JSON: {_advice(text, error)}") from error
    except RecursionError as error:
        raise ToolCallError("the tool call is nested too deep; write flatter arguments") from error
    except ValueError as error:  # NaN, Infinity, 1e999, an integer of 5,000 digits
        raise ToolCallError(
            "a number of the tool call is NaN, infinite or too long; write a plain number"
        ) from error
    return value, end


# -- Thoughts
# -------------------------------------------------------------------------------------------------


def _end_of_thoughts(action: str) -> int:
    """Return where the thoughts end, 0 where there are none."""
    if END_OF_THOUGHTS not in action:
        return 0
    end = 0
    position = 0
    drafts = 0
    while (event := _EVENT.search(action, position)) is not None:
        position = event.end()
        if event[0] == END_OF_THOUGHTS:
            end = position
        elif drafts < MAX_DRAFTS:
            try:
                position = _skip_call(action, event.start())
            except ToolCallError:
                drafts += 1
    return end


def _skip_call(action: str, start: int) -> int:
    """Return the end of the whole call at `start`. Raises ToolCallError where there is none."""
    _, end, _ = _read_call(action, start)
    inside = action[start + len(OPEN) : end]
    _, thought_ended, rest = inside.partition(END_OF_THOUGHTS)
    is_plain = inside.lstrip().startswith("<function=") or action.startswith("<function=", start)
    if is_plain and thought_ended and (OPEN in rest or "<function=" in rest):
        raise ToolCallError("a draft that was not ended, and a call after the thoughts")
    return end


def _without_tags(thoughts: str) -> str:
    return thoughts.replace(THINK, "").replace(END_OF_THOUGHTS, "").strip()


def _without_marks(action: str, start: int) -> tuple[int, int]:
    """Return where the text from `start` on begins and ends without the chat marks around it."""
    end = len(action)
    while True:
        inner = start
        while inner < end and action[inner].isspace():
            inner += 1
        mark = next((mark for mark in CHAT_MARKS if action.startswith(mark, inner)), None)
        if mark is None:
            break
        start = inner + len(mark)
    while True:
        inner = end
        while inner > start and action[inner - 1].isspace():
            inner -= 1
        mark = next((mark for mark in CHAT_MARKS if action.endswith(mark, start, inner)), None)
        if mark is None:
            break
        end = inner - len(mark)
    return start, end


# -- One call
# -------------------------------------------------------------------------------------------------


def _read_call(text: str, start: int) -> tuple[ToolCall, int, tuple[str, ...]]:
    """Return the call at `start`, its end, and the tags that must not follow outside of a call."""
    if not text.startswith(OPEN, start):
        call, end = _read_function(text, start, _UNTAGGED_VALUE_END)
        closed = _skip_space(text, end)
        if text.startswith(CLOSE, closed):  # Qwen3-Coder sometimes writes only this one
            end = closed + len(CLOSE)
        return call, end, (CLOSE, _FUNCTION_CLOSE, _PARAMETER_CLOSE)
    inner = _skip_space(text, start + len(OPEN))
    if text.find(CLOSE, inner) < 0:
        raise ToolCallError(f"the tool call has no {CLOSE}; end it with that")
    closers: tuple[str, ...] = (CLOSE,)
    if text.startswith("<function=", inner):
        call, end = _read_function(text, inner, _VALUE_END)
        closers = (CLOSE, _FUNCTION_CLOSE, _PARAMETER_CLOSE)
    elif text.startswith("<tool_name>", inner):
        call, end = _read_gem(text, inner)
    else:
        call, end = _read_json(text, inner)
    closed = _skip_space(text, end)
    if not text.startswith(CLOSE, closed):
        raise ToolCallError(f"the tool call has text after its end; write {CLOSE} there")
    return call, closed + len(CLOSE), closers


def _read_json(text: str, start: int) -> tuple[ToolCall, int]:
    """Read Qwen3's form from its opening brace on."""
    call, end = decode_json(text, start)
    if not isinstance(call, dict):
        call = {}
    name = call.get("name")
    arguments = call.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ToolCallError(f'the tool call needs "name" and "arguments"; write {_QWEN3}')
    return ToolCall(name, arguments), end


def _read_gem(text: str, start: int) -> tuple[ToolCall, int]:
    """Read gem-llm's form from `<tool_name>` on."""
    head = _TOOL_NAME.match(text, start)
    if head is None:
        raise ToolCallError(
            "the tool call is not <tool_name>name</tool_name> <arguments>{...}</arguments>"
        )
    arguments: Any = {}
    end = head.end()
    if not text.startswith(_ARGUMENTS_CLOSE, end):
        arguments, end = decode_json(text, end)
    closed = _skip_space(text, end)
    if not isinstance(arguments, dict) or not text.startswith(_ARGUMENTS_CLOSE, closed):
        raise ToolCallError("the tool call's <arguments> are not one JSON object; write {...}")
    return ToolCall(head[1].strip(), arguments), closed + len(_ARGUMENTS_CLOSE)


def _read_function(text: str, start: int, value_end: re.Pattern[str]) -> tuple[ToolCall, int]:
    """Read Qwen3-Coder's form from `<function=` on; the end is that of `</function>`."""
    head = _FUNCTION.match(text, start)
    if head is None:
        raise ToolCallError("the tool call has no name; write <function=name>")
    arguments: dict[str, Any] = {}
    position = head.end()
    while not text.startswith(_FUNCTION_CLOSE, position):
        parameter = _PARAMETER.match(text, position)
        if parameter is None:
            _refuse_function(text, position)
        value = value_end.search(text, parameter.end())
        if value is None:
            _refuse_function(text, position)
        # the template puts the value on lines of its own
        arguments[parameter[1]] = text[parameter.end() : value.start()].removesuffix("\n")
        position = value.end()
    return ToolCall(head[1], arguments), position + len(_FUNCTION_CLOSE)


def _refuse_function(text: str, position: int) -> NoReturn:
    """Raise the error of a function whose parameters do not go on at `position`."""
    if not _PARAMETER.match(text, position) and text.find(_FUNCTION_CLOSE, position) >= 0:
        raise ToolCallError(
            "the tool call has text that is not in <parameter=name>value</parameter>; write it so"
        )
    is_open = text.find(_FUNCTION_CLOSE, position) < 0
    closer = _FUNCTION_CLOSE if is_open else _PARAMETER_CLOSE
    raise ToolCallError(f"the tool call has no {closer} in its place; close what you open")


def _refuse_closers(text: str, closers: tuple[str, ...]) -> None:
    """Raise ToolCallError for a closing tag outside of a call: a call was cut, or not opened."""
    for closer in closers:
        if closer in text:
            raise ToolCallError(
                f"{closer} stands outside of a tool call; write each call as {OPEN} {_QWEN3}"
                f" {CLOSE}"
            )


def _find_function(text: str, position: int) -> int:
    match = _FUNCTION.search(text, position)
    return match.start() if match else -1


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _advice(text: str, error: json.JSONDecodeError) -> str:
    """Return what to change in a text that is not JSON."""
    rest = text[error.pos : error.pos + 12]
    if rest.startswith("```"):
        return f"write {_QWEN3} without a ``` fence around it"
    if rest.startswith("</"):
        return f"something is missing before {rest.split('>')[0]}>; write {_QWEN3}"
    if "escape" in error.msg:
        return f'{rest[:2]!a} is no escape; write a backslash as \\\\ and a quote as \\"'
    if error.msg.startswith("Unterminated"):
        return 'a text in it has no end; write " after it, and } for each {'
    if "delimiter" in error.msg or "property name" in error.msg:
        return f'{error.msg} before {rest!a}; write a quote within a text as \\"'
    return f"{error.msg} before {rest!a}; write {_QWEN3}"
