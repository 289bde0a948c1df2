"""Who asked for what a call does: the user, or a text that the agent was only shown.

A call that writes, runs or reaches something which the user's words do not name, but which a
sentence of other people's text does, follows that text: output of a tool, a file, a quoted mail.
Text that the user tells the agent to follow counts as the user's.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import fnmatch
import posixpath
import re
from collections.abc import Iterable

from rome.agent.iflow.approval.actions import Action

MAX_LINES = 4000  # of other people's sentences that are kept, the newest
MAX_LINE = 2000  # characters
_WORD = re.compile(r"[^\W\d_]{2,}|[\u3040-\u9fff]")
_MIN_WORDS = 3  # of a sentence, names of files apart; rows of data have fewer
_NAME = re.compile(r"\S*[\d/_.]\S+")  # a file, a number, an address
_ORDER = re.compile(
    r"\b(delete|remove|run|send|copy|append|start|replace|set|write|open|execute|download|install"
    r"|empty|make|add|post|move)\b",
    re.I,
)
_LISTED = re.compile(r"[-dlbcps][-rwxsStT]{9}|total \d")  # how `ls -l` begins a line
_ENCODED = re.compile(r"[A-Za-z0-9+/]{24,}={0,2}")
_FOLLOW = re.compile(
    r"\b(follow|obey|apply|implement|resolve|solve|fix|carry out|do what|according to|as (described"
    r"|said|asked)|instructions? (are )?in)\b",
    re.I,
)
_GLOB = re.compile(r"[\w./-]*[*?][\w./*?-]*")


class Sources:
    """The words of the user, and the sentences of others, of one session."""

    def __init__(self, root: str, home: str) -> None:
        self._root = root
        self._home = home
        self._asked: dict[str, None] = {}  # lines of the user, in order
        self._shown: dict[str, None] = {}  # sentences of others, in order

    def ask(self, text: str) -> None:
        """Note words of the user; lines that begin with ">" are quoted, so they are others'."""
        for line in text.splitlines():
            if line.lstrip().startswith(">"):
                self._note(line.lstrip("> "))
            else:
                self._note_asked(line)

    def show(self, text: str, paths: Iterable[str] = ()) -> None:
        """Note what a call printed that read or ran some files.

        Where the user says to follow one of them, the text counts as the user's.
        """
        is_users = any(self._is_to_be_followed(path) for path in paths)
        for line in text.splitlines():
            if is_users:
                self._note_asked(line)
            else:
                self._note(line)

    def demanded(self, action: Action) -> str:
        """Return what of a call another's sentence names and the user does not; "" for nothing."""
        asked = "\n".join(self._asked)
        for path in (*action.writes, *action.programs):
            names = _names_of(path, self._root, self._home)
            if self._is_asked(names, asked):
                continue
            if any(_is_wanted(names, line) for line in self._shown):
                return names[0]
        for host in action.hosts:
            is_shown = any(_is_named(host, line, False) for line in self._shown)
            if is_shown and not _is_named(host, asked, False):
                return host
        return ""

    def _note_asked(self, line: str) -> None:
        line = self._local(line)
        for text in (line, *_hidden_in(line)):
            self._asked[text] = None

    def _local(self, line: str) -> str:
        """Return a line with paths below the root as they are named from there."""
        line = line[:MAX_LINE]
        return line if self._root == "/" else line.replace(f"{self._root}/", "")

    def _note(self, line: str) -> None:
        """Keep a sentence, and what it hides in base64 or ROT13."""
        line = self._local(line)
        for text in (line, codecs.encode(line, "rot13"), *_hidden_in(line)):
            if _is_sentence(text):
                self._shown.pop(text, None)
                self._shown[text] = None
        while len(self._shown) > MAX_LINES:
            del self._shown[next(iter(self._shown))]

    def _is_asked(self, names: list[str], asked: str) -> bool:
        """Return whether the user names a path, a folder above it, or a pattern that fits."""
        base = posixpath.basename(names[0])
        if any(_is_named(name, asked, True) for name in (*names, base)):
            return True
        patterns = _GLOB.findall(asked)
        fits = fnmatch.fnmatchcase
        return any(fits(names[0], pattern) or fits(base, pattern) for pattern in patterns)

    def _is_to_be_followed(self, path: str) -> bool:
        name = _names_of(path, self._root, self._home)[0]
        names = (name, posixpath.basename(name))
        return any(
            _FOLLOW.search(line) and any(_is_named(one, line, False) for one in names)
            for line in self._asked
        )


def _names_of(path: str, root: str, home: str) -> list[str]:
    """Return a path as people would write it, and the folders above it below root or home."""
    for top in (root, home):
        prefix = top.rstrip("/") + "/"
        if path.startswith(prefix):
            path = path[len(prefix) :]
            break
    names = [path]
    while "/" in path.strip("/"):
        path = posixpath.dirname(path)
        names.append(path)
    return names


def _is_sentence(line: str) -> bool:
    """Return whether a line is prose, or a short order; lists and rows of data are neither."""
    if _LISTED.match(line):
        return False
    words = _WORD.findall(_NAME.sub(" ", line))
    return len(words) >= _MIN_WORDS or (bool(words) and _ORDER.search(line) is not None)


def _is_wanted(names: list[str], line: str) -> bool:
    """Return whether a sentence names a path or a folder above it, other than as a place in code.

    Compilers and tracebacks name places as FILE:LINE, or as "FILE", line LINE.
    """
    name = next((n for n in names if _is_named(n, line, n == names[0])), "")
    is_plain = not re.search(r"[./]", name)  # so it may be a word like any other
    if not name or (is_plain and f"{name}/" not in line):
        return False
    return not re.search(rf'{re.escape(name)}(:\d|", line \d)', line)


def _is_named(name: str, text: str, is_start_enough: bool) -> bool:
    """Return whether a text names something; where `is_start_enough`, also what is below it."""
    if not name or name not in text:
        return False
    after = r"(?![\w-]|\.\w)" if is_start_enough else r"(?![\w-]|[./]\w)"
    return re.search(rf"(?<![\w-])(?<!\w/){re.escape(name)}{after}", text) is not None


def _hidden_in(line: str) -> list[str]:
    """Return the texts that stand in a line as base64."""
    found = []
    for match in _ENCODED.finditer(line):
        with contextlib.suppress(ValueError):  # it is another long word
            found.append(base64.b64decode(match[0] + "=" * (-len(match[0]) % 4)).decode())
    return found
