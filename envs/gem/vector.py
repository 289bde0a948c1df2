"""Many environments stepped as one: in a loop, in threads, or as coroutines; and make_vec.

    vector = make_vec(["game/frozen_lake"] * 64, seed=0)
    observations, infos = vector.reset()
    observations, rewards, terminated, truncated, infos = vector.step(actions)

As in gem-llm, actions are a list (one for each environment) or a dict {index: action} for some of
them, results are lists and arrays in that order, and an environment whose episode has ended is
reset in the same step (SAME_STEP) or by the next one (NEXT_STEP). Unlike gem-llm, a same-step reset
loses nothing: the last observation and info of the ended episode are `info["final_obs"]` and
`info["final_info"]`, as in gymnasium.

Text games run fastest in SyncVectorEnv; threads and coroutines are for environments that wait for
sandboxes or servers.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
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

# (observations, rewards, terminated, truncated, infos)
Batch = tuple[list[Any], np.ndarray, np.ndarray, np.ndarray, list[Info]]
# An Env at run time, as in gem-llm. Type checkers must not see that: batches are no valid results
# of an Env.
_Base: type = Env


class AutoresetMode(enum.Enum):
    """When an environment whose episode has ended begins the next one."""

    # its next step ignores the action and returns the reset's observation with reward 0
    NEXT_STEP = "NextStep"
    # the step that ends the episode returns the next episode's first observation
    SAME_STEP = "SameStep"


class VectorEnv(_Base):
    """Several environments that are reset and stepped together.

    Subclasses decide how a list of calls is made (`_call_all`).

    Args:
      env_ids: names of the environments, for messages.
      env_fns: builds each environment.
      autoreset_mode: when an ended environment is reset; a value or a member of AutoresetMode.
      timeout_seconds: seconds for one reset or step of all environments together, after which
        TimeoutError is raised. SyncVectorEnv cannot be interrupted so.
    """

    def __init__(
        self,
        env_ids: Sequence[str],
        env_fns: Sequence[Callable[[], Env]],
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.env_ids = list(env_ids)
        self.env_fns: list[Callable[[], Env]] = list(env_fns)
        self.envs = [env_fn() for env_fn in env_fns]
        self.num_envs = len(self.envs)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.timeout_seconds = timeout_seconds
        self._ended = np.zeros(self.num_envs, np.bool_)

    def reset(self, seed: int | Sequence[int | None] | None = None) -> tuple[list[Any], list[Info]]:
        """Begin an episode in each environment.

        Args:
          seed: one seed for each environment; or an integer, which gives environment i the seed
            `seed + i`; or None to let the environments choose.

        Returns:
          First observations and infos, in the order of the environments.
        """
        calls = []
        for env, own_seed in zip(self.envs, self._seeds(seed), strict=True):
            calls.append(partial(env.reset, seed=own_seed))
        return self._begin(self._call_all(calls))

    def step(self, actions: Sequence[Any] | Mapping[int, Any]) -> Batch:
        """Play one turn in each environment, or in some of them.

        Args:
          actions: one for each environment, or a dict of index to action.

        Returns:
          (observations, rewards, terminated, truncated, infos) in the order of the actions.
          Rewards are float64, the two flags bool arrays.

        Raises:
          ValueError: the number of actions is wrong, or there is no environment of an index.
        """
        chosen = self._choose(actions)
        calls = [partial(self._advance, index, action) for index, action in chosen.items()]
        return self._collect(chosen, self._call_all(calls))

    def close(self) -> None:
        """Close all environments."""
        for env in self.envs:
            if hasattr(env, "close"):
                env.close()

    def sample_random_action(self) -> list[Any]:
        """Return a random action for each environment."""
        return [env.sample_random_action() for env in self.envs]

    # -- for subclasses

    def _call_all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Make all calls and return their results in order."""
        raise NotImplementedError

    # -- shared parts

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
        observations = [observation for observation, _ in results]
        infos = [info for _, info in results]
        return observations, infos

    def _choose(self, actions: Sequence[Any] | Mapping[int, Any]) -> dict[int, Any]:
        if isinstance(actions, Mapping):
            for index in actions:
                if index not in range(self.num_envs):
                    raise ValueError(
                        f"action for environment {index!r}; there are 0 to {self.num_envs - 1}"
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
        if self._is_reset_due(index):
            return _as_step(env.reset())
        result = env.step(action)
        if self._resets_now(result):
            return _with_next_episode(result, env.reset())
        return result

    def _is_reset_due(self, index: int) -> bool:
        return self.autoreset_mode is AutoresetMode.NEXT_STEP and bool(self._ended[index])

    def _resets_now(self, result: StepResult) -> bool:
        _, _, terminated, truncated, _ = result
        return self.autoreset_mode is AutoresetMode.SAME_STEP and bool(terminated or truncated)

    def _collect(self, chosen: Mapping[int, Any], results: list[StepResult]) -> Batch:
        observations = []
        infos = []
        rewards = np.zeros(len(results), np.float64)
        terminated = np.zeros(len(results), np.bool_)
        truncated = np.zeros(len(results), np.bool_)
        for row, result in enumerate(results):
            observation, rewards[row], terminated[row], truncated[row], info = result
            observations.append(observation)
            infos.append(info)
        self._ended[list(chosen)] = terminated | truncated
        return observations, rewards, terminated, truncated, infos


class SyncVectorEnv(VectorEnv):
    """A vector that steps its environments one after the other, in the caller's thread."""

    def _call_all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        return [call() for call in calls]


class AsyncVectorEnv(VectorEnv):
    """A vector that steps each environment in a thread of its own (the name is gem-llm's).

    An environment's error is raised when all others are done.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pool = ThreadPoolExecutor(
            max_workers=max(1, self.num_envs), thread_name_prefix="gem-vector"
        )

    def _call_all(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        futures = [self._pool.submit(call) for call in calls]
        _, waiting = wait(futures, self.timeout_seconds, ALL_COMPLETED)
        if waiting:
            raise TimeoutError(
                f"{len(waiting)} of {len(calls)} environments did not answer within"
                f" {self.timeout_seconds:g} s; close the vector"
            )
        return [future.result() for future in futures]

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)


class AsyncioVectorEnv(VectorEnv):
    """A vector that steps its environments as coroutines of one event loop.

    It is for environments with an `astep` of their own. The synchronous methods use the background
    loop of envs.rock.sync. A sandbox belongs to the loop that started it: use either `reset` and
    `step`, or `areset` and `astep`, not both.
    """

    def reset(self, seed: int | Sequence[int | None] | None = None) -> tuple[list[Any], list[Info]]:
        return run(self.areset(seed), self.timeout_seconds)

    def step(self, actions: Sequence[Any] | Mapping[int, Any]) -> Batch:
        return run(self.astep(actions), self.timeout_seconds)

    def close(self) -> None:
        run(self.aclose(), self.timeout_seconds)

    async def areset(
        self, seed: int | Sequence[int | None] | None = None
    ) -> tuple[list[Any], list[Info]]:
        """Begin an episode in each environment. See `VectorEnv.reset`."""
        resets = []
        for env, own_seed in zip(self.envs, self._seeds(seed), strict=True):
            resets.append(reset_async(env, own_seed))
        return self._begin(await _gather(resets))

    async def astep(self, actions: Sequence[Any] | Mapping[int, Any]) -> Batch:
        """Play one turn in each environment, or in some of them. See `VectorEnv.step`."""
        chosen = self._choose(actions)
        steps = [self._aadvance(index, action) for index, action in chosen.items()]
        return self._collect(chosen, await _gather(steps))

    async def aclose(self) -> None:
        """Close all environments."""
        await _gather([close_async(env) for env in self.envs])

    async def _aadvance(self, index: int, action: Any) -> StepResult:
        env = self.envs[index]
        if self._is_reset_due(index):
            return _as_step(await reset_async(env))
        result = await step_async(env, action)
        if self._resets_now(result):
            return _with_next_episode(result, await reset_async(env))
        return result


async def _gather(coroutines: list[Any]) -> list[Any]:
    """Await all to their end, then raise the first error if there was one.

    So no environment is left in the middle of a step.
    """
    results = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _as_step(beginning: tuple[Any, Info]) -> StepResult:
    """Return the beginning of an episode as the result of a step."""
    observation, info = beginning
    return observation, 0.0, False, False, info


def _with_next_episode(ended: StepResult, beginning: tuple[Any, Info]) -> StepResult:
    """Return the step that ended an episode, with the beginning of the next one."""
    last_observation, reward, terminated, truncated, last_info = ended
    observation, info = beginning
    merged = {**info, "final_obs": last_observation, "final_info": last_info}
    return observation, reward, terminated, truncated, merged


def make_vec(
    env_ids: str | Sequence[str],
    wrappers: Sequence[Callable[[Env], Env]] | None = None,
    vec_kwargs: Sequence[Mapping[str, Any]] | None = None,
    async_mode: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> VectorEnv:
    """Build a vector of registered environments.

    Args:
      env_ids: their names; one name for a vector of one.
      wrappers: applied to each environment, the innermost first (see
        wrapper_factory.get_wrapper_fns).
      vec_kwargs: constructor arguments for each environment.
      async_mode: step them at the same time: as coroutines if every environment and wrapper has
        them, else in threads. False: one after the other.
      seed: environment i is constructed with seed + i, unless its vec_kwargs name a seed.
      **kwargs: constructor arguments for all environments; they override vec_kwargs.

    Raises:
      ValueError: vec_kwargs has another length than env_ids, or a name is unknown.
    """
    ids = [env_ids] if isinstance(env_ids, str) else list(env_ids)
    if vec_kwargs is not None and len(vec_kwargs) != len(ids):
        raise ValueError(f"vec_kwargs has {len(vec_kwargs)} entries for {len(ids)} environments")

    def build(index: int) -> Env:
        own_kwargs = vec_kwargs[index] if vec_kwargs is not None else {}
        arguments = {"seed": seed + index, **own_kwargs, **kwargs}
        env = make(ids[index], **arguments)
        for wrapper in wrappers or ():
            env = wrapper(env)
        return env

    builders: list[Callable[[], Env]] = [partial(build, index) for index in range(len(ids))]
    if not async_mode:
        return SyncVectorEnv(ids, builders)
    # the environments themselves decide which kind of vector they need; they are built only once
    envs = [builder() for builder in builders]
    kind = AsyncioVectorEnv if all(map(is_async, envs)) else AsyncVectorEnv
    vector = kind(ids, [partial(_identity, env) for env in envs])
    vector.env_fns = builders
    return vector


def _identity(env: Env) -> Env:
    return env
