"""Values of settings: their types, and how each is read from JSON or from a variable.

A reader returns the value, or raises ValueError with what it must be, such as "a number".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from rome.agent.iflow.approval.supervisor_rules import Bounds
from rome.agent.iflow.specs.spec_files import list_of
from rome.agent.iflow.specs.tool_names import tool_name

MODES = ("plan", "default", "accept_edits", "yolo")
HOOK_EVENTS = (
    "PreToolUse", "PostToolUse", "UserPromptSubmit", "Stop", "SubagentStop", "SessionStart",
    "SessionEnd", "PreCompact", "PostCompact", "Notification", "SetUpEnvironment",
)  # fmt: skip
_MODE_NAMES = {
    "acceptEdits": "accept_edits",
    "autoEdit": "accept_edits",
    "auto_edit": "accept_edits",
    "smart": "accept_edits",
    "bypassPermissions": "yolo",
}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}  # as variables spell them


@dataclasses.dataclass(frozen=True)
class McpServer:
    """How an MCP server is reached: a command to start, or a URL."""

    name: str  # by which its tools are called, `name__tool`
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cwd: str = ""  # where the command runs; below the project's directory where it is relative
    url: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout: float = 60.0  # of a call, in seconds
    is_trusted: bool = False  # whether its calls need no approval


@dataclasses.dataclass(frozen=True)
class HookCommand:
    """A command of the user that runs at an event."""

    event: str  # one of HOOK_EVENTS
    command: str  # line of the shell
    # Regular expression on the name of a tool or the source of an event; "" for all.
    matcher: str = ""
    timeout: float = 60.0  # in seconds
    # Whether any failure blocks (iFlow's habit), and not only exit status 2 (Claude's).
    is_strict: bool = False


def _reader(
    is_right: Callable[[Any], bool], what: str, make: Callable[[Any], Any] = lambda value: value
) -> Callable[[Any], Any]:
    """Return a reader of the values that are right, each as `make` returns it."""

    def read(value: Any) -> Any:
        _need(is_right(value), what)
        return make(value)

    return read


def _need(is_right: bool, what: str) -> None:
    if not is_right:
        raise ValueError(what)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or _are_texts(value)


read_string = _reader(lambda value: isinstance(value, str), "a text")
read_table = _reader(lambda value: isinstance(value, dict), "an object", dict)
read_names = _reader(_are_names, "a list of texts", list_of)
# Commas in rules are part of them.
read_rules = _reader(_are_texts, "a list of rules such as 'shell(git status:*)'", tuple)


def read_flag(value: Any) -> bool:
    """Return a truth value, which a variable spells as text."""
    value = _FLAGS.get(value.lower(), value) if isinstance(value, str) else value
    _need(isinstance(value, bool), "true or false")
    return bool(value)


def read_number(value: Any) -> float:
    """Return a number that is not negative."""
    _need(isinstance(value, (int, float, str)) and not isinstance(value, bool), "a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("a number") from None
    _need(0 <= number < 1e12, "a number that is not negative")
    return number


def read_count(value: Any) -> int:
    """Return a whole number."""
    _need(read_number(value).is_integer(), "a whole number")
    return int(float(value))


def read_turns(value: Any) -> int:
    """Return a count of turns; 0 where there is no limit."""
    return 0 if value in (-1, "-1") else read_count(value)


def read_seconds(value: Any) -> float:
    """Return seconds, which files give in milliseconds."""
    return read_number(value) / 1000


def read_share(value: Any) -> float:
    """Return a number above 0 and below 1."""
    _need(0 < read_number(value) < 1, "a number above 0 and below 1")
    return float(value)


def read_tools(value: Any) -> tuple[str, ...]:
    """Return names of tools as this agent has them."""
    return tuple(tool_name(name) for name in read_names(value))


def read_mode(value: Any) -> str:
    """Return a mode of approval, which other programs name otherwise."""
    mode = str(_MODE_NAMES.get(read_string(value), value))
    _need(mode in MODES, f"one of {', '.join(MODES)}")
    return mode


_BOUNDS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "hosts": ("hosts", read_names),
    "writable": ("writable", read_names),
    "kept": ("kept", read_names),
    "mayChangeTests": ("may_change_tests", read_flag),
    "mayRewriteHistory": ("may_rewrite_history", read_flag),
    "judge": ("judge", read_string),
}


def read_supervisor(value: Any) -> Bounds | None:
    """Return what the supervisor permits; None where there is none."""
    if isinstance(value, (bool, str)):
        return Bounds() if read_flag(value) else None
    table = read_table(value)
    unknown = ", ".join(sorted(set(table) - set(_BOUNDS)))
    _need(not unknown, f"an object of {', '.join(_BOUNDS)}, without {unknown}")
    return Bounds(**{_BOUNDS[key][0]: _BOUNDS[key][1](table[key]) for key in table})


def read_server(name: str, value: Any) -> McpServer:
    """Return an MCP server of that name."""
    table = read_table(value)
    command = read_string(table.get("command", ""))
    url = read_string(table.get("httpUrl", table.get("url", "")))
    _need(bool(command) != bool(url), "an object with either a command or a url")
    args = table.get("args", [])
    _need(_are_texts(args), "an object whose args are a list of texts")
    return McpServer(
        name=name,
        command=command,
        args=tuple(args),
        env={key: str(one) for key, one in read_table(table.get("env", {})).items()},
        cwd=read_string(table.get("cwd", "")),
        url=url,
        headers={key: str(one) for key, one in read_table(table.get("headers", {})).items()},
        timeout=read_seconds(table.get("timeout", 60_000)),
        is_trusted=read_flag(table.get("trust", False)),
    )


def read_hooks(value: Any) -> tuple[HookCommand, ...]:
    """Return the hooks of a table {event: [{matcher, hooks: [{type, command, timeout}]}]}."""
    found = []
    for event, groups in read_table(value).items():
        if event not in HOOK_EVENTS:
            continue  # an event of another program
        _need(isinstance(groups, list), f"an object whose {event} is a list")
        for group in groups:
            matcher = read_string(read_table(group).get("matcher", ""))
            try:
                re.compile("" if matcher == "*" else matcher)
            except re.error as error:
                message = f"an object whose matcher {matcher!r} is a regular expression ({error})"
                raise ValueError(message) from None
            hooks = group.get("hooks", [])
            _need(isinstance(hooks, list), f"an object whose {event} has lists of hooks")
            for hook in hooks:
                if read_table(hook).get("type", "command") != "command":
                    continue
                command = read_string(hook.get("command", ""))
                _need(bool(command), f"an object whose hooks of {event} each have a command")
                timeout = read_number(hook.get("timeout", 60)) or 60.0
                found.append(HookCommand(event, command, matcher, timeout))
    return tuple(found)
