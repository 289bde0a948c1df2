"""What a user writes, and what the agent reads for it.

| written | read |
|---|---|
| /name words | the text of a command, of a prompt of an MCP server (/server:name), or of a skill |
| $agent words | the words, and that a sub-agent should do them |
| @path, @{path} | the words, and the file's content below them |
| @server:uri | the words, and the resource of an MCP server below them |
"""

from __future__ import annotations

import re

from rome.agent.iflow.interfaces import InterfaceSession
from rome.agent.iflow.places.workspace import WorkspaceError
from rome.agent.iflow.specs.spec_files import SpecError
from rome.agent.iflow.tools.base import ToolError

MAX_FILE = 200_000  # bytes of a file that is brought in
COMMAND_SECONDS = 60.0  # for a command line in a slash command
_FILE = re.compile(r"(?<!\S)@(?:\{(?P<braced>[^{}\n]+)\}|(?P<plain>[^\s:@{}]+))(?=\s|$|[,;.!?)])")


class InputError(ValueError):
    """What the user wrote cannot be read; the message says why."""


async def expand(text: str, session: InterfaceSession) -> str:
    """Return what a user wrote as the agent reads it; InputError where it means nothing."""
    if text.startswith("/") and len(text) > 1 and not text[1].isspace():
        name, _, words = text[1:].partition(" ")
        return await _expand_command(name, words.strip(), session)
    if text.startswith("$"):
        agent, _, words = text[1:].partition(" ")
        if agent in session.agents:
            return f"Let the sub-agent {agent!r} do this, with the tool task: {words.strip()}"
    text = await _with_files(text, session)
    return await session.servers.expand(text) if session.servers is not None else text


async def _expand_command(name: str, words: str, session: InterfaceSession) -> str:
    try:
        if name in session.commands:

            async def execute(command: str) -> str:
                return await _run(name, command, session)

            async def read(path: str) -> str:
                _require_allowed(name, "read_file", {"path": path}, session)
                return (await session.workspace.read(path, MAX_FILE)).decode(errors="replace")

            return await session.commands[name].expand(words, execute=execute, read=read)
        if session.servers is not None and ":" in name:
            return await session.servers.prompt(name, words)
    except (SpecError, ToolError, WorkspaceError, OSError) as error:
        raise InputError(f"/{name}: {error}") from error
    if name in session.skills:
        return f"Use the skill {name!r}. {words}".strip()
    raise InputError(f"there is no command /{name}; /help lists them")


async def _run(name: str, command: str, session: InterfaceSession) -> str:
    """Run a line that stands in a command's text, if the rules allow it without asking."""
    _require_allowed(name, "shell", {"command": command}, session)
    return (await session.workspace.execute(command, timeout=COMMAND_SECONDS)).output


def _require_allowed(name: str, tool: str, call: dict[str, str], session: InterfaceSession) -> None:
    """Raise InputError unless the rules allow what a command's text asks for without asking."""
    found = session.agent.tools.get(tool)
    if found is None:
        raise InputError(f"/{name} wants to use {tool}, which this session does not have")
    verdict = session.agent.policy.judge(found, call, session.workspace.directory)
    if verdict.decision != "allow":
        raise InputError(
            f"/{name} wants {found.summary(call)!r}, which the rules do not allow"
            f" ({verdict.reason}); add a rule that does, or write it yourself, with ! or @"
        )


async def _with_files(text: str, session: InterfaceSession) -> str:
    """Return a text with the files that it mentions below it; what is no file is only text."""
    parts = [text]
    for path in dict.fromkeys(match["braced"] or match["plain"] for match in _FILE.finditer(text)):
        try:
            content = await session.workspace.read(path.rstrip(".,;!?)"), MAX_FILE)
        except (WorkspaceError, OSError):
            continue
        shown = content.decode(errors="replace")
        parts.append(f'<file path="{path}">\n{shown}\n</file>')
    return "\n\n".join(parts)
