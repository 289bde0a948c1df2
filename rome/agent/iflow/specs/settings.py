"""Settings of the agent: one loader for the files of `.claude/`, `.agents/` and `.iflow/`.

Later sources count more: the user's files, the project's, the system's (/etc/iflow-cli), then
environment variables IFLOW_key and IFLOW_KEY. Rules, hooks, servers and excluded tools add up.

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
from collections.abc import Callable, Mapping
from typing import Any

from rome.agent.iflow.specs.settings_values import (
    HookCommand,
    McpServer,
    SupervisorSettings,
    read_count,
    read_flag,
    read_hooks,
    read_mode,
    read_names,
    read_rules,
    read_seconds,
    read_server,
    read_share,
    read_supervisor,
    read_table,
    read_text_value,
    read_tools,
    read_turns,
)
from rome.agent.iflow.specs.spec_files import SpecError, places, read_text

SYSTEM_SETTINGS = "/etc/iflow-cli/settings.json"
# In files of Claude, other keys mean something else: `model` names one of its own.
_CLAUDE_KEYS = ("hooks", "permissions", "mcpServers")
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings.

    Attributes:
      model: name of the model; "" for the endpoint's only one.
      api_key: for the endpoint.
      base_url: of the endpoint, with /v1.
      tokens_limit: of a conversation; 0 for what the model has.
      compression_threshold: share of `tokens_limit` from which on the context is compacted.
      shell_timeout: of a command, in seconds; 0 for the tool's own.
      core_tools: the only tools there are; None for all.
      exclude_tools: that are not there.
      mcp_servers: by name.
      hooks: in order.
      allow, ask, deny: rules, as `rome.agent.iflow.approval.rules` reads them.
      mode: of approval; "" where no file names one.
      context_files: names of files of instructions; () for the usual ones.
      checkpointing: whether files can be rewound.
      max_turns: of the model in one turn of the user; 0 for no limit.
      additional_directories: outside the project that tools may use.
      supervisor: what it permits; None for no supervisor.
      notices: for people: what was passed over, and why.
      bound: files, each with its keys that hold only once the user trusts the project.
    """

    model: str = ""
    api_key: str = ""
    base_url: str = ""
    tokens_limit: int = 0
    compression_threshold: float = 0.8
    shell_timeout: float = 0.0
    core_tools: tuple[str, ...] | None = None
    exclude_tools: tuple[str, ...] = ()
    mcp_servers: Mapping[str, McpServer] = dataclasses.field(default_factory=dict)
    hooks: tuple[HookCommand, ...] = ()
    allow: tuple[str, ...] = ()
    ask: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    mode: str = ""
    context_files: tuple[str, ...] = ()
    checkpointing: bool = True
    max_turns: int = 0
    additional_directories: tuple[str, ...] = ()
    supervisor: SupervisorSettings | None = None
    notices: tuple[str, ...] = ()
    bound: tuple[str, ...] = ()


def load_settings(
    directory: pathlib.Path,
    *,
    trusted: bool,
    home: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings that hold in a directory, which its project's root has a part in.

    Args:
      directory: where the agent works.
      trusted: whether the user trusts it (`projects.Projects`).
      home: of the user.
      environment: variables; those of this process where None.

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
    system = pathlib.Path(environment.get("IFLOW_CLI_SYSTEM_SETTINGS_PATH", SYSTEM_SETTINGS))
    if system.exists():
        reader.take_file(system, None, ".iflow", True)
    reader.take_environment()
    return reader.settings()


# key -> (setting, how its value is read, whether an untrusted project may set it)
_KEYS: Mapping[str, tuple[str, Callable[[Any], Any], bool]] = {
    "modelName": ("model", read_text_value, False),
    "model": ("model", read_text_value, False),
    "apiKey": ("api_key", read_text_value, False),
    "baseUrl": ("base_url", read_text_value, False),
    "tokensLimit": ("tokens_limit", read_count, False),
    "compressionTokenThreshold": ("compression_threshold", read_share, False),
    "shellTimeout": ("shell_timeout", read_seconds, False),
    "coreTools": ("core_tools", read_tools, True),
    "excludeTools": ("exclude_tools", read_tools, True),
    "contextFileName": ("context_files", read_names, False),
    "checkpointing": ("checkpointing", read_flag, False),
    "maxSessionTurns": ("max_turns", read_turns, False),
    "approvalMode": ("mode", read_mode, False),
    "supervisor": ("supervisor", read_supervisor, False),
    "allowMCPServers": ("allow_servers", read_names, True),
    "excludeMCPServers": ("exclude_servers", read_names, True),
}
# The same for the keys of `permissions`.
_PERMISSIONS: Mapping[str, tuple[str, Callable[[Any], Any], bool]] = {
    "deny": ("deny", read_rules, True),
    "ask": ("ask", read_rules, True),
    "allow": ("allow", read_rules, False),
    "additionalDirectories": ("additional_directories", read_names, False),
    "defaultMode": ("mode", read_mode, False),
}
_ADDING = ("exclude_tools", "exclude_servers", "allow", "ask", "deny", "additional_directories")


class _Reader:
    """Takes one source after the other; a later one counts more."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._values: dict[str, Any] = {}
        self._servers: dict[str, McpServer] = {}
        self._hooks: list[HookCommand] = []
        self._notices: list[str] = []
        self._bound: list[str] = []

    def settings(self) -> Settings:
        values = dict(self._values)
        allowed = values.pop("allow_servers", None)
        excluded = values.pop("exclude_servers", ())
        servers = {
            name: server
            for name, server in self._servers.items()
            if name not in excluded and (allowed is None or name in allowed)
        }
        return Settings(
            **values,
            mcp_servers=servers,
            hooks=tuple(self._hooks),
            notices=tuple(self._notices),
            bound=tuple(self._bound),
        )

    def take_environment(self) -> None:
        for key in _KEYS:
            upper = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).upper()
            for name in (f"IFLOW_{upper}", f"IFLOW_{key}"):
                if self._environment.get(name):
                    self._take(key, self._environment[name], f"the variable {name}", True)

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
        for key, value in table.items():
            if dialect == ".claude" and key not in _CLAUDE_KEYS:
                continue
            try:
                if not self._take_key(key, value, path, dialect, is_free):
                    unknown.append(key)
            except _BoundError:
                bound.append(key)
        if unknown:
            self._notices.append(f"{path}: not known here: {', '.join(unknown)}")
        if bound:
            keys = ", ".join(bound)
            self._bound.append(f"{path}: {keys}")
            self._notices.append(
                f"{path}: passed over until you trust this project (--trust): {keys}"
            )

    def _take_key(
        self, key: str, value: Any, path: pathlib.Path, dialect: str, is_free: bool
    ) -> bool:
        """Take one key of a file; return whether it is known."""
        if key == "hooks":
            _need(is_free)
            self._hooks += _read(lambda one: read_hooks(one, dialect == ".iflow"), value, path, key)
        elif key == "mcpServers":
            _need(is_free)
            for name, server in _read(read_table, value, path, key).items():
                read = functools.partial(read_server, name)
                given = self._with_variables(server)
                self._servers[name] = _read(read, given, path, f"{key}.{name}")
        elif key == "permissions":
            self._take_permissions(_read(read_table, value, path, key), path, is_free)
        elif key == "autoAccept":
            _need(is_free)
            if _read(read_flag, value, path, key):
                self._values.setdefault("mode", "accept_edits")
        elif key in _KEYS:
            self._take(key, value, str(path), is_free)
        else:
            return False
        return True

    def _take(self, key: str, value: Any, source: str, is_free: bool) -> None:
        setting, read, may_always = _KEYS[key]
        _need(is_free or may_always)
        taken = _read(read, self._with_variables(value), source, key)
        if setting in ("core_tools", "allow_servers") and not is_free and setting in self._values:
            taken = tuple(name for name in taken if name in self._values[setting])
        self._store(setting, taken)

    def _store(self, setting: str, value: Any) -> None:
        if setting in _ADDING:
            value = tuple(dict.fromkeys((*self._values.get(setting, ()), *value)))
        self._values[setting] = value

    def _take_permissions(self, table: dict[str, Any], path: pathlib.Path, is_free: bool) -> None:
        for key, (setting, read, may_always) in _PERMISSIONS.items():
            if key in table:
                _need(is_free or may_always)
                self._store(setting, _read(read, table[key], path, f"permissions.{key}"))

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


class _BoundError(Exception):
    """A project that is not trusted sets something that it may not."""


def _need(is_free: bool) -> None:
    if not is_free:
        raise _BoundError


def _read(read: Callable[[Any], Any], value: Any, source: object, key: str) -> Any:
    """Return a value as `read` has it.

    Raises:
      SpecError: it is of a wrong type; the message names source and key, and never the value, which
        may be a key to an account.
    """
    try:
        return read(value)
    except ValueError as error:
        raise SpecError(
            f"{source}: {key} must be {error}, not of type {type(value).__name__}"
            if not isinstance(value, str) or "key" in key.lower()
            else f"{source}: {key} must be {error}, not {value[:80]!r}"
        ) from error
