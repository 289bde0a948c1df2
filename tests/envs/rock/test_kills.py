"""Kills at random moments, and calls that are cancelled: nothing is left of any sandbox."""

import asyncio
import contextlib
import glob
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxError, probe
from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups
from tests.paths import ROOT
from tests.processes import open_files

KILLS = 15
# Starts, forks, sessions, verifiers, snapshots and stops beside each other, until it is killed.
BUSY = """
import asyncio, random, sys
sys.path.insert(0, {root!r})
from envs.rock import Sandbox, SandboxConfig
from envs.rock.embedded import zygote_client
CONFIG = SandboxConfig(isolation="best_available", tier={tier!r})
async def live(random):
    while True:
        async with Sandbox(CONFIG) as sandbox:
            if not told:
                told.append(print(zygote_client._zygote._process.pid, flush=True))
            await sandbox.execute("echo x > f; setsid sleep {mark} > /dev/null 2>&1 & sleep 0.01")
            session = await sandbox.create_session()
            await session.run("setsid sleep {mark} > /dev/null 2>&1 &")
            await session.close()
            async with await sandbox.fork() as copy:
                await copy.verify("cat f", files={{"a": b"b"}})
                snapshot = await copy.snapshot()
                if random.random() < 0.5:
                    await snapshot.delete()
            if random.random() < 0.3:
                await sandbox.execute("sleep {mark}", timeout=0.2)
async def main():
    await asyncio.gather(*(live(random.Random({seed} * 10 + one)) for one in range(3)))
told = []
asyncio.run(main())
"""
ONE_MORE = """
import asyncio, sys
sys.path.insert(0, {root!r})
from envs.rock import Sandbox, SandboxConfig
async def main():
    async with Sandbox(SandboxConfig(isolation="best_available", tier={tier!r})) as sandbox:
        assert (await sandbox.execute("echo hi")).stdout == "hi\\n"
asyncio.run(main())
"""


def need(tier: str) -> None:
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")


def run_here(program: str, state: pathlib.Path) -> subprocess.Popen:
    environment = {**os.environ, "TMPDIR": str(state)}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def is_running(zygote: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{zygote}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leftovers(zygotes: list[int], mark: str, state: pathlib.Path) -> list[str]:
    """Return what is left of zygotes that have ended: cgroups, processes, files and mounts."""
    place, _ = cgroups.find()
    found = []
    for parent in dict.fromkeys(place.parents.values()) if place else ():
        for zygote in zygotes:
            found += glob.glob(f"{parent}/rock-*-{zygote}")
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"sleep\0{mark}".encode() in pathlib.Path(path).read_bytes():
                found.append(path)
    found += glob.glob(f"{state}/rock-*/*")
    mounts = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in mounts if str(state) in line]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_after_kills_at_random_moments_the_next_start_leaves_nothing(tier, tmp_path):
    need(tier)
    if tier == "landlock" and os.geteuid() != 0:
        pytest.skip("an ordinary user's commands of this tier are found by no id of their own")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)  # sandboxes have ids of their own and must get to their files
    moments = random.Random(tier)
    zygotes = []
    for kill in range(KILLS):
        mark = f"4711{os.getpid()}{kill}"
        program = BUSY.format(root=str(ROOT), tier=tier, mark=mark, seed=kill)
        manager = run_here(program, tmp_path)
        zygote = int(manager.stdout.readline())
        time.sleep(moments.uniform(0.0, 1.0))
        victims = moments.choice([[manager.pid], [zygote], [manager.pid, zygote]])
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        if manager.pid not in victims:
            time.sleep(0.2)  # its calls fail now, or it has another zygote already
            manager.kill()
        manager.wait(60)
        manager.stdout.close()
        deadline = time.monotonic() + 60
        while is_running(zygote) and time.monotonic() < deadline:
            time.sleep(0.05)
        zygotes.append(zygote)
        another = run_here(ONE_MORE.format(root=str(ROOT), tier=tier), tmp_path)
        assert another.wait(60) == 0
        another.stdout.close()
        found = leftovers(zygotes, mark, tmp_path)
        while found and time.monotonic() < deadline and kill < KILLS:
            time.sleep(0.2)  # a second zygote of the killed manager may still be at its end
            run_here(ONE_MORE.format(root=str(ROOT), tier=tier), tmp_path).wait(60)
            found = leftovers(zygotes, mark, tmp_path)
        assert found == [], f"after kill {kill} of {victims}"


async def settle(find_left) -> list[str]:
    """Wait until nothing is left, for a minute at most; return what is."""
    for _ in range(1200):
        if not (left := find_left()):
            break
        await asyncio.sleep(0.05)
    return left


async def start(config: SandboxConfig) -> Sandbox:
    sandbox = Sandbox(config)
    await sandbox.start()
    return sandbox


CANCELLED = {
    "start": lambda sandbox: start(sandbox.config),
    "fork": lambda sandbox: sandbox.fork(),
    "snapshot": lambda sandbox: sandbox.snapshot(),
    "session": lambda sandbox: sandbox.create_session(),
    "execute": lambda sandbox: sandbox.execute("sleep 600"),
    "verify": lambda sandbox: sandbox.verify("sleep 600"),
    "list": lambda sandbox: sandbox.list_files("."),
}


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
@pytest.mark.parametrize("deed", sorted(CANCELLED))
def test_what_is_cancelled_leaves_nothing(deed, tier):
    """Each is cancelled at many moments, and once more while it cleans up."""
    need(tier)

    async def work():
        config = SandboxConfig(isolation="best_available", tier=tier)
        async with Sandbox(config) as sandbox:
            await sandbox.execute("echo x > f")
            state = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")
            owner = sandbox._backend._slot

            zygote = zygote_client._zygote._process.pid
            before = open_files(), open_files(zygote)

            def find_left():
                snapshots = map(str, state.glob(f"{owner}.*.snapshot"))
                opened = (open_files() - before[0]) + (open_files(zygote) - before[1])
                return [*opened.elements(), *snapshots]

            for moment in range(12):
                task = asyncio.ensure_future(CANCELLED[deed](sandbox))
                await asyncio.sleep(moment * 0.003)
                task.cancel()
                if moment % 3 == 0:
                    await asyncio.sleep(0.001)
                    task.cancel()
                with contextlib.suppress(asyncio.CancelledError, SandboxError):
                    await end(await task)
            left = await settle(find_left)
            for _ in range(600):
                status = await sandbox.get_status()
                if status.sessions + status.commands == 0:
                    break
                await asyncio.sleep(0.05)
            return left, status.sessions, status.commands

    assert asyncio.run(asyncio.wait_for(work(), 180)) == ([], 0, 0)


async def end(result: object) -> None:
    """End what was done before the cancellation came."""
    if isinstance(result, Sandbox):
        await result.stop()
    elif hasattr(result, "close"):
        await result.close()
    elif hasattr(result, "delete"):
        await result.delete()
