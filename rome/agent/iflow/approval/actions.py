"""What a call would do, as the supervisor's rules look at it: commands, files, hosts, texts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tree_sitter

from rome.agent.iflow.approval.rules import absolute
from rome.agent.iflow.approval.shell_commands import SimpleCommand
from rome.agent.iflow.approval.shell_nodes import all_below, text_of
from rome.agent.iflow.approval.shell_programs import commands_of, is_interpreter
from rome.agent.iflow.approval.shell_syntax import parse_tree
from rome.agent.iflow.tools.base import Tool

# Programs that reach the network by their nature.
NETWORK_PROGRAMS = frozenset({
    "curl", "wget", "nc", "ncat", "netcat", "telnet", "ssh", "scp", "sftp", "rsync", "ftp", "socat",
    "dig", "nslookup", "host", "ping", "nmap", "http", "https", "aria2c", "lynx", "w3m", "openssl",
})  # fmt: skip
# Programs that write the files that their arguments name: which ones.
_WRITE_ALL = frozenset({"tee", "touch", "truncate", "rm", "rmdir", "shred", "unlink", "mkdir"})
_WRITE_LAST = frozenset({"cp", "mv", "install", "ln", "rsync"})
_COPY = frozenset({"cp", "mv", "install", "ln"})
_CHANGE_MODE = frozenset({"chmod", "chown", "chgrp", "setfacl", "chattr"})
_URL = re.compile(
    r"\b(?:https?|ftp|wss?|git|ssh)://(?:[^/\s@'\"]*@)?([\w.-]+|\[[\da-fA-F:]+\])", re.I
)
_SOCKET = re.compile(r"/dev/(?:tcp|udp)/([\w.$-]+)")
_GIT_OVER_NETWORK = ("push", "clone", "fetch", "pull", "ls-remote")
_ASKS_ARGUMENT = re.compile(r"\[ (\"?)\$([1-9])\1 ==? ([\"']?)([\w./-]+)\3 \]")
# After one of these, the script's arguments may be others.
_CHANGES_ARGUMENTS = frozenset(
    {"set", "shift", "eval", "source", ".", "alias", "command", "builtin", "exec", "trap"}
)
_SCRIPT = re.compile(r"#!.*\b(?:ba|da|z|k)?sh\b")


@dataclasses.dataclass(frozen=True)
class Action:
    """One call."""

    tool: str  # name of the tool
    access: str  # what the tool may touch
    # Those that it runs, or that a script which it writes would run.
    commands: tuple[SimpleCommand, ...] = ()
    doubts: tuple[str, ...] = ()  # parts of a command line that are not understood
    reads: tuple[str, ...] = ()  # absolute paths that it names without writing them
    writes: tuple[str, ...] = ()  # absolute paths that it writes, removes or changes
    # Of the network, that it names; "?" where it reaches one that it does not name.
    hosts: tuple[str, ...] = ()
    # Absolute paths of files that it runs: scripts, and programs named with their folder.
    programs: tuple[str, ...] = ()
    text: str = ""  # all of its arguments
    is_written: bool = False  # whether the commands are only written to a script

    def runs(self, *names: str) -> list[SimpleCommand]:
        """Return the commands whose program has one of these names, in any folder."""
        return [command for command in self.commands if command.program in names]


def action_of(tool: Tool, arguments: Mapping[str, Any], root: str, home: str) -> Action:
    """Return what a call would do in a project's root, for a user with that home."""
    access = tool.access(arguments)
    text = "\n".join(_texts(arguments))
    hosts = tuple(_hosts_in(text))
    if access == "execute" and isinstance(arguments.get("command"), str):
        return of_script(arguments["command"], root, home, tool=tool.name, text=text)
    paths = tuple(absolute(path, root, home) for path in tool.paths(arguments))
    if access != "write":
        return Action(tool.name, access, reads=paths, hosts=hosts, text=text)
    content = str(arguments.get("content", arguments.get("new_text", "")))
    is_script = bool(_SCRIPT.match(content)) or any(path.endswith(".sh") for path in paths)
    script = commands_of(content).commands if is_script else ()
    return Action(
        tool.name, access, commands=script, writes=paths, text=text, is_written=bool(script)
    )


def of_script(
    script: str, root: str, home: str, *, tool: str = "shell", text: str | None = None
) -> Action:
    """Return what a script of the shell would do; the arguments are those of `action_of`."""
    line = commands_of(script)
    commands = list(line.commands)
    reads: list[str] = []
    writes: list[str] = []
    hosts: list[str] = []
    programs: list[str] = []
    copies: dict[str, str] = {}  # path -> what it is a copy of
    directory = root
    for one in line.commands:
        if one.program == "cd" and len(one.words) == 2 and one.words[1].is_static:
            directory = absolute(one.words[1].text, directory, home)
        written = [absolute(path, directory, home) for path in _written_by(one)]
        named = [absolute(path, directory, home) for path in _named_by(one)]
        writes += written
        reads += [path for path in named if path not in written]
        hosts += _hosts_of(one)
        run = [absolute(path, directory, home) for path in _programs_of(one)]
        programs += [*run, *(copies[path] for path in run if path in copies)]
        if one.program in _COPY and written and named:
            copies[written[-1]] = copies.get(named[0], named[0])
        commands += _commands_written_by(one)
    return Action(
        tool=tool,
        access="execute",
        commands=tuple(commands),
        doubts=line.problems,
        reads=tuple(dict.fromkeys(reads)),
        writes=tuple(dict.fromkeys(writes)),
        hosts=tuple(dict.fromkeys(hosts)),
        programs=tuple(dict.fromkeys(programs)),
        text=script if text is None else text,
    )


def arguments_of(action: Action, program: str, root: str, home: str) -> tuple[str, ...] | None:
    """Return the arguments that a call gives to a program that it runs; None where that is unsure.

    It is sure where one command of the call, which changes no folder, names the program, whose path
    is absolute, in full.
    """
    if action.runs("cd", "pushd", "exec", "cp", "mv", "ln", "xargs", "find"):
        return None
    found = []
    for command in action.commands:
        for number, word in enumerate(command.words):
            if absolute(word.text, root, home) == program and word.is_static:
                found.append(command.words[number + 1 :])
                break
    if len(found) != 1 or not all(word.is_static and not word.has_pattern for word in found[0]):
        return None
    return tuple(word.text for word in found[0])


def without_dead_branches(script: str, arguments: Sequence[str]) -> str:
    """Return a script of bash without the branches that its arguments rule out.

    Only those are left out that are certain: at the script's top, of a plain comparison of an
    argument with a fixed text, before anything that could change the arguments.
    """
    root = parse_tree(script)
    if root is None or root.has_error:
        return script
    source = script.encode()
    cuts = []
    for node in root.children:
        if _may_change_arguments(node):
            break
        if node.type == "if_statement" and _is_false(node, arguments):
            cuts.append(_branch_of(node))
    for start, end in reversed(cuts):
        source = source[:start] + b"\n:\n" + source[end:]
    return source.decode()


def _may_change_arguments(node: tree_sitter.Node) -> bool:
    return any(
        one.type == "function_definition"
        or (one.type == "command_name" and text_of(one) in _CHANGES_ARGUMENTS)
        or (one.type == "command_name" and not re.fullmatch(r"[\w./-]+|:|\[", text_of(one)))
        for one in all_below(node)
    )


def _is_false(node: tree_sitter.Node, arguments: Sequence[str]) -> bool:
    condition = node.child_by_field_name("condition")
    asked = _ASKS_ARGUMENT.fullmatch(text_of(condition)) if condition is not None else None
    if asked is None:
        return False
    place = int(asked[2])
    given = arguments[place - 1] if place <= len(arguments) else ""
    return given != asked[4]


def _branch_of(node: tree_sitter.Node) -> tuple[int, int]:
    """Return where the branch behind `then` begins and ends."""
    start = next(one.end_byte for one in node.children if one.type == "then")
    ends = ("elif_clause", "else_clause", "fi")
    return start, next(one.start_byte for one in node.children if one.type in ends)


def _programs_of(command: SimpleCommand) -> list[str]:
    """Return the files that a command runs."""
    found = [command.name] if "/" in command.name else []
    if is_interpreter(command) or command.program in ("source", "."):
        found += command.plain[:1]
    return [path for path in found if path]


def _commands_written_by(command: SimpleCommand) -> tuple[SimpleCommand, ...]:
    """Return the commands of a script that a command writes from a here-document."""
    body = next((one.target.text for one in command.redirects if one.operator == "<<"), "")
    files = _written_by(command)
    is_script = bool(_SCRIPT.match(body)) or any(path.endswith(".sh") for path in files)
    return commands_of(body).commands if body and files and is_script else ()


def _written_by(command: SimpleCommand) -> list[str]:
    """Return the paths that a command writes, as far as its words say so."""
    written = [redirect.target.text for redirect in command.redirects if redirect.writes]
    name, plain, options = command.program, command.plain, command.options
    if name in _WRITE_ALL:
        written += plain
    elif name in _WRITE_LAST:
        written += plain if name == "mv" else plain[-1:]
    elif name in _CHANGE_MODE:
        written += plain[1:]
    elif name == "dd":
        written += [text[3:] for text in plain if text.startswith("of=")]
    elif name in ("sed", "perl") and any(re.match(r"-\w*i|--in-place", text) for text in options):
        written += plain if "-e" in options else plain[1:]
    elif name in ("curl", "wget", "gcc", "cc", "sort"):
        for before, after in zip(command.texts, command.texts[1:], strict=False):
            if before in ("-o", "-O", "--output", "--output-document") and after[:1] != "-":
                written.append(after)
    elif name == "git" and plain[:1] and plain[0] in ("checkout", "restore", "rm"):
        written += [text for text in plain[1:] if "/" in text or "." in text]
    return [path for path in written if path and not re.match(r"https?://", path)]


def _named_by(command: SimpleCommand) -> list[str]:
    """Return what of a command looks like a path, or is read as its input."""
    found = [one.target.text for one in command.redirects if one.operator == "<"]
    for text in command.texts[1:]:
        value = text.partition("=")[2] if "=" in text else text.lstrip("-@")
        value = value.lstrip("@")
        is_path = "/" in value or value.startswith((".", "~")) or "." in value
        if value and is_path and "://" not in value and len(value) < 4096 and "\n" not in value:
            found.append(value)
    return found


def _hosts_of(command: SimpleCommand) -> list[str]:
    """Return the hosts that a command reaches; "?" for one that its words do not name."""
    name = command.program
    words = command.texts[1:]
    bodies = [one.target.text for one in command.redirects]
    named = _hosts_in("\n".join([*words, *bodies]))
    if name == "git":
        return (named or ["?"]) if any(word in _GIT_OVER_NETWORK for word in words) else []
    if name == "getent":
        return [word for word in words[1:2] if words[0] in ("hosts", "ahosts", "ahostsv4")] or named
    if name in NETWORK_PROGRAMS and (name != "openssl" or "s_client" in words):
        named += [match[1] for word in words if (match := re.match(r"[\w.-]+@([\w.-]+)", word))]
        if not named and name in ("curl", "wget"):
            named = [
                word.partition("/")[0] for word in words if re.match(r"[\w-]+\.[\w.-]+(/|$)", word)
            ]
        if not named and name in ("nc", "ncat", "netcat", "ssh", "telnet", "ping"):
            named = [
                word for word in words if re.fullmatch(r"[A-Za-z][\w.-]*|\d+(\.\d+){3}", word)
            ][:1]
        return named or ["?"]
    is_socket = "/dev/tcp/" in "\n".join([*words, *bodies])
    return named if is_interpreter(command) or is_socket else []


def _hosts_in(text: str) -> list[str]:
    """Return the hosts of a text: those of URLs and of bash's sockets."""
    return [host.lower() for host in (*_URL.findall(text), *_SOCKET.findall(text))]


def _texts(value: Any) -> Iterable[str]:
    """Yield all texts in the arguments of a call."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)
