r"""Tool calls that a chat requires (OpenAI's tool_choice), as a grammar of the model's own form.

The form is Qwen3's; for a model that writes calls otherwise, a required one is refused:

    <tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from envs.gem.tool_call import CLOSE, END_OF_THOUGHTS, OPEN, format_tool_call
from rome.model.tokenizer import Chat, Tokenizer
from rome.serve.checks import BadRequest, check_flag

CHOICES = (None, "auto", "none", "required")
# As the template writes arguments; with spaces anywhere, a weak model may draw no end of them.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def required_name(choice: Any) -> str | None:
    """Return the function that a tool_choice names; None where it names none.

    Raises:
      BadRequest: it is neither a function nor one of CHOICES.
    """
    if choice is None or (isinstance(choice, str) and choice in CHOICES):
        return None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise BadRequest(
            f"tool_choice={json.dumps(choice)[:100]} is not supported; give auto, none, required,"
            ' or {"type": "function", "function": {"name": ...}}'
        )
    return name


def call_grammar(
    body: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> str | None:
    """Return the grammar of the answer to a chat, in llguidance's Lark; None: any answer will do.

    Args:
      body: of the chat. A function that it names is called once; "required" is one call, or several
        unless parallel_tool_calls is false.
      tools: of the body.
      tokenizer: of the model.

    Raises:
      BadRequest: there is no such tool, or the model writes calls in another form.
    """
    choice = body.get("tool_choice")
    name = required_name(choice)
    if name is None and choice != "required":
        return None
    called = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    if not called:
        raise BadRequest(
            f"tool_choice={json.dumps(choice)[:100]} needs a tool in tools"
            + (f" that is named {name!r}" if name is not None else "")
        )
    parallel = body.get("parallel_tool_calls")
    is_many = check_flag("parallel_tool_calls", True if parallel is None else parallel)
    chat = Chat(tokenizer)
    _check_form(chat)
    more = ' ("\\n" call)*' if is_many and name is None else ""
    rules = [
        f"start: {_thoughts(chat)}call{more}",
        f"call: {_mark(OPEN, tokenizer)} body {_mark(CLOSE, tokenizer)}",
        "body: " + " | ".join(f"body_{number}" for number in range(len(called))),
    ]
    for number, function in enumerate(called):
        head = f'\n{{"name": {_dump(function["name"])}, "arguments": '
        rules.append(f'body_{number}: {_dump(head)} arguments_{number} "}}\\n"')
        rules.append(f"arguments_{number}: %json {_dump(_schema_of(function))}")
    return "\n".join(rules)


def _check_form(chat: Chat) -> None:
    """Raise BadRequest for a model that writes calls otherwise than this grammar."""
    said = chat.say("", [("f", {"a": 1})])
    if format_tool_call("f", {"a": 1}) not in said:
        raise BadRequest(
            "tool_choice that requires a call is not supported for this model, which writes calls"
            f" as {said[:200]!r}; use auto"
        )


def _thoughts(chat: Chat) -> str:
    """Return the rule of the thoughts that the header of a turn has opened; "" for none."""
    if not chat.opened:
        return ""
    if not _is_token(END_OF_THOUGHTS, chat.tokenizer):
        raise BadRequest(
            "tool_choice that requires a call is not supported for this model: its thoughts end"
            f" with {END_OF_THOUGHTS}, which is no token; use auto"
        )
    return f'/(.|\\n)*/ {END_OF_THOUGHTS} "\\n\\n" '


def _mark(tag: str, tokenizer: Tokenizer) -> str:
    """Return a tag as a grammar names it: the token, or its letters."""
    return tag if _is_token(tag, tokenizer) else _dump(tag)


def _is_token(text: str, tokenizer: Tokenizer) -> bool:
    return len(tokenizer.encode(text, allow_special=True)) == 1


def _schema_of(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"the parameters of tool {function['name']!r} are no JSON schema")
    return {"type": "object", "x-guidance": _SPACING, **parameters}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
