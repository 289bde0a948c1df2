"""Hostile commands: what the kernel keeps for a sandbox is counted, and the host comes first."""

import asyncio
import os
import pathlib

import pytest

from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups
from tests.hostile.sandboxes import execute, host_processes, inside, make_config, needs, python

# Fills the buffers of connections that nobody reads, and says how many MiB the kernel took.
BUFFERS = """
import socket, sys
kind = {kind}
total = 0
kept = []
try:
    for _ in range(60):
        if kind == socket.SOCK_STREAM:
            server = socket.create_server(("127.0.0.1", 0))
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
            kept += [server, far]
        else:
            far = socket.socket(socket.AF_INET, kind)
            far.bind(("127.0.0.1", 0))
            near = socket.socket(socket.AF_INET, kind)
            near.connect(far.getsockname())
            kept.append(far)
        kept.append(near)
        for one in (near, far):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        near.setblocking(False)
        try:
            for _ in range(1000):
                total += near.send(bytes(16000))
        except BlockingIOError:
            pass
except OSError as error:
    print(error, file=sys.stderr)
for line in open("/proc/net/sockstat"):
    if line.split(":")[0] in ("TCP", "UDP"):
        print(line.split()[0], int(line.split()[-1]) * 4096 >> 20)
"""


def group_of_the_only_sandbox(controller: str) -> pathlib.Path:
    place, reason = cgroups.find()
    if place is None or controller not in place.parents:
        pytest.skip(f"no {controller} cgroup here: {reason}")
    zygote = zygote_client._zygote._process.pid
    (group,) = pathlib.Path(place.parents[controller]).glob(f"rock-*-{zygote}")
    return group


def may_exceed_limits() -> bool:
    """Return whether this process has CAP_SYS_RESOURCE."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (capabilities,) = [line.split()[1] for line in lines if line.startswith("CapEff:")]
    return bool(int(capabilities, 16) >> 24 & 1)


@pytest.mark.parametrize("kind", [1, 2])
def test_buffers_of_sockets_are_bounded_by_the_memory_limit(kind):
    needs("namespaces", "memory")
    config = make_config("namespaces", memory_mb=32, disk_mb=8, open_files=256)
    lines = execute(config, python(BUFFERS.format(kind=kind)), timeout=30).stdout.splitlines()
    taken = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert max(taken.values(), default=0) <= 48


def test_network_buffers_are_limited_where_the_kernel_counts_them_apart():
    needs("namespaces", "memory")

    async def work(sandbox):
        group = group_of_the_only_sandbox("memory")
        limit = group / "memory.kmem.tcp.limit_in_bytes"
        if not limit.exists():
            pytest.skip("cgroups of version 2 count buffers as memory")
        return int(limit.read_text())

    assert inside(make_config("namespaces", memory_mb=64), work) == 64 << 20


@pytest.mark.parametrize("how", ["execute", "session", "verify"])
def test_the_kernels_memory_killer_takes_a_command_before_the_trainer(how):
    async def work(sandbox):
        command = "cat /proc/self/oom_score_adj"
        if how == "session":
            async with await sandbox.create_session() as session:
                return (await session.run(command)).stdout
        if how == "verify":
            return (await sandbox.verify(command)).stdout
        return (await sandbox.execute(command)).stdout

    assert inside(make_config("namespaces"), work) == "1000\n"


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_no_command_lowers_its_rank_for_the_memory_killer(tier):
    async def work(sandbox):
        nap = f"600.{os.getpid()}"
        job = await sandbox.spawn(f"echo 0 > /proc/self/oom_score_adj; exec sleep {nap}")
        while not host_processes(f"sleep\0{nap}"):
            await asyncio.sleep(0.01)
        (pid,) = (group_of_the_only_sandbox("pids") / "cgroup.procs").read_text().split()
        score = pathlib.Path(f"/proc/{pid}/oom_score_adj").read_text()
        await job.kill()
        return score

    needs(tier, "memory")
    if tier == "namespaces" and not may_exceed_limits():
        pytest.skip("without CAP_SYS_RESOURCE a rank can be lowered again, see SECURITY.md")
    assert inside(make_config(tier), work) == "1000\n"


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_many_busy_sandboxes_do_not_outweigh_the_trainer(tier):
    needs(tier, "cpu")

    async def work(sandbox):
        group = group_of_the_only_sandbox("cpu")
        shares = group / "cpu.shares"
        if shares.exists():
            return int(shares.read_text()), int((group.parent / "cpu.shares").read_text())
        return int((group / "cpu.weight").read_text()), 100

    own, trainers = inside(make_config(tier), work)
    assert own * 4 <= trainers
