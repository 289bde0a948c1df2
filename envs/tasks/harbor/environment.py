"""The environment of a task: the record of a build, and what any sandbox of ours can offer."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable

from envs.rock.config import SandboxConfig, parse_grant
from envs.tasks.harbor.errors import TaskError, UnsupportedError
from envs.tasks.harbor.load import line_of
from envs.tasks.harbor.paths import PathMap
from envs.tasks.harbor.task import HarborTask, Step

# Top folders that tasks often name in their instructions without making them in the Dockerfile.
_CONVENTIONAL = """
data home mnt opt output outputs project repo results srv testbed var work workspace
"""
CONVENTIONAL = tuple(_CONVENTIONAL.split())
UNREACHED_NETWORK = (
    "network_mode is public, and the sandbox reaches nothing; SandboxConfig.egress can grant hosts"
)
DEFAULT_MEMORY_MB = 1024
DEFAULT_DISK_MB = 256


@dataclasses.dataclass
class Built:
    """The record of a build: paths, variables (as the task writes them) and the working directory.

    `notes` say which settings were only approximated.
    """

    paths: PathMap
    env: dict[str, str]
    workdir: str
    notes: list[str]
    tier_env: dict[str, str]

    def inner_env(self) -> dict[str, str]:
        """Return the variables as commands in the sandbox see them."""
        own = {name: self.paths.inward(value) for name, value in self.env.items()}
        return {**self.tier_env, **own}

    def command(self, text: str) -> str:
        """Return an agent's command as it runs in the sandbox, in the working directory."""
        place = shlex.quote(self.paths.place(self.workdir))
        return f"cd -- {place} 2> /dev/null\n{self.paths.inward(text)}"


def sandbox_for(task: HarborTask, config: SandboxConfig | None) -> SandboxConfig:
    """Return the config with the limits that the task asks for.

    A config that sets a limit of its own keeps it. Egress is what the task may reach.
    """
    config = config or SandboxConfig()
    environment = task.environment
    memory = max(environment.memory_mb or DEFAULT_MEMORY_MB, 128)
    if _is_set(config, "memory_mb"):
        memory = config.memory_mb
    wanted = {
        "memory_mb": memory,
        # Files are kept in memory.
        "disk_mb": min(environment.storage_mb or DEFAULT_DISK_MB, memory // 2),
        "cpus": environment.cpus or config.cpus,
        "pids": 256,
        "inodes": 32_768,
    }
    changes = {name: value for name, value in wanted.items() if not _is_set(config, name)}
    return dataclasses.replace(config, egress=egress_of(task, config.egress), **changes)


def _is_set(config: SandboxConfig, name: str) -> bool:
    """Return whether a config's limit is not the default."""
    return getattr(config, name) != getattr(SandboxConfig(), name)


def limit_notes(task: HarborTask, config: SandboxConfig) -> list[str]:
    """Return the limits that the task asks for and the sandbox does not give, as sentences."""
    environment = task.environment
    asked_and_given = (
        ("storage_mb", environment.storage_mb, config.disk_mb),
        ("memory_mb", environment.memory_mb, config.memory_mb),
        ("cpus", environment.cpus, config.cpus),
    )
    notes = []
    for name, asked, given in asked_and_given:
        if asked is not None and asked > given:
            notes.append(f"environment.{name} = {asked:g}, and the sandbox has {given:g}")
    return notes


def execution(place: str, content: bytes) -> str:
    """Return the shell text that runs a script as Harbor does: by its own first line, or by bash.

    Args:
      place: the script's path in the sandbox; it is executable.
      content: of the script.
    """
    quoted = shlex.quote(place)
    return quoted if content.startswith(b"#!") else f"/bin/bash {quoted}"


def conventional_roots(steps: Iterable[Step]) -> set[str]:
    """Return the conventional top folders that the steps' instructions mention."""
    told = "\n".join(step.instruction for step in steps)
    return {name for name in CONVENTIONAL if re.search(rf"(?<![\w./])/{name}(?![\w-])", told)}


def refuse_unsupported(task: HarborTask, given: tuple[str, ...] = ()) -> None:
    """Refuse settings that no sandbox of any backend can fulfil.

    Args:
      task: the task.
      given: the hosts that a public task may reach.

    Raises:
      UnsupportedError: several containers, GPUs, MCP servers, or a phase that may reach other hosts
        than the rest of the episode.
    """
    environment = task.environment
    if environment.compose_path is not None:
        message = "several containers (docker-compose); a task has one sandbox here"
        raise UnsupportedError(environment.compose_path, 1, message)
    if environment.gpus:
        message = f"environment.gpus = {environment.gpus}; sandboxes see no GPU"
        raise _unsupported(task, ("environment", "gpus"), message)
    if environment.mcp_servers:
        message = "environment.mcp_servers; none are started here"
        raise _unsupported(task, ("environment", "mcp_servers"), message)
    own_egress = egress_of(task, given)
    for step in task.steps:
        for phase, network in step.networks.items():
            if phase == "verifier" and step.verifier_environment is not None:
                continue  # it has a sandbox and a network policy of its own
            asked = dataclasses.replace(
                environment, network_mode=network[0], allowed_hosts=network[1]
            )
            wants_more = network[0] == "public" != environment.network_mode
            asked_egress = egress_of(dataclasses.replace(task, environment=asked), given)
            if wants_more or asked_egress != own_egress:
                message = (
                    f"{phase}.network_mode = {network[0]!r} beside environment.network_mode ="
                    f" {environment.network_mode!r}; a sandbox has one network policy for its whole"
                    " life"
                )
                raise _unsupported(task, (phase, "network_mode"), message)


def _unsupported(task: HarborTask, key: tuple[str, ...], message: str) -> UnsupportedError:
    settings = task.path / ("task.toml" if task.format == "harbor" else "task.yaml")
    return UnsupportedError(settings, line_of(task, *key), message)


def egress_of(task: HarborTask, given: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the hosts that the task's sandbox may reach, in the form of SandboxConfig.egress.

    For an allowlist these are the task's allowed_hosts, at their ports or at 443 and 80. For
    no-network there are none. For public they are `given`, because no sandbox reaches the whole
    network.

    Raises:
      TaskError: a host cannot be granted.
    """
    environment = task.environment
    if environment.network_mode == "public":
        return given
    if environment.network_mode == "no-network":
        return ()
    grants: list[str] = []
    for host in environment.allowed_hosts:
        has_port = re.search(r":\d+$", host)
        grants += [host] if has_port else [f"{host}:443", f"{host}:80"]
    for grant in grants:
        try:
            parse_grant(grant)
        except ValueError as error:
            raise TaskError(
                task.path / "task.toml",
                line_of(task, "environment", "allowed_hosts"),
                f"environment.allowed_hosts: {error}",
            ) from error
    return tuple(grants)
