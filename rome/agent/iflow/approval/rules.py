"""Rules of approval: `tool(pattern)`, and whether one fits a call.

| rule | fits |
|---|---|
| `shell` | every command |
| `shell(git status)` | that command alone |
| `shell(git commit:*)`, `shell(git commit *)` | a command that begins with these words |
| `shell(npm run test-*)` | words by patterns; a pattern does not go across words |
| `edit(src/**)` | writing files below src, by any tool that writes |
| `read_file(.env)` | reading files of that name in any folder, by any tool that reads |
| `read_file(~/.ssh/**)`, `edit(/etc/**)` | files by absolute path |
| `web_fetch(domain:example.org)` | a host and the hosts below it |
| `github__*`, `mcp__github` | tools of an MCP server |
| `task(explore)` | a call with an argument of that text |

The names of other agents' tools are understood: `Bash(git log:*)`, `Read(./.env)`.
"""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
import functools
import posixpath
import re
import shlex
from collections.abc import Iterable, Sequence

from rome.agent.iflow.approval.shell_commands import SimpleCommand, Word
from rome.agent.iflow.specs.tool_names import tool_name

# Programs whose first argument says what they do.
SUBCOMMANDS = frozenset({
    "git", "npm", "pnpm", "yarn", "cargo", "go", "make", "docker", "pip", "uv", "poetry", "kubectl",
    "apt", "apt-get", "brew", "systemctl", "gh", "dotnet", "mvn", "gradle", "bundle", "rails",
})  # fmt: skip
# A rule for the first tool holds for all of them.
FAMILIES = {
    "edit": ("edit", "multi_edit", "write_file"),
    "read_file": ("read_file", "search", "glob", "list_directory"),
}


class Fit(enum.IntEnum):
    """Whether a rule fits: MAYBE where only the running shell knows."""

    NO = 0
    MAYBE = 1
    YES = 2


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule."""

    tool: str  # name of a tool, or a pattern of names
    pattern: str  # of what the call does; "" for every call
    text: str  # as it was written

    def names(self, tool: str) -> bool:
        """Return whether the rule is about a tool."""
        return fnmatch.fnmatchcase(tool, self.tool) or tool in FAMILIES.get(self.tool, ())

    def fits_command(self, command: SimpleCommand) -> bool:
        """Return whether the rule is for certain about a command, as a rule that allows must be.

        The program must be written as in the rule, without a folder, and all words be known.
        """
        if not command.words or not command.is_static:
            return False
        return _match_words(self._words, command.texts)

    def may_fit_command(self, command: SimpleCommand) -> Fit:
        """Return whether the rule may be about a command, as a rule that forbids must be judged.

        The folder of a program, capital letters (some file systems have none) and options before a
        subcommand do not hide it, and a word that is not known may be any.
        """
        if not command.words:
            return Fit.NO
        words = [Word(command.program.lower(), command.words[0].is_static), *command.words[1:]]
        wanted = [word.lower() if not place else word for place, word in enumerate(self._words)]
        return _search_words(wanted, words)

    def may_fit_arguments(self, command: SimpleCommand) -> bool:
        """Return whether arguments of a command are one that a rule that forbids is about.

        Many programs run what their arguments say. That of a subcommand, as in `git rm`, is none.
        """
        skipped = 2 if command.program in SUBCOMMANDS else 1
        words = [Word(word.text.rpartition("/")[2], word.is_certain) for word in command.words]
        starts = (words[place:] for place in range(skipped, len(words)) if words[place].is_static)
        return any(_search_words(self._words, rest) is not Fit.NO for rest in starts)

    def fits_path(self, path: str, root: str, *, ignores_case: bool = False) -> bool:
        """Return whether the rule is about a file, given by its absolute path."""
        if ignores_case:
            return bool(_path_pattern(self.pattern.lower(), root.lower()).fullmatch(path.lower()))
        return bool(_path_pattern(self.pattern, root).fullmatch(path))

    def fits_host(self, host: str) -> bool:
        """Return whether the rule is about a host of the network."""
        domain = self.pattern.removeprefix("domain:").lower()
        return host == domain or host.endswith(f".{domain.removeprefix('*.')}")

    @functools.cached_property
    def _words(self) -> tuple[str, ...]:
        """Return the pattern as words; a last "*" stands for any number of words."""
        pattern = self.pattern
        if pattern.endswith(":*"):
            pattern = f"{pattern[:-2]} *"
        try:
            return tuple(shlex.split(pattern))
        except ValueError:
            return tuple(pattern.split())


def parse_rule(text: str) -> Rule:
    """Return a rule.

    Raises:
      ValueError: it is not of the form `tool` or `tool(pattern)`.
    """
    match = re.fullmatch(r"\s*([\w.*-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"rule {text!r} must be of the form tool or tool(pattern)")
    name = tool_name(match[1])
    if match[1].startswith("mcp__") and "__" not in name:
        name += "__*"
    pattern = (match[2] or "").strip()
    return Rule(name, "" if pattern in ("*", ":*") else pattern, text.strip())


def absolute(path: str, root: str, home: str) -> str:
    """Return an absolute path without `.` and `..`; links are not followed."""
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    elif path.startswith("~"):  # another user's home, which may be anywhere
        path = posixpath.join("/", posixpath.expanduser(path))
    return posixpath.normpath(posixpath.join(root, path)).replace("//", "/")


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is one of some folders, or below one."""
    return any(path == one or path.startswith(f"{one.rstrip('/')}/") for one in folders)


def _match_words(pattern: Sequence[str], texts: Sequence[str]) -> bool:
    if pattern and pattern[-1] == "*":
        pattern = pattern[:-1]
        texts = texts[: len(pattern)]
    if len(pattern) != len(texts):
        return False
    return all(fnmatch.fnmatchcase(text, one) for one, text in zip(pattern, texts, strict=True))


def _search_words(pattern: Sequence[str], words: Sequence[Word]) -> Fit:
    """Return whether words begin with a pattern, when options and their values are passed over."""
    is_open = bool(pattern) and pattern[-1] == "*"
    wanted = list(pattern[:-1] if is_open else pattern)
    best = Fit.YES
    after_option = False
    rest = list(words)
    while wanted:
        if not rest:
            return Fit.NO
        word = rest.pop(0)
        if not word.is_certain:
            best = Fit.MAYBE
            wanted.pop(0)
        elif fnmatch.fnmatchcase(word.text, wanted[0]):
            wanted.pop(0)
        elif word.text.startswith("-"):
            after_option = True
            continue
        elif not after_option:
            return Fit.NO
        after_option = False
    # A rule on one command alone also forbids it with options, never with other arguments.
    has_more = any(not word.text.startswith("-") for word in rest)
    return best if is_open or not has_more else Fit.NO


@functools.lru_cache(maxsize=1024)
def _path_pattern(pattern: str, root: str) -> re.Pattern[str]:
    """Return the expression of a pattern of paths, which also fits what lies below."""
    if pattern.startswith("//"):
        pattern = pattern[1:]
    pattern = pattern.removeprefix("./").rstrip("/") or "/"
    if pattern.startswith("~/"):
        pattern = posixpath.expanduser(pattern)
    if not pattern.startswith("/"):
        # As in .gitignore, a name without a slash is looked for in all folders.
        pattern = f"{root.rstrip('/')}/{'' if '/' in pattern else '**/'}{pattern}"
    made = ""
    for part in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", pattern):
        made += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(
            part, re.escape(part)
        )
    return re.compile(f"{made}(?:/.*)?", re.DOTALL)
