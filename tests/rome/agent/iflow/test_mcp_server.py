"""The agent's tools over MCP, called by the SDK's own client."""

import asyncio

import pytest

from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.protocols.mcp_server import ToolServer, protocol_server
from tests.rome.agent.iflow.doubles import Folder, Note, Rules

mcp = pytest.importorskip("mcp")


def served(folder, **decisions):
    tools = [Note(), Note("write"), Note("task")]
    rules = Rules(**decisions)
    return ToolServer(
        Agent(None, tools, EventLog(), Folder(), policy=rules, session_folder=str(folder))
    )


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
                ("write", {"text": "hi"}, "needs approval (rule for write), and nobody is here"),
                ("task", {"text": "hi"}, "there is no tool 'task'"),
            ]:
                answer = await client.call_tool(name, arguments)
                assert answer.is_error and said in answer.content[0].text

    asyncio.run(play())
