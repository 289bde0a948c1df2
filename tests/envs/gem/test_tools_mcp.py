"""MCP tools: calls to real server processes, over pipes and HTTP, also to broken ones."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from aiohttp import web

from envs.gem import ToolCall
from envs.gem.tools import MCPTool
from envs.gem.tools.mcp import MCPServerError, _first_call
from envs.rock import SandboxError, sync
from tests.paths import ROOT
from tests.processes import host_processes

SERVER = """
import json, sys
ADD = {"type": "object", "properties": {"a": {"type": "number"}}}
TOOLS = [{"name": "add", "description": "adds", "inputSchema": ADD},
         *({"name": name, "inputSchema": {"type": "object"}} for name in ("fail", "die", "sleep"))]
for line in sys.stdin:
    call = json.loads(line)
    if "id" not in call:
        continue
    method, params, result = call["method"], call.get("params", {}), {}
    if method == "initialize":
        result = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "t", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": TOOLS}
    elif method == "tools/call":
        name, arguments = params["name"], params.get("arguments") or {}
        if name == "die":
            sys.exit(1)
        if name == "sleep":
            continue
        text = str(sum(arguments.values())) if name == "add" else "it broke"
        result = {"content": [{"type": "text", "text": text}], "isError": name == "fail"}
    print(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": result}), flush=True)
"""


def gem_call(name, **arguments):
    return (
        f"<tool_call>\n<tool_name>{name}</tool_name>\n"
        f"<arguments>\n{json.dumps(arguments)}\n</arguments>\n</tool_call>"
    )


@pytest.mark.slow
def test_mcp_tools_of_a_real_server_process(tmp_path):
    pytest.importorskip(
        "mcp", reason="the mcp package is optional; pip install -r tests/requirements-live.txt"
    )
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    tool = MCPTool(
        {"mcpServers": {"test": {"command": sys.executable, "args": [str(script)]}}},
        execution_timeout=3,
    )
    try:
        assert [one["name"] for one in tool.get_available_tools()] == [
            "add",
            "fail",
            "die",
            "sleep",
        ]
        assert '"name": "add"' in tool.instruction_string()
        call = "so " + gem_call("add", a=1, b=2)
        assert tool.execute_action(call + " x") == (
            True,
            False,
            "\n<tool_response>\n3\n</tool_response>\n",
            call,
        )
        assert (
            "7"
            in tool.execute_action('<tool_call>{"name": "add", "arguments": {"a": 7}}</tool_call>')[
                2
            ]
        )
        assert tool.execute_action(gem_call("fail"))[1:3] == (
            True,
            "\n<tool_response>\n[Tool execution error: it broke]\n</tool_response>\n",
        )
        assert "no tool 'nothing'" in tool.execute_action(gem_call("nothing"))[2]
        assert tool.execute_action("<tool_call>nonsense</tool_call>")[:2] == (True, True)
        assert tool.execute_action(gem_call("sleep"))[1] is True
        assert tool.execute_action(gem_call("die"))[1] is True
        assert "5" in tool.execute_action(gem_call("add", a=5))[2]  # a new process
    finally:
        tool.close()
        tool.close()
    with pytest.raises(ValueError, match="url or command"):
        MCPTool({"mcpServers": {"bad": {}}})


@pytest.mark.slow
def test_mcp_servers_that_die_hang_or_are_not_there_cost_their_own_calls_only(tmp_path):
    pytest.importorskip(
        "mcp", reason="the mcp package is optional; pip install -r tests/requirements-live.txt"
    )
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    seconds = f"7654{os.getpid()}"
    servers = {
        "dead": {"command": "false"},
        "silent": {"command": "sleep", "args": [seconds]},
        "missing": {"command": "/no/such/program"},
        "far": {"url": "http://127.0.0.1:9/mcp"},
        "good": {"command": sys.executable, "args": [str(script)]},
    }
    tool = MCPTool({"mcpServers": servers}, execution_timeout=8)
    try:
        assert tool.execute_action(gem_call("add", a=2, b=3))[1:3] == (
            False,
            "\n<tool_response>\n5\n</tool_response>\n",
        )
        assert "add" in tool.instruction_string()
        failed, text = tool.execute_action(gem_call("nothing"))[1:3]
        assert failed and all(repr(name) in text for name in servers if name != "good"), text
        assert "no answer within 4 s" in text and "No such file" in text
    finally:
        tool.close()
    assert host_processes(seconds) == 0
    alone = MCPTool({"mcpServers": {"silent": servers["silent"]}}, execution_timeout=1)
    with pytest.raises(MCPServerError, match=r"'silent' .* no answer within 0\.5 s") as raised:
        alone.get_available_tools()
    assert isinstance(raised.value, SandboxError)
    assert alone.execute_action(gem_call("add"))[1] is True
    alone.close()
    alone.close()
    assert host_processes(seconds) == 0


@pytest.mark.slow
def test_an_mcp_server_that_is_being_opened_can_be_closed_and_ends_with_its_caller(tmp_path):
    pytest.importorskip(
        "mcp", reason="the mcp package is optional; pip install -r tests/requirements-live.txt"
    )
    seconds = f"7655{os.getpid()}"
    config = {"mcpServers": {"silent": {"command": "sleep", "args": [seconds]}}}
    tool = MCPTool(config, execution_timeout=60)
    asking = threading.Thread(target=lambda: tool.execute_action(gem_call("add")), daemon=True)
    asking.start()
    deadline = time.monotonic() + 60
    while not host_processes(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host_processes(seconds) == 1
    tool.close()
    asking.join(60)
    assert not asking.is_alive() and host_processes(seconds) == 0
    left_open = f"""
import threading, time
from envs.gem.tools import MCPTool
tool = MCPTool({config!r}, execution_timeout=60)
threading.Thread(target=tool.get_available_tools, daemon=True).start()
time.sleep(3)
"""
    subprocess.run([sys.executable, "-c", left_open], cwd=ROOT, timeout=60, check=True)
    assert host_processes(seconds) == 0


@pytest.mark.slow
def test_mcp_tools_of_an_http_server():
    pytest.importorskip(
        "mcp", reason="the mcp package is optional; pip install -r tests/requirements-live.txt"
    )
    seen = []

    async def answer(request):
        seen.append(request.headers.get("Authorization"))
        call = await request.json()
        if "id" not in call:
            return web.Response(status=202)
        protocol = call.get("params", {}).get("protocolVersion")
        result = {
            "initialize": {
                "protocolVersion": protocol,
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "t", "version": "1"},
            },
            "tools/list": {"tools": [{"name": "hello", "inputSchema": {"type": "object"}}]},
            "tools/call": {"content": [{"type": "text", "text": "hello too"}]},
        }[call["method"]]
        return web.json_response({"jsonrpc": "2.0", "id": call["id"], "result": result})

    async def start():
        app = web.Application()
        app.router.add_post("/mcp", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = sync.run(start(), 10)
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/mcp"
    tool = MCPTool(
        {"mcpServers": {"test": {"url": url, "headers": {"Authorization": "Bearer x"}}}},
        execution_timeout=10,
    )
    try:
        assert tool.execute_action(gem_call("hello"))[1:3] == (
            False,
            "\n<tool_response>\nhello too\n</tool_response>\n",
        )
        assert set(seen) == {"Bearer x"}
    finally:
        tool.close()
        sync.run(runner.cleanup(), 70)
    with pytest.raises(ConnectionError, match="'default'"):
        MCPTool("http://127.0.0.1:9/mcp", execution_timeout=10).get_available_tools()


@pytest.mark.parametrize(
    ("text", "call"),
    [
        (gem_call("a", x=1), ToolCall("a", {"x": 1})),
        (
            "<tool_call><tool_name>a</tool_name><arguments></arguments></tool_call>",
            ToolCall("a", {}),
        ),
        ("<function=a><parameter=x>1</parameter></function>", ToolCall("a", {"x": "1"})),
        ("words", None),
    ],
)
def test_calls_are_read_in_gems_form_and_in_qwens(text, call):
    found = _first_call(text)
    assert (found and found[0]) == call


def test_a_malformed_call_of_a_server_is_told_and_is_no_answer():
    pytest.importorskip("mcp")
    found, failed, observation, _ = MCPTool("http://127.0.0.1:9/mcp").execute_action(
        "<tool_call><tool_name>a</tool_name><arguments>{1}</arguments></tool_call>"
    )
    assert found and failed and "is not JSON" in observation
