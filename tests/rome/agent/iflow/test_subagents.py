"""Sub-agents have contexts, files and limits of their own; each that starts also finishes."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from rome.agent.iflow import events as ev
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.limits import Limits
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.specs.agent_specs import GENERAL, AgentSpec
from rome.agent.iflow.subagents import TaskTool, tools_for
from rome.agent.iflow.tools.base import ToolContext, ToolError
from tests.paths import ROOT
from tests.rome.agent.iflow.doubles import Folder, Note, ScriptedModel, calls
from tests.rome.agent.iflow.scripted import Say
from tests.rome.agent.iflow.whole import Whole

SPECS = {
    GENERAL.name: GENERAL,
    "reader": AgentSpec("reader", "reads", "You read.", tools=("note",)),
}


def task(prompt, **more):
    return ("task", {"prompt": prompt, "agent": "general", **more})


class Team:
    """A main agent whose sub-agents have models of their own."""

    def __init__(self, main, *children, folder="", limits=None, max_parallel=4):
        self.folder = str(folder)
        self.log = EventLog(folder / "events.jsonl" if folder else None)
        self.children = list(children)
        self.models, self.limits, self.births = [], limits or Limits(), []
        self.note = Note(is_parallel=True)
        self.agent = Agent(
            ScriptedModel(*main),
            [self.note],
            self.log,
            Folder(),
            session="main",
            session_folder=self.folder,
        )
        self.tool = TaskTool(SPECS, self.make, notify=self.agent.notify, max_parallel=max_parallel)
        self.agent.tools["task"] = self.tool

    def make(self, birth):
        script = self.children.pop(0)
        if isinstance(script, Exception):
            raise script
        model = ScriptedModel(*script)
        self.models.append(model)
        self.births.append(birth)
        return Agent(
            model,
            tools_for(birth.spec, [self.note]),
            birth.log,
            Folder(),
            system=birth.spec.prompt,
            session=birth.id,
            session_folder=birth.folder,
            agent=birth.spec.name,
            parent="main",
            limits=self.limits,
        )

    def run(self, text="go"):
        return asyncio.run(asyncio.wait_for(self.agent.run(text), 60))

    def of(self, kind):
        return [event for event in self.log.events if isinstance(event, kind)]

    def results(self):
        return [event.output for event in self.of(ev.ToolFinished)]

    def check_ends(self):
        started = [event.id for event in self.of(ev.SubagentStarted)]
        finished = [event.id for event in self.of(ev.SubagentFinished)]
        assert sorted(started) == sorted(finished)
        return self.of(ev.SubagentFinished)


def test_a_sub_agent_has_a_context_and_an_answer_of_its_own():
    team = Team(
        [calls(task("look into it")), "done"], [calls(("note", {"text": "x"})), "two files"]
    )
    assert team.run().outcome == "finished"
    (finished,) = team.check_ends()
    assert (finished.outcome, finished.result) == ("finished", "two files")
    assert team.results() == ["two files\n[sub-agent general-1]"]
    shown = [message.content for message in team.models[0].asked[0]]
    assert shown[0].startswith("You carry out") and shown[1:] == ["look into it"]
    assert team.models[0].edges[0] == "subagent"
    assert finished.usage.prompt == 20 and team.agent.conversation.turn_usage.prompt == 40


def test_it_is_taken_up_again_by_its_id_with_all_that_it_knew(tmp_path):
    main = [calls(task("first")), calls(task("second", id="general-1")), "done"]
    team = Team(main, ["one"], ["two"], folder=tmp_path)
    team.run()
    texts = [message.content for message in team.models[1].asked[0]]
    assert texts[1:] == ["first", "one", "second"]
    assert [event.id for event in team.check_ends()] == ["general-1", "general-1"]
    path = tmp_path / "subagents" / "general-1" / "events.jsonl"
    starts = [e for e in EventLog(path).events if isinstance(e, ev.SessionStarted)]
    assert [start.resumed for start in starts] == [False, True]
    assert {(start.agent, start.parent) for start in starts} == {("general", "main")}
    assert path.stat().st_size < 4000, "the parent's events are not in it"


def test_several_work_at_once_but_not_more_than_allowed():
    children = [[calls(("note", {"text": str(n), "wait": 0.05})), f"n{n}"] for n in range(6)]
    team = Team([calls(*(task(f"t{n}") for n in range(6))), "done"], *children, max_parallel=2)
    team.run()
    assert len(team.check_ends()) == 6 and team.note.most_running == 2
    assert [result.split("\n")[0] for result in team.results()] == [f"n{n}" for n in range(6)]


def test_in_the_background_the_agent_goes_on_and_is_told_later():
    slow = [calls(("note", {"text": "slow", "wait": 0.1})), "found it"]
    main = [
        calls(task("search", background=True)),
        calls(("note", {"text": "own"})),
        "wait",
        "done",
    ]
    team = Team(main, slow)
    assert team.run().outcome == "finished"
    assert team.note.seen == ["own", "slow"]
    assert "works in the background" in team.results()[0]
    (told,) = [e for e in team.of(ev.UserMessage) if e.source == "notification"]
    assert "found it" in told.text and "general-1" in told.text
    (finished,) = team.check_ends()
    assert finished.number < told.number
    assert "found it" in team.agent.model.asked[-1][-1].content


def test_what_is_in_the_background_ends_with_the_tool():
    async def work():
        team = Team(
            [calls(task("a", background=True), task("b", background=True)), "bye"],
            [calls(("note", {"text": "x", "wait": 30}))],
            [calls(("note", {"text": "x", "wait": 30}))],
        )
        team.agent.desk.is_attended = True  # else the agent waits for them
        await team.agent.run("go")
        assert not team.of(ev.SubagentFinished)
        await team.tool.aclose()
        return team

    assert [event.outcome for event in asyncio.run(work()).check_ends()] == ["aborted"] * 2


@pytest.mark.parametrize(
    ("child", "outcome", "says"),
    [
        (ZeroDivisionError("a bug"), "infrastructure", "ZeroDivisionError"),
        ([ModelError("no endpoint")], "infrastructure", "no endpoint"),
        ([calls(("note", {"text": "on"}))], "limit", "3 turns"),
        ([""], "finished", "without a word"),
    ],
)
def test_a_sub_agent_that_fails_is_a_result_and_the_agent_goes_on(child, outcome, says):
    limits = Limits(turns=3)
    team = Team([calls(task("try")), "done"], child, limits=limits)
    assert team.run().outcome == "finished"
    (finished,) = team.check_ends()
    assert finished.outcome == outcome and says in team.results()[0]


def test_a_cancelled_agent_cancels_its_sub_agents_at_once():
    async def work():
        endless = [calls(("note", {"text": "x", "wait": 600}))]  # none ends in this test's time
        team = Team(
            [calls(task("a"), task("b"), task("c")), "done"], *[endless] * 3, max_parallel=2
        )
        running = asyncio.create_task(team.agent.run("go"))
        while len(team.births) < 2:
            await asyncio.sleep(0.01)
        team.agent.cancel()
        assert (await running).outcome == "aborted"
        return team

    team = asyncio.run(asyncio.wait_for(work(), 60))
    assert {event.outcome for event in team.check_ends()} == {"aborted"}
    assert len(team.results()) == 3, "each call has its result"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"agent": "painter"}, "no sub-agent 'painter'; choose one of general, reader"),
        ({"id": "general-9"}, "no sub-agent 'general-9' in this session"),
        ({"id": "../../etc"}, "no sub-agent"),
        ({}, "choose one of"),
    ],
)
def test_what_cannot_be_is_said_to_the_model(tmp_path, arguments, words):
    tool = TaskTool(SPECS, lambda birth: None)
    call = ev.ToolCall("c", "task", "{}")
    context = ToolContext(call, Folder(), lambda event: event, None, str(tmp_path))
    with pytest.raises(ToolError, match=words):
        asyncio.run(tool.run({"prompt": "x", **arguments}, context))
    with pytest.raises(ToolError, match="background"):
        asyncio.run(tool.run({"prompt": "x", "agent": "general", "background": True}, context))


def test_a_kind_names_the_tools_that_it_has():
    tools = [Note("note"), Note("db__read"), Note("db__write")]
    spec = AgentSpec("s", "w", "p", tools=("db__*",))
    assert [tool.name for tool in tools_for(spec, tools)] == ["db__read", "db__write"]


def test_sub_agents_share_what_is_left_of_the_turn(tmp_path):
    """Each looks before it asks, so at most one answer of each is over the limit."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 10}

    def answer(messages):
        if messages[1]["content"] == "child":
            return Say(calls=[("shell", {"command": f"echo {len(messages)}"})], usage=usage)
        return Say(calls=[("task", {"prompt": "child"})] * 4, usage=usage)

    played = Whole(tmp_path).play(answer, limits=Limits(tokens=10_000))
    (end,) = played.ends
    assert end.outcome == "limit" and "10000 tokens is reached" in end.reason
    assert 10_000 <= end.usage.prompt + end.usage.completion <= 10_000 + 4 * 1010
    assert len(played.of(ev.SubagentFinished)) == 4


PROGRAM = """
import asyncio, pathlib, sys
from tests.rome.agent.iflow.test_subagents import Team, task
from tests.rome.agent.iflow.doubles import calls
note = calls(("note", {"text": "x", "wait": 0.02}))
team = Team([calls(*(task(f"t{n}") for n in range(3))), "done"], *[[note] * 400] * 3,
            folder=pathlib.Path(sys.argv[1]))
print("ready", flush=True)
asyncio.run(team.agent.run("go"))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_sub_agents_that_finish_and_go_on(tmp_path):
    rng = random.Random(3)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env=environment, cwd=ROOT
        ) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.02, 0.5))
            process.send_signal(signal.SIGKILL)
        team = Team([calls(task("go on", id="general-1")), "done"], ["resumed"], folder=folder)
        team.run("")  # within its deadline
        team.check_ends()
        if (folder / "subagents" / "general-1").exists():
            assert "resumed" in team.results()[-1]


def test_what_a_sub_agent_used_counts_though_it_was_cancelled_or_failed():
    team = Team([calls(task("wait"))], [calls(("note", {"text": "x", "wait": 600}))])

    async def play():
        turn = asyncio.create_task(team.agent.run("go"))
        while not team.note.running:
            await asyncio.sleep(0.01)
        team.agent.cancel()
        return await turn

    assert asyncio.run(asyncio.wait_for(play(), 60)).outcome == "aborted"
    (finished,) = team.check_ends()
    assert finished.usage.prompt == 10 and team.agent.conversation.usage.prompt == 20
