"""Wrappers: the observations that gem's make, episode statistics, transparency."""

import asyncio
import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.gem import EnvWrapper, EpisodeTrackingWrapper, ObservationWrapper
from envs.gem.tools import BM25Index
from envs.gem.wrapper_factory import INDEX_REQUIRED, WRAPPER_FACTORY, get_wrapper_fns
from tests.envs.gem.worlds import AsyncCounter, Counter


class Tokenizer:
    """A chat template that can be read back."""

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt):
        assert tokenize is False and add_generation_prompt is True
        return (
            "".join(f"<{message['role']}>{message['content']}" for message in conversation)
            + "<assistant>"
        )


def test_concat_puts_observations_on_lines():
    env = ObservationWrapper(Counter(), include_action=False, include_chat_template=False)
    assert env.reset(seed=4)[0] == "start 4\n[0]"
    assert env.step("go")[0] == "start 4\ngo at 1\n[1]"


def test_concat_with_action_puts_actions_between_them():
    env = ObservationWrapper(Counter(), include_action=True, include_chat_template=False)
    env.reset(seed=4)
    env.step("go")
    assert env.step("on\n")[0] == "start 4\ngo\ngo at 1\non\non\n at 2\n[2]"


def test_a_chat_has_the_roles_in_turn():
    env = ObservationWrapper(Counter(), tokenizer=Tokenizer())
    assert env.reset(seed=4)[0] == "<user>start 4<assistant>[0]"
    assert env.step("go")[0] == "<user>start 4<assistant>go<user>go at 1<assistant>[1]"


def test_the_template_on_reset_only():
    env = ObservationWrapper(
        Counter(),
        include_chat_template=False,
        apply_chat_template_on_reset=True,
        tokenizer=Tokenizer(),
    )
    assert env.reset(seed=4)[0] == "<user>start 4<assistant>\n[0]"
    assert env.step("go")[0] == "<user>start 4<assistant>\ngo\ngo at 1\n[1]"


class Chatty(Counter):
    """Says what of the action counts, and that a tool answered."""

    def step(self, action):
        observation, *rest, info = super().step(action)
        return (
            observation,
            *rest,
            {**info, "parsed_action": "PARSED", "use_tool": True, "prefix": ">>"},
        )


def test_the_history_has_parsed_actions_tool_turns_and_this_turns_prefix():
    env = ObservationWrapper(Chatty(), tokenizer=Tokenizer())
    env.reset(seed=1)
    assert env.step("raw")[0] == ">><user>start 1<assistant>PARSED<tool>raw at 1<assistant>[1]"


@given(length=st.integers(1, 4), steps=st.integers(0, 8))
def test_a_bounded_history_is_the_end_of_the_whole_one(length, steps):
    short = ObservationWrapper(
        Counter(length=0), include_chat_template=False, max_history_length=length
    )
    whole = ObservationWrapper(Counter(length=0), include_chat_template=False)
    seen = [short.reset(seed=1)[0], whole.reset(seed=1)[0]]
    for _ in range(steps):
        seen = [short.step("a")[0], whole.step("a")[0]]
    assert seen[1].endswith(seen[0])
    assert seen[0].count("\n") == 1 + 2 * min(length, steps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenizer": None, "apply_chat_template_on_reset": True, "include_chat_template": False},
        {"tokenizer": Tokenizer(), "apply_chat_template_on_reset": True},
        {"tokenizer": Tokenizer(), "include_action": False},
    ],
)
def test_impossible_combinations_are_refused(options):
    with pytest.raises(ValueError):
        ObservationWrapper(Counter(), **options)


def test_episode_tracking_counts_and_remembers_the_last_episode():
    env = EpisodeTrackingWrapper(Counter(length=2))
    env.reset(3)
    env.step("a")
    info = env.step("b")[4]
    assert (info["step_counter"], info["cumulative_rewards"]) == (2, 1.0)
    info = env.reset()[1]
    assert (
        info["step_counter"],
        info["cumulative_rewards"],
        info["prev_ep_step_counter"],
        info["prev_ep_cumulative_rewards"],
    ) == (0, 0.0, 2, 1.0)


def test_a_wrapper_shows_the_environments_attributes_as_they_are_now():
    env = EpisodeTrackingWrapper(EnvWrapper(Counter()))
    env.reset(seed=1)
    env.step("a")
    assert (
        env.turn == 1 == env.unwrapped.turn
        and env.sample_random_action() == "go"
        and "turn" in dir(env)
    )
    with pytest.raises(AttributeError, match="nothing"):
        _ = env.nothing
    env.close()
    assert env.unwrapped.closed == 1


def test_wrapped_environments_can_be_copied_pickled_and_spawned():
    env = EpisodeTrackingWrapper(ObservationWrapper(Counter(), include_chat_template=False))
    env.reset(seed=1)
    env.step("a")
    expected = copy.deepcopy(env).step("b")
    assert (
        copy.deepcopy(env).step("b")
        == expected
        == pickle.loads(pickle.dumps(env)).step("b")
        == env.spawn(same_state=True).step("b")
    )
    assert env.spawn(seed=8).reset()[0] == "start 8\n[0]"
    assert env.step("b") == expected


def test_coroutines_do_what_the_methods_do():
    async def play(env):
        return [await env.areset(5), await env.astep("a"), await env.astep("b"), await env.aclose()]

    env = EpisodeTrackingWrapper(ObservationWrapper(AsyncCounter(), include_chat_template=False))
    plain = EpisodeTrackingWrapper(ObservationWrapper(Counter(), include_chat_template=False))
    results = asyncio.run(play(env))
    for result in results[1:3]:
        assert result[4].pop("thread") == "MainThread"
    assert results == [plain.reset(5), plain.step("a"), plain.step("b"), plain.close()]


def test_wrappers_by_name():
    index = BM25Index([("a", "b")])
    for name in [*WRAPPER_FACTORY, *INDEX_REQUIRED]:
        env = Counter()
        for wrapper in get_wrapper_fns(
            f"{name},episode_tracking", tokenizer=Tokenizer(), index=index
        ):
            env = wrapper(env)
        assert isinstance(env, EpisodeTrackingWrapper) and isinstance(env.env, EnvWrapper)
        env.reset(seed=0)
        assert env.step("plain words")[4]["step_counter"] == 1
    assert get_wrapper_fns("") == []
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        get_wrapper_fns("concat, nonsense")
    with pytest.raises(ValueError, match="index="):
        get_wrapper_fns("search_tool")
