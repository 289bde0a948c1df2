"""Values of settings: their types, and how each is read from JSON or from a variable.

A reader returns the value or raises ValueError with what the value must be, such as "a number".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from rome.agent.iflow.specs.spec_files import list_of
from rome.agent.iflow.specs.tool_names import tool_name

MODES = ("plan", "default", "accept_edits", "yolo")
HOOK_EVENTS = (
    "PreToolUse",
    "PostToolUse",
    "UserPromptSubmit",
    "Stop",
    "SubagentStop",
    "SessionStart",
    "SessionEnd",
    "PreCompact",
    "PostCompact",
    "Notification",
    "SetUpEnvironment",
)
_MODE_NAMES = {
    "acceptEdits": "accept_edits",
    "autoEdit": "accept_edits",
    "auto_edit": "accept_edits",
    "smart": "accept_edits",
    "bypassPermissions": "yolo",
}


@dataclasses.dataclass(frozen=True)
class McpServer:
    """How an MCP server is reached: a command to start, or a URL.

    Attributes:
      name: by which its tools are called, `name__tool`.
      cwd: where the command runs; below the project's directory where it is relative.
      timeout: of a call, in seconds.
      is_trusted: whether its calls need no approval.
    """

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cwd: str = ""
    url: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    timeout: float = 60.0
    is_trusted: bool = False


@dataclasses.dataclass(frozen=True)
class HookCommand:
    """A command of the user that runs at an event.

    Attributes:
      event: one of HOOK_EVENTS.
      command: line of the shell.
      matcher: regular expression on the name of a tool or the source of an event; "" for all.
      timeout: in seconds.
      is_strict: whether any failure blocks (iFlow's habit), and not only exit status 2 (Claude's).
    """

    event: str
    command: str
    matcher: str = ""
    timeout: float = 60.0
    is_strict: bool = False


@dataclasses.dataclass(frozen=True)
class SupervisorSettings:
    """What the supervisor permits, and when it acts.

    Attributes:
      hosts: of the network that may be reached; "*" for all.
      writable: folders outside the project that may be written.
      kept: patterns of paths that must stay as they are.
      may_change_tests: whether tests are a part of the work.
      may_rewrite_history: whether commits may be changed.
      pause_at: severity, from 1 to 3, from which on a call waits for approval.
      stop_at: severity from which on the turn ends; 4 for none.
      judge: name of a model that is asked too; "" for none.
    """

    hosts: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    may_change_tests: bool = True
    may_rewrite_history: bool = False
    pause_at: int = 2
    stop_at: int = 3
    judge: str = ""


def read_text_value(value: Any) -> str:
    """Return a text."""
    return str(_need(value, isinstance(value, str), "a text"))


def read_flag(value: Any) -> bool:
    """Return a truth value, which a variable spells as text."""
    spelled = {"true": True, "1": True, "false": False, "0": False}
    value = spelled.get(value.lower(), value) if isinstance(value, str) else value
    return bool(_need(value, isinstance(value, bool), "true or false"))


def read_number(value: Any) -> float:
    """Return a number that is not negative."""
    _need(value, isinstance(value, (int, float, str)) and not isinstance(value, bool), "a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("a number") from None
    _need(value, 0 <= number < 1e12, "a number that is not negative")
    return number


def read_count(value: Any) -> int:
    """Return a whole number."""
    number = read_number(value)
    return int(_need(number, number.is_integer(), "a whole number"))


def read_seconds(value: Any) -> float:
    """Return seconds, which files give in milliseconds."""
    return read_number(value) / 1000


def read_turns(value: Any) -> int:
    """Return a count of turns; 0 where there is no limit."""
    return 0 if value in (-1, "-1") else read_count(value)


def read_share(value: Any) -> float:
    """Return a number above 0, at most 1."""
    number = read_number(value)
    return float(_need(number, 0 < number <= 1, "a number above 0, at most 1"))


def read_names(value: Any) -> tuple[str, ...]:
    """Return names: a list of texts, or one text with commas."""
    return list_of(_need(value, isinstance(value, str) or _are_texts(value), "a list of texts"))


def read_tools(value: Any) -> tuple[str, ...]:
    """Return names of tools as this agent has them."""
    return tuple(tool_name(name) for name in read_names(value))


def read_mode(value: Any) -> str:
    """Return a mode of approval, which other programs name otherwise."""
    mode = _MODE_NAMES.get(read_text_value(value), value)
    return str(_need(mode, mode in MODES, f"one of {', '.join(MODES)}"))


def read_table(value: Any) -> dict[str, Any]:
    """Return an object."""
    return dict(_need(value, isinstance(value, dict), "an object"))


def read_rules(value: Any) -> tuple[str, ...]:
    """Return rules; commas in them are part of them."""
    return tuple(_need(value, _are_texts(value), "a list of rules such as 'shell(git status:*)'"))


def read_supervisor(value: Any) -> SupervisorSettings | None:
    """Return the settings of the supervisor; None where there is none."""
    if isinstance(value, (bool, str)):
        return SupervisorSettings() if read_flag(value) else None
    table = read_table(value)
    readers: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "hosts": ("hosts", read_names),
        "writable": ("writable", read_names),
        "kept": ("kept", read_names),
        "mayChangeTests": ("may_change_tests", read_flag),
        "mayRewriteHistory": ("may_rewrite_history", read_flag),
        "pauseAt": ("pause_at", read_count),
        "stopAt": ("stop_at", read_count),
        "judge": ("judge", read_text_value),
    }
    unknown = ", ".join(sorted(set(table) - set(readers)))
    _need(table, not unknown, f"an object of {', '.join(readers)}, without {unknown}")
    return SupervisorSettings(**{readers[key][0]: readers[key][1](table[key]) for key in table})


def read_server(name: str, value: Any) -> McpServer:
    """Return an MCP server of that name."""
    table = read_table(value)
    command = read_text_value(table.get("command", ""))
    url = read_text_value(table.get("httpUrl", table.get("url", "")))
    _need(table, bool(command) != bool(url), "an object with either a command or a url")
    args = table.get("args", [])
    _need(args, _are_texts(args), "an object whose args are a list of texts")
    return McpServer(
        name=name,
        command=command,
        args=tuple(args),
        env={key: str(one) for key, one in read_table(table.get("env", {})).items()},
        cwd=read_text_value(table.get("cwd", "")),
        url=url,
        headers={key: str(one) for key, one in read_table(table.get("headers", {})).items()},
        timeout=read_seconds(table.get("timeout", 60_000)),
        is_trusted=read_flag(table.get("trust", False)),
    )


def read_hooks(value: Any, is_strict: bool) -> list[HookCommand]:
    """Return the hooks of a table {event: [{matcher, hooks: [{type, command, timeout}]}]}."""
    found = []
    for event, groups in read_table(value).items():
        if event not in HOOK_EVENTS:
            continue  # an event of another program
        for group in _need(groups, isinstance(groups, list), f"an object whose {event} is a list"):
            matcher = read_text_value(read_table(group).get("matcher", ""))
            try:
                re.compile("" if matcher == "*" else matcher)
            except re.error as error:
                message = f"an object whose matcher {matcher!r} is a regular expression ({error})"
                raise ValueError(message) from None
            hooks = group.get("hooks", [])
            what = f"an object whose {event} has lists of hooks"
            for hook in _need(hooks, isinstance(hooks, list), what):
                if read_table(hook).get("type", "command") != "command":
                    continue
                command = read_text_value(hook.get("command", ""))
                what = f"an object whose hooks of {event} each have a command"
                _need(hook, bool(command), what)
                timeout = read_number(hook.get("timeout", 60))
                found.append(HookCommand(event, command, matcher, timeout or 60.0, is_strict))
    return found


def _need(value: Any, is_right: bool, what: str) -> Any:
    """Return a value that is right; ValueError with what it must be for another one."""
    if not is_right:
        raise ValueError(what)
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
