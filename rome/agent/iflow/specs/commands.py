"""Slash commands of the user: `commands/NAME.md`.

| in the text | becomes |
|---|---|
| $ARGUMENTS, $1 ... $9 | what the user wrote after the command |
| !`command` | the output of a command; arguments in it are quoted for the shell |
| @path | the content of a file |

What is put in is never looked through again: an argument that spells !`rm` is only text.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from rome.agent.iflow.specs.spec_files import Place, SpecError, load_named, text_in

# Runs a command, or reads a file, and returns text; the caller asks the policy first.
Fetch = Callable[[str], Awaitable[str]]

_ARGUMENT = re.compile(r"\$ARGUMENTS\b|\$([1-9])(?!\d)")
_PART = re.compile(
    rf"(?P<argument>{_ARGUMENT.pattern})|!`(?P<command>[^`]+)`"
    r"|(?<![\w@`])@(?P<file>[\w~.][\w./~-]*[\w~-])"
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A slash command."""

    name: str  # without the slash; "folder:name" for one in a sub-folder
    description: str  # for people
    template: str  # its text
    hint: str = ""  # what to write after it

    async def expand(self, arguments: str, *, execute: Fetch, read: Fetch) -> str:
        """Return the text of the user's message, who wrote arguments after the command.

        Where `read` raises SpecError or OSError, the name of a file stays as it is.
        """
        text = ""
        end = 0
        for match in _PART.finditer(self.template):
            text += self.template[end : match.start()]
            end = match.end()
            if match["argument"]:
                text += _fill(match["argument"], arguments, quote=False)
            elif match["command"]:
                text += await execute(_fill(match["command"], arguments, quote=True))
            else:
                text += await _content(match["file"], read)
        text += self.template[end:]
        if arguments.strip() and not _ARGUMENT.search(self.template):
            text += f"\n\n{arguments.strip()}"
        return text


def load_commands(where: Iterable[Place]) -> tuple[dict[str, Command], list[str]]:
    """Return the commands by name, and what was wrong with files; see `load_named`."""
    return load_named(where, "commands/**/*.md", _read_command)


def _read_command(path: pathlib.Path, place: Place, table: dict[str, Any], body: str) -> Command:
    if not body.strip():
        raise SpecError(f"{path} has no text; write what the agent should do")
    first = body.strip().splitlines()[0].lstrip("# ")
    return Command(
        name=":".join(path.relative_to(place.folder / "commands").with_suffix("").parts),
        description=text_in(table, "description") or first[:80],
        template=body.strip(),
        hint=text_in(table, "argument-hint"),
    )


def _fill(text: str, arguments: str, *, quote: bool) -> str:
    """Return a text with what stands for arguments replaced by them."""
    try:
        words = shlex.split(arguments)
    except ValueError:  # a lone quotation mark, as in "don't"
        words = arguments.split()

    def replace(match: re.Match[str]) -> str:
        value = arguments
        if match[1]:
            value = "".join(words[int(match[1]) - 1 :][:1])
        return shlex.quote(value) if quote else value

    return _ARGUMENT.sub(replace, text)


async def _content(path: str, read: Fetch) -> str:
    """Return the content of a file under its name; what stands there where it cannot be read."""
    try:
        return f"{path}:\n{await read(path)}"
    except (SpecError, OSError):
        return f"@{path}"  # a name such as @types/node, which is no file
