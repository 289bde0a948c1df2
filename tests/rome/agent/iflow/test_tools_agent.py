"""The agent with its real tools, on this machine and in a sandbox; only the model is a script."""

import asyncio

import pytest

from rome.agent.iflow import events
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.tools.standard import standard_tools
from tests.rome.agent.iflow.doubles import ScriptedModel, calls
from tests.rome.agent.iflow.places import KINDS, work


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def make(workspace, tmp_path, *steps):
    tools = standard_tools(user_memory=tmp_path / "memory.md")
    log = EventLog()
    model = ScriptedModel(*steps)
    return Agent(model, tools, log, workspace, has_checkpoints=True), model


def finished(agent):
    return [event for event in agent.log.events if isinstance(event, events.ToolFinished)]


def test_a_small_piece_of_work_is_done_and_taken_back(kind, tmp_path):
    new = {"path": "src/add.py", "content": "def add(a, b):\n    return a - b\n"}
    wrong = {"path": "src/add.py", "old_string": "return a * b", "new_string": "return a + b"}
    right = {"path": "src/add.py", "old_string": "return a - b", "new_string": "return a + b"}
    # -B: a file changed within a second, in equal length, would be hidden by its compiled form
    test = "cd src && python3 -B -c 'import add; print(add.add(2, 3))'"
    steps = [
        calls(("write_file", new), ("shell", {"command": test})),
        "It subtracts.",
        calls(("edit", wrong), ("edit", right), ("shell", {"command": f"cd ..; {test}"})),
        "It adds.",
    ]

    async def body(workspace):
        agent, _ = make(workspace, tmp_path, *steps)
        await agent.run("write add")
        await agent.run("repair it")
        done = finished(agent)
        assert [one.status for one in done] == ["ok", "ok", "error", "ok", "ok"]
        assert (done[1].output, done[4].output) == ("-1", "5")
        assert "First difference: line 2" in done[2].output
        assert "-    return a - b\n+    return a + b" in done[3].diff
        first, second = agent.conversation.requests
        await agent.rewind(second.number)
        assert await workspace.read("src/add.py") == new["content"].encode()
        await agent.rewind(first.number)
        assert await workspace.stat("src/add.py") is None

    work(kind, tmp_path, body)


def test_looking_around_runs_together_and_long_output_is_searched_later(kind, tmp_path):
    def search_in_file(messages):
        file = messages[-1].content.split("the whole is in ")[1].split(" ...]")[0]
        return calls(("search", {"pattern": "^77777$", "path": file}))

    steps = [
        calls(
            ("glob", {"pattern": "*.md"}),
            ("search", {"pattern": "hello"}),
            ("list_directory", {}),
            ("read_file", {"path": "a.md"}),
        ),
        calls(("shell", {"command": "seq 100000"})),
        search_in_file,
        "done",
    ]

    async def body(workspace):
        await workspace.write("a.md", b"hello\n")
        agent, _ = make(workspace, tmp_path, *steps)
        await agent.run("look")
        outputs = {one.call_id: one.output for one in finished(agent)}
        together = [outputs[f"c0.{place}"] for place in range(4)]
        assert together == ["a.md", "a.md:1:hello", "a.md 6", "     1\thello"]
        assert outputs["c2.0"].endswith(":77777:77777")

    work(kind, tmp_path, body)


def test_a_turn_that_is_cancelled_leaves_a_shell_that_works(kind, tmp_path):
    steps = [
        calls(("shell", {"command": "touch begun; sleep 600"})),
        calls(("shell", {"command": "echo on"})),
        "done",
    ]

    async def body(workspace):
        agent, _ = make(workspace, tmp_path, *steps)
        running = asyncio.ensure_future(agent.run("wait"))
        while await workspace.stat("begun") is None:
            await asyncio.sleep(0.05)
        agent.cancel()
        assert (await asyncio.wait_for(running, 60)).outcome == "aborted"
        await agent.run("go on")
        done = finished(agent)
        assert [one.status for one in done] == ["cancelled", "ok"]
        assert done[1].output.startswith("on")

    work(kind, tmp_path, body)


def test_a_job_that_ends_tells_the_session(kind, tmp_path):
    steps = [
        calls(("shell", {"command": "sleep 0.2; exit 7", "background": True})),
        calls(("shell_output", {"job": "1", "wait": 20})),
        calls(("shell", {"command": "sleep 0.2"})),
        "done",
    ]

    async def body(workspace):
        agent, _ = make(workspace, tmp_path, *steps)
        await agent.run("go")
        ended = [event for event in agent.log.events if isinstance(event, events.JobFinished)]
        assert [(one.job, one.exit_code) for one in ended] == [("1", 7)]

    work(kind, tmp_path, body)
