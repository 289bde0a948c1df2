"""The environment interface of GEM: Env, register and make.

Code written for gem-llm 0.1.0 runs on these unchanged: `reset(seed) -> (observation, info)`,
`step(action) -> (observation, reward, terminated, truncated, info)`, and a registry of names. Where
gem-llm is installed, our Env is a subclass of its Env, registrations are passed on to it, and
`make` also knows its environments.

An environment whose work is asynchronous, such as one with a sandbox, overrides `areset`, `astep`
and `aclose`.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import importlib
import logging
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

Info = dict[str, Any]
StepResult = tuple[str, float, bool, bool, Info]


def _import_gem() -> ModuleType | None:
    """Import gem-llm if it is installed, and undo what its import does to the root logger."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    level = root.level
    try:
        found = importlib.import_module("gem")
        return found if hasattr(found, "Env") else None  # some other package or folder "gem"
    except ImportError:
        return None
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


_gem = _import_gem()
_Base: type = _gem.Env if _gem else abc.ABC
_ASYNC_TWINS = (("reset", "areset"), ("step", "astep"), ("close", "aclose"))


class UnplayableTaskError(ValueError):
    """A task is broken: its environment cannot be made, started or graded, whoever plays it."""


class Env(_Base):
    """An environment that talks in text.

    Observations and infos are plain data, so they can be deep-copied.

        class Echo(Env):
            def reset(self, seed=None):
                return "Say something.", {}

            def step(self, action):
                return f"You said {action}.", 1.0, True, False, {}

    Each of `reset`, `step` and `close` has an asynchronous twin, which by default runs it in a
    thread. A subclass overrides one of the two or both; if it overrides only the synchronous one,
    it gets the default twin and not its parent's.

    Attributes:
      env_id: the name under which `make` built it; "" otherwise.
    """

    env_id: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method, twin in _ASYNC_TWINS:
            if method in cls.__dict__ and twin not in cls.__dict__:
                setattr(cls, twin, getattr(Env, twin))

    @abc.abstractmethod
    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin an episode.

        As in gem-llm, `super().reset(seed)` seeds the global `random` and `numpy.random`; an
        environment with a generator of its own need not call it.

        Args:
          seed: the same seed begins the same episode; None lets the environment choose. Callers
            pass it by position or by keyword.

        Returns:
          The first observation, and an info.
        """
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
        return "", {}

    @abc.abstractmethod
    def step(self, action: str) -> StepResult:
        """Play one turn.

        Args:
          action: what the model wrote. Any text is allowed; none makes an environment raise.

        Returns:
          (observation, reward, terminated, truncated, info). `terminated` means that the episode
          has reached an end of its own, `truncated` that a limit cut it.
        """

    def sample_random_action(self) -> str:
        """Return some action that the environment accepts, for tests of wrappers and vectors."""
        raise NotImplementedError(f"{type(self).__name__} has no random action")

    def spawn(self, same_state: bool = False, **kwargs: Any) -> Env:
        """Return another environment of the same kind.

        Args:
          same_state: copy the running episode.
          **kwargs: constructor arguments to change.

        Raises:
          NotImplementedError: this kind of environment cannot be spawned, or not so.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be spawned (same_state={same_state})"
        )

    def close(self) -> None:
        """Free what the episode holds. Calling it twice is allowed."""

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin an episode without blocking the event loop. See `reset`."""
        return await asyncio.to_thread(self.reset, seed)

    async def astep(self, action: str) -> StepResult:
        """Play one turn without blocking the event loop. See `step`."""
        return await asyncio.to_thread(self.step, action)

    async def ajudge(self, ending: str) -> StepResult:
        """Judge the work as it stands: a limit of the agent's has ended the episode.

        An environment with a verifier overrides this: what is there counts, whatever ended the
        episode. Here nothing is left to judge, and the rewards so far stand.

        Args:
          ending: what ended it, such as "truncated_tokens" or "timeout"; stands in the info.

        Returns:
          As `step`; the reward is added to those of the steps.
        """
        return "", 0.0, False, True, {"ending": ending}

    async def aclose(self) -> None:
        """Free what the episode holds without blocking the event loop. See `close`."""
        await asyncio.to_thread(self.close)

    @property
    def unwrapped(self) -> Env:
        """The innermost environment of a stack of wrappers."""
        return self


# The functions below look the twins up on the class: gem-llm's wrappers copy the attributes of an
# environment onto themselves, and calling a copied `astep` would bypass the wrapper.


async def reset_async(env: Any, seed: int | None = None) -> tuple[str, Info]:
    """Begin an episode of any environment, gem-llm's included, without blocking the event loop."""
    twin = getattr(type(env), "areset", None)
    if twin is None:
        return await asyncio.to_thread(env.reset, seed)
    return await twin(env, seed)


async def step_async(env: Any, action: Any) -> StepResult:
    """Play one turn of any environment, gem-llm's included, without blocking the event loop."""
    twin = getattr(type(env), "astep", None)
    if twin is None:
        return await asyncio.to_thread(env.step, action)
    return await twin(env, action)


async def judge_async(env: Any, ending: str) -> StepResult:
    """Judge the work in any environment as it stands; in gem-llm's the rewards so far stand."""
    twin = getattr(type(env), "ajudge", Env.ajudge)
    return await twin(env, ending)


async def close_async(env: Any) -> None:
    """Close any environment; gem-llm's may lack `close`."""
    twin = getattr(type(env), "aclose", None)
    if twin:
        await twin(env)
    elif hasattr(env, "close"):
        await asyncio.to_thread(env.close)


def is_async(env: Any) -> bool:
    """Return whether an environment, and each wrapper around it, has an `astep` of its own."""
    if getattr(type(env), "astep", Env.astep) is Env.astep:
        return False
    inner = vars(env).get("env") if hasattr(env, "__dict__") else None
    return inner is None or is_async(inner)


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """A registered environment.

    Attributes:
      env_id: its name.
      entry_point: a class or function, or the text "package.module:Name" of one.
      kwargs: its keyword arguments.
    """

    env_id: str
    entry_point: str | Callable[..., Env]
    kwargs: dict[str, Any]


_registry: dict[str, EnvSpec] = {}


def register(env_id: str, entry_point: str | Callable[..., Env], **kwargs: Any) -> None:
    """Give an environment a name for `make`.

    Args:
      env_id: the name, such as "game/sokoban".
      entry_point: a class or function that returns an environment, or the text
        "package.module:Name" of one, whose module is imported by `make`.
      **kwargs: arguments for it.

    Raises:
      ValueError: the name is taken, or the text is not of that form.
    """
    if env_id in _registry:
        raise ValueError(f"environment id {env_id!r} is registered already; choose another id")
    if isinstance(entry_point, str) and entry_point.count(":") != 1:
        raise ValueError(f"entry point {entry_point!r} of {env_id!r} is not 'package.module:Name'")
    _registry[env_id] = EnvSpec(env_id, entry_point, kwargs)
    if _gem and env_id not in _gem.envs.registration.ENV_REGISTRY:
        _gem.register(env_id, entry_point, **kwargs)


def registered() -> list[str]:
    """Return the names registered here, sorted; gem-llm's own are not among them."""
    return sorted(_registry)


def print_envs() -> None:
    """Print the name, entry point and arguments of each registered environment."""
    for env_id in registered():
        spec = _registry[env_id]
        print(f"{env_id}: {spec.entry_point} {spec.kwargs or ''}".rstrip())


def make(env_id: str, **kwargs: Any) -> Env:
    """Build a registered environment.

    Args:
      env_id: its name; where gem-llm is installed, its names are known too.
      **kwargs: arguments that override the registered ones.

    Raises:
      ValueError: no environment has this name.
      ImportError: the entry point cannot be imported.
    """
    spec = _registry.get(env_id)
    if spec is None:
        if _gem and env_id in _gem.envs.registration.ENV_REGISTRY:
            return _gem.make(env_id, **kwargs)
        raise ValueError(
            f"environment id {env_id!r} is unknown; registered: {_similar_ids(env_id)}"
        )
    arguments = {**spec.kwargs, **kwargs}
    env = _load(spec)(**arguments)
    env.env_id = env_id
    env.entry_point = spec.entry_point
    return env


def _similar_ids(env_id: str) -> str:
    group, _, _ = env_id.partition("/")
    similar = [known for known in registered() if known.partition("/")[0] == group]
    ids = similar or registered()
    return ", ".join(ids) or "none (import the module that registers it)"


def _load(spec: EnvSpec) -> Callable[..., Env]:
    if not isinstance(spec.entry_point, str):
        return spec.entry_point
    module_name, name = spec.entry_point.split(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"entry point {spec.entry_point!r} of environment {spec.env_id!r} cannot be imported:"
            f" {error}"
        ) from error
