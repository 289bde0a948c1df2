"""What the tests of the Docker backend share: a sandbox on the tests' own engine."""

import asyncio

import pytest

from envs.rock import Sandbox, SandboxConfig
from tests.envs.rock.engine import Engine


@pytest.fixture
def inside(engine: Engine):
    """Run `work(sandbox)` in a sandbox of the engine's, and see that no container is left."""

    def run(work, **fields):
        async def steps():
            async with Sandbox(config(engine, **fields)) as sandbox:
                return await work(sandbox)

        result = asyncio.run(asyncio.wait_for(steps(), 180))
        assert containers() == []
        return result

    return run


def config(engine: Engine, **fields) -> SandboxConfig:
    return SandboxConfig(**{"backend": "docker", "image": engine.image, "memory_mb": 128, **fields})


def containers() -> list[str]:
    from envs.rock.docker.engine import engine as docker_engine

    return [one["Id"] for one in docker_engine().client.containers(all=True)]
