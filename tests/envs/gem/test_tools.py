"""Tools: Python and shell in real sandboxes, search against BM25 computed otherwise, and the
wrapper's bookkeeping.
"""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem import ToolCall, ToolCallError
from envs.gem.tools import (
    BaseTool,
    BM25Index,
    MCPTool,
    PythonCodeTool,
    SearchTool,
    ShellTool,
    ToolEnvWrapper,
)
from envs.gem.tools.mcp import MCPServerError, _first_call
from envs.gem.tools.search import terms
from envs.rock import AgentFault, SandboxConfig, SandboxError, sync
from tests.envs.gem.worlds import Counter
from tests.paths import ROOT
from tests.processes import host_processes

CONFIG = SandboxConfig(isolation="best_available")
TOOLS = [
    PythonCodeTool(timeout=5, sandbox_config=CONFIG),
    ShellTool(timeout=5, sandbox_config=CONFIG),
    SearchTool(BM25Index([("title", "text")])),
]


@pytest.fixture
def python():
    return PythonCodeTool(timeout=5, sandbox_config=CONFIG)


@pytest.mark.parametrize(
    ("action", "observation", "failed", "parsed"),
    [
        (
            "so <python>print(6*7)</python> then",
            "Code execution result: 42\n\n",
            False,
            "so <python>print(6*7)</python>",
        ),
        (
            "```python\nprint('a')\n``` and ```python\nprint('b')\n```",
            "Code execution result: a\n\n",
            False,
            "```python\nprint('a')\n```",
        ),
        (
            "```python\nprint(1)\n``` <python>print(2)</python>",
            "Code execution result: 1\n\n",
            False,
            "```python\nprint(1)\n```",
        ),
        (
            "<python>print(sqrt(16), Counter('aab')['a'])</python>",
            "Code execution result: 4.0 2\n\n",
            False,
            None,
        ),  # after the usual imports
        (
            "<python>...</python>",
            "Code execution result: SyntaxError: invalid syntax\n",
            True,
            None,
        ),
    ],
)
def test_python_runs_the_first_block(python, action, observation, failed, parsed):
    found, has_error, told, parsed_action = python.execute_action(action)
    assert found and has_error is failed and told == observation
    assert parsed_action == (parsed or action)


def test_a_python_error_is_told_whole_or_by_its_last_line(python):
    action = "<python>print('before')\n1/0</python>"
    found, has_error, told, _ = python.execute_action(action)
    assert (
        found
        and has_error
        and "before" in told
        and "Traceback" in told
        and told.endswith("ZeroDivisionError: division by zero\n")
    )
    short = PythonCodeTool(keep_error_last_line=True, sandbox_config=CONFIG).execute_action(action)[
        2
    ]
    assert short == "Code execution result: before\n\nZeroDivisionError: division by zero\n"


def test_a_program_that_does_not_end_is_stopped():
    told = PythonCodeTool(timeout=0.5, sandbox_config=CONFIG).execute_action(
        "<python>while True: pass</python>"
    )
    assert told[:3] == (
        True,
        True,
        "Code execution result: Execution timed out after 0.5 seconds.\n",
    )


def test_python_leaves_nothing_to_the_next_call_and_does_not_run_here(
    python, tmp_path, monkeypatch
):
    monkeypatch.setenv("A_SECRET", "of this process")
    mark = tmp_path / "mark"
    code = f"""import os
print(os.environ.get('A_SECRET'), os.path.exists('left'))
open('left', 'w').close()
try:
    open({str(mark)!r}, 'w')
except OSError:
    pass
"""
    for _ in range(2):
        assert (
            python.execute_action(f"<python>{code}</python>")[2]
            == "Code execution result: None False\n\n"
        )
    assert not mark.exists()


def test_the_shell_keeps_files_for_the_episode_and_no_longer():
    tool = ShellTool(timeout=5, max_output_chars=50, sandbox_config=CONFIG)
    other = tool.spawn()
    try:
        assert tool.execute_action("<bash>echo hi > note; pwd</bash> done")[1:] == (
            False,
            "Command output: /workspace\n",
            "<bash>echo hi > note; pwd</bash>",
        )
        assert tool.execute_action("```bash\ncat note\n```")[2] == "Command output: hi\n"
        assert tool.execute_action("<bash>exit 3</bash>")[1:3] == (
            True,
            "Command output: (none)\n[exit 3]\n",
        )
        assert tool.execute_action("<bash>seq 100</bash>")[2].endswith("... (241 more)\n")
        assert other.execute_action("<bash>cat note</bash>")[1] is True
        tool.reset()
        assert tool.execute_action("<bash>cat note</bash>")[1] is True
    finally:
        tool.close(), tool.close(), other.close()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.tool_type)
@given(
    text=st.lists(
        st.text(max_size=5)
        | st.sampled_from(["<python>", "</bash>", "<search>", "```python", "```bash\n"]),
        max_size=3,
    ).map("".join)
)
def test_text_without_a_complete_call_is_none(tool, text):
    if text.count("```") < 2:
        assert tool.execute_action(text)[:3] == (False, True, "")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.tool_type)
@pytest.mark.parametrize(
    "text",
    [
        "<python>" * 100_000,
        "<bash>" * 100_000,
        "<search>" * 100_000,
        "```python\n" + "x" * 1_000_000,
        "<tool_call><tool_name>x</tool_name><arguments>" * 20_000,
    ],
)
def test_a_megabyte_without_an_end_is_read_in_linear_time(tool, text):
    assert tool.execute_action(text)[0] is False  # the suite's time limit is the assertion
    with contextlib.suppress(ToolCallError):
        assert _first_call(text) is None


DOCUMENTS = [
    ("cats", "the cat sat on the mat"),
    ("dogs", "the dog chased the cat, the cat ran"),
    ("physics", "energy equals mass"),
    ("empty", ""),
    ("cats", "cat"),
]


@settings(deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.sampled_from(["a", "b c", ""]), st.text("abc ", max_size=12)),
        min_size=1,
        max_size=6,
    ),
    query=st.text("abcd ", max_size=8),
)
def test_scores_are_bm25(documents, query):
    bags = [terms(f"{title}\n{text}") for title, text in documents]
    mean = sum(map(len, bags)) / len(bags) or 1.0

    def score(bag):
        total = 0.0
        for term in terms(query):
            n = sum(term in other for other in bags)
            f = bag.count(term)
            total += (
                math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
                * f
                * 2.2
                / (f + 1.2 * (0.25 + 0.75 * len(bag) / mean))
                if f
                else 0.0
            )
        return total

    matching = [
        (index, score(bag)) for index, bag in enumerate(bags) if set(bag) & set(terms(query))
    ]
    expected = sorted(matching, key=lambda item: (-round(item[1], 9), item[0]))
    found = BM25Index(documents).search(query, topk=10)
    assert sorted(index for index, _ in found) == sorted(index for index, _ in expected)
    assert [round(value, 9) for _, value in found] == pytest.approx(
        [round(value, 9) for _, value in expected]
    )


def test_search_answers_in_gems_form():
    tool = SearchTool(BM25Index(DOCUMENTS), topk=2)
    found, failed, observation, parsed = tool.execute_action(
        "think <search> Dog CHASED </search> more"
    )
    assert (found, failed, parsed) == (True, False, "think <search> Dog CHASED </search>")
    assert (
        observation == "\n\n<information>Doc 1(Title: dogs) the dog chased the cat, the cat"
        " ran\n</information>\n\n"
    )
    assert "No document matches." in tool.execute_action("<search>zebra</search>")[2]
    assert tool.execute_action("<search></search>")[0] is True
    assert BM25Index([]).search("anything") == []


class Echo(BaseTool):
    tool_type = "echo"

    def __init__(self, mark, fails=False):
        super().__init__()
        self.mark, self.fails = mark, fails

    def instruction_string(self):
        return f"write {self.mark}"

    def execute_action(self, action):
        return (
            (True, self.fails, f"{self.mark} ran", action.split(self.mark)[0] + self.mark)
            if self.mark in action
            else (False, True, "", action)
        )


def test_the_wrapper_counts_uses_pays_and_passes_on():
    env = ToolEnvWrapper(
        Counter(),
        [Echo("!"), Echo("?", fails=True)],
        tool_reward=0.1,
        tool_success_reward=0.5,
        max_tool_uses=2,
    )
    observation, info = env.reset(seed=1)
    assert observation == "start 1\nAvailable tools:\nwrite !\nwrite ?"
    counts = {
        "tool_use_counter": 0,
        "tool_success_counter": 0,
        "prev_ep_tool_use_counter": 0,
        "prev_ep_tool_success_counter": 0,
    }
    assert info == {"suffix": "[0]", "use_tool": False, **counts}
    used = {
        "parsed_action": "a!",
        "tool_type": "echo",
        "use_tool": True,
        "tool_use_counter": 1,
        "tool_success_counter": 1,
    }
    assert env.step("a! b") == ("! ran", 0.6, False, False, used)
    observation, reward, *_ = env.step("b?")
    assert (
        observation
        == "? ran\n\nReached the maximum number of tool use. Please output final answer directly."
        and reward == 0.1
    )
    observation, *_, info = env.step("c!")  # no more tools
    assert (
        observation == "c! at 1"
        and info["tool_use_counter"] == 2
        and info["tool_success_counter"] == 1
    )
    assert env.reset()[1]["prev_ep_tool_use_counter"] == 2


def test_of_two_tools_that_are_called_the_one_that_works_counts():
    env = ToolEnvWrapper(Counter(), [Echo("?", fails=True), Echo("!")])
    env.reset()
    assert env.step("?!")[0] == "! ran"
    assert env.step("?")[0] == "? ran"  # its own failure is told, not handed to the environment
    assert env.unwrapped.turn == 0
    both_fail = ToolEnvWrapper(Counter(), [Echo("?", fails=True), Echo("!", fails=True)])
    both_fail.reset()
    assert both_fail.step("?!")[0] == "? ran"


def test_a_lost_sandbox_is_raised_and_no_observation():
    class Lost(Echo):
        def execute_action(self, action):
            raise SandboxError("gone")

    env = ToolEnvWrapper(Counter(), [Lost("!")])
    env.reset()
    for step in (lambda: env.step("!"), lambda: asyncio.run(env.astep("!"))):
        with pytest.raises(SandboxError):
            step()


@pytest.mark.parametrize("kind", [ShellTool, PythonCodeTool])
def test_what_a_program_did_to_its_sandbox_is_an_observation(monkeypatch, kind):
    def broken(*_):
        raise AgentFault("2 processes survived SIGKILL for 10 s")

    monkeypatch.setattr(kind, "run_block", broken)
    found, failed, observation, _ = kind().execute_action(f"<{kind.tag}>x</{kind.tag}>")
    assert found and failed and "survived" in observation


def test_each_environment_has_a_shell_of_its_own():
    tool = ShellTool(sandbox_config=CONFIG)
    one, other = ToolEnvWrapper(Counter(), [tool]), ToolEnvWrapper(Counter(), [tool])
    twin = one.spawn()
    assert len({id(env.tools[0]) for env in (one, other, twin)} | {id(tool)}) == 4
    one.reset(), other.reset()
    try:
        one.step("<bash>touch mine</bash>")
        assert (
            one.step("<bash>ls</bash>")[0] == "Command output: mine\n"
            and other.step("<bash>ls</bash>")[0] == "Command output: (none)\n"
        )
        one.reset()
        assert one.step("<bash>ls</bash>")[0] == "Command output: (none)\n"
    finally:
        one.close(), other.close()


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
    deadline = time.monotonic() + 20
    while not host_processes(seconds) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert host_processes(seconds) == 1
    tool.close()
    asking.join(10)
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
