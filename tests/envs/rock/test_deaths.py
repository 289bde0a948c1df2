"""Whatever is killed or stuck: its callers are told, and nothing of it is left."""

import asyncio
import glob
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import pytest

from envs.rock import Sandbox, SandboxClosedError, SandboxError
from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups, linux
from tests.envs.rock.lives import (
    config_of,
    descendants,
    echo,
    eventually,
    groups_of_zygote,
    is_alive,
    zygote_pid,
)
from tests.envs.rock.waiting import until_running
from tests.paths import ROOT
from tests.processes import host_processes

REPOSITORY = str(ROOT)
MARK = f"31338{os.getpid()}"  # of what sleeps in sandboxes here: no other run has it
STATE = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")


@pytest.fixture(scope="module", autouse=True)
def own_zygote():
    """Bring another zygote, without what tests of other files may have left running."""
    zygote_client.shut_down()


_MANAGER = """
import asyncio, os, sys
sys.path.insert(0, {repository!r})
from envs.rock import Sandbox, SandboxConfig
from envs.rock.embedded import zygote_client
async def main():
    config = SandboxConfig(isolation="best_available", tier={tier!r})
    sandboxes = [Sandbox(config) for _ in range(3)]
    await asyncio.gather(*(sandbox.start() for sandbox in sandboxes))
    command = "setsid sleep {mark} & sleep {mark}"
    running = [
        asyncio.create_task(sandbox.execute(command, timeout=600)) for sandbox in sandboxes
    ]
    print(zygote_client._zygote._process.pid, flush=True)
    await asyncio.gather(*running)
asyncio.run(main())
"""


def _start_manager(tier: str, mark: str) -> tuple[subprocess.Popen, int]:
    config_of(tier)
    program = _MANAGER.format(repository=REPOSITORY, tier=tier, mark=mark)
    manager = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    zygote = int(manager.stdout.readline())
    assert eventually(lambda: host_processes(f"sleep\0{mark}") == 6)  # two in each sandbox
    return manager, zygote


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_when_the_manager_is_killed_everything_ends_and_is_removed(tier):
    before = set(os.listdir(STATE)) if STATE.exists() else set()
    manager, zygote = _start_manager(tier, mark=f"{MARK}1")
    processes = [zygote, *descendants(zygote)]
    assert len(processes) >= 1 + 3 * 3
    place, _ = cgroups.find()
    manager.kill()
    manager.wait()
    assert eventually(lambda: not any(map(is_alive, processes)))
    assert not [
        path
        for parent in (place.parents.values() if place else ())
        for path in glob.glob(f"{parent}/rock-*-{zygote}")
    ]
    assert not {name for name in set(os.listdir(STATE)) - before if _owner(name) == zygote}


def _owner(name: str) -> int | None:
    try:
        return int(json.loads((STATE / name).read_bytes().strip(b"\0 ") or b"{}").get("zygote", 0))
    except (OSError, ValueError, AttributeError):
        return None


def test_when_the_zygote_is_killed_nothing_runs_on_and_the_next_start_sweeps():
    manager, zygote = _start_manager("namespaces", mark=f"{MARK}2")
    processes = descendants(zygote)
    os.kill(zygote, signal.SIGKILL)
    assert manager.wait(60) != 0  # its commands fail: SandboxClosedError, not a wait without end
    assert eventually(lambda: not any(map(is_alive, processes)))
    place, _ = cgroups.find()
    left = {name for name in os.listdir(STATE)}
    zygote_client.shut_down()  # so that the next sandbox brings a new zygote
    assert asyncio.run(echo(config_of())) == "hi\n"
    assert not [
        path
        for parent in (place.parents.values() if place else ())
        for path in glob.glob(f"{parent}/rock-*-{zygote}")
    ]
    assert not left & {name for name in os.listdir(STATE) if _owner(name) == zygote}


def test_a_sandbox_whose_holder_is_killed_says_so():
    async def work():
        async with Sandbox(config_of()) as sandbox:
            running = asyncio.create_task(sandbox.execute(f"sleep {MARK}3"))
            await until_running(f"sleep\0{MARK}3")
            (holder,) = [
                int(word)
                for word in (
                    pathlib.Path(f"/proc/{zygote_pid()}/task/{zygote_pid()}/children")
                    .read_text()
                    .split()
                )
            ]
            children = descendants(holder)
            os.kill(holder, signal.SIGKILL)
            with pytest.raises(SandboxClosedError):
                await running
            with pytest.raises(SandboxClosedError):
                await sandbox.execute("true")
            return children

    children = asyncio.run(work())
    assert eventually(lambda: not any(map(is_alive, children)))


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
@pytest.mark.parametrize("command", ["true", "sleep 1000"])
def test_a_holder_that_is_stuck_is_killed_and_nothing_is_left(tier, command, monkeypatch):
    monkeypatch.setattr("envs.rock.embedded.channel.STOP_SECONDS", 0.5)

    async def work():
        sandbox = Sandbox(config_of(tier))
        sibling = Sandbox(config_of(tier))
        await sandbox.start()
        (holder,) = linux.children_of(zygote_pid())
        await sibling.start()
        running = await sandbox.spawn(command)
        await asyncio.sleep(0.2)
        processes = descendants(holder)
        os.kill(holder, signal.SIGSTOP)
        await sandbox.stop()
        with pytest.raises(SandboxClosedError):
            await running.wait()
            await sandbox.execute("true")
        left = [pid for pid in [holder, *processes] if is_alive(pid)]
        groups = len(groups_of_zygote())
        alive = (await sibling.execute("echo alive")).stdout
        await sibling.stop()
        return left, alive, groups

    groups_of_one = asyncio.run(_count_groups_of_one(tier))
    assert asyncio.run(asyncio.wait_for(work(), 180)) == ([], "alive\n", groups_of_one)
    assert not descendants(zygote_pid()) and not groups_of_zygote()


async def _count_groups_of_one(tier: str) -> int:
    async with Sandbox(config_of(tier)):
        return len(groups_of_zygote())


def test_a_dead_init_ends_its_commands_and_the_next_one_is_an_error():
    async def run():
        async with Sandbox(config_of()) as sandbox:
            await sandbox.execute("true")
            (holder,) = descendants(zygote_pid())[:1]
            (init,) = [
                int(word)
                for word in (
                    pathlib.Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
                )
            ]
            running = asyncio.create_task(sandbox.execute(f"sleep {MARK}4"))
            await until_running(f"sleep\0{MARK}4")
            os.kill(init, signal.SIGKILL)
            return await running, await asyncio.gather(
                sandbox.execute("true"), return_exceptions=True
            )

    interrupted, (after,) = asyncio.run(run())
    assert interrupted.exit_code == 137 and isinstance(after, SandboxError)
