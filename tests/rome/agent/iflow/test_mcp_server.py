"""The agent's tools over MCP, called by the SDK's own client."""

import asyncio
import contextlib
import logging
import re
import time

import pytest

from rome.agent.iflow.protocols.mcp_client import MCPServers
from rome.agent.iflow.protocols.mcp_server import ToolServer, protocol_server, serve_http
from rome.agent.iflow.specs.settings_values import McpServer
from tests.rome.agent.iflow.doubles import Folder, Note, Rules

mcp = pytest.importorskip("mcp")


def served(folder, **decisions):
    tools = [Note(), Note("write"), Note("task")]
    return ToolServer({one.name: one for one in tools}, Folder(), Rules(**decisions), str(folder))


@pytest.mark.parametrize("mode", ["legacy", "auto"])  # with the handshake, and without
def test_a_client_lists_and_calls_the_tools_under_the_rules(tmp_path, mode):
    async def play():
        server = protocol_server(served(tmp_path, write="ask"))
        async with mcp.Client(server, mode=mode) as client:
            listed = (await client.list_tools()).tools
            assert [tool.name for tool in listed] == ["note", "write"]
            answer = await client.call_tool("note", {"text": "hi"})
            assert (answer.is_error, answer.content[0].text) == (False, "noted hi")
            for name, arguments, said in [
                ("note", {"text": "fail"}, "it failed as asked"),
                ("note", {}, "note needs text"),
                ("note", {"text": "broken place"}, "the sandbox is gone"),
                ("write", {"text": "hi"}, "not allowed here: rule for write"),
                ("task", {"text": "hi"}, "there is no tool 'task'"),
            ]:
                answer = await client.call_tool(name, arguments)
                assert answer.is_error and said in answer.content[0].text

    asyncio.run(play())


def test_over_http_a_client_needs_the_token(tmp_path, capsys):
    closed = []

    async def tools_with(url, token):
        headers = {"Authorization": f"Bearer {token}"}
        notices = []
        config = McpServer("own", url=url, headers=headers)
        servers = MCPServers([config], notices.append, tmp_path)
        try:
            await servers.start()
            return [tool.name for tool in servers.tools], notices
        finally:
            await servers.close()

    async def address():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = re.search(r"(http\S+), token (\S+)", capsys.readouterr().err)
            if found:
                return found[1], found[2]
            await asyncio.sleep(0.05)
        raise TimeoutError

    async def play():
        handler = logging.StreamHandler()  # such as absl's, which closes standard error
        handler.close = lambda: closed.append(handler)
        serving = asyncio.create_task(serve_http(served(tmp_path), host="127.0.0.1", port=0))
        url, token = await address()
        assert (await tools_with(url, token))[0] == ["own__note", "own__write"]
        names, notices = await tools_with(url, "guess")
        assert not names and notices
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        assert not closed, "the logging of the program is its own"

    asyncio.run(play())
