"""Sandboxes of one tier, and what lives because of them: processes and control groups."""

import glob
import pathlib
import time

import pytest

from envs.rock import Sandbox, SandboxConfig, probe
from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups


def config_of(tier: str = "namespaces", **fields) -> SandboxConfig:
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")
    return SandboxConfig(isolation="best_available", tier=tier, **fields)


def zygote_pid() -> int:
    return zygote_client._zygote._process.pid


def descendants(pid: int) -> list[int]:
    children = [
        int(word)
        for path in glob.glob(f"/proc/{pid}/task/*/children")
        for word in pathlib.Path(path).read_text().split()
    ]
    return children + [grandchild for child in children for grandchild in descendants(child)]


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def groups_of_zygote() -> set[str]:
    place, _ = cgroups.find()
    return (
        {
            path
            for parent in set(place.parents.values())
            for path in glob.glob(f"{parent}/rock-*-{zygote_pid()}")
        }
        if place
        else set()
    )


async def echo(config: SandboxConfig) -> str:
    async with Sandbox(config) as sandbox:
        return (await sandbox.execute("echo hi")).stdout
