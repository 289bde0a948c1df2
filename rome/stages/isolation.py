"""The isolation that this machine's sandboxes have, found before anything starts."""

from __future__ import annotations

from envs.rock import SandboxConfig, probe
from envs.rock.docker.probe import probe_docker
from envs.rock.sync import SyncSandbox


def find_isolation(config: SandboxConfig) -> str:
    """Return the tier of the sandboxes of this config, and print what a weak tier lacks.

    A remote sandbox is started, because only its admin knows the tier.

    Raises:
      SandboxError: where the isolation that the config requires is not available.
    """
    if config.backend == "remote":
        with SyncSandbox(config) as sandbox:
            return sandbox.tier
    tier = probe_docker() if config.backend == "docker" else probe(config.isolation)
    tier.require(config.isolation)
    if tier.missing:
        print(tier.banner(), flush=True)
    assert tier.tier is not None, "require() raises where there is no tier"
    return tier.tier
