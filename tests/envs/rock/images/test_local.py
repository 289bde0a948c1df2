"""Images of the embedded backend: a workspace under a name, for other sandboxes and other days."""

import asyncio

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxStartError, probe
from envs.rock.images.hub import EnvHub


@pytest.fixture(params=["namespaces", "landlock"])
def config(request, tmp_path, monkeypatch):
    if (report := probe(tier=request.param)).tier is None:
        pytest.skip(f"no {request.param} tier here: {report.missing[0].reason}")
    monkeypatch.setenv("HOME", str(tmp_path))  # where ~/.rock is
    return lambda **fields: SandboxConfig(isolation="best_available", tier=request.param, **fields)


def test_a_committed_workspace_is_an_image_for_others_and_stays_as_it_was(config, tmp_path):
    async def work():
        async with Sandbox(config()) as first:
            await first.write_files({"a/b": "one", "run": ("echo ran; cat a/b", 0o755)})
            await first.execute("ln -s /etc/passwd link")
            await first.commit("team/env")
            await first.write_file("a/b", "two")
        async with Sandbox(config(image="team/env")) as second:
            began = (await second.execute("./run; ls; echo three > a/b")).stdout
            async with await second.fork() as fork:
                forked = (await fork.execute("cat a/b")).stdout
            await second.commit("team/env")
        async with Sandbox(config(image="team/env")) as third:
            return began, forked, (await third.execute("cat a/b")).stdout

    assert asyncio.run(asyncio.wait_for(work(), 180)) == (
        "ran\nonea\nlink\nrun\n",
        "three\n",
        "three\n",
    )
    hub = EnvHub(tmp_path / ".rock")
    assert [entry.name for entry in hub.list()] == ["team/env"] and len(
        list((tmp_path / ".rock/blobs").iterdir())
    ) == 1  # what it was before is gone
    hub.close()


def test_an_image_that_is_not_there_or_does_not_fit_is_an_error_of_the_start(config):
    async def work():
        with pytest.raises(
            SandboxStartError,
            match="no image 'nothing' on this machine; commit a sandbox to it first",
        ):
            await Sandbox(config(image="nothing")).start()
        with pytest.raises(ValueError, match="is not made of letters"):
            async with Sandbox(config()) as sandbox:
                await sandbox.write_file("big", b"x" * (3 << 20))
                await sandbox.commit("large")
                await sandbox.commit("no name!")
        small = Sandbox(config(image="large", disk_mb=1))
        if probe(tier=small.config.tier).guarantees & {"disk"}:
            with pytest.raises(SandboxStartError, match="do not fit in"):
                await small.start()
            assert not small.is_alive()

    asyncio.run(asyncio.wait_for(work(), 180))
