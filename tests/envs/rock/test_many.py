"""Hundreds of sandboxes of one process, at small and at large limits of open files."""

import json
import resource
import subprocess
import sys

import pytest

from envs.rock import probe
from tests.paths import ROOT

_MANAGER = """
import asyncio, json, os, resource, sys
sys.path.insert(0, {repository!r})
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from envs.rock import Sandbox, SandboxConfig, SandboxError
from envs.rock.embedded import zygote_client
from envs.rock.host import linux

occupy = "import os; taken = [os.open('/dev/null', os.O_RDONLY) for _ in range({occupied})]; "
zygote_client._BOOT = occupy + zygote_client._BOOT
exec(occupy)

async def work():
    config = SandboxConfig(isolation="best_available", tier="namespaces", start_timeout=300)
    sandboxes = [Sandbox(config) for _ in range({count})]
    starts = await asyncio.gather(*(one.start() for one in sandboxes), return_exceptions=True)
    errors = [repr(end) for end in starts if end is not None]
    alive = [one for one in sandboxes if one.is_alive()]
    turns = asyncio.Semaphore(max(1, len(alive) // 10))

    async def use(one):
        async with turns:
            return await one.execute("echo hi", timeout=300)

    results = await asyncio.gather(*map(use, alive))
    holders = linux.children_of(zygote_client._zygote._process.pid)
    inherited = max(len(os.listdir(f"/proc/{{pid}}/fd")) for pid in holders)
    await asyncio.gather(*(one.stop() for one in alive))
    answers = [result.stdout for result in results].count("hi\\n")
    left = linux.children_of(zygote_client._zygote._process.pid)
    async with Sandbox(config) as after:
        again = (await after.execute("echo again")).stdout
    facts = {{"errors": errors, "answers": answers, "left": left, "again": again}}
    print(json.dumps(facts | {{"inherited": inherited}}))

asyncio.run(work())
"""
HOLDER_DESCRIPTORS = 64  # more than a holder without commands has of its own


def run_sandboxes(count: int, soft: int, hard: int, occupied: int = 0) -> dict:
    """Start, use and stop sandboxes in a process of their own; return what became of them.

    Args:
      count: of sandboxes at one time.
      soft: limit of open files at the start.
      hard: limit of open files.
      occupied: descriptors that manager and zygote have open already.
    """
    if (report := probe(tier="namespaces")).tier is None:
        pytest.skip(f"no namespaces tier here: {report.missing[0].reason}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < hard:
        pytest.skip(f"the hard limit of open files is {most}, this needs {hard}")
    program = _MANAGER.format(
        repository=str(ROOT), count=count, soft=soft, hard=hard, occupied=occupied
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("occupied", [1100, 4500])
def test_descriptors_of_any_number_serve_and_are_not_inherited(occupied):
    """select() cannot take those above 1,023; a sandbox must not hold another one's channel."""
    facts = run_sandboxes(6, soft=6000, hard=6000, occupied=occupied)
    assert facts["errors"] == [] and facts["answers"] == 6 and facts["left"] == []
    assert facts["inherited"] < HOLDER_DESCRIPTORS


@pytest.mark.long
@pytest.mark.parametrize("soft", [64, 96])
def test_a_low_soft_limit_of_open_files_is_no_limit_of_sandboxes(soft):
    facts = run_sandboxes(40, soft=soft, hard=2000)
    assert facts["errors"] == [] and facts["answers"] == 40


@pytest.mark.long
@pytest.mark.parametrize("hard", [64, 71])
def test_at_the_hard_limit_a_start_fails_and_says_what_to_raise_while_the_others_live(hard):
    facts = run_sandboxes(40, soft=hard, hard=hard)
    assert 0 < facts["answers"] < 40 and len(facts["errors"]) == 40 - facts["answers"]
    assert all("ulimit -Hn" in error for error in facts["errors"])
    assert facts["again"] == "again\n" and facts["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize("soft", [1024, 20_000])
def test_a_thousand_sandboxes_are_started_used_and_stopped_in_one_process(soft):
    facts = run_sandboxes(1000, soft=soft, hard=20_000)
    assert facts["errors"] == [] and facts["answers"] == 1000 and facts["left"] == []
    assert facts["inherited"] < HOLDER_DESCRIPTORS
