"""The record into which every task format is read: Harbor (Terminal-Bench 2.x), Terminal-Bench 1.

A record holds only bytes and numbers; nothing here runs. `tests` and `solution` enter a sandbox
only through the grader and the oracle.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

Files = Mapping[str, tuple[bytes, int]]  # path below its folder -> (content, permissions)
# Permissions that stand for a symbolic link, whose content is where it leads: git's own.
LINK = 0o120000
NETWORK_MODES = ("public", "no-network", "allowlist")


@dataclasses.dataclass(frozen=True)
class Healthcheck:
    """A command that must succeed before the agent begins. Times are in seconds."""

    command: str
    interval: float = 5.0
    timeout: float = 30.0
    start_period: float = 0.0
    retries: int = 3


@dataclasses.dataclass(frozen=True)
class Environment:
    """The environment that the agent works in.

    `context` is the build context, including the Dockerfile; an empty folder is a path that ends
    with a slash, and a symbolic link has the permissions LINK. Other permissions are 755 and 644,
    and there are no times: a checkout has no others either. Without a Dockerfile, `docker_image`
    is used as it is.
    """

    context: Files = dataclasses.field(default_factory=dict, repr=False)
    dockerfile: str | None = None  # its text
    dockerfile_path: pathlib.Path | None = None  # for messages
    compose_path: pathlib.Path | None = None
    docker_image: str | None = None
    build_timeout: float = 600.0
    cpus: float | None = None
    memory_mb: int | None = None
    storage_mb: int | None = None
    gpus: int = 0
    network_mode: str = "public"
    allowed_hosts: tuple[str, ...] = ()
    workdir: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    healthcheck: Healthcheck | None = None
    mcp_servers: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """One instruction and how it is graded. A task of one step has its files at the task's root.

    Attributes:
      setup: files that are written into the working directory before the step. A setup.sh among
        them is run there.
      parser: "reward" reads /logs/verifier; "pytest" reads the summary that the script prints.
      min_reward: the task ends after a step with a lower reward, and later steps count 0. By key
        where the reward has several.
      verifier_environment: the tests run in this environment, which gets only `artifacts` from the
        agent. None: they run where the agent worked.
      collect: commands that run in the agent's environment when the agent's processes are dead,
        before the tests.
      artifacts: absolute paths in the agent's environment that a separate verifier gets, besides
        /logs/artifacts.
      networks: the network policy (mode, hosts) of the phase "agent" or "verifier" where it has its
        own.
    """

    name: str
    instruction: str
    tests: Files = dataclasses.field(repr=False)
    test_script: str = "test.sh"
    solution: Files = dataclasses.field(default_factory=dict, repr=False)
    solve_script: str | None = None  # among `solution`; None: the task has no reference solution
    setup: Files = dataclasses.field(default_factory=dict, repr=False)
    parser: str = "reward"
    agent_timeout: float | None = None
    verifier_timeout: float = 600.0
    verifier_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    solution_env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min_reward: float | Mapping[str, float] | None = None
    verifier_environment: Environment | None = None
    artifacts: tuple[str, ...] = ()
    collect: tuple[str, ...] = ()
    networks: Mapping[str, tuple[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    healthcheck: Healthcheck | None = None


@dataclasses.dataclass(frozen=True)
class HarborTask:
    """A task folder.

    `unknown_keys` are settings that were accepted and have no effect here.
    """

    name: str
    path: pathlib.Path
    format: str  # "harbor" or "terminal-bench-1"
    schema_version: str
    environment: Environment
    steps: tuple[Step, ...]
    reward_strategy: str = "mean"  # over the steps, or "final"
    difficulty: str = ""
    category: str = ""
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    artifacts: tuple[Any, ...] = ()
    unknown_keys: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Return a name for tasks of one kind: the category, or else the format."""
        return self.category or self.format

    @property
    def notes(self) -> list[str]:
        """Return the settings that no sandbox here can honour, as sentences."""
        found = []
        for key in self.unknown_keys:
            if key.endswith(".user"):
                found.append(f"{key}: commands run as the one user of the sandbox")
        if self.metadata.get("run_tests_in_same_shell") is True:
            found.append(
                "run_tests_in_same_shell: the tests have a shell of their own, since no process of"
                " the agent outlives its episode"
            )
        return found

    def with_more_time(self, multiplier: float) -> HarborTask:
        """Return the task with all its time limits multiplied."""
        steps = []
        for step in self.steps:
            agent_timeout = step.agent_timeout and step.agent_timeout * multiplier
            verifier_timeout = step.verifier_timeout * multiplier
            steps.append(
                dataclasses.replace(
                    step, agent_timeout=agent_timeout, verifier_timeout=verifier_timeout
                )
            )
        build_timeout = self.environment.build_timeout * multiplier
        environment = dataclasses.replace(self.environment, build_timeout=build_timeout)
        return dataclasses.replace(self, environment=environment, steps=tuple(steps))
