"""The agent's own tools, served to other programs over MCP: on stdio or by HTTP.

Another agent that calls them gets the same shell, files and search, under the same rules: what the
rules would ask a person about is refused, since none is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sys
from collections.abc import Mapping
from typing import Any

from rome.agent.iflow.approval.policy import Policy
from rome.agent.iflow.desk import Desk
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import Event, TodoChanged, TodoItem, ToolCall
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, read_arguments
from rome.version import VERSION

# Tools that need the loop: a model, a conversation, or a person.
OF_THE_LOOP = ("task", "ask_user", "exit_plan_mode", "skill")


@dataclasses.dataclass
class ToolServer:
    """Runs calls of a client; each is checked as the loop would check it.

    Attributes:
      tools: by name.
      workspace: where they work.
      policy: rules of approval.
      session_folder: where tools keep whole outputs.
    """

    tools: Mapping[str, Tool]
    workspace: Workspace
    policy: Policy
    session_folder: str
    _todo: tuple[TodoItem, ...] = ()
    _read_files: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)

    def listed(self) -> list[Tool]:
        """Return the tools that a client may call."""
        return [tool for tool in self.tools.values() if tool.name not in OF_THE_LOOP]

    async def call(self, name: str, arguments: str) -> ToolResult:
        """Run a call; what is wrong with it is its result.

        Args:
          name: of the tool.
          arguments: JSON text.
        """
        tool = next((tool for tool in self.listed() if tool.name == name), None)
        if tool is None:
            return ToolResult(f"there is no tool {name!r}", "error")
        call = ToolCall(secrets.token_hex(6), name, arguments)
        context = ToolContext(
            call=call,
            workspace=self.workspace,
            emit=self._take,
            asker=Desk(EventLog()),  # a client of MCP is a program: nobody answers
            session_folder=self.session_folder,
            todo=self._todo,
            mode=self.policy.mode,
            read_files=self._read_files,
            is_denied=self.policy.hides,
        )
        try:
            read = read_arguments(tool, arguments)
            verdict = self.policy.judge(tool, read, self.workspace.directory)
            if verdict.decision != "allow":
                reason = verdict.reason or "the rules say so"
                return ToolResult(f"this call of {name} is not allowed here: {reason}", "denied")
            return await tool.run(read, context)
        except (ToolError, WorkspaceError) as error:
            return ToolResult(str(error), "error")

    def _take(self, event: Event) -> Event:
        if isinstance(event, TodoChanged):
            self._todo = event.items
        return event


def protocol_server(served: ToolServer) -> Any:
    """Return the MCP server of some tools, `mcp.server.lowlevel.Server`."""
    import mcp.types as types
    from mcp.server.lowlevel import Server

    async def list_tools(context: Any, params: Any) -> types.ListToolsResult:
        tools = [
            types.Tool(
                name=tool.name,
                description=tool.description,
                input_schema=dict(tool.parameters),
                annotations=types.ToolAnnotations(
                    read_only_hint=tool.access({}) in ("none", "read"),
                ),
            )
            for tool in served.listed()
        ]
        return types.ListToolsResult(tools=tools)

    async def call_tool(context: Any, params: Any) -> types.CallToolResult:
        result = await served.call(params.name, json.dumps(params.arguments or {}))
        text = types.TextContent(type="text", text=result.output)
        return types.CallToolResult(content=[text], is_error=result.status != "ok")

    return Server("iflow", version=VERSION, on_list_tools=list_tools, on_call_tool=call_tool)


async def serve_stdio(served: ToolServer) -> None:
    """Serve one client on standard input and output, until it closes them."""
    from mcp.server.stdio import stdio_server

    server = protocol_server(served)
    async with stdio_server() as (reader, writer):
        await server.run(reader, writer, server.create_initialization_options())


async def serve_http(served: ToolServer, *, host: str, port: int, token: str = "") -> None:
    """Serve clients at http://host:port/mcp, until the task is cancelled.

    Args:
      served: the tools.
      host: address to listen at.
      port: to listen at; 0 takes a free one. The address is printed to standard error.
      token: that clients must send as `Authorization: Bearer TOKEN`; "" makes one and prints it.
        There is none without: any program of this machine could use the shell.

    Raises:
      OSError: the port is taken.
    """
    import socket

    import uvicorn

    token = token or secrets.token_urlsafe(24)
    app = _with_token(protocol_server(served).streamable_http_app(host=host), token)
    # Its own configuration of logging closes all handlers there are: with that of absl, where that
    # package is loaded, it would close standard error.
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", lifespan="on", timeout_graceful_shutdown=2
    )
    with contextlib.closing(socket.create_server((host, port))) as listening:
        bound = listening.getsockname()[1]
        print(f"MCP at http://{host}:{bound}/mcp, token {token}", file=sys.stderr, flush=True)
        await uvicorn.Server(config).serve([listening])


def _with_token(app: Any, token: str) -> Any:
    """Return an ASGI application that refuses requests without the token."""
    wanted = f"Bearer {token}".encode()

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, wanted):
                headers = [(b"content-type", b"text/plain")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b"the token is missing or wrong"})
                return
        await app(scope, receive, send)

    return guarded
