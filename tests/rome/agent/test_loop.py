"""The agent loop: tokens are appended and never rendered again, and every way to end is typed. The
reward is what the environment says, whatever ended the episode; its clock is the agent's own time.
"""

import asyncio
import dataclasses
import hashlib
import json

import numpy as np
import pytest

from envs.games import Sokoban
from envs.gem import UnplayableTaskError
from envs.gem.episode import PlayedEnv
from envs.rock import AgentFault, SandboxError, SandboxFileError
from rome.agent import loop
from rome.agent.loop import Limits, run_episode
from rome.data.routes import routes_to_npz
from rome.data.trajectory import is_success, to_atif
from rome.engine.errors import EngineError
from rome.rollout.simulator import clock
from tests.rome.rollout.worlds import (
    CHAT,
    EchoEnv,
    FailsToClose,
    NeverClosed,
    ScriptedEngine,
    routes_of,
)

LIMITS = Limits(max_context=300, max_new_tokens=40, episode_seconds=60.0)


def play(engine, env=None, limits=LIMITS, seed=7, **options):
    return asyncio.run(
        run_episode(engine, env or EchoEnv("copy/1"), CHAT, limits, seed=seed, **options)
    )


def play_in_virtual_time(engine, env, limits=LIMITS):
    """Do the same where all that takes time is a sleep: no busy machine changes who is late."""
    return clock.run(run_episode(engine, env, CHAT, limits, seed=7))


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


def test_a_turn_that_ends_at_another_end_token_says_nothing_more_and_gets_the_templates_end():
    turns = ["red", "blue", "done"]
    usual = play(ScriptedEngine(turns))
    engine = ScriptedEngine(turns, end=CHAT.tokenizer.pad)  # <|endoftext|>
    ended = play(engine)
    assert [chunk.text for chunk in ended.chunks] == turns and ended.ending == "success"
    for one, other in zip(ended.chunks[1:], usual.chunks[1:], strict=True):
        assert one.prompt_ids == [CHAT.tokenizer.im_end, *other.prompt_ids]
    assert all(chunk.action_ids[-1] == CHAT.tokenizer.pad for chunk in ended.chunks)


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


def test_episodes_are_recorded_as_before_a_session_owned_their_tokens():
    digest = hashlib.sha256()
    for turns, end, reason in (
        (["red", "blue", "done"], CHAT.tokenizer.im_end, "stop"),
        (["red", "blue", "done"], CHAT.tokenizer.pad, "stop"),
        (["red red"], CHAT.tokenizer.im_end, "length"),
        (["red"] * 50, CHAT.tokenizer.im_end, "stop"),
    ):
        engine = ScriptedEngine(turns, end=end, finish_reason=reason)
        limits = dataclasses.replace(LIMITS, episode_seconds=50.0)
        trajectory = play(engine, limits=limits, routes=True)
        trajectory.seconds, trajectory.note = 0.0, ""
        document = to_atif(trajectory)
        del document["agent"]["version"]
        routes = {number: chunk.routes for number, chunk in enumerate(trajectory.chunks)}
        digest.update(json.dumps(document).encode() + routes_to_npz(routes))
    assert digest.hexdigest()[:16] == "31e7a1609f2bd3cc"


def test_without_a_wish_for_routes_none_are_asked_for():
    engine = ScriptedEngine(["red", "done"])
    assert all(chunk.routes is None for chunk in play(engine).chunks)
    assert all(sampling.routes_from is None for _, sampling in engine.requests)


def test_turn_seeds_follow_from_the_episode_seed_and_the_context_alone():
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
        ),  # an engine that gives no answer is not the policy's failure
        (
            ScriptedEngine(["red", "done"]),
            EchoEnv("copy/1", delay=9.0),
            "timeout",
        ),  # slow commands are
    ],
)
def test_faults_become_typed_endings_and_the_environment_is_closed(engine, env, ending):
    limits = dataclasses.replace(LIMITS, episode_seconds=0.2, completion_seconds=0.2)
    trajectory = play(engine, env, limits)
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
    assert (trajectory.ending, trajectory.reward) == (ending, 0.0)
    assert str(fault) in trajectory.note
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
    trajectory = play_in_virtual_time(ScriptedEngine(["done"]), env)
    assert trajectory.ending == "success" and env.closed == 1
    assert "copy/1 was not closed" in caplog.text and words in caplog.text


class Shaped(EchoEnv):
    """Pays 0.5 for each turn; "done" pays 0.25."""

    async def astep(self, action):
        observation, _, terminated, truncated, info = await super().astep(action)
        return observation, 0.25 if terminated else 0.5, terminated, truncated, info


def test_an_episode_earns_the_sum_of_its_steps():
    assert play(ScriptedEngine(["red", "blue", "done"]), Shaped("copy/1")).reward == 1.25
    cut = play(ScriptedEngine(["red"] * 50), Shaped("copy/1"), max_context(60))
    assert cut.ending == "truncated_tokens" and cut.reward == 0.5 * (len(cut.chunks))


def max_context(tokens):
    return dataclasses.replace(LIMITS, max_context=tokens)


class Judged(EchoEnv):
    """A verifier that looks for the word red; a limit does not keep it from looking."""

    is_red = False

    async def astep(self, action):
        self.is_red |= action == "red"
        return await super().astep(action)

    async def ajudge(self, ending):
        return "", float(self.is_red), False, True, {"ending": ending, "note": "looked"}


class Unjudgeable(Judged):
    async def ajudge(self, ending):
        raise SandboxError("the sandbox is gone")


@pytest.mark.parametrize("said, reward", [("red", 1.0), ("blue", 0.0)])
@pytest.mark.parametrize(
    "limits, options, ending",
    [
        (max_context(60), {}, "truncated_tokens"),
        (LIMITS, {"finish_reason": "length"}, "truncated_tokens"),
        (dataclasses.replace(LIMITS, episode_seconds=0.1), {"slow": 9.0}, "timeout"),
    ],
    ids=["context", "turn", "time"],
)
def test_whatever_limit_ends_it_the_work_that_is_there_is_judged(
    said, reward, limits, options, ending
):
    env = Judged("copy/1")
    turns = [said] * 50
    engine = ScriptedEngine(turns)
    original = engine.generate

    async def generate(input_ids, *args, **kwargs):
        completion = await original(input_ids, *args, **kwargs)
        if len(engine.requests) == 2:  # the word was said in the turn before
            env.delay = options.get("slow", 0.0)
            completion.finish_reason = options.get("finish_reason", "stop")
        return completion

    engine.generate = generate
    trajectory = play(engine, env, limits)
    assert (trajectory.ending, trajectory.reward) == (ending, reward)
    assert trajectory.note.endswith("; looked") and trajectory.trainable
    assert trajectory.succeeded == (said == "red")


def test_work_that_cannot_be_judged_is_masked_and_not_a_zero():
    trajectory = play(ScriptedEngine(["red"] * 50), Unjudgeable("copy/1"), max_context(60))
    assert trajectory.ending == "infra_sandbox" and not trajectory.trainable


@pytest.mark.parametrize("engine_seconds", [0.0, 0.3])
def test_an_engine_may_take_longer_than_the_environment_may(engine_seconds):
    """Waits of an engine, its queue and publications included, are none of the policy's doing."""
    limits = dataclasses.replace(LIMITS, episode_seconds=0.25)
    engine = ScriptedEngine(["red", "blue", "done"], delay=engine_seconds)
    quick = play_in_virtual_time(engine, EchoEnv("copy/1", delay=0.01), limits)
    assert quick.ending == "success"
    late = play_in_virtual_time(engine, EchoEnv("copy/1", delay=0.2), limits)
    assert late.ending == "timeout" and "0.25 s" in late.note  # of two turns together


@pytest.mark.parametrize("seconds, ending", [(0.3, "success"), (9.0, "infra_sandbox")])
def test_a_start_is_on_its_own_clock_and_a_late_one_is_infrastructure(seconds, ending):
    class SlowStart(EchoEnv):
        async def areset(self, seed=None):
            await asyncio.sleep(seconds)
            return await super().areset(seed)

    limits = dataclasses.replace(LIMITS, episode_seconds=0.2, start_seconds=1.0)
    engine = ScriptedEngine(["red", "done"])
    trajectory = play_in_virtual_time(engine, SlowStart("copy/1"), limits)
    assert trajectory.ending == ending and ("within 1 s" in trajectory.note) == (seconds > 1)


@pytest.mark.parametrize("error", [TypeError("no such file"), UnplayableTaskError("task.toml:3")])
def test_an_environment_that_cannot_start_is_infrastructure_whatever_it_raises(error):
    class Broken(EchoEnv):
        async def areset(self, seed=None):
            raise error

    trajectory = play(ScriptedEngine([]), Broken("copy/1"))
    assert trajectory.ending == "infra_sandbox" and str(error) in trajectory.note


def test_grading_is_not_the_time_of_the_agent():
    class SlowVerifier(EchoEnv):
        is_grading = False
        grading_seconds = 5.0

        async def astep(self, action):
            self.is_grading = action == "done"
            await asyncio.sleep(0.4 * self.is_grading)
            return await super().astep(action)

    limits = dataclasses.replace(LIMITS, episode_seconds=0.2)
    engine = ScriptedEngine(["red", "done"])
    trajectory = play_in_virtual_time(engine, SlowVerifier("copy/1"), limits)
    assert trajectory.ending == "success"


class Bare:
    """An environment as gem-llm writes them: no task, no typed infos, nothing asynchronous."""

    def __init__(self, rewards, truncates=False):
        self.rewards = list(rewards)
        self.truncates = truncates

    def reset(self, seed=None):
        return "Guess.", {"suffix": "Board: ?"}

    def step(self, action):
        reward = self.rewards.pop(0)
        over = not self.rewards
        return "Again.", reward, over and not self.truncates, over and self.truncates, {}


@pytest.mark.parametrize(
    "env, reward, ending",
    [
        (Bare([0.0, 0.4, 0.6]), 1.0, "success"),
        (Bare([0.1] * 10), 1.0, "success"),  # as a float, the sum is a little less
        (Bare([1.0, -0.5]), 0.5, "failure"),
        (Bare([0.0, 0.25], truncates=True), 0.25, "truncated_turns"),
        (Bare([0.0, float("nan")]), 0.0, "infra_verifier"),
    ],
    ids=["sum", "rounded", "penalty", "cut", "nan"],
)
def test_an_environment_without_typed_infos_plays_to_its_end(env, reward, ending):
    trajectory = play(ScriptedEngine(["red"] * 10), env, max_context(2000))
    assert trajectory.reward == pytest.approx(reward) and trajectory.ending == ending
    assert trajectory.succeeded == (ending == "success")
    assert (trajectory.task, trajectory.family) == ("Bare", "Bare")


def test_the_board_of_an_opening_is_shown():
    trajectory = play(ScriptedEngine(["red"]), Bare([1.0]))
    assert "Guess.\nBoard: ?" in CHAT.tokenizer.decode(trajectory.chunks[0].prompt_ids)
    assert trajectory.instruction == "Guess.\nBoard: ?"


def test_a_task_says_from_which_reward_on_it_is_solved():
    class Half(Shaped):
        def __init__(self, name):
            super().__init__(name)
            self.task.success = 0.7

    solved = [play(ScriptedEngine(turns), Half("copy/1")) for turns in (["done"], ["red", "done"])]
    assert [(one.reward, one.succeeded) for one in solved] == [(0.25, False), (0.75, True)]


@pytest.mark.parametrize("moves, is_solved", [(1, False), (100, True)])
def test_a_game_of_shaped_rewards_is_solved_where_it_is_won(moves, is_solved):
    async def play_planned():
        env = Sokoban(seed=4, dim_room=(6, 6), num_boxes=2, max_turns=100)
        played = PlayedEnv(env, seconds=60.0, start_seconds=60.0)
        opening, info = await played.start()
        assert opening.endswith(info["suffix"])
        for _ in range(moves):
            turn = await played.step(env.demonstrator_action())
            if turn.ending:
                break
        return is_success(played.reward, played.success_reward), turn.ending

    assert asyncio.run(play_planned()) == (is_solved, "success" if is_solved else "")


class Watched(EchoEnv):
    """Reports harm in the turns that say blue."""

    async def astep(self, action):
        observation, reward, terminated, truncated, info = await super().astep(action)
        info["safety_events"] = ["mining"] if "blue" in action else []
        return observation, reward, terminated, truncated, info


def test_harm_that_the_environment_reports_stands_at_its_turn():
    trajectory = play(ScriptedEngine(["red", "blue", "done"]), Watched("copy/1"))
    assert [chunk.events for chunk in trajectory.chunks] == [[], ["mining"], []]
