"""The agent's own tools, served to another program over MCP on standard input and output.

Another agent that calls them gets the same shell, files and search, under the same rules: what the
rules would ask a person about is refused, since none is there.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from rome.agent.iflow.calls import CallRunner
from rome.agent.iflow.events import AssistantMessage, ToolCall, ToolFinished
from rome.agent.iflow.loop import Agent
from rome.version import VERSION

# Tools that need the loop: a model, a conversation, or a person.
OF_THE_LOOP = ("task", "ask_user", "exit_plan_mode", "skill")


class ToolServer:
    """Runs calls of a client as the loop would run them.

    Args:
      agent: with the tools, whose model is never asked.
    """

    def __init__(self, agent: Agent) -> None:
        self.tools = agent.tools
        for name in OF_THE_LOOP:
            self.tools.pop(name, None)
        self._log = agent.log
        self._runner = CallRunner(agent, _do_nothing, lambda text: None)

    async def call(self, name: str, arguments: str) -> ToolFinished:
        """Run a call whose arguments are JSON text; what is wrong with it is its result."""
        call = ToolCall(secrets.token_hex(6), name, arguments)
        self._log.append(AssistantMessage(tool_calls=(call,)))
        await self._runner.run([call])
        return next(
            event
            for event in reversed(self._log.events)
            if isinstance(event, ToolFinished) and event.call_id == call.id
        )


async def _do_nothing() -> None:
    """Take no checkpoint: there are no turns that could be rewound."""


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
                    read_only_hint=tool.access({}) in ("none", "read")
                ),
            )
            for tool in served.tools.values()
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
