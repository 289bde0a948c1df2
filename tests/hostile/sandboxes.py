"""Sandboxes of every tier for hostile commands, and what the tests ask of them."""

import asyncio
import contextlib
import os
import pathlib
import shlex

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxFileError, probe
from envs.rock.docker.probe import probe_docker
from envs.rock.embedded import zygote_client

# what a config needs whose sandboxes are not this process's own, by tier
elsewhere: dict[str, dict[str, object]] = {}


def make_config(tier: str, **fields) -> SandboxConfig:
    if tier in elsewhere:
        return SandboxConfig(**{"isolation": "best_available", **elsewhere[tier], **fields})
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")
    return SandboxConfig(isolation="best_available", tier=tier, **fields)


def needs(tier: str, guarantee: str) -> None:
    report = probe_docker() if tier == "docker" else probe(tier=None if tier == "remote" else tier)
    if guarantee not in report.guarantees:
        pytest.skip(f"{guarantee} is not enforced in the {tier} tier here")


@contextlib.contextmanager
def changed_zygote(monkeypatch, code: str):
    """Run another zygote meanwhile, in which `code` stands for what another kernel would do."""
    zygote_client.shut_down()
    boot = zygote_client._BOOT.replace("zygote.main", f"{code}; zygote.main")
    monkeypatch.setattr(zygote_client, "_BOOT", boot)
    yield
    zygote_client.shut_down()


def inside(config: SandboxConfig, work):
    async def run():
        async with Sandbox(config) as sandbox:
            return await work(sandbox)

    return asyncio.run(asyncio.wait_for(run(), 180))


def execute(config: SandboxConfig, command: str, **options):
    return inside(config, lambda sandbox: sandbox.execute(command, **options))


def python(program: str) -> str:
    return f"python3 -c {shlex.quote(program)}"


def host_processes(word: str) -> list[int]:
    """Host processes whose command line holds `word`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def file_exists(sandbox: Sandbox, path: str) -> bool:
    try:
        await sandbox.read_file(path)
    except SandboxFileError:
        return False
    return True
