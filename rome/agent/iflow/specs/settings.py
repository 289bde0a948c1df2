"""Settings of the agent: one loader for the files of `.claude/`, `.agents/` and `.iflow/`.

Later sources count more: the user's files, the project's, then environment variables IFLOW_key and
IFLOW_KEY. Rules, hooks, servers and excluded tools add up.

A project that the user does not trust may only forbid: what could run a program, send the key
elsewhere or allow a call is left out, with a notice. Keys of other programs are passed over with a
notice; a value of a wrong type is an error that names file and key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rome.agent.iflow.approval.supervisor_rules import Bounds
from rome.agent.iflow.specs import settings_values as values
from rome.agent.iflow.specs.settings_values import HookCommand, McpServer
from rome.agent.iflow.specs.spec_files import SpecError, places, read_text

# In files of Claude, other keys mean something else: `model` names one of its own.
_CLAUDE_KEYS = ("hooks", "permissions", "mcpServers")
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings."""

    model: str = ""  # name of the model; "" for the endpoint's only one
    api_key: str = ""  # for the endpoint
    base_url: str = ""  # of the endpoint, with /v1
    tokens_limit: int = 0  # of a conversation; 0 for what the model has
    # Share of `tokens_limit` from which on the context is compacted.
    compression_threshold: float = 0.8
    shell_timeout: float = 0.0  # of a command, in seconds; 0 for the tool's own
    core_tools: tuple[str, ...] | None = None  # the only tools there are; None for all
    exclude_tools: tuple[str, ...] = ()  # that are not there
    mcp_servers: Mapping[str, McpServer] = dataclasses.field(default_factory=dict)  # by name
    hooks: tuple[HookCommand, ...] = ()  # in order
    # Rules, as `rome.agent.iflow.approval.rules` reads them.
    allow: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    mode: str = ""  # of approval; "" where no file names one
    context_files: tuple[str, ...] = ()  # names of files of instructions; () for the usual ones
    checkpointing: bool = True  # whether files can be rewound
    max_turns: int = 0  # of the model in one turn of the user; 0 for no limit
    additional_directories: tuple[str, ...] = ()  # outside the project that tools may use
    supervisor: Bounds | None = None  # what it permits; None for no supervisor
    notices: tuple[str, ...] = ()  # for people: what was passed over, and why
    # Files, each with its keys that hold only once the user trusts the project.
    bound: tuple[str, ...] = ()


def load_settings(
    directory: pathlib.Path,
    *,
    trusted: bool,
    home: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings that hold in a directory, which its project's root has a part in.

    Home and environment are those of this process where they are None.

    Raises:
      SpecError: a file or a variable has a value of a wrong type.
    """
    environment = os.environ if environment is None else environment
    reader = _Reader(environment)
    for place in places(directory, home):
        is_free = trusted or place.scope != "project"
        for name in ("settings.json", "settings.local.json"):
            path = place.folder / name
            if path.exists():
                reader.take_file(path, place.boundary, place.dialect, is_free)
        if place.scope == "project" and place.dialect == ".claude":
            servers = place.folder.parent / ".mcp.json"
            if servers.exists():
                reader.take_file(servers, place.boundary, ".claude", is_free)
    reader.take_environment()
    return reader.settings()


# key -> (setting, how its value is read, whether an untrusted project may set it)
_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], bool]] = {
    "modelName": ("model", values.read_string, False),
    "model": ("model", values.read_string, False),
    "apiKey": ("api_key", values.read_string, False),
    "baseUrl": ("base_url", values.read_string, False),
    "tokensLimit": ("tokens_limit", values.read_count, False),
    "compressionTokenThreshold": ("compression_threshold", values.read_share, False),
    "shellTimeout": ("shell_timeout", values.read_seconds, False),
    "coreTools": ("core_tools", values.read_tools, True),
    "excludeTools": ("exclude_tools", values.read_tools, True),
    "contextFileName": ("context_files", values.read_names, False),
    "checkpointing": ("checkpointing", values.read_flag, False),
    "maxSessionTurns": ("max_turns", values.read_turns, False),
    "approvalMode": ("mode", values.read_mode, False),
    "supervisor": ("supervisor", values.read_supervisor, False),
}
# The same for keys that only files have.
_FILE_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], bool]] = {
    **_KEYS,
    "hooks": ("hooks", values.read_hooks, False),
    "permissions.deny": ("deny", values.read_rules, True),
    "permissions.ask": ("ask", values.read_rules, True),
    "permissions.allow": ("allow", values.read_rules, False),
    "permissions.additionalDirectories": ("additional_directories", values.read_names, False),
    "permissions.defaultMode": ("mode", values.read_mode, False),
}
_ADDING = ("exclude_tools", "hooks", "allow", "ask", "deny", "additional_directories")


class _Reader:
    """Takes one source after the other; a later one counts more."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._values: dict[str, Any] = {}
        self._servers: dict[str, McpServer] = {}
        self._notices: list[str] = []
        self._bound: list[str] = []

    def settings(self) -> Settings:
        notices, bound = tuple(self._notices), tuple(self._bound)
        return Settings(**self._values, mcp_servers=self._servers, notices=notices, bound=bound)

    def take_environment(self) -> None:
        for key, (setting, read, _) in _KEYS.items():
            upper = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).upper()
            for name in (f"IFLOW_{upper}", f"IFLOW_{key}"):
                if value := self._environment.get(name):
                    self._store(setting, _read(read, value, f"the variable {name}", key))

    def take_file(
        self, path: pathlib.Path, boundary: pathlib.Path | None, dialect: str, is_free: bool
    ) -> None:
        text = read_text(path, boundary)
        try:
            table = json.loads(_COMMENT.sub(lambda match: match[1] or "", text) or "{}")
        except (ValueError, RecursionError) as error:
            raise SpecError(f"{path} is no JSON: {error}") from error
        if not isinstance(table, dict):
            raise SpecError(f"{path} must hold an object")
        unknown, bound = [], []
        for key, value in _with_inner_keys(table, path):
            group, _, name = key.partition(".")
            if dialect == ".claude" and group not in _CLAUDE_KEYS:
                continue
            value = value if group in ("hooks", "permissions") else self._with_variables(value)
            if group == "mcpServers" and is_free:
                read = functools.partial(values.read_server, name)
                self._servers[name] = _read(read, value, path, key)
            elif group == "mcpServers":
                bound.append(key)
            elif key not in _FILE_KEYS:
                unknown.append(key)
            elif not is_free and not _FILE_KEYS[key][2]:
                bound.append(key)
            else:
                self._take(key, value, path, dialect, is_free)
        if unknown and dialect != ".claude":
            self._notices.append(f"{path}: not known here: {', '.join(unknown)}")
        if bound:
            keys = ", ".join(bound)
            self._bound.append(f"{path}: {keys}")
            self._notices.append(
                f"{path}: passed over until you trust this project (--trust): {keys}"
            )

    def _take(self, key: str, value: Any, path: pathlib.Path, dialect: str, is_free: bool) -> None:
        setting, read, _ = _FILE_KEYS[key]
        taken = _read(read, value, path, key)
        if setting == "hooks" and dialect == ".iflow":
            taken = tuple(dataclasses.replace(hook, is_strict=True) for hook in taken)
        if setting == "core_tools" and not is_free and setting in self._values:
            taken = tuple(name for name in taken if name in self._values[setting])
        self._store(setting, taken)

    def _store(self, setting: str, value: Any) -> None:
        if setting in _ADDING:
            value = tuple(dict.fromkeys((*self._values.get(setting, ()), *value)))
        self._values[setting] = value

    def _with_variables(self, value: Any) -> Any:
        """Return a value with $NAME and ${NAME} replaced by variables that are set."""
        if isinstance(value, dict):
            return {key: self._with_variables(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._with_variables(one) for one in value]
        if not isinstance(value, str):
            return value
        return _VARIABLE.sub(
            lambda match: self._environment.get(match[1] or match[2], match[0]), value
        )


def _with_inner_keys(table: dict[str, Any], path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a file; those of rules and of servers one by one, as `permissions.deny`."""
    for key, value in table.items():
        if key in ("permissions", "mcpServers"):
            inner = _read(values.read_table, value, path, key)
            yield from ((f"{key}.{name}", one) for name, one in inner.items())
        else:
            yield key, value


def _read(read: Callable[[Any], Any], value: Any, source: object, key: str) -> Any:
    """Return a value as `read` has it.

    Raises:
      SpecError: it is of a wrong type. The message never has the value of a key to an account.
    """
    try:
        return read(value)
    except ValueError as error:
        is_shown = isinstance(value, str) and "key" not in key.lower()
        given = repr(value[:80]) if is_shown else f"of type {type(value).__name__}"
        raise SpecError(f"{source}: {key} must be {error}, not {given}") from error
