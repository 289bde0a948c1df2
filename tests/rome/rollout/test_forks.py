"""Episodes that begin inside an earlier trajectory: by copies of one replay or by replays of their
own, in real sandboxes; the same either way.
"""

import asyncio
import dataclasses
import random

import pytest

from envs.games import Sokoban
from envs.gem import format_tool_call
from envs.rock import SandboxConfig, SandboxError
from envs.tasks.terminal.env import TerminalEnv
from rome.agent import loop
from rome.agent.loop import Limits, run_episode
from rome.rollout import forks as forks_module
from rome.rollout.accounting import Accounting
from rome.rollout.demonstrations import demonstrate
from rome.rollout.episode import Episode
from rome.rollout.forks import Forked, Forks
from rome.rollout.player import EpisodePlayer
from tests.rome.rollout.worlds import (
    CHAT,
    EchoEnv,
    FailsToClose,
    NeverClosed,
    ScriptedEngine,
)

TASK = "note_count/5"
LIMITS = Limits(2000, 60, 30.0)


def make_env(task=TASK):
    return TerminalEnv(task, SandboxConfig(isolation="best_available"))


@dataclasses.dataclass
class Continues:
    """Says what the source said from the anchor on."""

    source: object
    requests: list = dataclasses.field(default_factory=list)

    async def generate(self, input_ids, sampling, deadline_s, *, affinity=None):
        number = input_ids.count(CHAT.tokenizer.im_start) // 2 - 1
        self.requests.append((list(input_ids), sampling))
        inner = ScriptedEngine([chunk.text for chunk in self.source.chunks])
        return (
            await inner.generate(input_ids, sampling, deadline_s)
            if number < len(self.source.chunks)
            else None
        )


@pytest.fixture(scope="module")
def source():
    return asyncio.run(demonstrate(make_env(), CHAT, random.Random(0), 0.0))


def tokens_of(trajectory):
    chunks = trajectory.chunks
    return [token for chunk in chunks for token in (*chunk.prompt_ids, *chunk.action_ids)]


@pytest.mark.parametrize("by_fork", [True, False])
def test_what_comes_before_the_anchor_is_context_and_the_policy_sees_and_finishes_it(
    source, by_fork
):
    async def play():
        prefixes = [source.chunks[:anchor] for anchor in range(len(source.chunks))]
        forks = Forks(make_env, prefixes)
        played = []
        for prefix in prefixes:
            env = await forks.env_at(prefix) if by_fork else make_env()
            assert isinstance(env, Forked) == (by_fork and bool(prefix))
            engine = Continues(source)
            played.append(
                (
                    await run_episode(
                        engine, env, CHAT, LIMITS, seed=1, prefix=prefix, routes=False
                    ),
                    engine,
                )
            )
        await forks.aclose()
        return played

    for anchor, (trajectory, engine) in enumerate(asyncio.run(play())):
        assert (trajectory.ending, trajectory.reward) == ("success", 1.0), trajectory.note
        assert [chunk.kind for chunk in trajectory.chunks] == ["context"] * anchor + ["rl"] * (
            len(source.chunks) - anchor
        )
        # Token in, token out: as if it had said all of it.
        assert tokens_of(trajectory) == tokens_of(source)
        assert all(not chunk.versions for chunk in trajectory.chunks[:anchor])
        assert (
            engine.requests[0][0]
            == tokens_of(dataclasses.replace(source, chunks=source.chunks[:anchor]))
            + source.chunks[anchor].prompt_ids
        )


def test_copies_do_not_see_each_other_and_their_origin_may_end(source):
    async def play():
        prefix = source.chunks[:1]
        forks = Forks(make_env, [prefix])
        one, other = await forks.env_at(prefix), await forks.env_at(prefix)
        for env in (one, other):
            await env.areset()
            await env.astep(prefix[0].text)
        await forks.aclose()
        await one.astep(format_tool_call("bash", {"command": "touch mine"}))
        seen = [
            (await env.astep(format_tool_call("bash", {"command": "ls mine 2>&1"})))[0]
            for env in (one, other)
        ]
        await one.aclose(), await other.aclose()
        return seen

    mine, others = asyncio.run(play())
    assert mine.strip() == "mine" and "No such file" in others


def test_a_replay_that_is_answered_otherwise_is_infrastructure_and_no_failure_of_the_policy(source):
    tampered = [
        dataclasses.replace(source.chunks[0], observation="something else"),
        *source.chunks[1:],
    ]
    trajectory = asyncio.run(
        run_episode(Continues(source), make_env(), CHAT, LIMITS, seed=1, prefix=tampered[:1])
    )
    assert (
        trajectory.ending == "infra_sandbox"
        and "not deterministic" in trajectory.note
        and not trajectory.trainable
    )

    async def by_fork():  # the one replay fails: each episode replays for itself and says why
        forks = Forks(make_env, [tampered[:1]])
        env = await forks.env_at(tampered[:1])
        await forks.aclose()
        return env

    assert not isinstance(asyncio.run(by_fork()), Forked)


def test_an_environment_that_cannot_be_kept_is_replayed_by_each_episode():
    source = asyncio.run(
        run_episode(
            ScriptedEngine(["red", "blue", "done"]), EchoEnv("copy/1"), CHAT, LIMITS, seed=1
        )
    )
    scheduler = EpisodePlayer(ScriptedEngine(["red", "blue", "done"]), EchoEnv, CHAT, LIMITS)

    async def play():
        prefix = tuple(source.chunks[:2])
        forks = Forks(lambda: EchoEnv("copy/1"), [prefix])
        accounting = Accounting()
        accounting.begin()
        trajectory = await scheduler.play_one(
            Episode("copy/1", 0, 0, 1, "x", prefix, forks), temperature=1.0, accounting=accounting
        )
        await forks.aclose()
        return trajectory

    trajectory = asyncio.run(play())
    assert [chunk.kind for chunk in trajectory.chunks] == [
        "context",
        "context",
        "rl",
    ] and trajectory.ending == "success"


def test_an_environment_that_spawns_copies_is_copied_with_the_rewards_of_its_prefix():
    """A copy plays on as a replay does; neither changes the other."""
    moves = [f"<answer>{move}</answer>" for move in ("Right", "Left", "Right", "Left")]
    engine = ScriptedEngine([*moves, *moves, *moves])
    limits = Limits(max_context=4000, max_new_tokens=40, episode_seconds=20.0)

    def make_game():
        return Sokoban(seed=4, max_turns=6)

    source = asyncio.run(run_episode(engine, make_game(), CHAT, limits, seed=1))
    assert source.ending == "truncated_turns" and source.reward < 0

    async def play():
        prefixes = [source.chunks[:2], source.chunks[:5]]
        forks = Forks(make_game, prefixes)
        envs = [await forks.env_at(prefix) for prefix in prefixes * 2]
        assert all(isinstance(env, Forked) for env in envs)
        told = [
            await run_episode(engine, env, CHAT, limits, seed=1, prefix=prefix)
            for env, prefix in zip(envs, prefixes * 2, strict=True)
        ]
        await forks.aclose()
        return told

    for trajectory in asyncio.run(play()):
        assert tokens_of(trajectory) == tokens_of(source)
        assert trajectory.reward == pytest.approx(source.reward)


def test_a_spawned_environment_goes_on_in_the_same_state():
    with_state = make_env()
    with_state.reset()
    with_state.step(format_tool_call("bash", {"command": "echo here > mark"}))
    copy = with_state.spawn(same_state=True)
    assert copy.step(format_tool_call("bash", {"command": "cat mark"}))[0].strip() == "here"
    assert copy.step(format_tool_call("bash", {"command": "true"}))[4]["step_counter"] == 3
    with_state.close()
    copy.close()
    with pytest.raises(SandboxError, match="no running episode"):
        with_state.spawn(same_state=True)


def test_who_waits_for_a_replay_that_is_ended_replays_for_itself():
    class Slow(EchoEnv):
        async def areset(self, seed=None):
            await asyncio.sleep(60)

        asnapshot = None

    async def wait():
        forks = Forks(lambda: Slow("copy/1"), [[object()]])
        waiting = [asyncio.create_task(forks.env_at([object()])) for _ in range(2)]
        await asyncio.sleep(0.01)
        await forks.aclose()  # the group of a sibling is done
        return await asyncio.gather(*waiting)

    assert [type(env) for env in asyncio.run(wait())] == [Slow, Slow]


@pytest.mark.parametrize("kind", [NeverClosed, FailsToClose])
def test_a_source_and_copies_that_do_not_end_cost_a_bounded_wait_and_no_fork(monkeypatch, kind):
    class Copy:
        async def delete(self):
            await kind("copy/1").aclose()

    class Copied(kind):
        async def asnapshot(self):
            return Copy()

    monkeypatch.setattr(loop, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(forks_module, "CLOSE_SECONDS", 0.05)
    source = asyncio.run(
        run_episode(ScriptedEngine(["red", "done"]), EchoEnv("copy/1"), CHAT, LIMITS, seed=1)
    )

    async def fork():
        prefix = tuple(source.chunks[:1])
        forks = Forks(lambda: Copied("copy/1"), [prefix])
        env = await forks.env_at(prefix)
        await forks.aclose()
        return env

    env = asyncio.run(asyncio.wait_for(fork(), 60))
    assert isinstance(env, Forked)
