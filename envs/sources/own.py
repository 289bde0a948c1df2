"""Environments from anybody's package: `package.module:Name` and `path/to/file.py:Name`.

Name is an environment class, or a function that returns an environment; neither is given an
argument. What comes out may be an environment of GEM (this project's `envs.gem.Env`, gem-llm's, or
any object with `reset(seed)` and `step(text)`), a gymnasium environment, or one of `verifiers`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from envs.gem import Env, Info, StepResult, UnplayableTaskError
from envs.gem.core import close_async, judge_async, reset_async, step_async
from envs.gem.episode import has_script, script_of, shown
from envs.rock import SandboxConfig, SandboxError
from envs.sources.source import Finite, Generated, Source
from envs.sources.task import MARGIN_SECONDS, Content, Settings, SourceError, Task
from envs.sources.verifiers import is_verifiers, verifiers_tasks

PLAY_SECONDS = 60.0
UNGROUPED = "(none)"


def import_named(spec: str, folders: Sequence[str] = ()) -> Any:
    """Return the object that package.module:Name or FILE.py:Name stands for.

    Args:
      spec: the text.
      folders: where modules and files are looked for before the usual places.

    Raises:
      SourceError: there is no such module, file or name; or the module raised an error.
    """
    where, _, name = spec.rpartition(":")
    try:
        module = _import_file(where, folders) if where.endswith(".py") else _import(where, folders)
        return getattr(module, name)
    except AttributeError as error:
        raise SourceError(f"task {spec!r}: {error}") from error
    except Exception as error:  # whatever a module of another's does while it is imported
        raise SourceError(
            f"task {spec!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _import(module: str, folders: Sequence[str]) -> ModuleType:
    before = list(sys.path)
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        return importlib.import_module(module)
    finally:
        sys.path[:] = before


def _import_file(file: str, folders: Sequence[str]) -> ModuleType:
    """Import a file once; a path that is not absolute is looked for where modules are, too."""
    places = [pathlib.Path(folder) / file for folder in (*folders, ".", *sys.path)]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no file {file}")
    name = f"own_environment_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def open_own(spec: str, make: Any, seed: int, settings: Settings, eval_share: float) -> Source:
    """Return the source of an environment that is not registered here.

    Args:
      spec: what it was opened by.
      make: the class or function; called without arguments.
      seed: chooses the tasks of evaluations.
      settings: how it is played.
      eval_share: of a finite set.
    """
    example = _make(spec, make)
    if is_verifiers(example):
        return Finite(spec, verifiers_tasks(spec, example, settings), eval_share)
    example = _to_gem(spec, example)
    max_turns = settings.max_turns or turns_of(example)
    if max_turns is None:
        raise SourceError(
            f"task {spec!r}: {type(example).__name__} does not say how many turns an episode has."
            " Give it an attribute max_turns, or set max_turns in the config."
        )
    family = spec.rpartition(":")[2]

    def make_one(kind: str, task_seed: int) -> Task:
        identity = OwnTask(f"{kind}/{task_seed}", kind, task_seed, _success_of(example))

        def new_env(config: SandboxConfig) -> Env:
            return Adopted(_to_gem(spec, _make(spec, make)), identity, max_turns)

        def read() -> Content:
            return _read(new_env(SandboxConfig()), task_seed)

        return Task(
            name=identity.name,
            family=kind,
            domain=kind,
            difficulty=str(getattr(example, "difficulty", UNGROUPED)),
            cluster=kind,
            start_seconds=SandboxConfig().start_timeout + MARGIN_SECONDS,
            play_seconds=PLAY_SECONDS + MARGIN_SECONDS,
            grading_seconds=float(getattr(example, "grading_seconds", 0.0)),
            max_turns=max_turns,
            has_demonstrator=has_script(example),
            new_env=new_env,
            read=read,
            tools=tuple(getattr(example, "tools", None) or ()),
            system=getattr(example, "system", None) or None,
            success=identity.success,
        )

    # reading an instance resets an environment of somebody else, which may take long
    return Generated(spec, make_one, (family,), seed=seed, compares=False)


def turns_of(env: Any) -> int | None:
    """Return how many turns an episode of an environment has at most; None if it does not say."""
    limit = getattr(env, "max_turns", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _success_of(env: Any) -> float:
    """Return the reward that solves an environment's tasks: its task's, its own, or 1."""
    own = getattr(env, "success", 1.0)
    own = 1.0 if callable(own) else own
    return float(getattr(getattr(env, "task", None), "success", own))


def _make(spec: str, make: Any) -> Any:
    if not callable(make):
        raise SourceError(f"task {spec!r} is a {type(make).__name__}, no class and no function")
    try:
        return make()
    except Exception as error:
        raise SourceError(
            f"task {spec!r} cannot be made without arguments: {type(error).__name__}: {error}"
        ) from error


def _to_gem(spec: str, env: Any) -> Any:
    """Return the environment as one of GEM; gymnasium's are wrapped."""
    if "gymnasium" in sys.modules:
        import gymnasium

        if isinstance(env, gymnasium.Env):
            return _from_gymnasium(spec, env)
    missing = [name for name in ("reset", "step") if not callable(getattr(env, name, None))]
    if missing:
        raise SourceError(
            f"task {spec!r} gives a {type(env).__name__}, which has no {missing[0]}(): an"
            " environment of GEM, gymnasium or verifiers is needed"
        )
    return env


def _from_gymnasium(spec: str, env: Any) -> Env:
    from envs.gem.gymnasium import FromGymnasium  # gymnasium is an extra

    limit = getattr(env.spec, "max_episode_steps", None) if env.spec is not None else None
    try:
        return FromGymnasium(env, **({"max_turns": limit} if limit else {}))
    except ValueError as error:
        raise SourceError(f"task {spec!r}: {error}") from error


def _read(env: Env, seed: int) -> Content:
    """Return what an environment shows first; its name and seed define it."""
    try:
        observation, info = env.reset()
    finally:
        env.close()
    opening = shown(observation, info)
    parts = [opening.encode(errors="surrogatepass"), str(seed).encode()]
    return Content((opening,), opening, parts)


@dataclasses.dataclass(frozen=True)
class OwnTask:
    """The identity of an episode in an environment that has none of its own."""

    name: str
    family: str
    seed: int
    success: float


class Adopted(Env):
    """Another package's environment that plays one seed, within a number of turns.

    Its errors are the environment's: an episode that meets one says nothing about the agent.

    Args:
      env: the environment.
      task: what it plays.
      max_turns: the episode is truncated after so many turns.
    """

    def __init__(self, env: Any, task: OwnTask, max_turns: int) -> None:
        self.inner = env
        self.task = task
        self.max_turns = max_turns
        self._turns = 0

    @property
    def system(self) -> str | None:
        """What every agent is told before the task."""
        return getattr(self.inner, "system", None)

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools."""
        return list(getattr(self.inner, "tools", None) or [])

    @property
    def is_grading(self) -> bool:
        """Whether a verifier runs."""
        return bool(getattr(self.inner, "is_grading", False))

    @property
    def grading_seconds(self) -> float:
        """Time limit of the verifier."""
        return float(getattr(self.inner, "grading_seconds", 0.0))

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin the episode of the task."""
        self._turns = 0
        return _as_text(*self.inner.reset(seed=self.task.seed))

    def step(self, action: str) -> StepResult:
        """Play one turn."""
        return self._finish(self.inner.step(action))

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Begin the episode of the task without blocking the event loop."""
        self._turns = 0
        return _as_text(*await reset_async(self.inner, self.task.seed))

    async def astep(self, action: str) -> StepResult:
        """Play one turn without blocking the event loop."""
        try:
            return self._finish(await step_async(self.inner, action))
        except SandboxError:
            raise
        except Exception as error:
            kind = type(self.inner).__name__
            raise UnplayableTaskError(
                f"{kind}.step raised {type(error).__name__}: {error}"
            ) from error

    async def ajudge(self, ending: str) -> StepResult:
        """Judge the work as it stands."""
        return await judge_async(self.inner, ending)

    async def aclose(self) -> None:
        """Close the environment."""
        await close_async(self.inner)

    def close(self) -> None:
        """Close the environment."""
        if hasattr(self.inner, "close"):
            self.inner.close()

    def spawn(self, same_state: bool = False, **kwargs: Any) -> Adopted:
        """Return another environment of the task, or a copy of the running episode."""
        if not hasattr(self.inner, "spawn"):
            raise NotImplementedError(f"{type(self.inner).__name__} has no spawn")
        twin = copy.copy(self)
        twin.inner = self.inner.spawn(same_state=same_state, **kwargs)
        return twin

    def demonstration(self, rng: Any, error_rate: float = 0.0) -> Any:
        """Return the script of the environment, where it has one."""
        return script_of(self.inner, rng, error_rate)

    def _finish(self, result: Any) -> StepResult:
        observation, reward, terminated, truncated, info = result
        text, info = _as_text(observation, info)
        self._turns += 1
        is_out = self._turns >= self.max_turns and not terminated
        return text, float(reward or 0.0), bool(terminated), bool(truncated or is_out), info


def _as_text(observation: Any, info: Any) -> tuple[str, Info]:
    return str(observation), dict(info or {})
