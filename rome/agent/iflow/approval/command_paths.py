"""Which paths a command names, reads below, or may reach by a pattern."""

from __future__ import annotations

import fnmatch
import posixpath
import re

from rome.agent.iflow.approval.rules import Rule, absolute
from rome.agent.iflow.approval.shell_programs import base_name
from rome.agent.iflow.approval.shell_syntax import SimpleCommand

_SPEAKERS = ("echo", "printf")  # their words are no paths
# Programs that read whatever lies below a folder -> options that make them do so; "" for always.
_DEEP_READERS = {
    "grep": r"-\w*[rR]|--(dereference-)?recursive", "egrep": r"-\w*[rR]", "fgrep": r"-\w*[rR]",
    "rg": "", "ag": "", "ack": "", "tar": "", "rsync": "", "zip": r"-\w*r|--recurse",
    "cp": r"-\w*[rRa]|--recursive|--archive", "scp": r"-\w*r", "diff": r"-\w*r|--recursive",
}  # fmt: skip
_SEARCHERS = ("grep", "egrep", "fgrep", "rg", "ag", "ack")  # their first word is none
MAX_ALTERNATIVES = 64  # of one word with braces
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def paths_in(command: SimpleCommand) -> list[str]:
    """Return what of a command may be a path to read."""
    found = [one.target.text for one in command.redirects if one.operator == "<"]
    words = list(command.texts[1:])
    if command.name in _SPEAKERS:
        words = []
    elif command.name in _SEARCHERS and not any(re.match(r"--|-\w*[ef]", word) for word in words):
        plain = [word for word in words if not word.startswith("-")]
        if plain:
            words.remove(plain[0])  # what is looked for
    return found + [part for text in words for part in path_parts(text)]


def read_below(command: SimpleCommand) -> list[str]:
    """Return the folders all of whose files a command reads."""
    options = _DEEP_READERS.get(base_name(command))
    words = [text for text in command.texts[1:] if text.startswith("-")]
    if options is None or not (options == "" or any(re.match(options, word) for word in words)):
        return []
    plain = [text for text in command.texts[1:] if not text.startswith("-")]
    is_search = base_name(command) in _SEARCHERS
    if is_search and not any(re.match(r"--(regexp|file)|-\w*[ef]", word) for word in words):
        plain = plain[1:]  # what is looked for
    return plain or ["."]


def may_lead_to(rule: Rule, pattern: str, root: str) -> bool:
    """Return whether the names that the shell puts in place of a pattern may fit a rule.

    Args:
      rule: on files.
      pattern: with its folder, as an absolute path.
      root: directory of the project.
    """
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


def _alternatives(text: str) -> list[str]:
    """Return what the shell makes of braces, such as {a,b}."""
    found = [text]
    while len(found) < MAX_ALTERNATIVES:
        place, match = next(
            ((at, m) for at, one in enumerate(found) if (m := _BRACES.search(one))), (0, None)
        )
        if match is None:
            return found
        before, after = found[place][: match.start()], found[place][match.end() :]
        found[place : place + 1] = [f"{before}{one}{after}" for one in match[1].split(",")]
    return ["/"]  # too many to be looked at: it may be any path


def path_parts(text: str) -> list[str]:
    """Return what of an argument may be a path: all of it, or the value of an option."""
    return [part for one in _alternatives(text) for part in _plain_parts(one)]


def _plain_parts(text: str) -> list[str]:
    parts = [text]
    if text.startswith("-"):
        parts = [text[2:]] if not text.startswith("--") and len(text) > 2 else []
    if "=" in text:
        parts.append(text.partition("=")[2])
    return [part for part in parts if part]
