"""Which calls run at once, which wait for the user, and which never run.

Modes: `plan` only reads; `default` reads in the project and asks for the rest; `accept_edits` also
writes files in the project; `yolo` asks for nothing. Rules (`approval.rules`) come on top.
What is stricter holds, wherever it stands: deny, then plan mode, then ask, then allow, then the
mode. So `deny` and `ask` hold in yolo too, and no order of files opens what another file closed.

A command line is judged by its syntax tree: every command in it must be allowed, one that is
denied denies all, and what is not understood is never allowed by a rule.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rome.agent.iflow.approval.command_paths import (
    SPEAKERS,
    may_lead_to,
    path_parts,
    paths_in,
    read_below,
)
from rome.agent.iflow.approval.rules import (
    SUBCOMMANDS,
    Fit,
    Rule,
    absolute,
    is_below,
    parse_rule,
)
from rome.agent.iflow.approval.shell_commands import Line, SimpleCommand
from rome.agent.iflow.approval.shell_programs import INTERPRETERS, RIGHTS, commands_of, is_read_only
from rome.agent.iflow.specs.settings_values import MODES
from rome.agent.iflow.tools.base import Tool

# In these, a file can make programs run later: writing them is asked for in every mode but yolo.
PROTECTED = (".git", ".iflow", ".claude", ".agents", ".husky", ".vscode", ".idea", ".mcp.json")
# Variables that change how much programs say, and not what they do.
HARMLESS_VARIABLES = frozenset({
    "LANG", "LC_ALL", "TZ", "TERM", "NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS", "LINES", "DEBUG",
    "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "RUST_BACKTRACE", "RUST_LOG", "NODE_ENV",
})  # fmt: skip
# Entries below a folder, for a file that must not be read; more count as one.
MAX_LOOKED_AT = 50_000
MAX_DIRECTORIES = 64  # of one line, in which its commands may run
_VALUE = re.compile(r"(?:[\w.-]+=)?!?")  # what may stand before a script: `alias.x=!rm x`
# Programs that can do anything: "always" keeps all of their arguments.
_ANYTHING = INTERPRETERS | RIGHTS | {"ssh", "env", "xargs", "find", "awk", "sed", "rm", "curl"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the policy says of a call."""

    decision: Literal["allow", "ask", "deny"]
    reason: str = ""  # for people, and for the model where it is denied
    rule: str = ""  # which "allow always" would add; "" where none would be right


class Policy:
    """The modes and rules of one session.

    Args:
      mode: one of `settings_values.MODES`.
      root: directory of the project, as the tools see it.
      allow, ask, deny: rules.
      directories: outside the project that tools may use as if they were in it.
      servers: names of MCP servers whose tools need no approval.
      home: of the user, where the tools work.
      follow: returns a path with links followed; None where the files are on another machine.
      keep_rule: stores a rule that the user allowed for the project.

    Attributes:
      mode: as it is now; an interface may set it.

    Raises:
      ValueError: a rule or the mode is not understood.
    """

    def __init__(
        self,
        *,
        mode: str = "default",
        root: str = "/",
        allow: Sequence[str] = (),
        ask: Sequence[str] = (),
        deny: Sequence[str] = (),
        directories: Sequence[str] = (),
        servers: Iterable[str] = (),
        home: str = "",
        follow: Callable[[str], str] | None = None,
        keep_rule: Callable[[str], None] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} unknown; known: {', '.join(MODES)}")
        self.mode = mode
        self._follow = follow or (lambda path: path)
        self._is_here = follow is not None
        self._home = home or os.path.expanduser("~")
        self._root = self._follow(posixpath.abspath(root))
        self._open = [self._root, *(self._resolve(path) for path in directories)]
        self._allow = [parse_rule(rule) for rule in allow]
        self._ask = [parse_rule(rule) for rule in ask]
        self._deny = [parse_rule(rule) for rule in deny]
        self._servers = tuple(servers)
        self._keep_rule = keep_rule

    def judge(self, tool: Tool, arguments: Mapping[str, Any], directory: str = "") -> Verdict:
        """Return whether a call may run, whose shell is now in a directory ("" the project's)."""
        access = tool.access(arguments)
        command = arguments.get("command")
        if access == "execute" and isinstance(command, str):
            return self._judge_command(tool.name, command, directory or self._root)
        if found := self._rule_of(self._deny, tool, arguments, some=True):
            return _denied_by(found)
        paths = tool.paths(arguments)
        is_open = access == "none" or (access == "read" and self._are_open(paths))
        if self.mode == "plan" and access not in ("none", "read"):
            return Verdict("deny", _plan_mode(tool.name))
        if found := self._rule_of(self._ask, tool, arguments, some=True):
            return _asked_by(found)
        if found := self._rule_of(self._allow, tool, arguments, some=False):
            return Verdict("allow", f"the rule allow {found.text}")
        server, separator, _ = tool.name.partition("__")
        if is_open or self.mode == "yolo" or (separator and server in self._servers):
            return Verdict("allow")
        is_edit = access == "write" and self.mode == "accept_edits" and bool(paths)
        if is_edit and all(self._may_write(path) for path in paths):
            return Verdict("allow", "edits are accepted")
        return Verdict("ask", self._why(paths, access), _always(tool, arguments, access))

    def hides(self, path: str) -> bool:
        """Return whether a rule forbids to read a file."""
        rules = [rule for rule in self._deny if rule.pattern and rule.names("read_file")]
        return any(self._fits(rule, path) for rule in rules)

    def add_rule(self, rule: str, scope: Literal["session", "project"]) -> None:
        """Allow what a rule says from now on, for the project also in later sessions."""
        self._allow.append(parse_rule(rule))
        if scope == "project" and self._keep_rule:
            self._keep_rule(rule)

    # -- commands

    def _judge_command(self, tool: str, text: str, directory: str) -> Verdict:
        line = commands_of(text)
        where, is_lost = self._directories(line, directory)
        doubt = ""
        for rule in self._deny:
            fit = _fit(rule, line) if rule.names(tool) else Fit.NO
            fit = max(fit, self._path_fit(rule, line, where, is_lost))
            if fit is Fit.YES:
                return _denied_by(rule)
            if fit is Fit.MAYBE:
                doubt = f"it may do what the rule deny {rule.text} forbids"
        reads = not line.problems and all(self._reads(command, where) for command in line.commands)
        if self.mode == "plan" and not reads:
            return Verdict("deny", _plan_mode(tool))
        if doubt:
            return Verdict("ask", doubt)
        for rule in self._ask:
            if rule.names(tool) and _fit(rule, line) is not Fit.NO:
                return _asked_by(rule)
        allow = [rule for rule in self._allow if rule.names(tool)]
        whole = next((rule for rule in allow if not rule.pattern), None)
        if whole or self.mode == "yolo":
            return Verdict("allow", f"the rule allow {whole.text}" if whole else "")
        if line.problems:
            return Verdict("ask", f"a part of it cannot be judged: {line.problems[0]}")
        left = [one for one in line.commands if not self._is_allowed(one, allow, where)]
        if not left:
            return Verdict("allow", "only reads" if reads else "rules allow all of its commands")
        rules = {_always_command(tool, command) for command in left}
        shown = " ".join(left[0].texts)[:80] or "a variable that is set, or a redirection"
        reason = f"no rule allows: {shown}"
        return Verdict("ask", reason, rules.pop() if len(rules) == 1 else "")

    def _directories(self, line: Line, directory: str) -> tuple[tuple[str, ...], bool]:
        """Return where commands of a line may run, and whether only the shell knows more."""
        found = {directory: None}
        is_lost = False
        for command in line.commands:
            if command.name in ("cd", "pushd", "popd"):
                target = command.words[1] if len(command.words) == 2 else None
                is_known = target is not None and target.is_certain and target.text[:1] not in "-+"
                is_lost = is_lost or not is_known or len(found) >= MAX_DIRECTORIES
                if target is not None and not is_lost:
                    found |= {absolute(target.text, one, self._home): None for one in found}
        return tuple(found), is_lost

    def _reads(self, command: SimpleCommand, where: Sequence[str]) -> bool:
        """Return whether a command only reads, and only in the project."""
        return is_read_only(command) and self._are_open(paths_in(command), where)

    def _is_allowed(
        self, command: SimpleCommand, allow: Sequence[Rule], where: Sequence[str]
    ) -> bool:
        """Return whether a command needs no approval, its variables and redirections included."""
        if command.runs_as or any(
            name not in HARMLESS_VARIABLES for name, _ in command.assignments
        ):
            return False
        files = [one for one in command.redirects if one.operator != "<<"]
        written = [one.target.text for one in files if one.writes]
        read = [one.target.text for one in files if one.operator == "<"]
        is_open = self._are_open(read, where) and all(one.target.is_certain for one in files)
        if not is_open or not all(self._may_redirect(path, where) for path in written):
            return False
        bare = dataclasses.replace(command, assignments=(), redirects=())
        is_allowed = not bare.words or any(rule.fits_command(bare) for rule in allow)
        return is_allowed or self._reads(bare, where)

    def _may_redirect(self, path: str, where: Sequence[str]) -> bool:
        if self.mode == "accept_edits" and self._may_write(path, where):
            return True
        rules = [rule for rule in self._allow if rule.names("write_file") and rule.pattern]
        written = [self._resolve(path, one) for one in where]
        return all(any(rule.fits_path(one, self._root) for rule in rules) for one in written)

    def _path_fit(self, rule: Rule, line: Line, where: Sequence[str], is_lost: bool) -> Fit:
        """Return whether a line names a file that a rule forbids, or may reach one."""
        reads, writes = rule.names("read_file"), rule.names("write_file")
        if not rule.pattern or not (reads or writes):
            return Fit.NO
        # In a sandbox such files are not there at all.
        may_reach = is_lost or (self._is_here and bool(line.problems))
        for command in line.commands:
            paths = [one.target.text for one in command.redirects if one.writes] if writes else []
            if reads or not is_read_only(command):
                paths += [one.target.text for one in command.redirects if one.operator != "<<"]
                paths += [part for text in command.texts[1:] for part in path_parts(text)]
            if any(self._fits(rule, path, where) for path in paths):
                return Fit.YES
            folders = read_below(command) if reads and self._is_here else []
            words = [*command.words[1:], *(one.target for one in command.redirects)]
            if command.name in SPEAKERS or (is_read_only(command) and not reads):
                words = [one.target for one in command.redirects if reads or one.writes]
            if self._is_here and not all(word.is_static for word in words):
                may_reach = True
            patterns = [word.text for word in words if word.has_pattern]
            for one in where:
                places = (absolute(text, one, self._home) for text in patterns)
                below = (absolute(text, one, self._home) for text in folders)
                may_reach = may_reach or any(may_lead_to(rule, it, self._root) for it in places)
                may_reach = may_reach or any(self._holds(rule, folder) for folder in below)
        return Fit.MAYBE if may_reach else Fit.NO

    def _holds(self, rule: Rule, folder: str) -> bool:
        """Return whether a file that a rule is about lies below a folder of this machine."""
        left = MAX_LOOKED_AT
        for above, folders, names in os.walk(folder):
            left -= len(folders) + len(names)
            paths = (posixpath.join(above, name) for name in (*folders, *names))
            if left < 0 or any(self._names(rule, path) for path in paths):
                return True
        return False

    # -- files

    def _resolve(self, path: str, directory: str = "") -> str:
        return self._follow(absolute(path, directory or self._root, self._home))

    def _fits(self, rule: Rule, path: str, where: Sequence[str] = ("",)) -> bool:
        """Return whether a rule is about a path as it is written, or where it leads."""
        written = {absolute(path, one or self._root, self._home) for one in where}
        found = written | {self._follow(one) for one in written}
        return any(self._names(rule, one) for one in found)

    def _names(self, rule: Rule, path: str) -> bool:
        """Return whether a rule that forbids or asks is about a file; some systems ignore case."""
        return rule.fits_path(path, self._root, ignores_case=True)

    def _are_open(self, paths: Iterable[str], where: Sequence[str] = ("",)) -> bool:
        return all(self._is_open(path, one) for path in paths for one in where)

    def _is_open(self, path: str, directory: str = "") -> bool:
        resolved = self._resolve(path, directory)
        return resolved == "/dev/null" or is_below(resolved, self._open)

    def _may_write(self, path: str, where: Sequence[str] = ("",)) -> bool:
        """Return whether a file is the project's, and makes no program run by being there."""
        for directory in where:
            written = absolute(path, directory or self._root, self._home)
            parts = {*written.split("/"), *self._follow(written).split("/")}
            if {part.lower() for part in parts} & set(PROTECTED):
                return False
        return self._are_open([path], where)

    def _rule_of(
        self, rules: Iterable[Rule], tool: Tool, arguments: Mapping[str, Any], *, some: bool
    ) -> Rule | None:
        """Return the rule that fits a call: one of its files (`some`), or all of them."""
        paths = tool.paths(arguments)

        def fits(rule: Rule) -> bool:
            if not rule.pattern:
                return True
            if tool.name == "web_fetch":
                return rule.fits_host(_host(arguments))
            if not paths:
                return rule.pattern in arguments.values()
            if some:
                return any(self._fits(rule, path) for path in paths)
            return all(rule.fits_path(self._resolve(path), self._root) for path in paths)

        return next((rule for rule in rules if rule.names(tool.name) and fits(rule)), None)

    def _why(self, paths: Sequence[str], access: str) -> str:
        outside = [path for path in paths if not self._is_open(path)]
        if outside:
            return f"{outside[0]} is outside the project"
        guarded = [path for path in paths if access == "write" and not self._may_write(path)]
        if guarded:
            return f"{guarded[0]} can make programs run later"
        return {
            "write": "it writes files",
            "execute": "it runs a command",
            "network": "it reaches the network",
        }.get(access, "what it touches is not known")


def _denied_by(rule: Rule) -> Verdict:
    return Verdict("deny", f"the rule deny {rule.text} forbids it")


def _asked_by(rule: Rule) -> Verdict:
    return Verdict("ask", f"the rule ask {rule.text} wants it to be asked for")


def _fit(rule: Rule, line: Line) -> Fit:
    """Return whether a rule that forbids or asks fits any command of a line."""
    if not rule.pattern:
        return Fit.YES
    fits = [rule.may_fit_command(command) for command in line.commands]
    if line.problems or any(_may_run(rule, command) for command in line.commands):
        fits.append(Fit.MAYBE)
    return max(fits, default=Fit.NO)


def _may_run(rule: Rule, command: SimpleCommand) -> bool:
    """Return whether a command may run one that a rule is about: in its words, or as a script."""
    values = [value for _, value in command.assignments]
    if not is_read_only(command) and command.name not in SPEAKERS:
        if rule.may_fit_arguments(command):
            return True
        values += command.words[1:]
    scripts = (_VALUE.sub("", one.text) for one in values if " " in one.text)
    lines = (commands_of(script).commands for script in scripts)
    return any(rule.may_fit_command(one) is Fit.YES for found in lines for one in found)


def _host(arguments: Mapping[str, Any]) -> str:
    url = str(arguments.get("url", ""))
    try:
        return (urllib.parse.urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _plan_mode(tool: str) -> str:
    return (
        f"plan mode only reads, and this call of {tool} may do more; present the plan with"
        " exit_plan_mode first"
    )


def _always(tool: Tool, arguments: Mapping[str, Any], access: str) -> str:
    """Return the rule that "allow always" would add for a call that is no command."""
    if access == "network" and _host(arguments):
        return f"{tool.name}(domain:{_host(arguments)})"
    paths = tool.paths(arguments)
    if access in ("read", "write") and paths:
        folder = posixpath.dirname(paths[0])
        family = "edit" if access == "write" else "read_file"
        return f"{family}({folder}/**)" if folder.strip("/") else f"{family}({paths[0]})"
    return tool.name


def _always_command(tool: str, command: SimpleCommand) -> str:
    """Return the rule that "allow always" would add for a command; "" where none would be right."""
    words = command.texts
    is_plain = command.is_static and not command.redirects and not command.assignments
    if not words or not is_plain or command.runs_as or "/" in words[0]:
        return ""
    if any(set(word) & set("*?[]()'\"\\\n") for word in words):
        return ""  # a rule would read these as patterns
    if words[0].rstrip("0123456789.") in _ANYTHING:
        return f"{tool}({' '.join(words)})" if " " not in "".join(words) else ""
    if words[0] in SUBCOMMANDS and len(words) > 1:
        return "" if words[1].startswith("-") else f"{tool}({words[0]} {words[1]}:*)"
    return f"{tool}({words[0]}:*)"
