"""The isolation that this machine's sandboxes have, found before anything starts."""

from __future__ import annotations

from envs.rock import Sandbox, SandboxConfig, SandboxError, probe
from envs.rock.docker.probe import probe_docker
from rome.stages.waiting import wait_for_episodes
from rome.stopping import ShouldStop, never

REMOTE_SECONDS = 900.0  # an admin may have to wait for a free worker, and for an image


def find_isolation(config: SandboxConfig, should_stop: ShouldStop = never) -> str:
    """Return the tier of the sandboxes of this config, and print what a weak tier lacks.

    A remote sandbox is started, because only its admin knows the tier.

    Raises:
      SandboxError: where the isolation that the config requires is not available.
      RolloutError: no remote sandbox was started within REMOTE_SECONDS.
      Stopped: the user asked to stop meanwhile.
    """
    if config.backend == "remote":
        what = f"the start of a sandbox by {config.url}"
        return wait_for_episodes(_tier_of(config), REMOTE_SECONDS, what, should_stop)
    tier = probe_docker() if config.backend == "docker" else probe(config.isolation)
    tier.require(config.isolation)
    if tier.missing:
        print(tier.banner(), flush=True)
    assert tier.tier is not None, "require() raises where there is no tier"
    return tier.tier


async def _tier_of(config: SandboxConfig) -> str:
    async with Sandbox(config) as sandbox:
        if sandbox.tier is None:
            raise SandboxError(f"{config.url} does not say how its sandboxes are isolated")
        return sandbox.tier
