"""Episodes of the iFlow agent: the plain loop's record where both do the same, and branches where
it summarises or has sub-agents.
"""

import asyncio
import dataclasses
import random

import pytest

from envs.gem import format_tool_call
from envs.gem.episode import play_demonstration
from envs.rock import AgentFault, SandboxConfig, SandboxError
from envs.sources import load_tasks
from envs.tasks.terminal import make_task
from envs.tasks.terminal.env import TerminalEnv
from rome.agent.iflow.episode import IFlowAgent, IFlowError, run_iflow_episode
from rome.agent.iflow.specs.agent_specs import AgentSpec
from rome.agent.loop import Limits, run_episode
from rome.agent.replay import Replay
from rome.data.batch import RL
from rome.data.packing import pack
from rome.data.trajectory import from_atif, to_atif
from rome.data.tree import ROOT, credits_of, resolve_parents
from rome.engine.completion import Completion
from rome.engine.errors import EngineError
from rome.evals.policy import Policy
from tests.rome.agent.test_dialogue import CHAT, Scripted
from tests.rome.rollout.worlds import EchoEnv

LIMITS = Limits(max_context=4000, max_new_tokens=500, episode_seconds=60.0)
BASH = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}


def bash(command):
    return format_tool_call("bash", {"command": command})


def task(prompt, **more):
    return format_tool_call("task", {"prompt": prompt, **more})


def terminal():
    config = SandboxConfig(isolation="best_available", disk_mb=16)
    return TerminalEnv(make_task("count", 3), config)


class Told(EchoEnv):
    """An echo with a system text and a tool."""

    system = "You echo."
    tools = (BASH,)


def play(engine, env, agent=None, limits=LIMITS, **options):
    agent = agent or IFlowAgent()
    episode = run_iflow_episode(engine, env, CHAT, limits, agent, seed=7, **options)
    return asyncio.run(asyncio.wait_for(episode, 120))


def play_plain(engine, env, limits=LIMITS, **options):
    return asyncio.run(run_episode(engine, env, CHAT, limits, seed=7, **options))


def record(trajectory):
    """All that an episode's record has, apart from the time that it took."""
    trajectory.seconds = 0.0
    document = to_atif(trajectory)
    seen = [(chunk.status, chunk.exit_code, chunk.tool_call) for chunk in trajectory.chunks]
    return document, seen, [chunk.logprobs for chunk in trajectory.chunks]


def check_trained_once(trajectory):
    batch = pack([trajectory], row_length=20_000, chunks_per_row=64, gamma=1.0, failure_reward=0.0)
    trained = batch.tokens_BT[batch.kind_BT() == RL]
    sampled = [token for chunk in trajectory.chunks for token in chunk.action_ids]
    assert sorted(trained.tolist()) == sorted(sampled)


SHELL_TURNS = (
    "<think>\nlook\n</think>\n\n" + bash("cat list.txt | head -2; false"),
    "<tool_call>\n{broken\n</tool_call>",
    bash("ls") + bash("pwd"),
    "first " + bash("grep -c rain list.txt > out.txt"),
    format_tool_call("nothing", {}),
    "done",
)


@pytest.mark.parametrize("tell_tools", [False, True])
def test_iflow_and_the_plain_loop_make_the_same_record_in_a_shell(tell_tools):
    engines = Scripted(*SHELL_TURNS), Scripted(*SHELL_TURNS)
    ours = play(engines[0], terminal(), tell_tools=tell_tools)
    theirs = play_plain(engines[1], terminal(), tell_tools=tell_tools)
    assert (ours.ending, ours.reward) == ("success", 1.0), ours.note
    assert record(ours) == record(theirs)
    assert engines[0].requests == engines[1].requests, "ids, seeds and settings of each request"


def test_a_record_of_the_plain_loop_answers_the_agent_to_its_end():
    plain = play_plain(Scripted(*SHELL_TURNS), terminal(), tell_tools=True)
    replay = Replay(plain.chunks, CHAT.tokenizer.turn_ends)
    ours = play(replay, terminal(), tell_tools=True)
    assert replay.left == 0 and record(ours) == record(plain)


@pytest.mark.parametrize("source", ["games:all:4", "worlds:all:2", "problems:all:2"])
def test_iflow_plays_any_source_as_the_plain_loop_does(source):
    """Solutions that make calls, talk to a user, move in a game, or only answer."""
    for task in load_tasks(source, 0):
        config = SandboxConfig(isolation="best_available")
        shown = asyncio.run(play_demonstration(task.make_env(config), random.Random(1)))
        turns = [turn.text for turn in shown.turns]
        limits = dataclasses.replace(LIMITS, max_context=60_000, max_new_tokens=2000)
        ours, theirs = (
            player(Scripted(*turns), task.make_env(config), limits=limits, tell_tools=True)
            for player in (play, play_plain)
        )
        assert ours.ending == shown.ending == "success", (task.name, ours.note)
        assert record(ours) == record(theirs), task.name


@pytest.mark.slow
@pytest.mark.parametrize("place", range(12))
def test_the_shipped_harbor_tasks_are_solved_through_the_agent(place):
    """As `launch.eval --dataset harbor --agent iflow` plays them, with the solutions as script."""
    tasks = load_tasks("harbor", 0)
    assert len(tasks) == 12, "each shipped task has a place here"
    config = SandboxConfig(isolation="best_available")
    shown = asyncio.run(play_demonstration(tasks[place].make_env(config), random.Random(1)))
    turns = [turn.text for turn in shown.turns]
    limits = dataclasses.replace(LIMITS, max_context=60_000, max_new_tokens=6000)
    ours = played_by(Scripted(*turns), limits, config, tasks[place])
    theirs = played_by(Scripted(*turns), limits, config, tasks[place], iflow=None)
    assert (ours.reward, ours.ending) == (1.0, "success"), ours.note
    assert (theirs.reward, theirs.ending) == (1.0, "success"), theirs.note
    assert ours.turns == theirs.turns and ours.tokens == theirs.tokens
    if place == 0:
        given_up = played_by(Scripted("done"), limits, config, tasks[place])
        assert given_up.reward == 0.0


def played_by(engine, limits, config, task, iflow=IFlowAgent()):  # noqa: B008 - it is frozen
    """Return the outcome of an attempt at a task."""
    policy = Policy(engine, CHAT, limits, config, tell_tools=True, iflow=iflow)
    return asyncio.run(asyncio.wait_for(policy.play(task, 0, seed=5), 240))


@pytest.mark.parametrize("seed", range(12))
def test_both_agree_whatever_the_policy_says(seed):
    """Words, calls, broken calls, other ends, cut answers, full contexts, slow worlds, faults."""
    rng = random.Random(seed)
    says = ["red", bash("x"), "<tool_call>{", "<think>never ended", bash("a") + bash("b"), "  ", ""]
    turns = [rng.choice(says) for _ in range(rng.randrange(1, 12))] + ["done"]
    if rng.random() < 0.2:
        turns.insert(rng.randrange(len(turns)), EngineError("gone"))
    end = rng.choice([CHAT.tokenizer.im_end] * 2 + [CHAT.tokenizer.pad])
    limits = dataclasses.replace(LIMITS, max_context=rng.choice([4000, 200]))
    records = []
    for player in (play, play_plain):
        engine = Scripted(*turns, end=end)
        records.append((record(player(engine, Told("copy/1"), limits=limits)), engine.requests))
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("engine", "env", "limits"),
    [
        ({"finish_reason": "length"}, {}, {}),
        ({}, {"delay": 0.3}, {"episode_seconds": 0.05}),
        ({}, {"ending": "infra_verifier"}, {}),
        ({}, {}, {"max_context": 60}),
    ],
)
def test_both_end_alike_at_each_limit(engine, env, limits):
    limits = dataclasses.replace(LIMITS, **limits)
    records = []
    for player in (play, play_plain):
        trajectory = player(
            Scripted(*["red"] * 9, "done", **engine), EchoEnv("c/1", **env), limits=limits
        )
        records.append(record(trajectory))
    assert records[0] == records[1]


class Watched(EchoEnv):
    """Reports harm in the turns that say blue, and judges the whole at the end."""

    async def astep(self, action):
        observation, reward, terminated, truncated, info = await super().astep(action)
        info["safety_events"] = ["mining"] if "blue" in action else []
        info["safety"] = {"harm": 1.0}
        return observation, reward, terminated, truncated, info


def test_both_record_the_harm_that_the_environment_reports():
    for player in (play, play_plain):
        trajectory = player(Scripted("red", "blue", "done"), Watched("copy/1"))
        assert [chunk.events for chunk in trajectory.chunks] == [[], ["mining"], []]
        assert trajectory.safety == {"harm": 1.0}


class Failing(EchoEnv):
    def __init__(self, fault):
        super().__init__("copy/1")
        self.fault = fault

    async def astep(self, action):
        raise self.fault


@pytest.mark.parametrize(
    ("fault", "ending"),
    [(SandboxError("gone"), "infra_sandbox"), (AgentFault("full"), "failure")],
)
@pytest.mark.parametrize("says", ["red", task("look")])
def test_what_the_environment_meets_is_the_ending_also_in_a_sub_agent(fault, ending, says):
    agent = IFlowAgent(tools=("task",))
    turns = [says, bash("x"), "red", "red"]
    trajectory = play(Scripted(*turns), Failing(fault), agent, tell_tools=True)
    assert trajectory.ending == ending and str(fault) in trajectory.note
    assert trajectory.chunks and trajectory.reward == 0.0


def test_a_call_that_goes_on_for_long_is_no_circle_that_ends_the_episode():
    """What the guard of production would say is not the environment's word."""
    env = EchoEnv("copy/1")
    trajectory = play(Scripted(*[bash("x")] * 12, "done"), env)
    assert trajectory.ending == "success" and len(trajectory.chunks) == 13


class Speaking:
    """An engine that answers by what its context says; counts what it was asked."""

    def __init__(self, say):
        self.say, self.requests = say, []

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None):
        self.requests.append(list(input_ids))
        said = self.say(CHAT.tokenizer.decode(input_ids), len(self.requests))
        if isinstance(said, Exception):
            raise said
        ids = CHAT.turn(said)
        return Completion(ids, [-0.5] * len(ids), "stop", [(1, 0, len(ids))])


def test_a_compaction_is_a_branch_and_every_token_is_trained_once():
    def say(context, number):
        if "Your context is nearly full" in context[-900:]:
            return "I counted on."
        return f"step {number} {'so ' * 60}" if number < 16 else "done"

    engine = Speaking(say)
    limits = dataclasses.replace(LIMITS, max_context=1500)
    trajectory = play(engine, EchoEnv("copy/1"), IFlowAgent(compaction=0.7), limits)
    assert trajectory.ending == "success", trajectory.note
    edges = [chunk.edge for chunk in trajectory.chunks]
    parents = resolve_parents([chunk.parent for chunk in trajectory.chunks])
    compactions = [n for n, edge in enumerate(edges) if edge == "compaction"]
    assert len(compactions) >= 2 and set(edges) == {"continuation", "compaction"}
    for number in compactions:
        assert parents[number] == ROOT
        prompt = CHAT.tokenizer.decode(trajectory.chunks[number].prompt_ids)
        assert "say it" in prompt and "I counted on." in prompt
        assert trajectory.chunks[number - 1].text == "I counted on.", "the summary is trained too"
    assert all(len(ids) < 1500 for ids in engine.requests)
    check_trained_once(trajectory)
    weights = credits_of(parents, edges, {"compaction": 0.5})
    assert weights[0] == 1.0 and weights[compactions[0]] == 0.5
    again = from_atif(to_atif(trajectory))
    assert [chunk.edge for chunk in again.chunks] == edges


def test_without_compaction_a_full_context_is_judged():
    engine = Speaking(lambda context, number: "so " * 60)
    limits = dataclasses.replace(LIMITS, max_context=600)
    assert play(engine, EchoEnv("copy/1"), limits=limits).ending == "truncated_tokens"


def test_a_sub_agent_works_in_the_same_environment_in_a_context_of_its_own():
    def say(context, number):
        if "You carry out" in context:
            return bash("look") if "echo" not in context else "there are two"
        return "done" if "there are two" in context else task("count the files", agent="general")

    engine = Speaking(say)
    env = Told("copy/1")
    trajectory = play(engine, env, IFlowAgent(tools=("task",)), tell_tools=True)
    assert trajectory.ending == "success", trajectory.note
    chunks = trajectory.chunks
    assert [chunk.edge for chunk in chunks] == [
        "continuation", "subagent", "continuation", "continuation",
    ]  # fmt: skip
    assert resolve_parents([chunk.parent for chunk in chunks]) == [ROOT, ROOT, 1, 0]
    assert "echo" in chunks[1].observation and "there are two" in chunks[0].observation
    assert "You echo." in CHAT.tokenizer.decode(chunks[0].prompt_ids)
    check_trained_once(trajectory)


def test_the_agents_own_tools_take_no_turn_of_the_environment():
    todo = format_tool_call("todo", {"items": [{"text": "echo red"}]})
    mixed = todo + bash("x")  # the environment's business: it may refuse two calls in one turn

    class Counting(Told):
        turns = 0

        async def astep(self, action):
            self.turns += 1
            return await super().astep(action)

    env = Counting("copy/1")
    turns = [todo, "red", mixed, todo, "done"]
    trajectory = play(Scripted(*turns), env, IFlowAgent(tools=("todo",)), tell_tools=True)
    assert trajectory.ending == "success" and env.turns == 3 and len(trajectory.chunks) == 5
    assert trajectory.chunks[0].observation == "[ ] echo red"
    assert "echo <tool_call>" in trajectory.chunks[2].observation
    assert {chunk.edge for chunk in trajectory.chunks} == {"continuation"}
    check_trained_once(trajectory)


def test_sub_agents_work_beside_each_other_and_share_the_turns_of_the_environment():
    class Alone(Told):
        inside = 0

        async def astep(self, action):
            self.inside += 1
            assert self.inside == 1, "two turns at once"
            result = await super().astep(action)
            await asyncio.sleep(0.01)
            self.inside -= 1
            return result

    def say(context, number):
        if "You carry out" in context:
            return bash("look") if "echo" not in context else "seen"
        return "done" if "seen" in context else task("a") + task("b") + task("c")

    trajectory = play(Speaking(say), Alone("copy/1"), IFlowAgent(tools=("task",)), tell_tools=True)
    assert trajectory.ending == "success", trajectory.note
    assert [chunk.edge for chunk in trajectory.chunks].count("subagent") == 3
    check_trained_once(trajectory)


def test_sub_agents_have_none_themselves():
    told = []

    def say(context, number):
        if "You dig" in context:
            told.append('"name": "task"' in context)
            return "no deeper"
        return "done" if "tool_response" in context else task("dig")

    spec = AgentSpec("digger", "digs", "You dig.")
    agent = IFlowAgent(tools=("task",), specs=(spec,), answers=30)
    trajectory = play(Speaking(say), Told("copy/1"), agent, tell_tools=True)
    edges = [chunk.edge for chunk in trajectory.chunks]
    assert edges.count("subagent") == 1 and trajectory.ending == "success"
    assert told == [False]


@pytest.mark.parametrize("where", ["main", "sub-agent", "summary"])
def test_an_engine_that_fails_spoils_the_episode_wherever(where):
    def say(context, number):
        if where == "summary" and "Your context is nearly full" in context[-900:]:
            return EngineError("gone")
        if where == "sub-agent" and "You carry out" in context:
            return EngineError("gone")
        if where == "main" and number == 3:
            return EngineError("gone")
        return task("look") if where == "sub-agent" else "so " * 60

    agent = IFlowAgent(tools=("task",), compaction=0.7)
    limits = dataclasses.replace(LIMITS, max_context=1500)
    trajectory = play(Speaking(say), Told("copy/1"), agent, limits, tell_tools=True)
    assert (trajectory.ending, trajectory.note) == ("infra_engine", "gone")
    assert not trajectory.trainable and trajectory.reward == 0.0


def test_the_answers_of_an_episode_are_bounded():
    engine = Speaking(lambda context, number: "on")
    trajectory = play(engine, EchoEnv("copy/1"), IFlowAgent(answers=5))
    assert trajectory.ending == "truncated_turns" and len(trajectory.chunks) == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"tools": ("shell",)}, "no tool 'shell'"), ({"compaction": 1.5}, "no share")],
)
def test_settings_that_cannot_be_are_refused(fields, words):
    with pytest.raises(IFlowError, match=words):
        IFlowAgent(**fields)
