"""The agent loop: tokens are appended and never rendered again, and every way to end is typed."""

import asyncio
import dataclasses

import numpy as np
import pytest

from envs.rock import AgentFault, SandboxError, SandboxFileError
from rome.agent import loop
from rome.agent.loop import Limits, run_episode
from rome.engine.errors import EngineError
from tests.rome.rollout.worlds import (
    CHAT,
    EchoEnv,
    FailsToClose,
    NeverClosed,
    ScriptedEngine,
    routes_of,
)

LIMITS = Limits(max_context=300, max_new_tokens=40, episode_seconds=5.0)


def play(engine, env=None, limits=LIMITS, seed=7, **options):
    return asyncio.run(
        run_episode(engine, env or EchoEnv("copy/1"), CHAT, limits, seed=seed, **options)
    )


def test_each_request_is_the_last_one_with_its_answer_and_the_observation_appended():
    engine = ScriptedEngine(["red", "blue", "done"])
    trajectory = play(engine)
    context = []
    for chunk, (asked, _) in zip(trajectory.chunks, engine.requests, strict=True):
        context += chunk.prompt_ids
        assert asked == context
        context += chunk.action_ids
    assert trajectory.ending == "success" and trajectory.reward == 1.0
    assert [chunk.text for chunk in trajectory.chunks] == ["red", "blue", "done"]
    assert "echo red" in CHAT.tokenizer.decode(trajectory.chunks[1].prompt_ids)
    assert trajectory.oldest_version == 3


def test_routes_are_asked_for_once_a_token_and_kept_with_it():
    engine = ScriptedEngine(["red", "blue", "done"])
    trajectory = play(engine, routes=True)
    routes = np.concatenate([chunk.routes for chunk in trajectory.chunks])
    ids = [token for chunk in trajectory.chunks for token in chunk.prompt_ids + chunk.action_ids]
    np.testing.assert_array_equal(routes[:-1], routes_of(ids)[:-1])
    assert len(routes) == len(ids) and not routes[-1].any()  # nothing was drawn from the last token
    starts = [sampling.routes_from for _, sampling in engine.requests]
    assert starts == [0] + [
        len(asked) - len(chunk.prompt_ids) - 1
        for (asked, _), chunk in list(zip(engine.requests, trajectory.chunks, strict=False))[1:]
    ]


def test_without_a_wish_for_routes_none_are_asked_for():
    engine = ScriptedEngine(["red", "done"])
    assert all(chunk.routes is None for chunk in play(engine).chunks)
    assert all(sampling.routes_from is None for _, sampling in engine.requests)


def test_turn_seeds_follow_from_the_episode_seed_and_the_turn_alone():
    engines = [ScriptedEngine(["red", "done"]) for _ in range(3)]
    for engine, seed in zip(engines, (7, 7, 8), strict=False):
        play(engine, seed=seed)
    seeds = [[sampling.seed for _, sampling in engine.requests] for engine in engines]
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0])) == 2


def test_a_turn_without_an_end_is_truncated_and_keeps_its_tokens():
    trajectory = play(ScriptedEngine(["red red red"], finish_reason="length"))
    assert (trajectory.ending, trajectory.reward, len(trajectory.chunks)) == (
        "truncated_tokens",
        0.0,
        1,
    )
    assert trajectory.trainable


def test_a_full_context_ends_the_episode():
    trajectory = play(
        ScriptedEngine(["red"] * 50), limits=dataclasses.replace(LIMITS, max_context=60)
    )
    tokens = sum(len(chunk.prompt_ids) + len(chunk.action_ids) for chunk in trajectory.chunks)
    assert trajectory.ending == "truncated_tokens" and tokens <= 60


@pytest.mark.parametrize(
    "engine, env, ending",
    [
        (
            ScriptedEngine(["done"], error=EngineError("http://x is dead")),
            EchoEnv("copy/1"),
            "infra_engine",
        ),
        (
            ScriptedEngine(["done"], delay=9.0),
            EchoEnv("copy/1"),
            "infra_engine",
        ),  # a slow engine is not the policy's failure
        (
            ScriptedEngine(["red", "done"]),
            EchoEnv("copy/1", delay=9.0),
            "timeout",
        ),  # slow commands are
    ],
)
def test_faults_become_typed_endings_and_the_environment_is_closed(engine, env, ending):
    trajectory = play(engine, env, dataclasses.replace(LIMITS, episode_seconds=0.2))
    assert trajectory.ending == ending and trajectory.note and env.closed == 1


@pytest.mark.parametrize(
    "fault, ending",
    [
        (AgentFault("2 processes survived SIGKILL"), "failure"),
        (SandboxFileError("no_space", "f: no space left"), "failure"),
        (SandboxError("the host is gone"), "infra_sandbox"),
    ],
)
def test_what_an_agent_can_bring_about_is_its_failure_once_it_has_acted(fault, ending):
    class Broken(EchoEnv):
        def step(self, action):
            raise fault

    class NeverBegun(EchoEnv):
        def reset(self, seed=None):
            raise fault

    trajectory = play(ScriptedEngine(["red"]), Broken("copy/1"))
    assert (trajectory.ending, trajectory.reward, trajectory.note) == (ending, 0.0, str(fault))
    assert trajectory.trainable == (ending == "failure")
    assert play(ScriptedEngine(["red"]), NeverBegun("copy/1")).ending == "infra_sandbox"


def test_a_sandbox_that_does_not_end_takes_nothing_from_the_episode():
    class Lingering(EchoEnv):
        async def aclose(self):
            raise SandboxError("the sandbox did not end within 30 s")

    trajectory = play(ScriptedEngine(["red", "done"]), Lingering("copy/1"))
    assert (trajectory.ending, trajectory.reward) == ("success", 1.0)


@pytest.mark.parametrize(
    "kind, words", [(NeverClosed, "did not end within 0.05 s"), (FailsToClose, "manager is gone")]
)
def test_an_environment_that_does_not_end_costs_a_bounded_wait_and_no_result(
    monkeypatch, caplog, kind, words
):
    monkeypatch.setattr(loop, "CLOSE_SECONDS", 0.05)
    env = kind("copy/1")
    trajectory = play(ScriptedEngine(["done"]), env)
    assert trajectory.ending == "success" and trajectory.seconds < 5 and env.closed == 1
    assert "copy/1 was not closed" in caplog.text and words in caplog.text
