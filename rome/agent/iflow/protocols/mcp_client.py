"""MCP servers of a session: their tools, resources and prompts.

A server's tool is offered to the model as `server__tool`. What the user has approved is a tool as
its server described it: where a server changes the description or the parameters of a tool, now or
between two sessions, the tool is withheld, and the next call of it asks the user again. Each server
that is dead, slow or unsound costs its own tools only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pathlib
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import IO, Any, TypeVar

from envs.gem.tools.mcp_connection import MCPConnection, MCPServerError
from rome.agent.iflow.events import Notice
from rome.agent.iflow.protocols.mcp_tools import (
    Server,
    ServerTool,
    digest_of,
    printable,
    safe,
    shorten,
    tool_name,
)
from rome.agent.iflow.specs.settings_values import McpServer
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, of, takes
from rome.files import write_atomically

OPENING_SECONDS = 20.0  # at most, in which a server lists its tools
REQUEST_SECONDS = 60.0  # for a resource or a prompt
RELIST_SECONDS = 60.0  # after which a server is asked again for its tools before a call
MAX_TOOLS = 200  # of one server: more fill the context before the task begins
Answered = TypeVar("Answered")
# The package logs what a server breaks, whole with a traceback. Without a handler of its program's,
# that would be written over the terminal.
logging.getLogger("mcp").addHandler(logging.NullHandler())
MENTION = re.compile(r"(?<!\S)@([\w.-]+):(\S+)")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a server, for a slash command `/server:name`."""

    server: str  # that has it
    name: str  # as the server calls it
    description: str  # for people
    arguments: tuple[str, ...]  # their names, in order; those that it needs end in "*"

    @property
    def command(self) -> str:
        """Its name as a command."""
        return f"{self.server}:{self.name}"


class ResourceTool(Tool):
    """Lists and reads the resources of all servers."""

    name = "mcp_resource"
    description = (
        "Lists the resources (documents, records) that MCP servers offer, or reads one of them."
        " Without uri it lists those of one server, or of all."
    )
    parameters = takes(
        server=of("string", "name of the server"),
        uri=of("string", "of the resource to read, as listed"),
    )
    is_parallel = True
    accesses = "read"

    def __init__(self, servers: MCPServers) -> None:
        self._servers = servers

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """List the resources, or read one."""
        server = arguments.get("server", "")
        if "uri" not in arguments:
            return ToolResult(await self._servers.list_resources(server))
        text = await self._servers.read_resource(server, arguments["uri"])
        output, file = shorten(text, context.session_folder)
        return ToolResult(output, file=file)


class MCPServers:
    """The servers of a session.

    `notify` tells people of failures and changes. What servers write to their standard errors goes
    to files in `folder`. `approved` is the file of the approved tools' digests, for all sessions.
    `wanted` says of a tool's name whether the session has it.
    """

    def __init__(
        self,
        configs: Iterable[McpServer],
        notify: Callable[[Notice], Any],
        folder: pathlib.Path,
        approved: pathlib.Path | None = None,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.servers: dict[str, Server] = {}
        self._notify = notify
        self._wanted = wanted
        self._approved_file = approved
        self._approved = self._read_digests()
        self._saved = json.dumps(self._approved)
        self._errors: list[IO[str]] = []
        for config in configs:
            self.servers[config.name] = self._server(config, folder)

    def _server(self, config: McpServer, folder: pathlib.Path) -> Server:
        name = config.name
        # It stays open as long as the server runs.
        errors = open(folder / f"mcp-{safe(name)}.log", "a")  # noqa: SIM115
        self._errors.append(errors)
        how: dict[str, Any] = {"url": config.url, "headers": config.headers}
        if config.command:
            how = {"command": config.command, "args": config.args, "env": config.env}
            how["cwd"] = config.cwd or None
        server = Server(
            name,
            MCPConnection(name, how, min(config.timeout, OPENING_SECONDS), errors),
            seconds=config.timeout,
            is_trusted=config.is_trusted,
        )
        server.connection.on_tools_changed = lambda: self._hear_change(server)
        return server

    async def start(self) -> None:
        """Open all servers at once; those that fail are told of, and stay without tools."""
        await asyncio.gather(*(self._start(server) for server in self.servers.values()))

    async def restart(self, name: str) -> None:
        """Open one server again, such as one that failed; its new tools are in `tools`."""
        server = self.servers[name]
        await server.connection.close()
        server.connection.forget_failure()
        await self._start(server)

    async def _start(self, server: Server) -> None:
        try:
            listed = await server.connection.tools(fresh=True)
            resources = await server.connection.resources()
            server.prompts = await server.connection.prompts()
        except MCPServerError as error:
            server.state = "failed"
            server.reason = str(error)
            self._warn(f"{error}; its tools are missing")
            return
        server.state = "ready"
        server.reason = ""
        server.resources = len(resources)
        self._take(server, listed)

    def _take(self, server: Server, listed: list[dict[str, Any]]) -> None:
        """Offer the tools that a server lists when it is opened."""
        server.listed_at = time.monotonic()
        server.tools = {}
        if len(listed) > MAX_TOOLS:
            self._warn(
                f"MCP server {server.name} lists {len(listed)} tools; {MAX_TOOLS} are offered"
            )
        taken = {tool.name for tool in self.tools}
        for described in listed[:MAX_TOOLS]:
            full_name = tool_name(server.name, described["name"])
            if full_name in taken:
                self._warn(
                    f"MCP tool {full_name} is there twice; that of {server.name} is left out"
                )
                continue
            taken.add(full_name)
            tool = ServerTool(self.check, server, full_name, described)
            server.tools[described["name"]] = tool
            self._compare(tool, described)
        self._save()

    def _compare(self, tool: ServerTool, described: Mapping[str, Any]) -> None:
        """Withhold a tool that is not as it was approved; a tool seen first is approved."""
        digest = digest_of(described)
        known = self._approved.setdefault(tool.server.name, {})
        if tool.server.is_trusted:
            known[tool.own_name] = digest
        if known.setdefault(tool.own_name, digest) == digest:
            tool.show(described)
        elif not tool.is_withheld:
            tool.withhold()
            what = f"MCP server {tool.server.name} changed its tool {tool.own_name}"
            self._warn(f"{what}: withheld until you agree")

    def _warn(self, text: str) -> None:
        self._notify(Notice(text=text, level="warning"))

    def _hear_change(self, server: Server) -> None:
        server.listed_at = -RELIST_SECONDS  # the next call asks for the list

    async def check(self, tool: ServerTool, context: ToolContext) -> None:
        """See that a tool is still as approved, before a call of it; ask the user where it is not.

        Raises:
          ToolError: its server is gone or has it no longer, or the user does not agree.
        """
        server = tool.server
        is_old = time.monotonic() > server.listed_at + RELIST_SECONDS
        try:
            listed = await server.connection.tools(fresh=is_old)
        except MCPServerError as error:
            raise ToolError(str(error)) from error
        if is_old:
            server.listed_at = time.monotonic()
        described = next((one for one in listed if one["name"] == tool.own_name), None)
        if described is None:
            raise ToolError(f"MCP server {server.name} no longer has the tool {tool.own_name}")
        self._compare(tool, described)
        if not tool.is_withheld:
            return
        if not await _agreed(tool, described, context):
            raise ToolError(
                f"MCP server {server.name} changed the tool {tool.own_name} after it was approved,"
                " and the user has not agreed to the new one; do the task without it"
            )
        self._approved[server.name][tool.own_name] = digest_of(described)
        self._save()
        tool.show(described)

    def _read_digests(self) -> dict[str, dict[str, str]]:
        """Return the approved digests: none where the file is missing, or damaged (told of)."""
        if self._approved_file is None or not self._approved_file.exists():
            return {}
        try:
            found = json.loads(self._approved_file.read_text())
            return {server: dict(tools) for server, tools in found.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            self._warn(
                f"{self._approved_file} cannot be read ({error}): whether MCP servers changed their"
                " tools since the last session is not known"
            )
            return {}

    def _save(self) -> None:
        text = json.dumps(self._approved)
        if self._approved_file is not None and text != self._saved:
            self._saved = text
            self._approved_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._approved_file, text.encode())

    @property
    def tools(self) -> list[Tool]:
        """The tools of all servers that are ready, and one for resources where there are any."""
        ready = [server for server in self.servers.values() if server.state == "ready"]
        found: list[Tool] = [tool for server in ready for tool in server.tools.values()]
        if any(server.resources for server in ready):
            found.append(ResourceTool(self))
        return [tool for tool in found if self._wanted(tool.name)]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all servers that are ready."""
        return [
            Prompt(
                server.name,
                listed["name"],
                printable(listed.get("description") or "")[:200],
                tuple(_argument_name(one) for one in listed.get("arguments") or ()),
            )
            for server in self.servers.values()
            if server.state == "ready"
            for listed in server.prompts
        ]

    async def prompt(self, command: str, words: str) -> str:
        """Return the text of the prompt `server:name`; ToolError where there is none.

        Its arguments stand in order, quoted as in a shell; the last one takes the rest.
        """
        prompt = next((one for one in self.prompts if one.command == command), None)
        if prompt is None:
            raise ToolError(f"no prompt /{command}")
        names = [name.removesuffix("*") for name in prompt.arguments]
        values = _split(words, len(names))
        needed = sum(name.endswith("*") for name in prompt.arguments)
        if len(values) < needed:
            raise ToolError(f"/{command} needs {' '.join(prompt.arguments)}")
        connection = self.servers[prompt.server].connection
        arguments = dict(zip(names, values, strict=False))
        return await _deadlined(connection.prompt(prompt.name, arguments), prompt.server)

    async def list_resources(self, server: str = "") -> str:
        """Return one line for each resource of one server, or of all; ToolError without any."""
        lines = []
        for name in [server] if server else self._with_resources():
            for one in await _deadlined(self._ready(name).connection.resources(), name):
                said = printable(one.get("description") or one.get("name") or "")
                lines.append(f"{name}: {one['uri']}  {said.replace(chr(10), ' ')[:200]}")
        return "\n".join(lines) or "no resources"

    def _with_resources(self) -> list[str]:
        return [name for name, one in self.servers.items() if one.resources]

    async def read_resource(self, server: str, uri: str) -> str:
        """Return the text of a resource; ToolError where it cannot be read."""
        if not server and len(self._with_resources()) == 1:
            server = self._with_resources()[0]
        return await _deadlined(self._ready(server).connection.read_resource(uri), server)

    def _ready(self, name: str) -> Server:
        if name not in self.servers:
            known = ", ".join(self.servers) or "none"
            raise ToolError(f"no MCP server {name!r}; there are {known}")
        server = self.servers[name]
        if server.state != "ready":
            raise ToolError(f"MCP server {name} is not there: {server.reason}")
        return server

    async def expand(self, text: str) -> str:
        """Return what a user wrote, with the resources that it names as `@server:uri` below it."""
        parts = [text]
        for name, uri in MENTION.findall(text):
            if name not in self.servers:
                continue
            try:
                content = await self.read_resource(name, uri)
            except ToolError as error:
                content = f"(could not be read: {error})"
            parts.append(f'<resource server="{name}" uri="{uri}">\n{content}\n</resource>')
        return "\n\n".join(parts)

    async def close(self) -> None:
        """End all sessions and processes; takes CLOSE_SECONDS of the connection at most."""
        await asyncio.gather(*(server.connection.close() for server in self.servers.values()))
        for errors in self._errors:
            errors.close()


async def _agreed(tool: ServerTool, described: Mapping[str, Any], context: ToolContext) -> bool:
    """Ask the user whether a changed tool may be used; without an answer it may not."""
    question = (
        f"MCP server {tool.server.name} changed its tool {tool.own_name} after you approved it."
        f" It now says:\n{printable(described['description'])[:1000]}\nUse it as it is now?"
    )
    answer = await context.asker.question(question, ("yes", "no"))
    return answer.strip().lower() in ("yes", "y")


async def _deadlined(request: Awaitable[Answered], server: str) -> Answered:
    """Return the answer of a request, in time; ToolError for its failure."""
    try:
        async with asyncio.timeout(REQUEST_SECONDS):
            return await request
    except TimeoutError as error:
        raise ToolError(f"MCP server {server} did not answer in {REQUEST_SECONDS:g} s") from error
    except MCPServerError as error:
        raise ToolError(str(error)) from error


def _argument_name(argument: Mapping[str, Any]) -> str:
    return f"{argument['name']}*" if argument.get("required") else str(argument["name"])


def _split(words: str, count: int) -> list[str]:
    """Return the arguments of a command, as many as it takes."""
    try:
        values = shlex.split(words)
    except ValueError:  # a lone quote
        values = words.split()
    if len(values) > count > 0:
        values = [*values[: count - 1], " ".join(values[count - 1 :])]
    return values
