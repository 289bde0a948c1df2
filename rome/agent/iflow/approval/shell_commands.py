"""Simple commands of a line of bash, as `shell_syntax` finds them."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a command."""

    # As the program gets it, patterns left as they are; as it is written where it is not static.
    text: str
    is_static: bool = True  # whether the text is known before the shell runs
    has_pattern: bool = False  # whether the shell may put names of files in its place
    # Whether it begins with a pattern: `*` becomes an option where a file is named like one.
    may_be_option: bool = False

    @property
    def is_certain(self) -> bool:
        """Return whether nothing about it depends on the running shell but names of files."""
        return self.is_static and not self.may_be_option


@dataclasses.dataclass(frozen=True)
class Redirect:
    """A redirection: its operator, such as ">>" or "<", and its file, or the text of `<<`."""

    operator: str
    target: Word

    @property
    def writes(self) -> bool:
        """Return whether it writes a file; `2>&1` and /dev/null do not count."""
        if ">" not in self.operator or self.target.text == "/dev/null":
            return False
        return not (self.operator.endswith("&") and re.fullmatch(r"\d+|-", self.target.text))


@dataclasses.dataclass(frozen=True)
class SimpleCommand:
    """One command of a line."""

    # The program and its arguments; () for assignments or redirections alone.
    words: tuple[Word, ...] = ()
    assignments: tuple[tuple[str, Word], ...] = ()  # variables that it sets, with their values
    redirects: tuple[Redirect, ...] = ()  # of its streams
    pipe: int = -1  # number of the pipeline that it stands in; -1 for none
    place: int = 0  # in that pipeline, from 0
    runs_as: tuple[str, ...] = ()  # wrappers around it that give it rights, such as sudo

    @property
    def name(self) -> str:
        """Return the program as it is written; "" where it is not known."""
        return self.words[0].text if self.words and self.words[0].is_static else ""

    @property
    def program(self) -> str:
        """Return the program without its folder; "" where it is not known."""
        return self.name.rstrip("/").rpartition("/")[2]

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts of the words."""
        return tuple(word.text for word in self.words)

    @property
    def options(self) -> list[str]:
        """Return the arguments that begin with a dash."""
        return [text for text in self.texts[1:] if text.startswith("-")]

    @property
    def plain(self) -> list[str]:
        """Return the arguments that do not begin with a dash."""
        return [text for text in self.texts[1:] if not text.startswith("-")]

    @property
    def is_static(self) -> bool:
        """Return whether all words and files are known."""
        values = (*(value for _, value in self.assignments), *(r.target for r in self.redirects))
        return all(word.is_certain for word in (*self.words, *values))


@dataclasses.dataclass(frozen=True)
class Line:
    """A whole line: its commands, nested ones included, and what was not understood."""

    commands: tuple[SimpleCommand, ...]
    problems: tuple[str, ...] = ()
