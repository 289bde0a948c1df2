"""Sessions for tests of interfaces: real logs and agents, a model that does what it is told.

The model obeys the last message of the user, line by line, one answer a line:

    say WORDS           answers
    think WORDS         thinks, and goes on with the next line
    call NAME {JSON}    makes a call
    slow WORDS          answers a word every 50 ms
    wait SECONDS        says nothing for so long
    fail WORDS          does not answer: the endpoint is not there
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import json
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from rome.agent.iflow.desk import Desk
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import (
    AssistantMessage,
    TodoChanged,
    TodoItem,
    ToolCall,
    ToolOutput,
    Usage,
)
from rome.agent.iflow.interfaces import InterfaceSession
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.places.workspace import CommandOutput, WorkspaceError
from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.sessions import SessionInfo, SessionUnavailable
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult
from tests.rome.agent.iflow.doubles import Folder, Said, Shortener


class Obedient:
    """The model."""

    context_tokens = 8_000

    def __init__(self, name="obedient"):
        self.name = name

    async def ask(self, messages, tools, *, edge=None, max_tokens=None, on_text=None):
        place = max(
            place
            for place, one in enumerate(messages)
            if one.role == "user" and not one.content.startswith("<system-reminder>")
        )
        asked = messages[place].content
        lines = [line for line in asked.splitlines() if line.split(" ")[0] in _ORDERS]
        done = sum(one.role == "assistant" for one in messages[place:])
        reasoning = ""
        for line in lines[done:]:
            order, _, rest = line.partition(" ")
            if order == "think":
                reasoning = rest
                on_text(rest, True)
                continue
            return await _ORDERS[order](rest, reasoning, on_text)
        return await _say(f"I heard: {asked}" if not lines else "Done.", "", on_text)

    def count_tokens(self, messages, tools=()):
        return sum(len(message.content) for message in messages) // 4

    async def aclose(self):
        """Do nothing."""


async def _say(words, reasoning, on_text):
    on_text(words, False)
    return AssistantMessage(text=words, reasoning=reasoning, usage=Usage(1000, 50, price=0.25))


async def _call(words, reasoning, on_text):
    name, _, arguments = words.partition(" ")
    call = ToolCall(secrets.token_hex(4), name, arguments or "{}")
    return AssistantMessage(
        reasoning=reasoning,
        tool_calls=(call,),
        finish="tool_calls",
        usage=Usage(1000, 50, price=0.25),
    )


async def _slow(words, reasoning, on_text):
    for word in words.split():
        on_text(f"{word} ", False)
        await asyncio.sleep(0.05)
    return AssistantMessage(text=words, reasoning=reasoning, usage=Usage(1000, 50))


async def _wait(words, reasoning, on_text):
    await asyncio.sleep(float(words))
    return AssistantMessage(text="waited", reasoning=reasoning)


async def _fail(words, reasoning, on_text):
    raise ModelError(words)


_ORDERS = {"say": _say, "call": _call, "slow": _slow, "wait": _wait, "fail": _fail, "think": None}


class Directory(Folder):
    """A workspace in a directory of this machine."""

    is_isolated = False

    def __init__(self, root):
        super().__init__()
        self.root = self.directory = str(root)

    async def read(self, path, limit=4 << 20):
        try:
            return pathlib.Path(self.root, path).read_bytes()
        except OSError as error:
            raise WorkspaceError(f"{path}: {error.strerror}") from error

    async def write(self, path, content):
        pathlib.Path(self.root, path).write_bytes(content)

    async def execute(self, command, *, timeout, on_output=None):
        run = subprocess.run(
            command, shell=True, cwd=self.root, capture_output=True, text=True, timeout=timeout
        )
        return CommandOutput(run.stdout + run.stderr, run.returncode)


class Write(Tool):
    """Writes a file."""

    name: ClassVar[str] = "write_file"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
        "required": ["path", "content"],
    }
    accesses: ClassVar[str] = "write"

    def summary(self, arguments):
        return f"Write {arguments['path']}"

    async def preview(self, arguments, context):
        path = arguments["path"]
        try:
            before = (await context.workspace.read(path)).decode()
        except WorkspaceError:
            before = ""
        lines = (text.splitlines(keepends=True) for text in (before, arguments["content"]))
        return "".join(difflib.unified_diff(*lines, path, path))

    async def run(self, arguments, context):
        diff = await self.preview(arguments, context)
        await context.workspace.write(arguments["path"], arguments["content"].encode())
        return ToolResult("written", changed=(arguments["path"],), diff=diff)


class Shell(Tool):
    """Runs a command."""

    name: ClassVar[str] = "shell"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"command": {"type": "string"}},
        "required": ["command"],
    }
    accesses: ClassVar[str] = "execute"

    def summary(self, arguments):
        return f"$ {arguments['command']}"

    async def run(self, arguments, context):
        done = await context.workspace.execute(arguments["command"], timeout=20)
        context.emit(ToolOutput(call_id=context.call.id, text=done.output))
        status = "ok" if done.exit_code == 0 else "error"
        return ToolResult(done.output, status, exit_code=done.exit_code)


class Todo(Tool):
    """Keeps the list; the first item is begun."""

    name: ClassVar[str] = "todo"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"items": {"type": "array"}},
    }

    async def run(self, arguments, context):
        states = ["done", "in_progress", *["pending"] * 20]
        pairs = zip(arguments["items"], states, strict=False)
        items = tuple(TodoItem(*pair) for pair in pairs)
        context.emit(TodoChanged(items=items))
        return ToolResult("noted")


class Ask(Tool):
    """Asks the user."""

    name: ClassVar[str] = "ask_user"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"question": {"type": "string"}, "choices": {"type": "array"}},
    }

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        answer = await context.asker.question(arguments["question"], arguments.get("choices", ()))
        if not answer:
            raise ToolError("no answer")
        return ToolResult(f"the user says {answer}")


@dataclasses.dataclass
class Cautious:
    """A policy that asks about what writes and runs, as modes want it."""

    mode: str = "default"
    rules: set[str] = dataclasses.field(default_factory=set)

    def hides(self, path):
        return False

    def judge(self, tool, arguments, directory=""):
        access = tool.access(arguments)
        is_open = access in ("none", "read") or self.mode == "yolo" or tool.name in self.rules
        if is_open or (access == "write" and self.mode == "accept_edits"):
            return Said("allow")
        if self.mode == "plan":
            return Said("deny", "plan mode only reads")
        return Said("ask", f"mode {self.mode} asks", tool.name)

    def add_rule(self, rule, scope):
        self.rules.add(rule)


class FolderOpener:
    """Opens sessions whose files lie in a folder.

    Args:
      folder: for the sessions.
      more: for `InterfaceSession`, such as commands and skills.
    """

    def __init__(self, folder, **more):
        self.folder = pathlib.Path(folder)
        self.more = more

    async def open(self, directory, *, resume="", is_fork=False, servers=()):
        if not os.path.isdir(directory):
            raise ValueError(f"no directory {directory}")
        session = resume or secrets.token_hex(4)
        path = self.folder / session / "events.jsonl"
        if resume and not path.exists():
            raise SessionUnavailable(f"no session {resume!r}")
        if is_fork:
            session = secrets.token_hex(4)
            shutil.copytree(path.parent, self.folder / session)
            path = self.folder / session / "events.jsonl"
        log = EventLog(path)
        workspace = Directory(directory)
        connected = MCPServers(servers, log.append, path.parent)
        await connected.start()
        tools = [Write(), Shell(), Todo(), Ask(), *connected.tools]
        agent = Agent(
            Obedient(),
            tools,
            log,
            workspace,
            policy=Cautious(),
            session=session,
            context=Shortener(),
            has_checkpoints=True,
            system="Obey.",
            desk=Desk(log, is_attended=True),
            session_folder=str(path.parent),
        )

        async def close(outcome="finished"):
            await agent.aclose(outcome)
            await connected.close()
            log.close()

        await agent.start()
        return InterfaceSession(
            agent=agent,
            keep=_nothing,
            make_model=_model,
            close=close,
            servers=connected,
            models=("obedient", "other"),
            **self.more,
        )

    def sessions(self, directory=""):
        found = []
        for path in self.folder.glob("*/events.jsonl"):
            events = [json.loads(line) for line in path.read_text().splitlines()]
            said = [one["text"] for one in events if one["kind"] == "user_message"]
            where = events[0]["directory"]
            if directory in ("", where):
                title = said[0] if said else ""
                found.append(SessionInfo(path.parent.name, where, title, path.stat().st_mtime))
        return sorted(found, key=lambda one: -one.changed)


async def _nothing():
    """Keep nothing."""
    return ""


async def _model(name):
    if name not in ("obedient", "other"):
        raise ValueError(f"no model {name!r}")
    return Obedient(name)


async def talk(folder, first=""):
    """Run the terminal interface here."""
    from rome.agent.iflow.specs.commands import Command
    from rome.agent.iflow.tui.slash_commands import ACTIONS
    from rome.agent.iflow.tui.terminal import Terminal

    commands = {"greet": Command("greet", "Greets.", "say hello $ARGUMENTS")}
    opener = FolderOpener(folder, commands=commands)
    session = await opener.open(os.getcwd())
    await Terminal(opener, session, os.getcwd(), ACTIONS).run(first)


if __name__ == "__main__":
    if sys.argv[1] == "acp":  # an agent of the Agent Client Protocol on stdio
        from rome.agent.iflow.protocols.acp_agent import serve

        asyncio.run(serve(FolderOpener(sys.argv[2])))
    else:
        asyncio.run(talk(*sys.argv[2:]))
