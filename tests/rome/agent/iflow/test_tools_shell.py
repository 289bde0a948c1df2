"""The shell's tools: what the model reads of commands and jobs."""

import asyncio

import pytest

from rome.agent.iflow.events import JobFinished, JobStarted
from rome.agent.iflow.places.sandbox_workspace import SHELL_ENDED
from rome.agent.iflow.tools.shell import ShellKillTool, ShellListTool, ShellOutputTool, ShellTool
from tests.rome.agent.iflow.places import KINDS, Hand, work


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_commands_are_described(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        shell = ShellTool(seconds=60)
        for command, expected in {
            "echo a; echo b >&2": "a\nb",
            "true": "(no output)",
            "echo x; (exit 4)": "x\n[exit 4]",
            "echo bye; exit 3": f"bye\n[exit 3]\n[{SHELL_ENDED}]",
        }.items():
            assert (await hand.use(shell, command=command)).output == expected
        late = await hand.use(shell, command="echo a; sleep 600", timeout=1)
        assert late.output.startswith("a\n") and "[ended after 1 seconds; run" in late.output
        assert late.exit_code is None and late.status == "ok"
        for arguments, words in (
            ({"command": " "}, "the command is empty"),
            ({"command": "x", "timeout": 9999}, "at most 600 seconds, not 9999"),
            ({"command": "x", "timeout": 0}, "above 0"),
        ):
            assert words in (await hand.use(shell, **arguments)).output

    work(kind, tmp_path, body)


def test_a_job_is_started_listed_read_and_ended(kind, tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        shell = ShellTool()
        started = await hand.use(shell, command="echo up; sleep 550", background=True)
        assert started.output.startswith("job 1 runs in the background")
        said = await hand.use(ShellOutputTool(), job="1", wait=1)
        assert said.output == "up\n[job 1 runs]"
        await hand.use(shell, command="exit 5", background=True)
        said = await hand.use(ShellOutputTool(), job="2", wait=60)
        assert said.output == "(no new output)\n[job 2 ended with status 5]"
        said = await hand.use(ShellListTool())
        assert said.output == "1 (runs): echo up; sleep 550\n2 (ended with status 5): exit 5"
        assert (await hand.use(ShellKillTool(), job="1")).output == "job 1 was ended"
        assert (await hand.use(ShellKillTool(), job="1")).output == "job 1 was ended already"
        assert (
            "there is no job '9'; there are 1, 2"
            in (await hand.use(ShellKillTool(), job="9")).output
        )
        while len(hand.events) < 4:  # the ends are told a moment after they are known
            await asyncio.sleep(0.01)
        assert hand.events == [
            JobStarted(job="1", command="echo up; sleep 550", call_id="c1"),
            JobStarted(job="2", command="exit 5", call_id="c1"),
            JobFinished(job="2", exit_code=5),
            JobFinished(job="1", exit_code=None),
        ]

    work(kind, tmp_path, body)


def test_waiting_for_a_job_ends_with_it(tmp_path):
    async def body(workspace):
        hand = Hand(workspace)
        await hand.use(ShellTool(), command="sleep 0.3; echo done", background=True)
        waiting = asyncio.create_task(hand.use(ShellOutputTool(), job="1", wait=60))
        await hand.context.workspace.jobs["1"].wait()
        # Its end wakes who waits for it, in less than the rest of the 60 seconds.
        said = await asyncio.wait_for(waiting, 30)
        assert said.output == "done\n[job 1 ended with status 0]"

    work("host", tmp_path, body)


def test_a_summary_is_one_line():
    tool = ShellTool()
    assert (
        tool.summary({"command": "\nmake all\nmake test", "background": True}) == "$ make all ... &"
    )
    assert tool.paths({"command": "x", "path": "y"}) == ()
