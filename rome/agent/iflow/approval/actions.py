"""What a call would do, as the supervisor's rules look at it: commands, files, hosts, texts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rome.agent.iflow.approval.rules import absolute
from rome.agent.iflow.approval.shell_programs import INTERPRETERS, base_name, commands_of
from rome.agent.iflow.approval.shell_syntax import SimpleCommand
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
_GIT_OVER_NETWORK = ("push", "clone", "fetch", "pull", "ls-remote")
_SCRIPT = re.compile(r"#!.*\b(?:ba|da|z|k)?sh\b")


@dataclasses.dataclass(frozen=True)
class Action:
    """One call.

    Attributes:
      tool: name of the tool.
      access: what the tool may touch.
      commands: that it runs, or that a script which it writes would run.
      doubts: parts of a command line that are not understood.
      reads: absolute paths that it names without writing them.
      writes: absolute paths that it writes, removes or changes.
      hosts: of the network that it names; "?" where it reaches one that it does not name.
      programs: absolute paths of files that it runs: scripts, and programs named with their folder.
      text: all of its arguments.
      is_written: whether the commands are only written to a script.
    """

    tool: str
    access: str
    commands: tuple[SimpleCommand, ...] = ()
    doubts: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    text: str = ""
    is_written: bool = False

    def runs(self, *names: str) -> list[SimpleCommand]:
        """Return the commands whose program has one of these names, in any folder."""
        return [command for command in self.commands if base_name(command) in names]


def action_of(tool: Tool, arguments: Mapping[str, Any], root: str, home: str) -> Action:
    """Return what a call would do.

    Args:
      tool: that is called.
      arguments: of the call.
      root: directory of the project, which relative paths are below.
      home: of the user, where the tools work.
    """
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
        if base_name(one) == "cd" and len(one.words) == 2 and one.words[1].is_static:
            directory = absolute(one.words[1].text, directory, home)
        written = [absolute(path, directory, home) for path in _written_by(one)]
        named = [absolute(path, directory, home) for path in _named_by(one)]
        writes += written
        reads += [path for path in named if path not in written]
        hosts += _hosts_of(one)
        run = [absolute(path, directory, home) for path in _programs_of(one)]
        programs += [*run, *(copies[path] for path in run if path in copies)]
        if base_name(one) in _COPY and written and named:
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
    """Return the arguments that a call gives to a program of its own; None where that is unsure.

    It is sure where one command of the call, which changes no folder, names the program in full.

    Args:
      action: the call.
      program: the absolute path of a file that it runs.
      root: directory that the call begins in.
      home: of the user.
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


def _programs_of(command: SimpleCommand) -> list[str]:
    """Return the files that a command runs."""
    name = base_name(command)
    found = [command.name] if "/" in command.name else []
    if name.rstrip("0123456789.") in INTERPRETERS or name in ("source", "."):
        plain = (word.text for word in command.words[1:] if not word.text.startswith("-"))
        found += [next(plain, "")]
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
    name = base_name(command)
    plain = [word.text for word in command.words[1:] if not word.text.startswith("-")]
    options = [word.text for word in command.words[1:] if word.text.startswith("-")]
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
    elif name == "git" and any(verb in plain[:1] for verb in ("checkout", "restore", "rm")):
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
    name = base_name(command)
    words = command.texts[1:]
    bodies = [one.target.text for one in command.redirects]
    named = list(_hosts_in("\n".join([*words, *bodies])))
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
    is_program = name.rstrip("0123456789.") in INTERPRETERS
    return named if is_program or "/dev/tcp/" in "\n".join([*words, *bodies]) else []


def _hosts_in(text: str) -> Iterable[str]:
    """Yield the hosts of a text: those of URLs, of bash's sockets and of user@host:path."""
    for match in _URL.finditer(text):
        yield match[1].lower()
    for match in re.finditer(r"/dev/(?:tcp|udp)/([\w.$-]+)", text):
        yield match[1].lower()


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


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is one of some folders, or below one."""
    return any(path == one or path.startswith(f"{one.rstrip('/')}/") for one in folders)
