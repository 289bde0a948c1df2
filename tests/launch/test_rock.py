"""The command line of ROCK's services: what it prints, where it listens, and what a killed admin or
worker leaves.
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from envs.rock import Sandbox, SandboxClosedError, SandboxConfig, probe
from tests.paths import ROOT
from tests.processes import host_processes


@contextlib.contextmanager
def started(data, *arguments):
    """(process, URL) of a service with its tokens in `data`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.rock", *arguments, "--port=0", f"--data={data}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        yield process, re.search(r" at (http://127\.0\.0\.1:[0-9]+)$", lines[1].strip()).group(1)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def config(data, url):
    tokens = dict(line.split() for line in (data / "tokens").read_text().splitlines())
    return SandboxConfig(
        backend="remote", url=url, token=tokens["default"], isolation="best_available"
    )


async def until(holds):
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about within 60 s")


@pytest.fixture
def mark():
    if (report := probe()).tier is None:
        pytest.skip(f"no sandbox here: {report.missing[0].reason}")
    return f"rock-{os.getpid()}-{time.monotonic_ns()}"


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_admin_that_is_ended_or_killed_leaves_no_process(tmp_path, mark, how):
    async def work(process, url):
        sandbox = Sandbox(config(tmp_path, url))
        await sandbox.start()
        await sandbox.spawn(f"exec -a {mark} sleep 600", timeout=900)
        await until(lambda: host_processes(mark))
        process.send_signal(how)
        await asyncio.to_thread(process.wait, 60)
        await until(lambda: not host_processes(mark))

    with started(tmp_path, "admin") as (process, url):
        asyncio.run(asyncio.wait_for(work(process, url), 180))


@pytest.mark.slow
def test_a_killed_worker_is_told_leaves_no_process_and_another_takes_its_place(tmp_path, mark):
    async def work(worker, url):
        sandbox = Sandbox(config(tmp_path, url))
        await sandbox.start()
        running = asyncio.create_task(sandbox.execute(f"exec -a {mark} sleep 600", timeout=900))
        await until(lambda: host_processes(mark))
        worker.kill()
        with pytest.raises(SandboxClosedError, match="worker one"):
            await running
        assert not sandbox.is_alive()
        await sandbox.stop()
        await until(lambda: not host_processes(mark))
        waiting = asyncio.create_task(again(url))
        with started(tmp_path, "worker", f"--admin={url}", "--name=two"):
            assert await waiting == "well\n"

    async def again(url):
        async with Sandbox(config(tmp_path, url)) as sandbox:
            return (await sandbox.execute("echo well")).stdout

    with (
        started(tmp_path, "admin", "--workers=0") as (_, url),
        started(tmp_path, "worker", f"--admin={url}", "--name=one") as (worker, _),
    ):
        asyncio.run(asyncio.wait_for(work(worker, url), 180))


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["admin", "--host=0.0.0.0"], "add --public"),
        (
            ["admin", "--host=0.0.0.0", "--public"],
            "name the file of names and tokens by --token_file",
        ),
        ([], "say what to start"),
        (["worker"], "needs --admin"),
        (["worker", "--admin=nonsense"], "http://HOST:PORT; not 'nonsense'"),
        (["admin", "--port=99999"], "port"),
        (["admin", "--host=127.0.0.1", "--port=1", "--backends=podman"], "podman is unknown"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(tmp_path, arguments, message):
    ended = subprocess.run(
        [sys.executable, "-m", "launch.rock", *arguments, f"--data={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode and message in ended.stderr and "Traceback" not in ended.stderr


def test_a_user_without_a_home_directory_is_told_what_to_set():
    """An id that a cluster made up: no HOME, no entry in passwd."""
    become = ["unshare", "--user", "--map-user=54321"]
    if subprocess.run([*become, "true"], capture_output=True).returncode:
        pytest.skip("no other user id can be had here")
    program = """
import runpy, sys
from envs.rock import SandboxError
from envs.rock.images import local
try:
    local.require("image")
except SandboxError as error:
    print(error)
sys.argv = ["launch.rock", "admin"]
runpy.run_module("launch.rock", run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [*become, sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "this user has no home directory" in done.stdout and "set HOME" in done.stdout
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "--data=~/.rock" in done.stderr and "user id 54321" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    "given", [["--host=0.0.0.0"], ["--host=127.0.0.1", "--advertise=http://0.0.0.0:1"]]
)
def test_a_worker_on_all_addresses_must_say_where_it_is_reached(given, tmp_path):
    (tmp_path / "tokens").write_text(
        "default a-long-enough-token-1\nworker a-long-enough-token-2\n"
    )
    options = ["--admin=http://127.0.0.1:1", "--public", f"--token_file={tmp_path}/tokens"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.rock", "worker", *options, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "--advertise=http://HOST:PORT" in done.stderr
