"""Tools of MCP servers (Model Context Protocol), through the `mcp` package where it is installed.

A server is a local command that the caller trusts (it runs on this machine, with an environment of
its own and nothing of ours) or an HTTP address. One session for each server stays open on ROCK's
background loop until `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from envs.gem.tool_call import CLOSE, OPEN, ToolCall, ToolCallError, parse_tool_calls
from envs.gem.tools.base import BaseTool, ToolResult
from envs.rock.sync import run

_GEM_CALL = re.compile(
    r"\s*<tool_name>([^<]+)</tool_name>\s*<arguments>(.*)</arguments>\s*", re.DOTALL
)
CONNECTION_CLOSED = (
    -32000
)  # the JSON-RPC code with which the mcp package says that the server is gone


class MCPTool(BaseTool):
    """All tools of the configured servers.

    A call is read in gem's form (`<tool_name>`, `<arguments>`) and in both of Qwen's.
    """

    tool_type = "mcp"

    def __init__(self, config: str | Mapping[str, Any], execution_timeout: float = 30.0) -> None:
        """config: an URL, or {"mcpServers": {name: {"url", "headers"?} or {"command", "args"?,
        "env"?}}}. execution_timeout: seconds for one call.
        """
        super().__init__()
        if importlib.util.find_spec("mcp") is None:
            raise ImportError("MCPTool needs the mcp package; pip install mcp")
        servers = (
            {"default": {"url": config}}
            if isinstance(config, str)
            else dict(config.get("mcpServers", {}))
        )
        if not servers:
            raise ValueError(
                f"MCP configuration {config!r} names no server; it is an URL or {{'mcpServers':"
                " {name: ...}}"
            )
        for name, server in servers.items():
            if ("url" in server) == ("command" in server):
                raise ValueError(
                    f"MCP server {name!r} has {sorted(server)}; give it either url or command"
                )
        self.config, self.execution_timeout = config, execution_timeout
        self._servers = [_Server(name, server) for name, server in servers.items()]

    def get_available_tools(self) -> list[dict[str, Any]]:
        """[{"name", "description", "parameters": JSON schema}] of all servers.

        Of two tools of one name the first server's is called.
        """
        return run(self._tools(), self.execution_timeout)

    def instruction_string(self) -> str:
        functions = [
            json.dumps({"type": "function", "function": tool})
            for tool in sorted(self.get_available_tools(), key=lambda tool: tool["name"])
        ]
        return (
            "You can call the functions between <tools> and </tools>, one in a turn."
            " Write\n<tool_call>\n<tool_name>its name</tool_name>\n<arguments>\n{a JSON object of"
            " its parameters}\n</arguments>\n</tool_call>\nand its result comes back between"
            " <tool_response> and </tool_response>.\n<tools>\n"
            + "\n".join(functions)
            + "\n</tools>"
        )

    def execute_action(self, action: str) -> ToolResult:
        try:
            found = _first_call(action)
        except ToolCallError:
            found = None
        if found is None:
            return False, True, "", ""
        call, parsed_action = found
        try:
            failed, text = run(self._call(call), self.execution_timeout)
        except TimeoutError:
            failed, text = (
                True,
                f"[Tool execution failed: no answer within {self.execution_timeout:g} s]",
            )
        return True, failed, f"\n<tool_response>\n{text}\n</tool_response>\n", parsed_action

    def close(self) -> None:
        for server in self._servers:
            run(server.close(), self.execution_timeout)

    async def _tools(self) -> list[dict[str, Any]]:
        return [tool for server in self._servers for tool in await server.tools()]

    async def _call(self, call: ToolCall) -> tuple[bool, str]:
        names = []
        for server in self._servers:
            names += (own := [tool["name"] for tool in await server.tools()])
            if call.name in own:
                return await server.call(call)
        return True, f"[Tool execution failed: no tool {call.name!r}; there are {', '.join(names)}]"


def _first_call(action: str) -> tuple[ToolCall, str] | None:
    """The call and the action up to its end. Raises ToolCallError."""
    end = action.find(CLOSE)
    text = action if end < 0 else action[: end + len(CLOSE)]
    match = (
        _GEM_CALL.fullmatch(action, action.index(OPEN) + len(OPEN), end)
        if 0 <= action.find(OPEN) < end
        else None
    )
    if match is None:
        calls = parse_tool_calls(text)
        return (calls[0], text) if calls else None
    try:
        arguments = json.loads(match[2].strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise ToolCallError("arguments are not JSON") from error
    if not isinstance(arguments, dict):
        raise ToolCallError("arguments are no JSON object")
    return ToolCall(match[1].strip(), arguments), text


class _Server:
    """One server's session.

    It is opened by the first request and lives in a task of its own, which alone may open and close
    it.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name, self._config = name, config
        self._session: Any = None
        self._tools: list[dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop: asyncio.Event | None = None

    async def tools(self) -> list[dict[str, Any]]:
        if self._tools is None:
            listed = await (await self._open()).list_tools()
            wire = [
                tool.model_dump(by_alias=True) for tool in listed.tools
            ]  # the field names of the protocol, whichever version of the package
            self._tools = [
                {
                    "name": tool["name"],
                    "description": tool.get("description") or "",
                    "parameters": tool["inputSchema"],
                }
                for tool in wire
            ]
        return self._tools

    async def call(self, call: ToolCall) -> tuple[bool, str]:
        try:
            result = (await (await self._open()).call_tool(call.name, call.arguments)).model_dump(
                by_alias=True
            )
        except Exception as error:  # the server's own words, its death, a broken protocol: all are the tool's failure, told to the model
            if (
                getattr(getattr(error, "error", None), "code", CONNECTION_CLOSED)
                == CONNECTION_CLOSED
            ):
                await self.close()  # no answer of the server: the next call opens another session
            return True, f"[Tool execution failed: {type(error).__name__}: {error}]"
        text = "\n".join(
            part["text"] if part.get("type") == "text" else json.dumps(part, default=str)
            for part in result["content"]
        )
        return (True, f"[Tool execution error: {text}]") if result.get("isError") else (False, text)

    async def close(self) -> None:
        task, self._task, self._session, self._tools = self._task, None, None, None
        if task is not None:
            self._stop.set()
            await asyncio.wait([task])

    async def _open(self) -> Any:
        if self._task is not None and self._task.done():
            self._task = self._session = None  # the server died: a new one
        if self._task is None:
            opened = asyncio.get_running_loop().create_future()
            self._stop = asyncio.Event()
            self._task = asyncio.create_task(self._live(opened, self._stop))
            self._session = opened
        return await asyncio.shield(self._session)

    async def _live(self, opened: asyncio.Future[Any], stop: asyncio.Event) -> None:
        try:
            async with self._connect() as session:
                opened.set_result(session)
                await stop.wait()
        except Exception as error:
            if not opened.done():
                opened.set_exception(
                    ConnectionError(f"MCP server {self.name!r} could not be reached: {error}")
                )

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[Any]:
        import mcp

        async with contextlib.AsyncExitStack() as stack:
            if "command" in self._config:
                transport = mcp.stdio_client(
                    mcp.StdioServerParameters(
                        command=self._config["command"],
                        args=list(self._config.get("args", [])),
                        env=dict(self._config.get("env", {})) or None,
                    )
                )
            else:
                from mcp.client.streamable_http import streamable_http_client
                from mcp.shared._httpx_utils import (
                    create_mcp_http_client,
                )  # the way to headers in 1.x and 2.x

                client = await stack.enter_async_context(
                    create_mcp_http_client(headers=dict(self._config.get("headers", {})))
                )
                transport = streamable_http_client(self._config["url"], http_client=client)
            streams = await stack.enter_async_context(transport)
            session = await stack.enter_async_context(mcp.ClientSession(streams[0], streams[1]))
            await session.initialize()
            yield session
