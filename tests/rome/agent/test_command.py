"""Episodes that a command in the sandbox plays: their record, their endings, their verdict."""

import asyncio
import shutil

import pytest

from envs.games.frozen_lake import FrozenLake
from envs.gem import format_tool_call
from envs.rock import AgentFault, SandboxConfig, probe
from envs.tasks.terminal import make_task
from envs.tasks.terminal.env import TerminalEnv
from rome.agent.command import CommandAgent, CommandError, run_command_episode
from rome.agent.loop import Limits, run_episode
from rome.agent.proxy import Budget
from rome.data.packing import pack
from rome.data.tree import ROOT as NO_PARENT
from rome.engine.completion import Completion
from rome.engine.errors import EngineError
from tests.paths import ROOT
from tests.rome.agent.test_dialogue import CHAT, Scripted

LIMITS = Limits(max_context=4000, max_new_tokens=500, episode_seconds=60.0)
OUTSIDE = CommandAgent("python3 $AGENT_FILES/outside_agent.py", files=str(ROOT / "examples/agents"))


def bash(command):
    return format_tool_call("bash", {"command": command})


def terminal(doors):
    config = SandboxConfig(isolation="best_available", tier="namespaces", disk_mb=16, doors=doors)
    return TerminalEnv(make_task("count", 3), config)


def play(agent, *turns, limits=LIMITS, make_env=terminal, engine=None, **options):
    if probe(tier="namespaces").tier is None:
        pytest.skip("no namespaces tier here")
    engine = engine or Scripted(*turns)
    episode = run_command_episode(engine, make_env, CHAT, limits, agent, seed=5, **options)
    return asyncio.run(asyncio.wait_for(episode, 120)), engine


def test_an_outside_agent_plays_a_task_and_every_sampled_token_is_recorded():
    turns = (bash("ls -a; ls -a $HOME"), f"two {bash('pwd')}", "done")
    episode, engine = play(OUTSIDE, *turns)
    assert len(engine.requests) == 3 and episode.ending == "failure", episode.note
    assert [chunk.edge for chunk in episode.chunks] == ["continuation"] * 3
    assert ".agent" not in episode.chunks[0].observation  # the workspace is the task's
    context = []
    for chunk, (asked, _) in zip(episode.chunks, engine.requests, strict=True):
        context += chunk.prompt_ids
        assert asked == context
        context += chunk.action_ids
    assert episode.instruction and episode.note == ""


def test_an_outside_agent_and_the_loop_make_the_same_record():
    """The dialogue writes what the loop writes, where both hold the same conversation."""
    turns = (bash("cat list.txt | head -2; false"), bash("grep -c rain list.txt > out.txt"), "done")
    silent = CommandAgent(f"TELL_TOOLS=0 {OUTSIDE.command}", OUTSIDE.files)
    outside, _ = play(silent, *turns)
    looped = asyncio.run(run_episode(Scripted(*turns), terminal({}), CHAT, LIMITS, seed=5))
    assert (outside.ending, outside.reward) == (looped.ending, looped.reward) == ("success", 1.0)
    for ours, theirs in zip(outside.chunks, looped.chunks, strict=True):
        assert ours.prompt_ids == theirs.prompt_ids and ours.action_ids == theirs.action_ids
        assert ours.tool_call == theirs.tool_call and ours.parent == theirs.parent


def test_the_verifier_judges_what_the_command_left():
    episode, engine = play(CommandAgent("grep -c rain list.txt > out.txt"))
    assert (episode.ending, episode.reward) == ("success", 1.0), episode.note
    assert not engine.requests and not episode.chunks
    assert episode.note == "the agent asked nothing"


class Watched(TerminalEnv):
    """Judges harm too."""

    async def astep(self, action):
        *result, info = await super().astep(action)
        return *result, info | {"safety": {"harm": 1.0}}


def test_the_harm_that_the_environment_judges_is_recorded():
    episode, _ = play(
        CommandAgent("true"),
        make_env=lambda doors: Watched(make_task("count", 3), SandboxConfig(doors=doors)),
    )
    assert episode.safety == {"harm": 1.0}


def test_a_command_that_fails_says_so_and_is_judged():
    episode, _ = play(CommandAgent("echo why >&2; exit 3"))
    assert episode.ending == "failure" and episode.note == "the agent ended with status 3: why"


@pytest.mark.parametrize(
    ("added", "test"),
    [
        ("x" * 150_000, '[ -z "$INSTRUCTION" ] && [ $(wc -c < $INSTRUCTION_FILE) -gt 150000 ]'),
        ("\0 \ud83d", '[ -z "$INSTRUCTION" ] && grep -q \ufffd $INSTRUCTION_FILE'),
        (
            "\ud83d",
            'echo "$INSTRUCTION" | cmp - $INSTRUCTION_FILE; grep -q \ufffd $INSTRUCTION_FILE',
        ),
    ],
)
def test_any_instruction_reaches_the_command(added, test):
    class Told(TerminalEnv):
        async def areset(self, seed=None):
            instruction, info = await super().areset(seed)
            return instruction + added, info

    def make_env(doors):
        config = SandboxConfig(isolation="best_available", tier="namespaces", doors=doors)
        return Told(make_task("count", 3), config)

    solving = CommandAgent(f"{test} && grep -c rain list.txt > out.txt")
    episode, _ = play(solving, make_env=make_env)
    assert episode.reward == 1.0, episode.note


def test_a_command_that_asks_nothing_for_long_is_ended():
    episode, _ = play(CommandAgent("sleep 60", idle_seconds=0.5))
    assert episode.ending == "failure"
    assert episode.note == "the agent was ended: it has asked nothing for 0.5 s"


def test_the_clock_counts_the_agents_own_time():
    limits = Limits(max_context=4000, max_new_tokens=500, episode_seconds=1.0)
    episode, _ = play(CommandAgent("while :; do :; done"), limits=limits)
    assert episode.ending == "timeout" and "its time is over" in episode.note


def test_a_budget_ends_an_agent_that_goes_on_asking():
    agent = CommandAgent(
        "while :; do curl -s $OPENAI_BASE_URL/chat/completions -d"
        ' \'{"messages": [{"role": "user", "content": "\'$RANDOM\'"}]}\'; done',
        budget=Budget(calls=2),
    )
    episode, engine = play(agent, "one", "two", "three")
    assert len(engine.requests) == 2 and "used up" in episode.note


class Gathered:
    """An engine that answers nobody until so many ask at once, as often as there are so many."""

    def __init__(self, at_once):
        self.at_once, self.waiting, self.most = at_once, 0, 0
        self.everybody = asyncio.Event()

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None):
        said = f"answer {len(input_ids)}"
        if b"sub-agent" in CHAT.tokenizer.decode(input_ids).encode():
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            if self.waiting == self.at_once:
                self.everybody.set()
            await asyncio.wait_for(self.everybody.wait(), 60)
            self.waiting -= 1
        ids = CHAT.turn(said)
        return Completion(ids, [-0.5] * len(ids), "stop", [(1, 0, len(ids))])


def test_eight_sub_agents_ask_at_once_and_each_sampled_token_is_trained_once(tmp_path):
    for name in ("outside_agent.py", "crowd.py"):
        folder = "examples/agents" if name == "outside_agent.py" else "tests/rome/agent"
        shutil.copy(ROOT / folder / name, tmp_path)
    engine = Gathered(8)
    crowd = CommandAgent("TELL_TOOLS=0 python3 $AGENT_FILES/crowd.py", files=str(tmp_path))
    episode, _ = play(crowd, engine=engine)
    assert engine.most == 8, "they did not ask at once"
    assert episode.note == "" and len(episode.chunks) == 2 + 8 * 2
    edges = [chunk.edge for chunk in episode.chunks]
    assert edges.count("subagent") == 8 and edges.count("continuation") == 10
    roots = [
        one.edge
        for one, parent in zip(episode.chunks, episode.parents, strict=True)
        if parent == NO_PARENT
    ]
    assert sorted(roots) == ["continuation"] + ["subagent"] * 8
    assert len(episode.lines()) == 9
    batch = pack([episode], row_length=1024, chunks_per_row=32, gamma=1.0, failure_reward=-1.0)
    assert batch.action_mask_BT.sum() == episode.num_action_tokens


def test_an_agent_that_is_killed_leaves_the_record_of_what_it_asked():
    """kill -9 of the agent, in the middle of its conversation: what is there is judged."""
    killed = CommandAgent(
        "grep -c rain list.txt > out.txt\n"
        "python3 $AGENT_FILES/outside_agent.py & agent=$!\n"
        "until [ -e go ]; do sleep 0.02; done; kill -9 $agent; wait $agent",
        files=OUTSIDE.files,
    )
    episode, engine = play(killed, bash("touch go; sleep 30"))
    assert (episode.ending, episode.reward) == ("success", 1.0), episode.note
    assert episode.note.startswith("the agent ended with status 137")
    assert len(episode.chunks) == len(engine.requests) == 1 and episode.trainable


def test_an_engine_that_fails_spoils_the_episode():
    episode, _ = play(OUTSIDE, EngineError("gone"))
    assert (episode.ending, episode.reward, episode.note) == ("infra_engine", 0.0, "gone")
    assert not episode.trainable


def test_what_has_no_sandbox_is_refused_by_name():
    episode, _ = play(OUTSIDE, make_env=lambda doors: FrozenLake())
    assert episode.ending == "infra_sandbox" and "has no sandbox" in episode.note


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"command": " "}, "names no command"), ({"command": "x", "files": "/nowhere"}, "no folder")],
)
def test_an_agent_that_cannot_be_is_refused(fields, words):
    with pytest.raises(CommandError, match=words):
        CommandAgent(**fields)


@pytest.mark.parametrize(("where", "ending"), [("aspawn", "infra_sandbox"), ("wait", "failure")])
def test_what_the_agents_programs_bring_about_is_its_failure(where, ending):
    """If it were masked, an agent could choose which of its failures count."""

    class Job:
        async def wait(self):
            raise AgentFault("the workspace is full")

    class Full(TerminalEnv):
        async def aspawn(self, command, env, timeout):
            if where == "aspawn":  # nobody has acted yet
                raise AgentFault("the workspace is full")
            return Job()

    def make_env(doors):
        return Full("count/3", SandboxConfig(isolation="best_available", doors=doors))

    episode, _ = play(CommandAgent("true"), make_env=make_env)
    assert episode.ending == ending and "the workspace is full" in episode.note
