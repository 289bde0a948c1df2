"""A task: one exercise, which its name makes again on any machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.gem import Env
from envs.rock import SandboxConfig

MARGIN_SECONDS = 60.0  # added to a task's own limits, for a busy machine


class SourceError(ValueError):
    """A spec names no tasks, or none that can be used; the message says what to write instead."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the tasks of a source are played, beside the config of their sandboxes.

    Attributes:
      max_turns: turns of an episode (in task folders of each step); 0: the environment's own.
      command_timeout: seconds of one command in a shell; 0: the environment's own.
      timeout_multiplier: of all time limits that a task folder has.
      images: base images that cannot be had, for which this machine's system stands, with the
        programs that it must have (`envs.tasks.harbor.build`).
      build_egress: hosts that the build of a task's environment may reach (HarborEnv).
      verifier_egress: hosts that the tests may reach (HarborEnv).
      environ: the values of ${NAME} in the env tables of task folders
        (`envs.tasks.harbor.load_task`).
      fetch: whether git may fetch the repositories that a registry names.
      folders: where modules of own environments are looked for, beside the usual places.
    """

    max_turns: int = 0
    command_timeout: float = 0.0
    timeout_multiplier: float = 1.0
    images: Mapping[str, tuple[str, ...]] | None = None
    build_egress: tuple[str, ...] | None = None
    verifier_egress: tuple[str, ...] = ()
    environ: Mapping[str, str] | None = None
    fetch: bool = False
    folders: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Content:
    """What a task consists of.

    Attributes:
      texts: the words of its user, of its problem, or of each step. Those of a task folder may be
        hostile.
      opening: what the agent is shown first.
      parts: everything that defines the task but its name, as bytes.
    """

    texts: tuple[str, ...]
    opening: str
    parts: Sequence[bytes]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a source.

    Attributes:
      name: unique within its source, which makes the task again from it.
      family: the kind of task: curricula draw families, and reports group by them.
      domain: reports group by it.
      difficulty: reports group by it.
      cluster: tasks of one cluster resemble each other: seeds of a family, bugs of a package. Other
        tasks are each their own.
      start_seconds: limit for starting the environment.
      play_seconds: limit for a scripted agent with its grading.
      grading_seconds: limit of the verifier.
      max_turns: turns of an episode at most.
      has_demonstrator: whether a script solves it (`envs.gem.episode.script_of`).
      new_env: makes the environment.
      read: returns the content; it may be slow.
      tools: schemas of the tools that the agent has.
      system: what every agent is told before the task; None for nothing.
      success: the reward from which on it counts as solved.
      path: of its files; None for a generated task.
      source: the source of a mixture that it is from; "" outside of mixtures.
      has_attack: whether its environment brings a scripted attacker (`envs.safety`).
    """

    name: str
    family: str
    domain: str
    difficulty: str
    cluster: str
    start_seconds: float
    play_seconds: float
    grading_seconds: float
    max_turns: int
    has_demonstrator: bool
    new_env: Callable[[SandboxConfig], Env] = dataclasses.field(repr=False, compare=False)
    read: Callable[[], Content] = dataclasses.field(repr=False, compare=False)
    tools: Sequence[Mapping[str, Any]] = dataclasses.field(default=(), repr=False, compare=False)
    system: str | None = dataclasses.field(default=None, repr=False)
    success: float = 1.0
    path: pathlib.Path | None = None
    source: str = ""
    has_attack: bool = False

    def make_env(self, config: SandboxConfig) -> Env:
        """Return a new environment that is not started yet.

        Args:
          config: of its sandbox, for those that have one.
        """
        return self.new_env(config)

    @functools.cached_property
    def content(self) -> Content:
        """What the task consists of."""
        return self.read()

    @property
    def instruction(self) -> str:
        """The task's words."""
        return "\n".join(self.content.texts)

    def digest(self) -> bytes:
        """Return a hash over everything that defines the task, its name included."""
        return hash_parts(self.name, self.content.parts)

    def content_digest(self) -> bytes:
        """Return a hash over what defines the task: equal for one task under two names."""
        return hash_parts("", self.content.parts)


def hash_parts(name: str, parts: Sequence[bytes]) -> bytes:
    """Return a hash over a name and parts that differs where any of them does."""
    whole = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16)
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.digest()


def dataset_digest(tasks: Sequence[Task]) -> str:
    """Return a hash over all tasks and their order."""
    return hashlib.blake2b(b"".join(task.digest() for task in tasks), digest_size=16).hexdigest()


def parts_of_value(value: Any) -> list[bytes]:
    """Return a value as bytes that differ for different values; paths have none."""
    identity = getattr(value, "identity", None)
    if identity:  # files that are made only when they are needed
        return [identity.encode()]
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        parts = [b"{"]
        for key in sorted(value, key=str):
            parts.append(str(key).encode(errors="surrogatepass"))
            parts += parts_of_value(value[key])
        return [*parts, b"}"]
    if isinstance(value, list | tuple):
        parts = [b"["]
        for element in value:
            parts += parts_of_value(element)
        return [*parts, b"]"]
    if isinstance(value, pathlib.Path):
        return []
    return [value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")]
