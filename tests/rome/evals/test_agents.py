"""Agents in real sandboxes: the reference solution earns 1, nobody and cheats earn 0, and what no
agent did is no agent's failure.
"""

import asyncio
import dataclasses

import pytest

from envs.gem import format_tool_call
from envs.rock import AgentFault, SandboxError
from envs.sources import load_tasks
from envs.tasks.terminal.shell import ShellEnv
from rome.agent.loop import Limits
from rome.engine.errors import EngineError
from rome.evals.agents import Scripted
from rome.evals.cheats import CHEATS
from rome.evals.policy import Policy
from tests.rome.evals.tasks import CONFIG, write_task
from tests.rome.rollout.worlds import CHAT, ScriptedEngine

LIMITS = Limits(max_context=2000, max_new_tokens=200, episode_seconds=30.0)


def play(agent, task, attempt=0):
    return asyncio.run(agent.play(task, attempt, seed=1))


def scripted(name):
    return Scripted(name, CONFIG)


@pytest.fixture(scope="module")
def played():
    """(agent, attempt, task) -> outcome, of a terminal family and two examples, one of them in two
    steps; side by side.
    """
    tasks = [
        *load_tasks("terminal:git_merge"),
        *load_tasks("harbor/tidy-downloads"),
        *load_tasks("harbor/inventory-steps"),
    ]
    jobs = [
        (name, attempt, task)
        for task in tasks
        for name, attempts in (("oracle", 1), ("noop", 1), ("cheat", len(CHEATS)))
        for attempt in range(attempts)
    ]

    async def everything():
        gate = asyncio.Semaphore(4)

        async def one(name, attempt, task):
            async with gate:
                return await scripted(name).play(task, attempt, 0)

        return await asyncio.gather(*(one(*job) for job in jobs))

    return {
        (name, attempt, task.name): outcome
        for (name, attempt, task), outcome in zip(jobs, asyncio.run(everything()), strict=True)
    }


@pytest.mark.parametrize(
    "agent, reward, ending",
    [("oracle", 1.0, "success"), ("noop", 0.0, "failure"), ("cheat", 0.0, "failure")],
)
def test_what_each_scripted_agent_earns(played, agent, reward, ending):
    found = {
        key: (outcome.reward, outcome.ending) for key, outcome in played.items() if key[0] == agent
    }
    assert len(found) == (12 if agent == "cheat" else 3) and set(found.values()) == {
        (reward, ending)
    }, found


def test_every_trick_is_played_and_named(played):
    notes = {
        outcome.note
        for (agent, _, task), outcome in played.items()
        if agent == "cheat" and task == "tidy-downloads"
    }
    assert {note.split(";")[0] for note in notes} == {f"trick: {name}" for name in CHEATS}


def test_a_policy_plays_a_task_folder_and_its_tokens_are_counted(tmp_path):
    write_task(tmp_path, "task")
    (task,) = load_tasks(str(tmp_path))
    engine = ScriptedEngine([format_tool_call("bash", {"command": "echo hello > out.txt"}), "done"])
    outcome = play(Policy(engine, CHAT, LIMITS, CONFIG), task)
    assert (outcome.reward, outcome.ending, outcome.turns) == (1.0, "success", 2)
    asked = engine.requests[-1][0]
    assert sum(outcome.tokens.values()) == len(asked) + len(CHAT.turn("done")) and outcome.tokens[
        "completion"
    ] == sum(len(CHAT.turn(turn)) for turn in engine.turns)


WRITES = format_tool_call("bash", {"command": "echo hello > out.txt"})
SLEEPS = format_tool_call("bash", {"command": "sleep 600"})


@pytest.mark.long
@pytest.mark.parametrize(
    "turns, changes, ending",
    [
        ([WRITES, "done"], {}, "success"),
        ([WRITES, "word " * 300], {"max_new_tokens": 60}, "truncated_tokens"),
        ([WRITES] * 50, {"max_context": 260}, "truncated_tokens"),
        ([WRITES, SLEEPS], {"episode_seconds": 3.0}, "timeout"),
        ([WRITES] * 50, {"max_context": 20_000}, "truncated_turns"),
    ],
    ids=["handed in", "turn", "context", "time", "turns"],
)
def test_the_same_finished_file_earns_1_whatever_ended_the_attempt(
    tmp_path, turns, changes, ending
):
    write_task(tmp_path, "task")
    engine = ScriptedEngine(turns)
    original = engine.generate

    async def generate(input_ids, sampling, *args, **options):
        completion = await original(input_ids, sampling, *args, **options)
        if len(completion.output_ids) > sampling.max_new_tokens:
            completion.finish_reason = "length"
        return completion

    engine.generate = generate
    limits = dataclasses.replace(LIMITS, **changes)
    outcome = play(Policy(engine, CHAT, limits, CONFIG), *load_tasks(str(tmp_path)))
    assert (outcome.reward, outcome.ending) == (1.0, ending)


def test_a_dead_engine_spoils_the_attempt(tmp_path):
    write_task(tmp_path, "task")
    outcome = play(
        Policy(ScriptedEngine([], error=EngineError("nobody there")), CHAT, LIMITS, CONFIG),
        *load_tasks(str(tmp_path)),
    )
    assert (outcome.reward, outcome.ending, outcome.note) == (None, "infra_engine", "nobody there")


def test_what_the_backend_cannot_build_is_no_ones_failure_and_names_its_file(tmp_path):
    write_task(
        tmp_path,
        "task",
        dockerfile=(
            "FROM ubuntu:24.04\nFROM scratch\nWORKDIR /app\nHEALTHCHECK CMD true\nVOLUME /x\nRUN"
            " apt-get install -y cowsay\n"
        ),
    )
    outcome = play(scripted("noop"), *load_tasks(str(tmp_path)))
    assert (
        outcome.reward is None
        and outcome.ending == "infra_sandbox"
        and outcome.permanent
        and "Dockerfile" in outcome.note
    )


@pytest.mark.parametrize("closes", [True, False])
def test_what_an_agent_did_to_its_sandbox_is_its_failure(monkeypatch, closes):
    async def step(self, action):
        raise AgentFault("2 processes survived SIGKILL for 10 s")

    async def close(self):
        await original(self)
        if not closes:
            raise SandboxError("the sandbox did not end within 30 s")

    original = ShellEnv.aclose
    monkeypatch.setattr(ShellEnv, "astep", step)
    monkeypatch.setattr(ShellEnv, "aclose", close)
    monkeypatch.setattr("envs.tasks.terminal.env.TerminalEnv.areset", areset_without_a_sandbox)
    outcome = play(scripted("noop"), *load_tasks("terminal:count:1"))
    assert (outcome.reward, outcome.ending) == (0.0, "failure") and "survived" in outcome.note


async def areset_without_a_sandbox(self, seed=None):
    return "instruction", {}


def test_a_build_step_that_fails_may_be_tried_again(tmp_path):
    write_task(tmp_path, "task", dockerfile="FROM ubuntu:24.04\nWORKDIR /app\nRUN exit 3\n")
    outcome = play(scripted("noop"), *load_tasks(str(tmp_path)))
    assert outcome.spoiled and not outcome.permanent and "Dockerfile:3" in outcome.note


def test_a_task_without_a_reference_solution_gives_the_oracle_no_reward(tmp_path):
    write_task(tmp_path, "task", solve=None)
    outcome = play(scripted("oracle"), *load_tasks(str(tmp_path)))
    assert outcome.reward is None and outcome.permanent and "no reference solution" in outcome.note


def test_a_wrong_reference_solution_is_a_failure_that_says_why(tmp_path):
    write_task(tmp_path, "task", solve="echo wrong > /app/out.txt\necho oops >&2\nexit 7\n")
    outcome = play(scripted("oracle"), *load_tasks(str(tmp_path)))
    assert (
        (outcome.reward, outcome.ending) == (0.0, "failure")
        and "exit 7" in outcome.note
        and "oops" in outcome.note
    )
