"""Vectors do what their environments do one by one, in a loop, in threads and as coroutines, and
lose no episode's end.
"""

import asyncio
import threading

import numpy as np
import pytest

from envs.games import FrozenLake
from envs.gem import (
    AsyncioVectorEnv,
    AsyncVectorEnv,
    AutoresetMode,
    EpisodeTrackingWrapper,
    SyncVectorEnv,
    make,
    make_vec,
)
from envs.gem.core import is_async
from tests.envs.gem.worlds import AsyncCounter, Counter

KINDS = [SyncVectorEnv, AsyncVectorEnv, AsyncioVectorEnv]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def vector(kind, envs, **options):
    return kind(["x"] * len(envs), [lambda env=env: env for env in envs], **options)


def test_a_vector_of_games_plays_like_the_games_alone(kind):
    seeds = [3, 4, 5]
    alone = [make("game/frozen_lake", seed=seed) for seed in seeds]
    together = vector(kind, [make("game/frozen_lake", seed=seed) for seed in seeds])
    observations, infos = together.reset(seed=seeds)
    for env, seed, *begun in zip(alone, seeds, observations, infos, strict=True):
        assert tuple(begun) == env.reset(seed=seed)
    for _ in range(40):
        actions = [env.sample_random_action() for env in alone]
        observations, rewards, terminated, truncated, infos = together.step(actions)
        for i, env in enumerate(alone):
            observation, reward, ended, cut, info = env.step(actions[i])
            assert (rewards[i], terminated[i], truncated[i]) == (reward, ended, cut)
            if ended or cut:
                assert (infos[i].pop("final_obs"), infos[i].pop("final_info")) == (
                    observation,
                    info,
                )
                observation, info = env.reset()
            assert (observations[i], infos[i]) == (observation, info)
    together.close()


def test_same_step_keeps_the_end_of_the_episode(kind):
    together = vector(kind, [Counter(length=2), Counter(length=5)])
    together.reset(seed=10)
    together.step(["a", "a"])
    observations, rewards, terminated, truncated, infos = together.step(["b", "b"])
    assert (
        observations == ["start 10", "b at 2"]
        and rewards.tolist() == [1.0, 0.0]
        and terminated.tolist() == [True, False]
        and not truncated.any()
    )
    assert infos[0] == {
        "suffix": "[0]",
        "final_obs": "b at 2",
        "final_info": {"suffix": "[2]", "seed": 10, "last": True},
    }
    assert "final_obs" not in infos[1]
    assert (rewards.dtype, terminated.dtype) == (np.float64, np.bool_)


def test_next_step_resets_with_the_step_after_the_end(kind):
    together = vector(kind, [Counter(length=1), Counter(length=3)], autoreset_mode="NextStep")
    together.reset(seed=0)
    first = together.step(["a", "a"])
    assert first[0] == ["a at 1", "a at 1"] and first[2].tolist() == [True, False]
    second = together.step({1: "b"})  # the one that ended waits for its own turn
    assert second[0] == ["b at 2"]
    third = together.step(["ignored", "c"])
    assert (
        third[0] == ["start 0", "c at 3"]
        and third[1].tolist() == [0.0, 1.0]
        and third[2].tolist() == [False, True]
    )
    assert together.autoreset_mode is AutoresetMode.NEXT_STEP


def test_some_of_the_environments_can_be_stepped_in_any_order(kind):
    together = vector(kind, [Counter(length=9) for _ in range(4)])
    together.reset(seed=0)
    observations, rewards, *_, infos = together.step({3: "x", 1: "y"})
    assert (
        observations == ["x at 1", "y at 1"]
        and [info["seed"] for info in infos] == [3, 1]
        and len(rewards) == 2
    )
    assert [env.turn for env in together.envs] == [0, 1, 0, 1]
    assert together.step({})[0] == []


def test_wrong_actions_and_seeds_are_refused(kind):
    together = vector(kind, [Counter(), Counter()])
    for actions in (["a"], ["a"] * 3, "ab", {2: "a"}, {-1: "a"}):
        with pytest.raises(ValueError, match=r"2 environments|0 to 1"):
            together.step(actions)
    with pytest.raises(ValueError, match="3 seeds"):
        together.reset(seed=[1, 2, 3])


def test_threads_and_coroutines_run_beside_each_other():
    barrier = threading.Barrier(3, timeout=60)

    class Meets(Counter):
        def step(self, action):
            barrier.wait()
            return super().step(action)

    for kind in (AsyncVectorEnv, AsyncioVectorEnv):
        together = vector(kind, [Meets() for _ in range(3)])
        together.reset()
        assert together.step(["a"] * 3)[0] == ["a at 1"] * 3
        together.close()


def test_an_environments_error_comes_after_the_others_are_done(kind):
    class Fails(Counter):
        def step(self, action):
            raise KeyError("mine")

    together = vector(kind, [Counter(), Fails(), Counter()])
    together.reset()
    with pytest.raises(KeyError, match="mine"):
        together.step(["a"] * 3)
    assert together.envs[2].turn == (0 if kind is SyncVectorEnv else 1)


def test_a_vector_does_not_wait_for_ever():
    release = threading.Event()

    class Hangs(Counter):
        def step(self, action):
            release.wait(60)
            return super().step(action)

    for kind in (AsyncVectorEnv, AsyncioVectorEnv):
        release.clear()
        together = vector(kind, [Counter(), Hangs()], timeout_seconds=1.0)
        together.reset()
        with pytest.raises(TimeoutError):
            together.step(["a", "a"])
        release.set()


def test_close_closes_each(kind):
    together = vector(kind, [Counter(), Counter()])
    together.reset()
    together.close()
    assert [env.closed for env in together.envs] == [1, 1]


def test_make_vec_gives_each_its_seed_and_wraps_it():
    ids, own = ["game/wordle", "game/frozen_lake", "game/wordle"], [{}, {"seed": 90, "size": 5}, {}]
    made = make_vec(
        ids, wrappers=[EpisodeTrackingWrapper], vec_kwargs=own, seed=7, state_in="observation"
    )
    assert isinstance(made, SyncVectorEnv)
    _, infos = made.reset()
    assert [info["seed"] for info in infos] == [7, 90, 9]
    assert (
        isinstance(made.envs[1].unwrapped, FrozenLake)
        and made.envs[1].size == 5
        and all(env.state_in == "observation" for env in made.envs)
    )
    assert made.step([env.sample_random_action() for env in made.envs])[4][0]["step_counter"] == 1
    with pytest.raises(ValueError, match="vec_kwargs"):
        make_vec("game/wordle", vec_kwargs=[{}, {}])


def test_make_vec_takes_coroutines_only_where_all_have_them():
    both = make_vec(["game/wordle"] * 2, async_mode=True, wrappers=[EpisodeTrackingWrapper])
    assert isinstance(both, AsyncioVectorEnv) and len(both.env_fns) == 2

    class Mine(EpisodeTrackingWrapper):
        def step(self, action):  # as code written for gem does: no astep
            observation, *rest = super().step(action)
            return observation + "!", *rest

    threads = make_vec(["game/wordle"] * 2, async_mode=True, wrappers=[Mine])
    assert isinstance(threads, AsyncVectorEnv)
    threads.reset()
    assert all(observation.endswith("!") for observation in threads.step(["about", "about"])[0])
    threads.close()


def test_coroutines_run_on_the_callers_loop():
    async def main():
        together = vector(AsyncioVectorEnv, [AsyncCounter(), AsyncCounter()])
        await together.areset(seed=1)
        *_, infos = await together.astep(["a", "a"])
        await together.aclose()
        return together, infos

    together, infos = asyncio.run(main())
    assert [info["thread"] for info in infos] == [threading.current_thread().name] * 2
    assert [env.closed for env in together.envs] == [1, 1]


def test_a_subclass_that_overrides_step_does_not_inherit_astep():
    class Louder(AsyncCounter):
        def step(self, action):
            return super().step(action.upper())

    assert is_async(AsyncCounter()) and not is_async(Louder()) and not is_async(Counter())
    louder = Louder()
    louder.reset()
    assert asyncio.run(louder.astep("a"))[0] == "A at 1"
