"""A reader of Dockerfiles: instructions with their lines.

Reference: https://docs.docker.com/reference/dockerfile/. Supported: comments, line continuation,
flags, the JSON form, quotes and variables (dockerfile_words.py). Not supported, and refused by
name: here-documents, another escape character than the backslash.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping

from envs.tasks.harbor.dockerfile_words import SubstitutionError, expand, split_words
from envs.tasks.harbor.errors import TaskError, UnsupportedError

_KEYWORDS = """
ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL MAINTAINER ONBUILD RUN SHELL
STOPSIGNAL USER VOLUME WORKDIR
"""
KEYWORDS = frozenset(_KEYWORDS.split())
_HEREDOC = re.compile(r"(?:^|\s)\d*<<-?[\"']?[A-Za-z_]")  # as Docker sees one: a word of its own
_FLAG = re.compile(r"--([a-z][a-z-]*)(?:=(\S+))?(?:\s+|$)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    `rows` are its lines with their numbers, to locate something in a long RUN.
    """

    keyword: str
    arguments: str
    line: int
    rows: tuple[tuple[int, str], ...]

    def flags(self) -> tuple[dict[str, str], str]:
        """Return (flags, the text after them)."""
        rest = self.arguments
        found = {}
        while match := _FLAG.match(rest):
            found[match[1]] = match[2] or ""
            rest = rest[match.end() :]
        return found, rest

    def line_of(self, pattern: re.Pattern[str]) -> int:
        """Return the number of the first line that the pattern matches, or of the instruction."""
        return next((number for number, row in self.rows if pattern.search(row)), self.line)


def parse(text: str, file: pathlib.Path) -> list[Instruction]:
    """Parse a Dockerfile.

    Raises:
      TaskError: the text is not a Dockerfile.
      UnsupportedError: it uses a feature that this reader does not support.
    """
    instructions = [_instruction(rows, file) for rows in _joined_lines(text, file)]
    if not any(instruction.keyword == "FROM" for instruction in instructions):
        raise TaskError(file, 1, "no FROM instruction")
    first = next(instruction for instruction in instructions if instruction.keyword != "ARG")
    if first.keyword != "FROM":
        raise TaskError(file, first.line, f"{first.keyword} before FROM; only ARG may stand there")
    return instructions


def _joined_lines(text: str, file: pathlib.Path) -> Iterator[list[tuple[int, str]]]:
    """Yield the lines of each instruction with their numbers, without comments and backslashes."""
    rows: list[tuple[int, str]] = []
    directives = True
    for number, row in enumerate(text.splitlines(), 1):
        stripped = row.strip()
        if stripped.startswith("#"):
            if directives and re.match(r"#\s*escape\s*=\s*[^\\\s]", stripped, re.IGNORECASE):
                raise UnsupportedError(
                    file,
                    number,
                    f"the directive {stripped!r}; only the backslash continues a line here",
                )
            directives = directives and bool(re.match(r"#\s*\w+\s*=", stripped))
            continue
        if not stripped:  # inside an instruction too: Docker drops empty lines there
            continue
        directives = False
        continues = re.search(r"\\\s*$", row)
        rows.append((number, row[: continues.start()] if continues else row))
        if not continues:
            yield rows
            rows = []
    if rows:
        yield rows


def _instruction(rows: list[tuple[int, str]], file: pathlib.Path) -> Instruction:
    line = rows[0][0]
    text = "".join(row for _, row in rows).strip()
    keyword, _, arguments = re.sub(r"\A(\S+)\s*", r"\1 ", text, count=1).partition(" ")
    if keyword.upper() not in KEYWORDS:
        raise TaskError(file, line, f"unknown instruction {keyword[:40]!r}")
    if not arguments.strip():
        raise TaskError(file, line, f"{keyword.upper()} without arguments")
    if "\0" in arguments:
        raise TaskError(file, line, f"{keyword.upper()} has a NUL character")
    if keyword.upper() in ("RUN", "COPY", "ADD") and _HEREDOC.search(_outside_quotes(arguments)):
        raise UnsupportedError(
            file,
            line,
            f"{keyword.upper()} with a here-document; write the text to a file of the build context"
            " and COPY it",
        )
    return Instruction(keyword.upper(), arguments.strip(), line, tuple(rows))


def _outside_quotes(text: str) -> str:
    """Return the text without its quoted parts, except for the quotes of a here-document's mark."""
    kept = []
    quote = ""
    escaped = False
    for index, letter in enumerate(text):
        if escaped or letter == "\\":
            escaped = not escaped
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not text.startswith(("<<", "<-"), max(index - 2, 0)):
            quote = letter
        else:
            kept.append(letter)
    return "".join(kept)


def assignments(
    instruction: Instruction, file: pathlib.Path, variables: Mapping[str, str]
) -> dict[str, str]:
    """Return the NAME=value pairs of ENV, also in its old form `ENV NAME value`.

    Variables have the values from before the instruction.

    Raises:
      TaskError: the arguments are no such pairs.
    """
    found = {}
    words = split_words(instruction.arguments)
    if words and "=" not in words[0]:
        name, *rest = instruction.arguments.split(maxsplit=1)
        if not rest:
            raise TaskError(file, instruction.line, f"ENV {name[:40]!r} is not NAME=value")
        words = [f"{name}={rest[0]}"]
    for word in words:
        name, equals, value = word.partition("=")
        name = filled(instruction, file, name, variables)
        if not equals or not name:
            raise TaskError(file, instruction.line, f"ENV {word[:40]!r} is not NAME=value")
        found[name] = filled(instruction, file, value, variables)
    return found


def filled(
    instruction: Instruction, file: pathlib.Path, word: str, variables: Mapping[str, str]
) -> str:
    """Return a word without quotes, its variables filled in. Raises TaskError."""
    try:
        return expand(word, variables)
    except SubstitutionError as error:
        message = f"{instruction.keyword} {word[:60]!r}: {error}"
        raise TaskError(file, instruction.line, message) from error


def paths(
    instruction: Instruction, file: pathlib.Path, text: str, variables: Mapping[str, str]
) -> list[str]:
    """Return the paths of COPY or ADD, written with blanks between them or as a JSON list."""
    words = json_list(text) if text.startswith("[") else text.split()
    if words is None:
        raise TaskError(
            file,
            instruction.line,
            f"{instruction.keyword} begins with [ and is not a JSON list of texts",
        )
    return [filled(instruction, file, word, variables) for word in words]


def json_list(text: str) -> list[str] | None:
    """Return the entries of a JSON list of texts.

    Returns None where the text is no such list: Docker then takes it for a shell command.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list) or not value:
        return None
    return value if all(isinstance(entry, str) for entry in value) else None
