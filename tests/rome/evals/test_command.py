"""A model behind an agent that knows nothing of it: a command in the sandbox of each task."""

import asyncio
import dataclasses

import pytest

from envs.gem import format_tool_call
from envs.rock import SandboxConfig, probe
from envs.sources import load_tasks
from rome.agent.command import CommandAgent
from rome.agent.loop import Limits
from rome.data.trajectory import load_trajectory
from rome.engine.errors import EngineError
from rome.evals.command import ForwardedCommand
from rome.evals.policy import Policy, files_digest
from rome.evals.runner import Job, play
from tests.paths import ROOT
from tests.rome.agent.test_dialogue import CHAT, Scripted
from tests.rome.agent.test_forward import Outside, forwarding, says
from tests.rome.evals.tasks import write_task

CONFIG = SandboxConfig(isolation="best_available", tier="namespaces", disk_mb=16)
LIMITS = Limits(max_context=4000, max_new_tokens=500, episode_seconds=60.0)
OUTSIDE = CommandAgent("python3 $AGENT_FILES/outside_agent.py", str(ROOT / "examples/agents"))
SOLVES = format_tool_call("bash", {"command": "echo hello > out.txt"})


@pytest.fixture
def task(tmp_path):
    if probe(tier="namespaces").tier is None:
        pytest.skip("no namespaces tier here")
    write_task(tmp_path, "task")
    return load_tasks(str(tmp_path))[0]


def policy(engine, command):
    return Policy(engine, CHAT, LIMITS, CONFIG, command=command, name="command")


def play_one(task, engine, command, kept=None):
    job = Job(policy(engine, command), task, attempt=0)
    return asyncio.run(asyncio.wait_for(play(job, 5, kept), 120))


def test_an_outside_agent_is_evaluated_and_its_record_kept(task, tmp_path):
    engine = Scripted(SOLVES, "done")
    record = play_one(task, engine, OUTSIDE, tmp_path / "attempts")
    assert (record["reward"], record["ending"], record["agent"]) == (1.0, "success", "command")
    assert record["turns"] == len(engine.requests) == 2 and record["tries"] == 1
    kept = load_trajectory(tmp_path / record["transcript"])
    assert kept.task == task.name and kept.reward == 1.0
    assert [chunk.kind for chunk in kept.chunks] == ["rl", "rl"]
    first, second = kept.chunks
    assert first.prompt_ids == engine.requests[0][0]
    assert first.prompt_ids + first.action_ids + second.prompt_ids == engine.requests[1][0]
    assert record["tokens"]["completion"] == len(first.action_ids) + len(second.action_ids)


def test_calls_that_begin_anew_are_branches_of_the_transcript(task, tmp_path):
    ask = (
        'ask() { curl -s $OPENAI_BASE_URL/chat/completions -d "{\\"messages\\": '
        '[{\\"role\\": \\"system\\", \\"content\\": \\"$1\\"},'
        ' {\\"role\\": \\"user\\", \\"content\\": \\"go\\"}]}"; }\n'
    )
    command = CommandAgent(f"{ask}ask main; ask helper; echo hello > out.txt")
    record = play_one(task, Scripted("one", "two"), command, tmp_path / "attempts")
    assert record["reward"] == 1.0, record
    kept = load_trajectory(tmp_path / record["transcript"])
    assert [chunk.edge for chunk in kept.chunks] == ["continuation", "subagent"]
    assert len(kept.lines()) == 2


def test_an_engine_that_fails_is_tried_again_with_another_seed(task):
    engine = Scripted(EngineError("gone"), SOLVES, "done")
    record = play_one(task, engine, OUTSIDE)
    assert (record["reward"], record["ending"], record["tries"]) == (1.0, "success", 2)
    seeds = [sampling.seed for _, sampling in engine.requests]
    assert seeds[0] != seeds[1] and engine.requests[0][0] == engine.requests[1][0]


def test_a_task_that_cannot_start_is_the_infrastructures_and_is_not_tried_again(tmp_path):
    write_task(tmp_path, "task", dockerfile="FROM registry.example/base:7\nWORKDIR /app\n")
    (task,) = load_tasks(str(tmp_path))
    record = play_one(task, Scripted(), OUTSIDE)
    assert (record["reward"], record["ending"], record["tries"]) == (None, "infra_sandbox", 1)
    assert "registry.example/base:7" in record["note"] and record["permanent"]


def test_the_agents_own_time_ends_it_and_its_work_is_judged(task):
    agent = policy(Scripted(), CommandAgent("echo hello > out.txt; while :; do :; done"))
    agent.limits = dataclasses.replace(LIMITS, episode_seconds=3.0)
    outcome = asyncio.run(asyncio.wait_for(agent.play(task, 0, seed=5), 120))
    assert (outcome.reward, outcome.ending) == (1.0, "timeout")
    assert "its time is over" in outcome.note


def play_forwarded(task, *answers, kept=None):
    """The record of an attempt whose calls an outside API answers, and that API."""
    outside = Outside(*answers)

    async def steps():
        async with forwarding(outside) as dialogue:
            endpoint = dialogue.endpoint
            agent = ForwardedCommand(endpoint, CHAT, OUTSIDE, LIMITS, CONFIG, temperature=0.5)
            return await play(Job(agent, task, attempt=0), 5, kept)

    return asyncio.run(asyncio.wait_for(steps(), 120)), outside


def test_an_outside_model_behind_an_outside_agent_leaves_the_same_kind_of_record(task, tmp_path):
    call = ("bash", '{"command": "echo hello > out.txt"}')
    answers = (says(None, call, reason="tool_calls"), says("done"))
    record, outside = play_forwarded(task, *answers, kept=tmp_path / "attempts")
    assert (record["reward"], record["ending"], record["turns"]) == (1.0, "success", 2), record
    assert record["tokens"] == {"prompt": 20, "completion": 6}  # as it bills them
    assert [body["temperature"] for body in outside.bodies] == [0.5, 0.5]
    kept = load_trajectory(tmp_path / record["transcript"])
    assert [chunk.kind for chunk in kept.chunks] == ["context", "context"]
    assert kept.chunks[0].tool_call["arguments"] == {"command": "echo hello > out.txt"}


def test_a_key_that_is_refused_spoils_the_attempt_for_good(task):
    record, outside = play_forwarded(task, (401, {"error": "no such key"}))
    assert (record["reward"], record["ending"], record["tries"]) == (None, "infra_engine", 1)
    assert record["permanent"] and len(outside.bodies) == 1


def test_a_digest_of_files_follows_their_names_modes_and_content(tmp_path):
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "agent.py"
    file.write_text("one")
    seen = {files_digest(tmp_path)}
    file.write_text("two")
    seen.add(files_digest(tmp_path))
    file.chmod(0o755)
    seen.add(files_digest(tmp_path))
    file.rename(tmp_path / "agent.py")
    seen.add(files_digest(tmp_path))
    (tmp_path / "link").symlink_to("agent.py")
    seen.add(files_digest(tmp_path))
    assert len(seen) == 5
