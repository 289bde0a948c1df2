"""GEM's environment interface: Env, register, make.

Code written for gem (axon-rl) runs on these unchanged: `reset(seed) -> (obs, info)`, `step(action) -> (obs, reward, terminated, truncated,
info)`, and a registry of names. An environment whose work is asynchronous (a sandbox) also has `areset`, `astep` and `aclose`.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from typing import Any, Callable

Info = dict[str, Any]
StepResult = tuple[str, float, bool, bool, Info]


class Env(abc.ABC):
    """One world that talks in text. Observations and infos are plain data, so they can be deep-copied."""

    env_id: str = ""

    @abc.abstractmethod
    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begins an episode. Called with the seed both by position and by keyword."""

    @abc.abstractmethod
    def step(self, action: str) -> StepResult:
        """One turn: (observation, reward, terminated, truncated, info). Any text is an action; none makes it raise."""

    def sample_random_action(self) -> str:
        """Some action that the environment accepts, for tests of wrappers and vectors."""
        raise NotImplementedError(f"{type(self).__name__} has no random action")

    def spawn(self, same_state: bool = False, **kwargs: Any) -> Env:
        """A second environment of the same kind; `same_state` asks for a copy of the running episode."""
        raise NotImplementedError(f"{type(self).__name__} cannot be spawned (same_state={same_state})")

    def close(self) -> None:
        """Frees what the episode holds. Safe to call twice."""

    @property
    def unwrapped(self) -> Env:
        return self


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """What `make` needs: a class (or function), or the text "package.module:Name" of one, and its keyword arguments."""

    env_id: str
    entry_point: str | Callable[..., Env]
    kwargs: dict[str, Any]


_registry: dict[str, EnvSpec] = {}


def register(env_id: str, entry_point: str | Callable[..., Env], **kwargs: Any) -> None:
    """Gives an environment a name. The module of a textual entry point is imported by `make`, not here."""
    if env_id in _registry:
        raise ValueError(f"environment id {env_id!r} is registered already; choose another id")
    if isinstance(entry_point, str) and entry_point.count(":") != 1:
        raise ValueError(f"entry point {entry_point!r} of {env_id!r} is not 'package.module:Name'")
    _registry[env_id] = EnvSpec(env_id, entry_point, kwargs)


def registered() -> list[str]:
    """All known ids, sorted."""
    return sorted(_registry)


def make(env_id: str, **kwargs: Any) -> Env:
    """Builds a registered environment; keyword arguments override the registered ones.

    Raises ValueError for an unknown id and ImportError when the entry point cannot be imported.
    """
    if env_id not in _registry:
        near = [known for known in registered() if known.split("/")[0] == env_id.split("/")[0]] or registered()
        raise ValueError(f"environment id {env_id!r} is unknown; registered: {', '.join(near) or 'none (import the module that registers it)'}")
    spec = _registry[env_id]
    env = _load(spec)(**{**spec.kwargs, **kwargs})
    env.env_id = env_id
    return env


def _load(spec: EnvSpec) -> Callable[..., Env]:
    if not isinstance(spec.entry_point, str):
        return spec.entry_point
    module_name, name = spec.entry_point.split(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"entry point {spec.entry_point!r} of environment {spec.env_id!r} cannot be imported: {error}") from error
