"""Fixtures of the hostile tests: every tier, with an engine or an admin where it needs one."""

import pytest

from envs.rock import probe, sync
from envs.rock.embedded import zygote_client
from tests.envs.rock.engine import engine
from tests.envs.rock.service import running
from tests.hostile.sandboxes import elsewhere

__all__ = ["engine"]  # a fixture


@pytest.fixture(
    params=[
        "namespaces",
        "landlock",
        pytest.param("remote", marks=pytest.mark.slow),
        pytest.param("docker", marks=[pytest.mark.slow, pytest.mark.docker]),
    ]
)
def tier(request):
    if request.param == "docker":
        elsewhere["docker"] = {
            "backend": "docker",
            "image": request.getfixturevalue("engine").image,
            "memory_mb": 128,
        }
    elif request.param == "remote":
        if (report := probe()).tier is None:
            pytest.skip(f"no sandbox here: {report.missing[0].reason}")
        site = request.getfixturevalue("admin")
        elsewhere["remote"] = {
            "backend": "remote",
            "url": site.url,
            "token": running.TOKENS["default"],
        }
    return request.param


@pytest.fixture(scope="module", autouse=True)
def own_zygote():
    """Bring another zygote, without what tests of other files may have left running."""
    zygote_client.shut_down()


@pytest.fixture(scope="module")
def admin(tmp_path_factory):
    """An admin on the background loop, for callers on any loop."""
    entered = running.admin(tmp_path_factory.mktemp("admin"))
    yield sync.run(entered.__aenter__(), 60)
    sync.run(entered.__aexit__(None, None, None), 60)
