"""Many environments stepped as one: in a loop, in threads, or as coroutines; and make_vec.

As in gem: actions are a list (one for each environment) or a dict {index: action} for some of them,
results are lists and arrays in that order, and an environment that ended is reset in the same step
(SAME_STEP) or by the next one (NEXT_STEP). Unlike gem, a same-step reset loses nothing: the last
observation and info of the episode that ended are `info["final_obs"]` and `info["final_info"]`
(gymnasium's names).

64 text games run fastest in SyncVectorEnv; threads and coroutines are for environments that wait
(sandboxes, servers).
"""

from __future__ import annotations

import asyncio
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from envs.gem.core import (
    Env,
    Info,
    StepResult,
    close_async,
    is_async,
    make,
    reset_async,
    step_async,
)
from envs.rock.sync import run

Batch = tuple[list[Any], np.ndarray, np.ndarray, np.ndarray, list[Info]]


class AutoresetMode(enum.Enum):
    """When an environment that ended begins its next episode."""

    # its next step ignores the action and returns the reset's observation with reward 0
    NEXT_STEP = "NextStep"
    SAME_STEP = "SameStep"  # the step that ends it returns the next episode's first observation


class VectorEnv(Env):
    """What the three kinds share; a kind says how a list of calls is made (`_call_all`)."""

    def __init__(
        self,
        env_ids: Sequence[str],
        env_fns: Sequence[Callable[[], Env]],
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        timeout_s: float = 600.0,
    ) -> None:
        """timeout_s: bound of one reset or step of all environments together; then TimeoutError.

        A loop in this thread cannot be cut short.
        """
        self.env_ids, self.env_fns = list(env_ids), list(env_fns)
        self.envs = [env_fn() for env_fn in env_fns]
        self.num_envs = len(self.envs)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.timeout_s = timeout_s
        self._ended = np.zeros(self.num_envs, np.bool_)

    def reset(self, seed: int | Sequence[int | None] | None = None) -> tuple[list[Any], list[Info]]:
        """Begins an episode in each. An integer seed gives environment i the seed `seed + i`."""
        results = self._call_all(
            [
                functools.partial(env.reset, seed=one)
                for env, one in zip(self.envs, self._seeds(seed))
            ]
        )
        return self._begin(results)

    def step(self, actions: Sequence[Any] | Mapping[int, Any]) -> Batch:
        """Observations, rewards (float64), terminated and truncated (bool) and infos, in the order
        of the actions.
        """
        chosen = self._choose(actions)
        calls = [
            functools.partial(self._advance, index, action) for index, action in chosen.items()
        ]
        return self._collect(chosen, self._call_all(calls))

    def close(self) -> None:
        for env in self.envs:
            getattr(env, "close", lambda: None)()

    def sample_random_action(self) -> list[Any]:
        return [env.sample_random_action() for env in self.envs]

    # -- what a kind brings
    # ---------------------------------------------------------------------------------------------

    def _call_all(self, calls: list[Callable[[], Any]]) -> list[Any]:
        raise NotImplementedError

    # -- shared parts
    # ---------------------------------------------------------------------------------------------

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + index for index in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(
                f"{len(seed)} seeds for {self.num_envs} environments; give one for each"
            )
        return list(seed)

    def _begin(self, results: list[tuple[Any, Info]]) -> tuple[list[Any], list[Info]]:
        self._ended[:] = False
        return [obs for obs, _ in results], [info for _, info in results]

    def _choose(self, actions: Sequence[Any] | Mapping[int, Any]) -> dict[int, Any]:
        if isinstance(actions, Mapping):
            if wrong := [index for index in actions if index not in range(self.num_envs)]:
                raise ValueError(
                    f"action for environment {wrong[0]!r}; there are 0 to {self.num_envs - 1}"
                )
            return dict(actions)
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise ValueError(
                f"{len(actions)} actions for {self.num_envs} environments; give one for each, or a"
                " dict of index to action"
            )
        return dict(enumerate(actions))

    def _advance(self, index: int, action: Any) -> StepResult:
        env = self.envs[index]
        if self._due(index):
            return _first(env.reset())
        result = env.step(action)
        return _with_first(result, env.reset()) if self._resets_now(result) else result

    def _due(self, index: int) -> bool:
        return self.autoreset_mode is AutoresetMode.NEXT_STEP and bool(self._ended[index])

    def _resets_now(self, result: StepResult) -> bool:
        return self.autoreset_mode is AutoresetMode.SAME_STEP and bool(result[2] or result[3])

    def _collect(self, chosen: dict[int, Any], results: list[StepResult]) -> Batch:
        observations, rewards, terminated, truncated, infos = (
            map(list, zip(*results)) if results else ([], [], [], [], [])
        )
        terminations, truncations = np.array(terminated, np.bool_), np.array(truncated, np.bool_)
        self._ended[list(chosen)] = terminations | truncations
        return observations, np.array(rewards, np.float64), terminations, truncations, infos


class SyncVectorEnv(VectorEnv):
    """One after the other, in the caller's thread."""

    def _call_all(self, calls: list[Callable[[], Any]]) -> list[Any]:
        return [call() for call in calls]


class AsyncVectorEnv(VectorEnv):
    """Each environment in a thread of its own (gem's name for it).

    An environment's error is raised when all others are done.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pool = ThreadPoolExecutor(
            max_workers=max(1, self.num_envs), thread_name_prefix="gem-vector"
        )

    def _call_all(self, calls: list[Callable[[], Any]]) -> list[Any]:
        futures = [self._pool.submit(call) for call in calls]
        _, waiting = wait(futures, self.timeout_s, ALL_COMPLETED)
        if waiting:
            raise TimeoutError(
                f"{len(waiting)} of {len(calls)} environments did not answer within"
                f" {self.timeout_s:g} s; close the vector"
            )
        return [future.result() for future in futures]

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class AsyncioVectorEnv(VectorEnv):
    """Coroutines on one event loop, for environments with `astep`.

    The synchronous methods use ROCK's background loop.

    A sandbox belongs to the loop that started it: use either `reset` and `step` or `areset` and
    `astep`, not both.
    """

    def reset(self, seed: int | Sequence[int | None] | None = None) -> tuple[list[Any], list[Info]]:
        return run(self.areset(seed), self.timeout_s)

    def step(self, actions: Sequence[Any] | Mapping[int, Any]) -> Batch:
        return run(self.astep(actions), self.timeout_s)

    def close(self) -> None:
        run(self.aclose(), self.timeout_s)

    async def areset(
        self, seed: int | Sequence[int | None] | None = None
    ) -> tuple[list[Any], list[Info]]:
        return self._begin(
            await _gather([reset_async(env, one) for env, one in zip(self.envs, self._seeds(seed))])
        )

    async def astep(self, actions: Sequence[Any] | Mapping[int, Any]) -> Batch:
        chosen = self._choose(actions)
        return self._collect(
            chosen,
            await _gather([self._aadvance(index, action) for index, action in chosen.items()]),
        )

    async def aclose(self) -> None:
        await _gather([close_async(env) for env in self.envs])

    async def _aadvance(self, index: int, action: Any) -> StepResult:
        env = self.envs[index]
        if self._due(index):
            return _first(await reset_async(env))
        result = await step_async(env, action)
        return _with_first(result, await reset_async(env)) if self._resets_now(result) else result


async def _gather(coroutines: list[Any]) -> list[Any]:
    """All of them to their end, then the first error if there was one: no environment is left in
    the middle of a step.
    """
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _first(beginning: tuple[Any, Info]) -> StepResult:
    return beginning[0], 0.0, False, False, beginning[1]


def _with_first(ended: StepResult, beginning: tuple[Any, Info]) -> StepResult:
    """The step that ended an episode, with the next one's beginning."""
    obs, reward, terminated, truncated, info = ended
    return (
        beginning[0],
        reward,
        terminated,
        truncated,
        {**beginning[1], "final_obs": obs, "final_info": info},
    )


def make_vec(
    env_ids: str | Sequence[str],
    wrappers: Sequence[Callable[[Env], Env]] | None = None,
    vec_kwargs: Sequence[Mapping[str, Any]] | None = None,
    async_mode: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> VectorEnv:
    """A vector of registered environments, each wrapped from the inside out.

    Args:
      vec_kwargs: constructor arguments for each environment; `kwargs` are for all and win.
      async_mode: coroutines where every environment and wrapper has them, else threads; False: one
        after the other.
      seed: environment i is constructed with seed + i, unless its vec_kwargs name one.
    """
    env_ids = [env_ids] if isinstance(env_ids, str) else list(env_ids)
    if vec_kwargs is not None and len(vec_kwargs) != len(env_ids):
        raise ValueError(
            f"vec_kwargs has {len(vec_kwargs)} entries for {len(env_ids)} environments"
        )

    def build(index: int) -> Env:
        own = vec_kwargs[index] if vec_kwargs is not None else {}
        env = make(env_ids[index], **{"seed": seed + index, **own, **kwargs})
        for wrapper in wrappers or ():
            env = wrapper(env)
        return env

    builders = [functools.partial(build, index) for index in range(len(env_ids))]
    if not async_mode:
        return SyncVectorEnv(env_ids, builders)
    first = [
        builder() for builder in builders
    ]  # what they are decides how they run; they are not built twice
    kind = AsyncioVectorEnv if all(map(is_async, first)) else AsyncVectorEnv
    vector = kind(env_ids, [functools.partial(lambda env: env, env) for env in first])
    vector.env_fns = builders
    return vector
