"""Slash commands of the user: `commands/NAME.md` (Claude) and `commands/NAME.toml` (iFlow).

| in the text | becomes |
|---|---|
| $ARGUMENTS, {{args}}, $1 ... $9 | what the user wrote after the command |
| !`command`, !{command} | the output of a command; arguments in it are quoted for the shell |
| @path, @{path} | the content of a file |

What is put in is never looked through again: an argument that spells !`rm` is only text.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import tomllib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from rome.agent.iflow.specs.spec_files import (
    Place,
    SpecError,
    load_named,
    read_text,
    split_front_matter,
    text_in,
)

# Runs a command, or reads a file, and returns text; the caller asks the policy first.
Fetch = Callable[[str], Awaitable[str]]

_ARGUMENT = re.compile(r"\$ARGUMENTS\b|\{\{\s*args\s*\}\}|\$([1-9])(?!\d)")
_PART = re.compile(
    rf"(?P<argument>{_ARGUMENT.pattern})"
    r"|!`(?P<command>[^`]+)`|!\{(?P<braced>(?:[^{}]|\{\{\s*args\s*\}\}|\{[^{}]*\})+)\}"
    r"|(?<![\w@`])@(?:\{(?P<file_braced>[^{}\n]+)\}|(?P<file>[\w~.][\w./~-]*[\w~-]))"
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
      name: without the slash; "folder:name" for one in a sub-folder.
      description: for people.
      template: its text.
      hint: what to write after it.
    """

    name: str
    description: str
    template: str
    hint: str = ""

    async def expand(self, arguments: str, *, execute: Fetch, read: Fetch) -> str:
        """Return the text of the user's message.

        Args:
          arguments: what the user wrote after the command.
          execute: runs a command and returns its output.
          read: returns the content of a file; SpecError or OSError where it cannot.
        """
        parts = []
        end = 0
        for match in _PART.finditer(self.template):
            parts.append(self.template[end : match.start()])
            end = match.end()
            command = match["command"] or match["braced"]
            if match["argument"]:
                parts.append(_fill(match["argument"], arguments, quote=False))
            elif command:
                parts.append(await execute(_fill(command, arguments, quote=True)))
            else:
                parts.append(await _content(match, read))
        parts.append(self.template[end:])
        text = "".join(parts)
        if arguments.strip() and not _ARGUMENT.search(self.template):
            text += f"\n\n{arguments.strip()}"
        return text


def load_commands(where: Iterable[Place]) -> tuple[dict[str, Command], list[str]]:
    """Return the commands by name, and what was wrong with files; see `load_named`."""
    found: dict[str, Command] = {}
    problems = []
    for place in where:  # the kinds of file of one place count alike
        for suffix in (".md", ".toml"):
            commands, wrong = load_named([place], f"commands/**/*{suffix}", _read_command)
            found |= commands
            problems += wrong
    return found, problems


def _read_command(path: pathlib.Path, place: Place) -> Command:
    """Return the command that a file describes.

    Raises:
      SpecError: it has no text, or is no TOML.
    """
    name = ":".join(path.relative_to(place.folder / "commands").with_suffix("").parts)
    text = read_text(path, place.boundary)
    if path.suffix == ".toml":
        try:
            table: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{path} is no TOML: {error}") from error
        template = text_in(table, "prompt")
    else:
        table, template = split_front_matter(text, path)
    if not template.strip():
        raise SpecError(f"{path} has no text; write what the agent should do")
    first = template.strip().splitlines()[0].lstrip("# ")
    return Command(
        name=name,
        description=text_in(table, "description") or first[:80],
        template=template.strip(),
        hint=text_in(table, "argument-hint"),
    )


def _fill(text: str, arguments: str, *, quote: bool) -> str:
    """Return a text with what stands for arguments replaced by them."""
    try:
        words = shlex.split(arguments)
    except ValueError:  # a lone quotation mark, as in "don't"
        words = arguments.split()

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            place = int(match[1]) - 1
            value = words[place] if place < len(words) else ""
        else:
            value = arguments
        return shlex.quote(value) if quote else value

    return _ARGUMENT.sub(replace, text)


async def _content(match: re.Match[str], read: Fetch) -> str:
    """Return the content of a file under its name; what stands there where it cannot be read."""
    path = match["file_braced"] or match["file"]
    try:
        return f"{path}:\n{await read(path)}"
    except (SpecError, OSError):
        return match[0]  # a name such as @types/node, which is no file
