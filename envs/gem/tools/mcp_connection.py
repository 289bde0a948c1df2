"""Sessions to MCP servers (Model Context Protocol), for environments and for agents.

A server is an HTTP address, or a local command that the caller trusts: it runs on this machine,
outside of any sandbox, with an environment of its own.

A server is not trusted to be sound: it may be dead, hang, list tools without end, describe them
badly or change them. Each of these costs its own tools only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import IO, Any, TypeVar

from envs.proxies import is_loopback
from envs.rock.errors import SandboxError

CONNECTION_CLOSED = -32000  # the mcp package's JSON-RPC code for a server that is gone
METHOD_NOT_FOUND = -32601
RETRY_SECONDS = 30.0  # after which a server that could not be reached is tried again
# The package gives a process 4 s to end before it kills it, and 2 s more to be gone.
CLOSE_SECONDS = 10.0
ALIVE_SECONDS = 2.0  # in which a server that is not stuck lists its tools
MAX_LISTED = 1_000  # tools, resources or prompts of one server; the rest is passed over
MAX_PAGES = 50  # in which it lists them

Listed = TypeVar("Listed")


class MCPServerError(SandboxError, ConnectionError):
    """A server could not be reached: a fault of the infrastructure, not of the caller's turn."""


@dataclasses.dataclass(frozen=True)
class MCPAnswer:
    """The answer of a tool.

    Attributes:
      text: of all its parts; parts that are no text are named with their type and size.
      is_error: whether the server calls it an error.
    """

    text: str
    is_error: bool = False


class MCPConnection:
    """The session to one server.

    It is opened by the first request and lives in a task of its own, since only the task that
    opened a session may close it. All its methods belong to one event loop.

    Args:
      name: of the server, for messages.
      config: {"url", "headers"?} or {"command", "args"?, "env"?, "cwd"?}.
      opening_seconds: in which it must have opened a session and listed its tools.
      errors: receives what a command writes to its standard error; None passes it on.

    Attributes:
      name: as given.
      on_tools_changed: called when the server says that its list of tools is another one.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        opening_seconds: float,
        errors: IO[str] | None = None,
    ) -> None:
        self.name = name
        self.on_tools_changed: Callable[[], None] = lambda: None
        self._config = config
        self._opening_seconds = opening_seconds
        self._errors = errors
        self._session: asyncio.Future[Any] | None = None
        self._tools: list[dict[str, Any]] | None = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._failure: MCPServerError | None = None
        self._failed_at = 0.0
        self._endings: set[asyncio.Task[None]] = set()  # of sessions that failed

    async def tools(self, *, fresh: bool = False) -> list[dict[str, Any]]:
        """Return {"name", "description", "parameters": JSON schema} of each of the server's tools.

        Args:
          fresh: asks the server; else it is asked once in a session.

        Raises:
          MCPServerError: it cannot be reached. That is remembered for RETRY_SECONDS.
        """
        if self._tools is not None and not fresh:
            return self._tools
        if self._failure and time.monotonic() < self._failed_at + RETRY_SECONDS:
            raise self._failure
        try:
            session = await self._open()
            async with asyncio.timeout(self._opening_seconds):
                listed = await _all_pages(session.list_tools, "tools")
        except Exception as error:
            self._end_behind()
            self._failure = self._unreachable(error)
            self._failed_at = time.monotonic()
            raise self._failure from error
        self._failure = None
        self._tools = [_describe_tool(tool) for tool in listed]
        return self._tools

    def forget_failure(self) -> None:
        """Let the next request try the server at once, though it has just failed."""
        self._failure = None

    async def call(self, name: str, arguments: Mapping[str, Any]) -> MCPAnswer:
        """Call a tool.

        Raises:
          MCPServerError: the server is gone, answers with an error of the protocol, or breaks it.
        """
        result = await self._ask(lambda session: session.call_tool(name, dict(arguments)))
        text = "\n".join(_part_text(part) for part in result["content"])
        return MCPAnswer(text, bool(result.get("isError")))

    async def resources(self) -> list[dict[str, Any]]:
        """Return {"uri", "name", "description", "mimeType"} of each resource; [] where it has none.

        Raises:
          MCPServerError: as `call` does.
        """
        return await self._list(lambda session: session.list_resources, "resources")

    async def prompts(self) -> list[dict[str, Any]]:
        """Return {"name", "description", "arguments"} of each prompt; [] where it has none.

        Raises:
          MCPServerError: as `call` does.
        """
        return await self._list(lambda session: session.list_prompts, "prompts")

    async def read_resource(self, uri: str) -> str:
        """Return the text of a resource; raises as `call` does."""
        result = await self._ask(lambda session: session.read_resource(uri))
        return "\n".join(_contents_text(part) for part in result["contents"])

    async def prompt(self, name: str, arguments: Mapping[str, str]) -> str:
        """Return the text of a prompt, its messages below each other; raises as `call` does."""
        result = await self._ask(lambda session: session.get_prompt(name, dict(arguments)))
        return "\n\n".join(_part_text(message["content"]) for message in result["messages"])

    async def end_if_stuck(self) -> None:
        """End the session unless the server still answers; to be called after a call in vain.

        A server that does one thing after another would let all later calls wait for that one.
        """
        session = self._session
        try:
            async with asyncio.timeout(ALIVE_SECONDS):
                await (await self._open()).list_tools()
        except Exception:
            if self._session is session:
                self._end_behind()

    async def close(self) -> None:
        """End the session and the server's process, if there are any; takes CLOSE_SECONDS at most.

        A session that is still being opened is given up.
        """
        self._end_behind()
        if self._endings:
            await asyncio.wait(self._endings, timeout=CLOSE_SECONDS + 1)

    def _end_behind(self) -> None:
        """End the session while others go on: it may take seconds, and the next one is opened."""
        task = self._task
        self._forget_session()
        if task is not None:
            ending = asyncio.create_task(self._end(task, self._stop))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _end(self, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        stop.set()
        _, pending = await asyncio.wait([task], timeout=CLOSE_SECONDS)
        if pending:
            task.cancel()

    async def _list(self, method: Callable[[Any], Any], member: str) -> list[dict[str, Any]]:
        """Return what the server lists; nothing where it does not know the method."""
        session = await self._opened()
        try:
            async with asyncio.timeout(self._opening_seconds):
                return await _all_pages(method(session), member)
        except Exception as error:
            if _code(error) == METHOD_NOT_FOUND:
                return []
            raise self._broken(error) from error

    async def _ask(self, request: Callable[[Any], Awaitable[Any]]) -> dict[str, Any]:
        """Return the answer of a request in the protocol's names, whatever the package calls it."""
        session = await self._opened()
        try:
            answer = await request(session)
        except Exception as error:
            raise self._broken(error) from error
        result: dict[str, Any] = answer.model_dump(mode="json", by_alias=True)
        return result

    async def _opened(self) -> Any:
        try:
            return await self._open()
        except Exception as error:
            raise self._unreachable(error) from error

    def _broken(self, error: Exception) -> MCPServerError:
        """Return the error of a request; unless the server answered it, the session ends."""
        if not _is_answer(error):
            self._end_behind()  # the next request opens another session
        return MCPServerError(f"MCP server {self.name!r}: {causes(error)}")

    def _unreachable(self, error: Exception) -> MCPServerError:
        while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if isinstance(error, MCPServerError):
            return error
        reason = causes(error)
        if isinstance(error, TimeoutError):
            reason = f"no answer within {self._opening_seconds:g} s"
        return MCPServerError(f"MCP server {self.name!r} could not be reached: {reason}")

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
        opening = asyncio.ensure_future(_handshake(session))
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
                raise MCPServerError(f"MCP server {self.name!r} was closed while it was opened")
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
                transport = _command_transport(self._config, self._errors)
            else:
                transport = await _http_transport(self._config, stack)
            streams = await stack.enter_async_context(transport)
            session = mcp.ClientSession(streams[0], streams[1], message_handler=self._hear)
            yield await stack.enter_async_context(session)

    async def _hear(self, message: Any) -> None:
        """Note what the server says without being asked."""
        if getattr(message, "method", "") == "notifications/tools/list_changed":
            self._tools = None
            self.on_tools_changed()


def server_configs(config: str | Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the servers of a configuration by name, after checking them.

    Raises:
      ValueError: it names no server, or one with both or neither of url and command.
    """
    if isinstance(config, str):
        return {"default": {"url": config}}
    servers = dict(config.get("mcpServers", {}))
    if not servers:
        raise ValueError(
            f"MCP configuration {config!r} names no server; it is a URL or {{'mcpServers':"
            " {name: ...}}"
        )
    for name, server in servers.items():
        check_server_config(name, server)
    return servers


def check_server_config(name: str, server: Mapping[str, Any]) -> None:
    """Raise ValueError unless a server has a command or a URL, and not both."""
    if ("url" in server) == ("command" in server):
        raise ValueError(f"MCP server {name!r} has {sorted(server)}; give it either url or command")


def causes(error: BaseException) -> str:
    """Return what an error says; for a group, what the errors in it say."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(map(causes, error.exceptions)))
    return f"{type(error).__name__}: {error}".rstrip(": ")


async def _handshake(session: Any) -> None:
    """Agree on a version of the protocol: by the handshake, or without one where none is known."""
    try:
        await session.initialize()
    except Exception as error:
        if not _is_answer(error):
            raise
        await session.discover()  # a server of version 2026-07-28 or later need not know it


async def _all_pages(request: Callable[..., Awaitable[Any]], member: str) -> list[dict[str, Any]]:
    """Return what a server lists, page after page, as dictionaries in the protocol's names."""
    from mcp.types import PaginatedRequestParams

    found: list[dict[str, Any]] = []
    cursor = None
    for _ in range(MAX_PAGES):
        params = PaginatedRequestParams(cursor=cursor) if cursor else None
        page = (await request(params=params)).model_dump(mode="json", by_alias=True)
        found += page[member]
        cursor = page.get("nextCursor")
        if not cursor or len(found) >= MAX_LISTED:
            break
    return found[:MAX_LISTED]


def _command_transport(config: Mapping[str, Any], errors: IO[str] | None) -> Any:
    import mcp

    parameters = mcp.StdioServerParameters(
        command=config["command"],
        args=list(config.get("args", [])),
        env=dict(config.get("env", {})) or None,
        cwd=config.get("cwd"),
        encoding_error_handler="replace",  # a server's bad byte is no end of its session
    )
    if errors is None:
        return mcp.stdio_client(parameters)
    return mcp.stdio_client(parameters, errlog=errors)  # type: ignore[arg-type]


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


def _code(error: BaseException) -> int | None:
    """Return the JSON-RPC code of a server's answer; None for other errors."""
    return getattr(getattr(error, "error", None), "code", None)


def _is_answer(error: Exception) -> bool:
    """Return whether an error is the server's answer, and not a sign that the server is gone."""
    return _code(error) not in (None, CONNECTION_CLOSED)


def _part_text(part: Mapping[str, Any]) -> str:
    """Return a part of an answer as text; what is no text is named."""
    kind = part.get("type")
    if kind == "text":
        return str(part["text"])
    if kind == "resource":
        return _contents_text(part["resource"])
    if kind == "resource_link":
        return f"[resource {part['uri']}: {part.get('description') or part.get('name')}]"
    size = len(part.get("data", "")) * 3 // 4
    return f"[{kind}, {part.get('mimeType')}, {size} bytes]"


def _contents_text(contents: Mapping[str, Any]) -> str:
    if "text" in contents:
        return str(contents["text"])
    size = len(contents.get("blob", "")) * 3 // 4
    return f"[{contents['uri']}, {contents.get('mimeType')}, {size} bytes]"
