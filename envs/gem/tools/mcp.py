"""Tools of MCP servers (Model Context Protocol), through the `mcp` package where it is installed.

A server is an HTTP address, or a local command that the caller trusts: it runs on this machine,
outside of any sandbox, with an environment of its own. One session to each server stays open on the
background loop of envs.rock.sync until `close`.
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
from envs.proxies import is_loopback
from envs.rock.sync import run

_GEM_CALL = re.compile(
    r"\s*<tool_name>([^<]+)</tool_name>\s*<arguments>(.*)</arguments>\s*", re.DOTALL
)
CONNECTION_CLOSED = -32000  # the mcp package's JSON-RPC code for a server that is gone


class MCPTool(BaseTool):
    """All tools of some MCP servers.

    A call is read in gem-llm's form (`<tool_name>`, `<arguments>`) and in both of Qwen's.

    Args:
      config: a URL, or {"mcpServers": {name: server}} where a server is {"url", "headers"?} or
        {"command", "args"?, "env"?}.
      execution_timeout: seconds for one call.

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
        self._servers = [_Server(name, server) for name, server in _servers(config).items()]

    def get_available_tools(self) -> list[dict[str, Any]]:
        """Return {"name", "description", "parameters": JSON schema} of each tool of all servers.

        Of two tools with one name the first server's is called.
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
        except ToolCallError:
            found = None
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
        for server in self._servers:
            run(server.close(), self.execution_timeout)

    async def _tools(self) -> list[dict[str, Any]]:
        return [tool for server in self._servers for tool in await server.tools()]

    async def _call(self, call: ToolCall) -> tuple[bool, str]:
        """Call a tool on the first server that has it; return whether it failed, and its text."""
        names: list[str] = []
        for server in self._servers:
            own = [tool["name"] for tool in await server.tools()]
            if call.name in own:
                return await server.call(call)
            names += own
        return True, f"[Tool execution failed: no tool {call.name!r}; there are {', '.join(names)}]"


def _servers(config: str | Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the servers of a configuration by name, after checking them."""
    if isinstance(config, str):
        return {"default": {"url": config}}
    servers = dict(config.get("mcpServers", {}))
    if not servers:
        raise ValueError(
            f"MCP configuration {config!r} names no server; it is a URL or {{'mcpServers':"
            " {name: ...}}"
        )
    for name, server in servers.items():
        if ("url" in server) == ("command" in server):
            raise ValueError(
                f"MCP server {name!r} has {sorted(server)}; give it either url or command"
            )
    return servers


def _first_call(action: str) -> tuple[ToolCall, str] | None:
    """Return the first call of a turn, and the turn up to its end; None for a turn without any.

    Raises:
      ToolCallError: it is malformed.
    """
    start = action.find(OPEN)
    end = action.find(CLOSE)
    parsed_action = action if end < 0 else action[: end + len(CLOSE)]
    match = None
    if 0 <= start < end:
        match = _GEM_CALL.fullmatch(action, start + len(OPEN), end)
    if match is None:
        calls = parse_tool_calls(parsed_action)
        return (calls[0], parsed_action) if calls else None
    name, encoded = match.groups()
    try:
        arguments = json.loads(encoded.strip() or "{}")
    except (ValueError, RecursionError) as error:
        raise ToolCallError("arguments are not JSON") from error
    if not isinstance(arguments, dict):
        raise ToolCallError("arguments are no JSON object")
    return ToolCall(name.strip(), arguments), parsed_action


class _Server:
    """The session to one server.

    It is opened by the first request and lives in a task of its own, since only the task that
    opened a session may close it.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._config = config
        self._session: asyncio.Future[Any] | None = None
        self._tools: list[dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    async def tools(self) -> list[dict[str, Any]]:
        """Return the server's tools; they are asked for once in a session."""
        if self._tools is None:
            session = await self._open()
            listed = await session.list_tools()
            # by_alias: the protocol's names of fields, in every version of the package
            described = [tool.model_dump(by_alias=True) for tool in listed.tools]
            self._tools = [_describe_tool(tool) for tool in described]
        return self._tools

    async def call(self, call: ToolCall) -> tuple[bool, str]:
        """Call a tool; return whether it failed, and its text.

        An error of the server, its death or a broken protocol is a failure of the tool, which the
        model reads.
        """
        try:
            session = await self._open()
            answer = await session.call_tool(call.name, call.arguments)
            result = answer.model_dump(by_alias=True)
        except Exception as error:
            if not _is_answer(error):
                await self.close()  # the next call opens another session
            return True, f"[Tool execution failed: {type(error).__name__}: {error}]"
        text = "\n".join(_part_text(part) for part in result["content"])
        if result.get("isError"):
            return True, f"[Tool execution error: {text}]"
        return False, text

    async def close(self) -> None:
        """End the session, if there is one."""
        task = self._task
        self._forget_session()
        if task is not None:
            self._stop.set()
            await asyncio.wait([task])

    def _forget_session(self) -> None:
        self._task = None
        self._session = None
        self._tools = None

    async def _open(self) -> Any:
        """Return the session, opened if there is none or its server has died."""
        session = self._session
        is_open = self._task is not None and not self._task.done()
        if session is None or not is_open:
            session = asyncio.get_running_loop().create_future()
            stop = asyncio.Event()
            self._task = asyncio.create_task(self._hold_session(session, stop))
            self._session = session
            self._stop = stop
        return await asyncio.shield(session)

    async def _hold_session(self, opened: asyncio.Future[Any], stop: asyncio.Event) -> None:
        try:
            async with self._connect() as session:
                opened.set_result(session)
                await stop.wait()
        except Exception as error:
            if not opened.done():
                opened.set_exception(
                    ConnectionError(f"MCP server {self._name!r} could not be reached: {error}")
                )

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[Any]:
        import mcp

        async with contextlib.AsyncExitStack() as stack:
            if "command" in self._config:
                transport = _command_transport(self._config)
            else:
                transport = await _http_transport(self._config, stack)
            streams = await stack.enter_async_context(transport)
            session = await stack.enter_async_context(mcp.ClientSession(streams[0], streams[1]))
            await session.initialize()
            yield session


def _command_transport(config: Mapping[str, Any]) -> Any:
    import mcp

    parameters = mcp.StdioServerParameters(
        command=config["command"],
        args=list(config.get("args", [])),
        env=dict(config.get("env", {})) or None,
    )
    return mcp.stdio_client(parameters)


async def _http_transport(config: Mapping[str, Any], stack: contextlib.AsyncExitStack) -> Any:
    from mcp.client.streamable_http import streamable_http_client

    # the only way to set headers that versions 1 and 2 of the package share
    from mcp.shared._httpx_utils import create_mcp_http_client

    url = config["url"]
    headers = dict(config.get("headers", {}))
    client = create_mcp_http_client(headers=headers)
    if is_loopback(url):  # a proxy of the environment cannot reach it
        direct: Any = type(client)  # httpx or httpx2, as the version of the package has it
        client = direct(
            headers=headers,
            timeout=client.timeout,
            follow_redirects=client.follow_redirects,
            trust_env=False,
        )
    await stack.enter_async_context(client)
    return streamable_http_client(url, http_client=client)


def _describe_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": tool["name"],
        "description": tool.get("description") or "",
        "parameters": tool["inputSchema"],
    }


def _is_answer(error: Exception) -> bool:
    """Return whether an error is the server's answer, and not a sign that the server is gone."""
    code = getattr(getattr(error, "error", None), "code", CONNECTION_CLOSED)
    return code != CONNECTION_CLOSED


def _part_text(part: Mapping[str, Any]) -> str:
    return part["text"] if part.get("type") == "text" else json.dumps(part, default=str)
