"""Tools of MCP servers (Model Context Protocol), through the `mcp` package where it is installed.

A server is an HTTP address, or a local command that the caller trusts: it runs on this machine,
outside of any sandbox, with an environment of its own. One session to each server stays open on the
background loop of envs.rock.sync until `close`.

A server that dies, hangs or never answers costs the calls of its own tools only.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import importlib.util
import json
import time
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

from envs.gem.tool_call import ToolCall, ToolCallError, iterate_tool_calls
from envs.gem.tools.base import BaseTool, ToolResult
from envs.proxies import is_loopback
from envs.rock.errors import SandboxError
from envs.rock.sync import run

CONNECTION_CLOSED = -32000  # the mcp package's JSON-RPC code for a server that is gone
OPEN_SHARE = 0.5  # of a call's time, in which its server must have opened a session
RETRY_SECONDS = 30.0  # after which a server that could not be reached is tried again
# The package gives a process 4 s to end before it kills it, and 2 s more to be gone.
CLOSE_SECONDS = 10.0


class MCPServerError(SandboxError, ConnectionError):
    """A server could not be reached: a fault of the infrastructure, not of the caller's turn."""


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
            _Server(name, server, opening) for name, server in _servers(config).items()
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

    async def _reach(self) -> tuple[list[tuple[_Server, list[dict[str, Any]]]], list[Exception]]:
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
                return await server.call(call)
        names = [tool["name"] for _, tools in reached for tool in tools]
        said = [f"no tool {call.name!r}; there are {', '.join(names) or 'none'}"]
        return True, f"[Tool execution failed: {'; '.join([*said, *map(str, failures)])}]"


_open_tools: weakref.WeakSet[MCPTool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End what a caller left open: a server need not notice that this process has ended."""
    for tool in list(_open_tools):
        tool.close()


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
    """Return the first call that a turn says, and the turn up to its end; None without any.

    Raises:
      ToolCallError: it is malformed.
    """
    for call, end in iterate_tool_calls(action):
        return call, action[:end]
    return None


class _Server:
    """The session to one server.

    It is opened by the first request and lives in a task of its own, since only the task that
    opened a session may close it.
    """

    def __init__(self, name: str, config: Mapping[str, Any], opening_seconds: float) -> None:
        self._name = name
        self._config = config
        self._opening_seconds = opening_seconds
        self._session: asyncio.Future[Any] | None = None
        self._tools: list[dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._failure: MCPServerError | None = None
        self._failed_at = 0.0
        self._ending: asyncio.Task[None] | None = None  # of a session that failed

    async def tools(self) -> list[dict[str, Any]]:
        """Return the server's tools; they are asked for once in a session.

        Raises:
          MCPServerError: it cannot be reached. That is remembered for RETRY_SECONDS.
        """
        if self._tools is not None:
            return self._tools
        if self._failure and time.monotonic() < self._failed_at + RETRY_SECONDS:
            raise self._failure
        try:
            session = await self._open()
            async with asyncio.timeout(self._opening_seconds):
                listed = await session.list_tools()
        except Exception as error:
            # It may take long, and the other servers' calls do not wait for it.
            self._ending = asyncio.ensure_future(self.close())
            self._failure = self._unreachable(error)
            self._failed_at = time.monotonic()
            raise self._failure from error
        self._failure = None
        # by_alias: the protocol's names of fields, in every version of the package
        described = [tool.model_dump(by_alias=True) for tool in listed.tools]
        self._tools = [_describe_tool(tool) for tool in described]
        return self._tools

    def _unreachable(self, error: Exception) -> MCPServerError:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, MCPServerError):
            return error
        reason = _causes(error)
        if isinstance(error, TimeoutError):
            reason = f"no answer within {self._opening_seconds:g} s"
        return MCPServerError(f"MCP server {self._name!r} could not be reached: {reason}")

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
            return True, f"[Tool execution failed: MCP server {self._name!r}: {_causes(error)}]"
        text = "\n".join(_part_text(part) for part in result["content"])
        if result.get("isError"):
            return True, f"[Tool execution error: {text}]"
        return False, text

    async def close(self) -> None:
        """End the session and the server's process, if there are any; takes CLOSE_SECONDS at most.

        A session that is still being opened is given up.
        """
        task = self._task
        self._forget_session()
        if self._ending and self._ending is not asyncio.current_task():
            await asyncio.wait([self._ending], timeout=CLOSE_SECONDS)
        if task is None:
            return
        self._stop.set()
        _, pending = await asyncio.wait([task], timeout=CLOSE_SECONDS)
        if pending:
            task.cancel()

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
                try:
                    await self._initialize(session, stop)
                except Exception as error:
                    self._fail(opened, error)  # at once: ending a process takes seconds
                    return
                opened.set_result(session)
                await stop.wait()
        except Exception as error:
            if not opened.done():
                self._fail(opened, error)

    def _fail(self, opened: asyncio.Future[Any], error: Exception) -> None:
        opened.set_exception(self._unreachable(error))
        opened.exception()  # marks it as retrieved: nobody may wait for it any more

    async def _initialize(self, session: Any, stop: asyncio.Event) -> None:
        """Open the protocol, unless `stop` is set first.

        Only the request is cancelled then, never this task, which must yet end the process.
        """
        opening = asyncio.ensure_future(session.initialize())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait(
                [opening, stopping],
                timeout=self._opening_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if opening.done():
                opening.result()
            elif stop.is_set():
                raise MCPServerError(f"MCP server {self._name!r} was closed while it was opened")
            else:
                raise TimeoutError
        finally:
            opening.cancel()
            stopping.cancel()
            await asyncio.gather(opening, stopping, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[Any]:
        import mcp

        async with contextlib.AsyncExitStack() as stack:
            if "command" in self._config:
                transport = _command_transport(self._config)
            else:
                transport = await _http_transport(self._config, stack)
            streams = await stack.enter_async_context(transport)
            yield await stack.enter_async_context(mcp.ClientSession(streams[0], streams[1]))


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


def _causes(error: BaseException) -> str:
    """Return what an error says; for a group, what the errors in it say."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(map(_causes, error.exceptions)))
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _is_answer(error: Exception) -> bool:
    """Return whether an error is the server's answer, and not a sign that the server is gone."""
    code = getattr(getattr(error, "error", None), "code", CONNECTION_CLOSED)
    return code != CONNECTION_CLOSED


def _part_text(part: Mapping[str, Any]) -> str:
    return part["text"] if part.get("type") == "text" else json.dumps(part, default=str)
