"""Which paths a command names, reads below, or may reach by a pattern."""

from __future__ import annotations

import fnmatch
import posixpath
import re

from rome.agent.iflow.approval.rules import Rule, absolute
from rome.agent.iflow.approval.shell_commands import SimpleCommand

# Their words are no paths of files that are read.
SPEAKERS = ("echo", "printf", "test", "[", "exit", "return", "kill", "sleep", "export", "local")
# Programs that read whatever lies below a folder -> options that make them do so; "" for always.
_DEEP_READERS = {
    "grep": r"-\w*[rR]|--(dereference-)?recursive", "egrep": r"-\w*[rR]", "fgrep": r"-\w*[rR]",
    "rg": "", "ag": "", "ack": "", "tar": "", "rsync": "", "zip": r"-\w*r|--recurse",
    "cp": r"-\w*[rRa]|--recursive|--archive", "mv": "", "ln": "", "7z": "",
    "scp": r"-\w*r", "diff": r"-\w*r|--recursive",
}  # fmt: skip
_SEARCHERS = ("grep", "egrep", "fgrep", "rg", "ag", "ack")  # their first word is none
MAX_ALTERNATIVES = 64  # of one word with braces
MAX_CLUSTER = 12  # characters of short options that stand before a value
_SEPARATOR = re.compile("[=@:,;<]+")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def paths_in(command: SimpleCommand) -> list[str]:
    """Return what of a command may be a path to read."""
    found = [one.target.text for one in command.redirects if one.operator == "<"]
    words = list(command.texts[1:])
    if command.name in SPEAKERS:
        words = []
    elif command.name in _SEARCHERS and not any(re.match(r"--|-\w*[ef]", word) for word in words):
        for wanted in command.plain[:1]:
            words.remove(wanted)  # what is looked for
    return found + [part for text in words for part in path_parts(text)]


def read_below(command: SimpleCommand) -> list[str]:
    """Return the folders all of whose files a command reads, or puts in another place."""
    if command.program == "git":
        return ["."] if "grep" in command.plain[:2] else []
    options = _DEEP_READERS.get(command.program)
    words = command.options
    if options is None or not (options == "" or any(re.match(options, word) for word in words)):
        return []
    is_search = command.program in _SEARCHERS
    names_pattern = any(re.match(r"--(regexp|file)|-\w*[ef]", word) for word in words)
    first = 1 if is_search and not names_pattern else 0  # what is looked for is no folder
    last = -1 if command.program in ("mv", "ln", "cp") and len(command.plain) > 1 else None
    return command.plain[first:last] or ["."]


def may_lead_to(rule: Rule, pattern: str, root: str) -> bool:
    """Return whether names that the shell puts in place of an absolute pattern may fit a rule."""
    wanted = rule.pattern.removeprefix("./").rstrip("/")
    last = posixpath.basename(wanted.rstrip("/*"))
    if "/" not in wanted:
        return fnmatch.fnmatchcase(last, posixpath.basename(pattern))
    parts = absolute(wanted, root, "/~").split("/")
    given = pattern.split("/")
    fixed = next((place for place, one in enumerate(parts) if "*" in one), len(parts))
    if len(given) < fixed + (fixed < len(parts)):
        return False
    return all(map(fnmatch.fnmatchcase, parts[:fixed], given))


def path_parts(text: str) -> list[str]:
    """Return what of an argument may be a path: all of it, the value of an option, or a part."""
    parts = []
    for one in _alternatives(text):
        if not one.startswith("-"):
            parts.append(one)
        elif not one.startswith("--"):
            parts += [one[start:] for start in range(2, min(len(one), MAX_CLUSTER))]
        parts.append(one.partition("=")[2])
        pieces = _SEPARATOR.split(one)  # as in HEAD:.env, x=@.env;type=a
        parts += pieces if len(pieces) > 1 else []
    return [part for part in parts if part]


def _alternatives(text: str) -> list[str]:
    """Return what the shell makes of braces, such as {a,b}."""
    waiting = [text]
    done: list[str] = []
    while waiting and len(waiting) + len(done) < MAX_ALTERNATIVES:
        one = waiting.pop()
        match = _BRACES.search(one)
        if match is None:
            done.append(one)
        else:
            before, after = one[: match.start()], one[match.end() :]
            waiting += [f"{before}{inner}{after}" for inner in match[1].split(",")]
    return ["/"] if waiting else done  # too many to be looked at: it may be any path
