"""The Docker backend's way with death, on an engine of the tests' own (engine.py): doors, killed
managers, sweeping, what is given up.
"""

import asyncio
import json
import os
import subprocess
import sys
import time

import pytest

from envs.rock import Sandbox, SandboxClosedError, SandboxStartError
from tests.envs.rock.in_docker import config, containers
from tests.paths import ROOT
from tests.processes import host_processes

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


def test_a_port_of_the_sandbox_is_reached_through_a_door_on_loopback(inside):
    server = """use Socket; socket(S, PF_INET, SOCK_STREAM, 0);
bind(S, sockaddr_in(7777, INADDR_LOOPBACK)) or die; listen(S, 5);
open(U, ">up"); close(U);
while (accept(C, S)) { sysread(C, $x, 100); syswrite(C, scalar reverse $x); close(C); }"""

    async def work(sandbox):
        address = await sandbox.expose_port(7777)
        reader, writer = await asyncio.open_connection(*address)
        nothing = await asyncio.wait_for(reader.read(), 60)  # nobody listens yet
        writer.close()
        await sandbox.write_file("s.pl", server)
        job = await sandbox.spawn("perl s.pl")
        while "up" not in [entry.path for entry in await sandbox.list_files()]:
            await asyncio.sleep(0.01)
        answers = []
        for word in (b"abc", b"12345"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(word)
            answers.append(await asyncio.wait_for(reader.read(), 60))
            writer.close()
            await sandbox.execute("true")  # what it tidies away is not the way in
        await job.kill()
        return address, nothing, answers

    (host, port), nothing, answers = inside(work)
    assert host == "127.0.0.1" and nothing == b"" and answers == [b"cba", b"54321"]
    with pytest.raises(OSError):  # the door closes with its sandbox
        asyncio.run(asyncio.open_connection(host, port))


MANAGER = """
import asyncio, sys
sys.path.insert(0, {root!r})
from envs.rock import Sandbox, SandboxConfig
async def main():
    async with Sandbox(SandboxConfig(backend="docker", image={image!r})) as sandbox:
        running = asyncio.create_task(sandbox.execute("sleep 60"))
        print("up", flush=True)
        await running
asyncio.run(main())
"""


def test_a_killed_manager_leaves_no_container(engine):
    root = str(ROOT)
    manager = subprocess.Popen(
        [sys.executable, "-c", MANAGER.format(root=root, image=engine.image)],
        stdout=subprocess.PIPE,
    )
    assert manager.stdout.readline() == b"up\n" and len(containers()) == 1
    manager.kill()
    manager.wait()
    deadline = time.monotonic() + 20
    while containers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert containers() == []


def test_the_sweeper_removes_what_dead_managers_left_and_nothing_else(engine):
    from envs.rock.docker.engine import OWNER, identity
    from envs.rock.docker.engine import engine as docker_engine

    client = docker_engine().client
    dead = identity(os.getpid()) | {"started": "1"}
    other_boot = identity(os.getpid()) | {"boot": "an earlier one"}
    elsewhere = dead | {"namespace": "pid:[1]"}
    labels = [
        {OWNER: json.dumps(who)} for who in (dead, other_boot, elsewhere, identity(os.getpid()))
    ] + [{OWNER: "no json"}, {}]
    made = [client.create_container(engine.image, ["sh"], labels=label)["Id"] for label in labels]
    try:
        docker_engine()._remove_orphans()
        assert {made.index(left) for left in containers()} == {2, 3, 4, 5}
    finally:
        for one in containers():
            client.remove_container(one, force=True)


def test_a_container_that_is_removed_from_outside_closes_its_sandbox(engine):
    async def work():
        from envs.rock.docker.engine import engine as docker_engine

        async with Sandbox(config(engine)) as sandbox:
            running = asyncio.create_task(sandbox.execute("sleep 60"))
            await asyncio.sleep(0.3)
            client = docker_engine().client
            await asyncio.to_thread(
                client.remove_container, sandbox._backend._running.container.id, force=True
            )
            with pytest.raises(SandboxClosedError):
                await running
            assert not sandbox.is_alive()
            with pytest.raises(SandboxClosedError):
                await sandbox.execute("true")
            await sandbox.stop()

    asyncio.run(asyncio.wait_for(work(), 180))
    assert containers() == []


def test_cancelled_starts_and_commands_leave_nothing(engine):
    seconds = f"8768{os.getpid()}"

    async def work():
        for delay in (0.0, 0.01, 0.03, 0.06, 0.1):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(Sandbox(config(engine)).start(), delay)
        async with Sandbox(config(engine)) as sandbox:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(sandbox.execute(f"setsid sleep {seconds}"), 0.5)
            return (await sandbox.execute("echo well")).stdout, host_processes(seconds)

    assert asyncio.run(asyncio.wait_for(work(), 180)) == ("well\n", 0)
    assert containers() == []


def test_an_image_that_lacks_what_a_sandbox_needs_is_named(engine, tmp_path):
    from envs.rock.docker.engine import engine as docker_engine

    client = docker_engine().client
    empty = tmp_path / "empty.tar"
    subprocess.run(["tar", "-cf", str(empty), "-T", "/dev/null"], check=True)
    client.import_image_from_data(empty.read_bytes(), repository="rock-test/empty", tag="1")
    with pytest.raises(SandboxStartError, match="/bin/sh"):
        asyncio.run(Sandbox(config(engine, image="rock-test/empty:1")).start())
    assert containers() == []
