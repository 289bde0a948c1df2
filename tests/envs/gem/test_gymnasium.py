"""gymnasium both ways: its own checker and vectors over our environments, and its environments as
ours.
"""

import copy
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import envs.tasks.terminal  # noqa: F401  (registers the terminal families)
from envs.games import GAMES
from envs.gem import make
from envs.gem.gymnasium import FromGymnasium, ToGymnasium
from envs.gem.text_space import AnyText, _create, _read, _write
from envs.rock import SandboxConfig
from tests.envs.gem.worlds import Counter


@pytest.mark.parametrize("name", sorted(GAMES))
def test_our_games_pass_gymnasiums_checker(name):
    gymnasium.register(
        "gem-test-v0",
        entry_point=lambda render_mode=None: ToGymnasium(
            make(name, state_in="observation"), render_mode
        ),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(gymnasium.make("gem-test-v0", disable_env_checker=True).unwrapped)
    finally:
        gymnasium.registry.pop("gem-test-v0")


def test_sandboxed_tasks_pass_it_too():
    env = make("terminal/count", sandbox_config=SandboxConfig(isolation="best_available"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        warnings.filterwarnings("ignore", message=".*not having a spec")
        check_env(ToGymnasium(env))
    env.close()


def builders(n=3):
    return [lambda: ToGymnasium(make("game/sokoban", state_in="observation")) for _ in range(n)]


@pytest.mark.parametrize(
    "build",
    [
        lambda: gymnasium.vector.SyncVectorEnv(builders()),
        pytest.param(
            lambda: gymnasium.vector.AsyncVectorEnv(builders(), shared_memory=True),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: gymnasium.vector.AsyncVectorEnv(builders(), shared_memory=False),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gymnasiums_vectors_run_our_games(build):
    alone = [make("game/sokoban", state_in="observation") for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads
        vector = build()
    try:
        observations, _ = vector.reset(seed=[5, 6, 7])
        for env, seed, observation in zip(alone, (5, 6, 7), observations, strict=True):
            assert observation == env.reset(seed=seed)[0]
        for action in ("Up", "Left", "nonsense √", "Down"):
            observations, rewards, terminated, truncated, _ = vector.step((action,) * 3)
            expected = [env.step(action) for env in alone]
            assert observations == tuple(one[0] for one in expected)
            np.testing.assert_allclose(rewards, [one[1] for one in expected])
            assert not (terminated | truncated).any()
    finally:
        vector.close()


class _Memory:
    """What multiprocessing's Array is to the space, without a second process."""

    def __init__(self, kind, size):
        self._data = np.zeros(size, np.uint8)

    def get_obj(self):
        return self._data

    Array = classmethod(lambda cls, kind, size: cls(kind, size))


@given(texts=st.lists(st.text(st.characters(), max_size=20), min_size=1, max_size=4))
def test_any_text_goes_through_shared_memory(texts):
    space = AnyText(20)
    memory = _create(space, len(texts), _Memory)
    view = _read(space, memory, len(texts))
    for index, text in enumerate(texts):
        assert text in space
        _write(space, index, text, memory)
    assert copy.deepcopy(view) == tuple(texts) == view[:]


def test_text_spaces():
    space = AnyText(5, seed=1)
    assert all(space.sample() in space for _ in range(50))
    assert "123456" not in space and 5 not in space and "√é\ud800" in space
    assert space == AnyText(5) != AnyText(6)
    shown, *_ = ToGymnasium(Counter(), max_text=7).reset(seed=12345678)
    assert shown == "2345678"  # the newest of a long text
    env = ToGymnasium(Counter(), render_mode="ansi")
    env.reset(seed=3)
    assert env.render() == "start 3"


def test_frozen_lake_of_gymnasium_is_a_gem_environment():
    reference = gymnasium.make("FrozenLake-v1", is_slippery=False)
    env = FromGymnasium(
        "FrozenLake-v1", action_names=["Left", "Down", "Right", "Up"], is_slippery=False
    )
    observation, info = env.reset(seed=1)
    assert observation.endswith("\n0") and "Left, Down, Right, Up" in observation
    reference.reset(seed=1)
    for text, action in {
        "<answer>down</answer>": 1,
        "\\boxed{1}": 1,
        "2": 2,
        "I say <answer>Right</answer><answer>Down</answer>": 1,
    }.items():
        observation, reward, terminated, truncated, info = env.step(text)
        there = reference.step(action)
        assert (observation, reward, terminated, truncated) == (
            str(there[0]),
            *there[1:4],
        ) and info["prob"] == there[4]["prob"]
    twin = env.spawn(same_state=True)
    *_, info = env.step("Down")
    assert twin.step("Down")[4] == info and "ending" not in info
    assert "ending" not in env.step("Right")[4]
    _, reward, terminated, _, info = env.step("Right")
    assert terminated and reward == 1.0 and "ending" not in info
    env.close()


@given(
    text=st.text()
    | st.sampled_from(
        [
            "4",
            "-1",
            "--1",
            "9" * 5000,
            "٣",
            "<answer>",
            "</answer><answer>",
            "\\boxed{}",
            "1.0",
            "True",
        ]
    )
)
def test_any_text_is_an_action_for_them_too(text):
    env = FromGymnasium(gymnasium.make("FrozenLake-v1", render_mode="ansi"), max_turns=3)
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(text)
    valid = text.strip() in ("0", "1", "2", "3")
    assert info["metrics"]["action_is_valid"] is valid
    assert valid or (
        "0 to 3" in observation and (reward, terminated, truncated) == (0.0, False, False)
    )


def test_turns_without_an_action_end_at_max_turns():
    env = FromGymnasium(
        "CartPole-v1", max_turns=3, describe=lambda observation: f"{len(observation)} numbers"
    )
    assert env.reset(seed=0)[0].endswith("4 numbers") and env.task.name == "CartPole-v1/0"
    assert [env.step("what?")[3] for _ in range(2)] == [False, False]
    *_, truncated, info = env.step("what?")
    assert truncated and info["ending"] == "truncated_turns"
    assert env.sample_random_action() in ("<answer>0</answer>", "<answer>1</answer>")


class Parrot(gymnasium.Env):
    """Text in, text out."""

    action_space, observation_space = spaces.Text(5, charset="abc"), spaces.Text(20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "say", {}

    def step(self, action):
        return action[::-1], len(action), False, False, {}


def test_text_actions_are_taken_from_the_answer():
    env = FromGymnasium(Parrot(), instruction="Speak.")
    assert env.reset()[0] == "Speak.\nsay"
    assert env.step("hm <answer>abc</answer>")[:2] == ("cba", 3.0)
    assert env.step("xyz")[4]["status"] == "malformed"
    assert env.sample_random_action() in env.gymnasium_env.action_space


def test_other_spaces_and_wrong_names_are_refused():
    with pytest.raises(ValueError, match="Box"):
        FromGymnasium("Pendulum-v1")
    with pytest.raises(ValueError, match="action_names"):
        FromGymnasium("CartPole-v1", action_names=["left"])


def test_both_ways_and_back():
    there = FromGymnasium(ToGymnasium(make("game/tower_of_hanoi")), instruction="x")
    here = make("game/tower_of_hanoi")
    assert there.reset(seed=2)[0] == "x\n" + here.reset(seed=2)[0]
    action = here.demonstrator_action()
    content = action.removeprefix("<answer>").removesuffix("</answer>")
    assert there.step(action)[:4] == here.step(content)[:4]
