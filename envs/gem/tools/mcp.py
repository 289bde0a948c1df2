"""Tools of MCP servers (Model Context Protocol), through the `mcp` package where it is installed.

A server is an HTTP address, or a local command that the caller trusts: it runs on this machine,
outside of any sandbox, with an environment of its own. One session to each server stays open on the
background loop of envs.rock.sync until `close`.

A server that dies, hangs or never answers costs the calls of its own tools only.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import json
import weakref
from collections.abc import Mapping
from typing import Any

from envs.gem.tool_call import ToolCall, ToolCallError, iterate_tool_calls
from envs.gem.tools.base import BaseTool, ToolResult
from envs.gem.tools.mcp_connection import (
    CLOSE_SECONDS,
    MCPConnection,
    MCPServerError,
    server_configs,
)
from envs.rock.sync import run

OPEN_SHARE = 0.5  # of a call's time, in which its server must have opened a session


class MCPTool(BaseTool):
    """All tools of some MCP servers.

    A call is read in gem-llm's form (`<tool_name>`, `<arguments>`) and in both of Qwen's.

    Args:
      config: a URL, or {"mcpServers": {name: server}} where a server is {"url", "headers"?} or
        {"command", "args"?, "env"?}.
      execution_timeout: seconds for one call; half of it is for opening a session, if it must.

    Raises:
      ImportError: the mcp package is not installed.
      ValueError: the configuration names no server, or one with both or neither of url and command.
    """

    tool_type = "mcp"

    def __init__(self, config: str | Mapping[str, Any], execution_timeout: float = 30.0) -> None:
        super().__init__()
        if importlib.util.find_spec("mcp") is None:
            raise ImportError("MCPTool needs the mcp package; pip install mcp")
        self.config = config
        self.execution_timeout = execution_timeout
        opening = OPEN_SHARE * execution_timeout
        self._servers = [
            MCPConnection(name, server, opening) for name, server in server_configs(config).items()
        ]
        _open_tools.add(self)

    def get_available_tools(self) -> list[dict[str, Any]]:
        """Return {"name", "description", "parameters": JSON schema} of each tool of all servers.

        Of two tools with one name the first server's is called. Those of a server that cannot be
        reached are missing.

        Raises:
          MCPServerError: no server can be reached.
        """
        return run(self._tools(), self.execution_timeout)

    def instruction_string(self) -> str:
        tools = sorted(self.get_available_tools(), key=lambda tool: tool["name"])
        functions = [json.dumps({"type": "function", "function": tool}) for tool in tools]
        listed = "\n".join(functions)
        return (
            "You can call the functions between <tools> and </tools>, one in a turn."
            " Write\n<tool_call>\n<tool_name>its name</tool_name>\n<arguments>\n{a JSON object of"
            " its parameters}\n</arguments>\n</tool_call>\nand its result comes back between"
            f" <tool_response> and </tool_response>.\n<tools>\n{listed}\n</tools>"
        )

    def execute_action(self, action: str) -> ToolResult:
        try:
            found = _first_call(action)
        except ToolCallError as error:
            return True, True, f"\n<tool_response>\n[{error}]\n</tool_response>\n", action
        if found is None:
            return False, True, "", ""
        call, parsed_action = found
        try:
            failed, text = run(self._call(call), self.execution_timeout)
        except TimeoutError:
            failed = True
            text = f"[Tool execution failed: no answer within {self.execution_timeout:g} s]"
        return True, failed, f"\n<tool_response>\n{text}\n</tool_response>\n", parsed_action

    def close(self) -> None:
        """End the sessions and the processes of all servers, whatever state they are in."""
        _open_tools.discard(self)
        run(self._close(), 2 * CLOSE_SECONDS)

    async def _close(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers))

    async def _tools(self) -> list[dict[str, Any]]:
        reached, failures = await self._reach()
        if not reached:
            raise MCPServerError("; ".join(map(str, failures)))
        return [tool for _, tools in reached for tool in tools]

    async def _reach(
        self,
    ) -> tuple[list[tuple[MCPConnection, list[dict[str, Any]]]], list[Exception]]:
        """Return the servers that can be reached with their tools, and why others cannot be."""
        answers = await asyncio.gather(
            *(server.tools() for server in self._servers), return_exceptions=True
        )
        reached = []
        failures = []
        for server, answer in zip(self._servers, answers, strict=True):
            if isinstance(answer, Exception):
                failures.append(answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                reached.append((server, answer))
        return reached, failures

    async def _call(self, call: ToolCall) -> tuple[bool, str]:
        """Call a tool on the first server that has it; return whether it failed, and its text."""
        reached, failures = await self._reach()
        for server, tools in reached:
            if any(tool["name"] == call.name for tool in tools):
                return await _answer(server, call)
        names = [tool["name"] for _, tools in reached for tool in tools]
        said = [f"no tool {call.name!r}; there are {', '.join(names) or 'none'}"]
        return True, f"[Tool execution failed: {'; '.join([*said, *map(str, failures)])}]"


_open_tools: weakref.WeakSet[MCPTool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End what a caller left open: a server need not notice that this process has ended."""
    for tool in list(_open_tools):
        tool.close()


def _first_call(action: str) -> tuple[ToolCall, str] | None:
    """Return the first call that a turn says, and the turn up to its end; None without any.

    Raises:
      ToolCallError: it is malformed.
    """
    for call, end in iterate_tool_calls(action):
        return call, action[:end]
    return None


async def _answer(server: MCPConnection, call: ToolCall) -> tuple[bool, str]:
    """Call a tool; return whether it failed, and its text.

    An error of the server, its death or a broken protocol is a failure of the tool, which the
    model reads.
    """
    try:
        answer = await server.call(call.name, call.arguments)
    except MCPServerError as error:
        return True, f"[Tool execution failed: {error}]"
    if answer.is_error:
        return True, f"[Tool execution error: {answer.text}]"
    return False, answer.text
