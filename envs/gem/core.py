"""GEM's environment interface: Env, register, make.

Code written for gem (axon-rl's gem-llm 0.1.0) runs on these unchanged: `reset(seed) -> (obs,
info)`, `step(action) -> (obs, reward, terminated, truncated, info)`, and a registry of names. Where
gem is installed our Env is one of gem's, registrations are told to gem too, and `make` also knows
gem's own names. An environment whose work is asynchronous (a sandbox) overrides `areset`, `astep`
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
    """The gem package if it can be imported.

    Its import gives the root logger a handler; the caller's logging is put back.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        return importlib.import_module("gem")
    except ImportError:
        return None
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


_gem = _import_gem()
_Base: type = _gem.Env if _gem else abc.ABC
_TWINS = (("reset", "areset"), ("step", "astep"), ("close", "aclose"))


class Env(_Base):
    """One world that talks in text.

    Observations and infos are plain data, so they can be deep-copied.

    The asynchronous twins run the synchronous method in a thread, unless a class brings its own; a
    subclass that overrides only one of a pair never inherits the other one of its parent.
    """

    env_id: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method, twin in _TWINS:
            if method in cls.__dict__ and twin not in cls.__dict__:
                setattr(cls, twin, getattr(Env, twin))

    @abc.abstractmethod
    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begins an episode. Called with the seed both by position and by keyword.

        `super().reset(seed)` seeds the global `random` and `numpy.random`, as gem's does; an
        environment with a generator of its own does not need it.
        """
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)

    @abc.abstractmethod
    def step(self, action: str) -> StepResult:
        """One turn: (observation, reward, terminated, truncated, info).

        Any text is an action; none makes it raise.
        """

    def sample_random_action(self) -> str:
        """Some action that the environment accepts, for tests of wrappers and vectors."""
        raise NotImplementedError(f"{type(self).__name__} has no random action")

    def spawn(self, same_state: bool = False, **kwargs: Any) -> Env:
        """A second environment of the same kind; `same_state` asks for a copy of the running
        episode.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be spawned (same_state={same_state})"
        )

    def close(self) -> None:
        """Frees what the episode holds. Safe to call twice."""

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """`reset` for callers with an event loop."""
        return await asyncio.to_thread(self.reset, seed)

    async def astep(self, action: str) -> StepResult:
        """`step` for callers with an event loop."""
        return await asyncio.to_thread(self.step, action)

    async def aclose(self) -> None:
        """`close` for callers with an event loop."""
        await asyncio.to_thread(self.close)

    @property
    def unwrapped(self) -> Env:
        return self


# Twins are looked up on the class: gem's wrappers copy an environment's `astep` onto themselves,
# and calling that would go past the wrapper.


async def reset_async(env: Any, seed: int | None = None) -> tuple[str, Info]:
    """Resets any environment, gem's included, without blocking the event loop."""
    twin = getattr(type(env), "areset", None)
    return await (twin(env, seed) if twin else asyncio.to_thread(env.reset, seed))


async def step_async(env: Any, action: Any) -> StepResult:
    """Steps any environment, gem's included, without blocking the event loop."""
    twin = getattr(type(env), "astep", None)
    return await (twin(env, action) if twin else asyncio.to_thread(env.step, action))


async def close_async(env: Any) -> None:
    """Closes any environment; gem's may have nothing to close."""
    twin = getattr(type(env), "aclose", None)
    if twin:
        await twin(env)
    elif hasattr(env, "close"):
        await asyncio.to_thread(env.close)


def is_async(env: Any) -> bool:
    """Whether the environment, and each wrapper around it, has an `astep` that needs no thread."""
    if getattr(type(env), "astep", Env.astep) is Env.astep:
        return False
    inner = vars(env).get("env") if hasattr(env, "__dict__") else None
    return inner is None or is_async(inner)


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What `make` needs: a class (or function), or the text "package.module:Name" of one, and its
    keyword arguments.
    """

    env_id: str
    entry_point: str | Callable[..., Env]
    kwargs: dict[str, Any]


_registry: dict[str, EnvSpec] = {}


def register(env_id: str, entry_point: str | Callable[..., Env], **kwargs: Any) -> None:
    """Gives an environment a name.

    The module of a textual entry point is imported by `make`, not here.
    """
    if env_id in _registry:
        raise ValueError(f"environment id {env_id!r} is registered already; choose another id")
    if isinstance(entry_point, str) and entry_point.count(":") != 1:
        raise ValueError(f"entry point {entry_point!r} of {env_id!r} is not 'package.module:Name'")
    _registry[env_id] = EnvSpec(env_id, entry_point, kwargs)
    if _gem and env_id not in _gem.envs.registration.ENV_REGISTRY:
        _gem.register(env_id, entry_point, **kwargs)


def registered() -> list[str]:
    """All ids registered here, sorted (gem's own are not listed)."""
    return sorted(_registry)


def print_envs() -> None:
    """Writes ids, entry points and arguments to standard output."""
    for env_id in registered():
        spec = _registry[env_id]
        print(f"{env_id}: {spec.entry_point} {spec.kwargs or ''}".rstrip())


def make(env_id: str, **kwargs: Any) -> Env:
    """Builds a registered environment; keyword arguments override the registered ones.

    Raises ValueError for an unknown id and ImportError when the entry point cannot be imported.
    """
    if env_id not in _registry:
        if _gem and env_id in _gem.envs.registration.ENV_REGISTRY:
            return _gem.make(env_id, **kwargs)
        near = [
            known for known in registered() if known.split("/")[0] == env_id.split("/")[0]
        ] or registered()
        raise ValueError(
            f"environment id {env_id!r} is unknown; registered:"
            f" {', '.join(near) or 'none (import the module that registers it)'}"
        )
    spec = _registry[env_id]
    env = _load(spec)(**{**spec.kwargs, **kwargs})
    env.env_id, env.entry_point = env_id, spec.entry_point
    return env


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
