r"""Measure the time of starting, using and forking sandboxes, their memory, and what they leave.

python -m benchmarks.sandbox --json sandbox.json \
    [--cycles 1000] [--live 200] [--docker_image IMAGE] [--swerex_image IMAGE]

Times are medians in milliseconds of calls one after the other on this machine. `floor` is bash
itself, started and waited for without any sandbox: no command in a process of its own can take
less.

With --docker_image (one that is present and has a shell) `docker run --rm --network none ...`, with
the limits of our sandboxes, and `docker exec` are timed alternately with ours. `ratio_docker` is
the median of the pairs' ratios of creation. The Docker backend is timed too. Without the flag, or
where no engine answers, `ratio_docker` is null and `docker_none` says why.

Where SWE-ReX is installed (pip install swe-rex) its local deployment, which isolates nothing, is
timed alternately with ours: creation to the first output of a shell, and a command in that shell.
With --swerex_image (one that has swerex-remote in it) its Docker deployment is timed too, on the
host's network and without limits. Otherwise `ratio_swerex_*` are null and `swerex_none` says why.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import glob
import json
import logging
import os
import pathlib
import shlex
import statistics
import subprocess
import tempfile
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web
from rich.console import Console
from rich.table import Table

from envs.rock import Sandbox, SandboxConfig, probe
from envs.rock.docker.probe import probe_docker
from envs.rock.doors import Door
from envs.rock.embedded import zygote_client

CONFIG = SandboxConfig(memory_mb=256, pids=64, disk_mb=64)
FILES = 1000  # of the tree that is snapshotted and forked
FILE_BYTES = 10_000
WORKERS = 8  # that create and end sandboxes at the same time, to find leaks
LEAVING_SECONDS = 10.0  # after which what is still there was left behind
DOCKER_LIMITS = (
    "--network",
    "none",
    "--memory",
    "256m",
    "--memory-swap",
    "256m",
    "--pids-limit",
    "64",
    "--cpus",
    "1",
    "--read-only",
    "--tmpfs",
    "/tmp:rw,size=64m",
    "--security-opt",
    "no-new-privileges",
    "--cap-drop",
    "ALL",
    "--user",
    "65534:65534",
    "--log-driver",
    "none",
)


async def timed(
    repeats: int,
    work: Callable[[], Awaitable[Any]],
    after: Callable[[Any], Awaitable[Any]] | None = None,
) -> list[float]:
    """Return the milliseconds of each call of `work`; `after` gets its result, untimed."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = await work()
        times.append(1000 * (time.perf_counter() - began))
        if after:
            await after(result)
    return times


async def create_and_echo(config: SandboxConfig = CONFIG) -> Sandbox:
    """Start a sandbox and run a first command in it."""
    sandbox = Sandbox(config)
    await sandbox.start()
    result = await sandbox.execute("echo hi")
    if result.stdout != "hi\n":
        raise RuntimeError(f"a new sandbox answered {result}")
    return sandbox


async def measure_commands(repeats: int) -> dict[str, list[float]]:
    """Time the operations of one sandbox, and the forks of its snapshot."""
    found = {}
    async with Sandbox(CONFIG) as sandbox:
        found["execute"] = await timed(repeats, lambda: sandbox.execute("true"))
        async with await sandbox.create_session() as session:
            found["session_command"] = await timed(repeats, lambda: session.run("true"))
        content = os.urandom(1 << 20)
        found["upload_1mb"] = await timed(repeats, lambda: sandbox.write_file("big", content))
        found["verify"] = await timed(repeats, lambda: sandbox.verify("true"))
        await sandbox.execute(
            f"rm big; for n in $(seq {FILES}); do head -c {FILE_BYTES} /dev/zero > f$n; done"
        )
        found["snapshot"] = await timed(
            max(3, repeats // 10), sandbox.snapshot, lambda snapshot: snapshot.delete()
        )
        snapshot = await sandbox.snapshot()

        async def fork() -> Sandbox:
            fork = Sandbox(CONFIG, snapshot)
            await fork.start()
            return fork

        found["fork"] = await timed(repeats, fork, lambda fork: fork.stop())
        found["restore"] = await timed(max(3, repeats // 10), lambda: sandbox.restore(snapshot))
    return found


_ASK = """
import http.client, statistics, sys, time
connection = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]))
times = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    connection.request("GET", "/")
    connection.getresponse().read()
    times.append(1000 * (time.perf_counter() - began))
print(statistics.median(times))
"""


async def measure_door(repeats: int) -> dict[str, float]:
    """Time a request over a kept connection to a door, and the same over this host's loopback."""

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(text="ok")

    server = web.Server(answer)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = str(listening.sockets[0].getsockname()[1])
    config = dataclasses.replace(CONFIG, doors={"model:80": Door.http(server)})
    async with Sandbox(config) as sandbox, listening:
        command = f"python3 -c {shlex.quote(_ASK)} model 80 {repeats}"
        result = await sandbox.execute(command, timeout=120)
        client = await asyncio.create_subprocess_exec(
            "/usr/bin/python3", "-c", _ASK, "127.0.0.1", port, str(repeats), stdout=PIPE
        )
        out, _ = await client.communicate()
    return {"door_ms_p50": float(result.stdout), "host_loopback_ms_p50": float(out)}


async def measure_live(number: int) -> dict[str, float]:
    """Start many sandboxes at once.

    Returns:
      live_seconds: until all have answered a command; live_mib_each: the memory that each adds to
      the machine (proportional set size).
    """
    async with Sandbox(CONFIG) as first:
        await first.execute("true")
        before = _proportional_bytes()
        began = time.perf_counter()
        sandboxes = [Sandbox(CONFIG) for _ in range(number)]
        await asyncio.gather(*(sandbox.start() for sandbox in sandboxes))
        await asyncio.gather(*(sandbox.execute("echo hi") for sandbox in sandboxes))
        seconds = time.perf_counter() - began
        added = _proportional_bytes() - before
        await asyncio.gather(*(sandbox.stop() for sandbox in sandboxes))
    return {"live": number, "live_seconds": seconds, "live_mib_each": added / number / (1 << 20)}


async def measure_leaks(cycles: int) -> dict[str, Any]:
    """Create and end many sandboxes; count descriptors, processes, cgroups and files that stay."""
    share = cycles // WORKERS
    total = share * WORKERS

    async def create_and_end(times: int) -> None:
        for _ in range(times):
            sandbox = await create_and_echo()
            await sandbox.stop()

    await create_and_end(1)  # what the first one makes stays for all
    before = _resources()
    began = time.perf_counter()
    await asyncio.gather(*(create_and_end(share) for _ in range(WORKERS)))
    seconds = time.perf_counter() - began
    deadline = time.monotonic() + LEAVING_SECONDS
    while (left := _added(before)) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return {
        "cycles": total,
        "cycles_per_s": total / seconds,
        "leaks": sum(map(len, left.values())),
        "left": left,
    }


def _added(before: dict[str, set[str]]) -> dict[str, list[str]]:
    """Return what is held now and was not before, by kind; a kind without any is left out."""
    added = {kind: sorted(now - before[kind]) for kind, now in _resources().items()}
    return {kind: names for kind, names in added.items() if names}


def _resources() -> dict[str, set[str]]:
    """Return what this process's zygote and its sandboxes hold now, by kind."""
    zygote = zygote_client._zygote._process.pid
    state = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")
    descriptors = set(os.listdir("/proc/self/fd"))
    for name in os.listdir(f"/proc/{zygote}/fd"):
        descriptors.add(f"zygote {name}")
    files = {path.name for path in state.iterdir()} if state.exists() else set()
    # glob, not rglob: it passes over groups of others that vanish meanwhile.
    groups = glob.glob(f"/sys/fs/cgroup/**/rock-*-{zygote}", recursive=True)
    return {
        "descriptors": descriptors,
        "processes": {str(pid) for pid in _descendants(zygote)},
        "files": files,
        "cgroups": set(groups),
    }


def _descendants(pid: int) -> list[int]:
    children = []
    try:
        for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            children += [int(word) for word in path.read_text().split()]
    except FileNotFoundError:
        return []
    found = list(children)
    for child in children:
        found += _descendants(child)
    return found


def _proportional_bytes() -> int:
    """Return the proportional set size of the zygote's descendants."""
    total = 0
    for pid in _descendants(zygote_client._zygote._process.pid):
        try:
            lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        for line in lines:
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


async def measure_beside_docker(image: str, repeats: int) -> dict[str, Any]:
    """Time Docker's creation and commands alternately with ours, and then our Docker backend."""
    report = await asyncio.to_thread(probe_docker)
    if not image:
        return {"ratio_docker": None, "docker_none": "no --docker_image was given"}
    if report.tier is None:
        return {"ratio_docker": None, "docker_none": report.missing[0].reason}

    async def create() -> None:
        _docker("run", "--rm", *DOCKER_LIMITS, image, "sh", "-c", "echo hi")

    pairs = []
    for _ in range(repeats):
        (ours,) = await timed(1, create_and_echo, lambda sandbox: sandbox.stop())
        (theirs,) = await timed(1, create)
        pairs.append((ours, theirs))
    commands = await _time_docker_exec(image, repeats)
    return await _measure_docker_backend(image, repeats) | {
        "docker_create_ms_p50": statistics.median(theirs for _, theirs in pairs),
        "docker_exec_ms_p50": statistics.median(commands),
        "ratio_docker": statistics.median(theirs / ours for ours, theirs in pairs),
    }


def _docker(*arguments: str) -> str:
    command = ["docker", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120, text=True)
    return done.stdout.strip()


async def _time_docker_exec(image: str, repeats: int) -> list[float]:
    container = _docker("run", "--detach", "--rm", *DOCKER_LIMITS, image, "sleep", "600")

    async def command() -> None:
        _docker("exec", container, "sh", "-c", "true")

    try:
        return await timed(repeats, command)
    finally:
        _docker("kill", container)


async def _measure_docker_backend(image: str, repeats: int) -> dict[str, float]:
    config = SandboxConfig(backend="docker", image=image, memory_mb=256, pids=64, disk_mb=64)
    made = await timed(repeats, lambda: create_and_echo(config), lambda sandbox: sandbox.stop())
    async with Sandbox(config) as sandbox:
        executed = await timed(repeats, lambda: sandbox.execute("true"))
        async with await sandbox.create_session() as session:
            told = await timed(repeats, lambda: session.run("true"))
    return {
        "docker_backend_create_ms_p50": statistics.median(made),
        "docker_backend_execute_ms_p50": statistics.median(executed),
        "docker_backend_session_command_ms_p50": statistics.median(told),
    }


async def measure_beside_swerex(image: str, repeats: int) -> dict[str, Any]:
    """Time SWE-ReX's shells, from creation to the first output, alternately with ours."""
    try:
        from swerex.deployment.docker import DockerDeployment
        from swerex.deployment.local import LocalDeployment
        from swerex.runtime.abstract import BashAction, CreateBashSessionRequest
    except ImportError as error:
        return {
            "ratio_swerex_local": None,
            "swerex_none": f"SWE-ReX is not installed ({error}); pip install swe-rex",
        }
    logging.disable(logging.WARNING)  # it tells of each step on the terminal

    async def open_shell(deployment: Any) -> Any:
        await deployment.start()
        await deployment.runtime.create_session(CreateBashSessionRequest())
        answer = await deployment.runtime.run_in_session(BashAction(command="echo hi"))
        if "hi" not in answer.output:
            raise RuntimeError(f"a new shell of SWE-ReX answered {answer}")
        return deployment

    def make_docker_deployment() -> Any:
        # On the host's network, since its port is fixed and an engine may have no bridge.
        network = ["--network", "host"]
        return DockerDeployment(image=image, port=8000, pull="never", docker_args=network)

    async def compare(make: Callable[[], Any], times: int) -> tuple[list, list[float]]:
        pairs = []
        for _ in range(times):
            (ours,) = await timed(1, _open_our_shell, lambda sandbox: sandbox.stop())
            (theirs,) = await timed(
                1, lambda: open_shell(make()), lambda deployment: deployment.stop()
            )
            pairs.append((ours, theirs))
        deployment = await open_shell(make())
        action = BashAction(command="true")
        commands = await timed(repeats, lambda: deployment.runtime.run_in_session(action))
        await deployment.stop()
        return pairs, commands

    compared = {"local": await compare(LocalDeployment, repeats)}
    if image:
        compared["docker"] = await compare(make_docker_deployment, max(3, repeats // 3))
    found: dict[str, Any] = {}
    for name, (pairs, commands) in compared.items():
        found |= {
            f"swerex_{name}_create_ms_p50": statistics.median(theirs for _, theirs in pairs),
            f"swerex_{name}_session_command_ms_p50": statistics.median(commands),
            f"ratio_swerex_{name}": statistics.median(theirs / ours for ours, theirs in pairs),
            "shell_first_output_ms_p50": statistics.median(ours for ours, _ in pairs),
        }
    return found


async def _open_our_shell() -> Sandbox:
    sandbox = Sandbox(CONFIG)
    await sandbox.start()
    session = await sandbox.create_session()
    await session.run("echo hi")
    return sandbox


def bare_bash() -> float:
    """Return the milliseconds of an empty command of bash without a sandbox."""
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/bash", ["bash", "-c", "true"], {"PATH": "/usr/bin:/bin"}), 0)
    return 1000 * (time.perf_counter() - began)


async def measure(
    repeats: int, cycles: int, live: int, docker_image: str, swerex_image: str
) -> dict[str, Any]:
    """Run all measurements and return what --json writes."""
    report = probe("required")
    report.require("required")
    created = await timed(repeats, create_and_echo, lambda sandbox: sandbox.stop())
    times = {"create_first_output": created} | await measure_commands(repeats)
    found: dict[str, Any] = {}
    for name, values in times.items():
        found[f"{name}_ms_p50"] = statistics.median(values)
    for name, values in times.items():
        found[f"{name}_ms_p90"] = sorted(values)[int(0.9 * len(values))]
    found |= {
        "tier": report.tier,
        "repeats": repeats,
        "floor": {"bash_ms_p50": statistics.median(bare_bash() for _ in range(repeats))},
    }
    found |= await measure_door(20 * repeats)
    found |= await measure_live(live)
    found |= await measure_leaks(cycles)
    found |= await measure_beside_docker(docker_image, max(5, repeats // 5))
    found |= await measure_beside_swerex(swerex_image, max(5, repeats // 5))
    ratio = None
    if found["ratio_swerex_local"]:
        theirs = found["swerex_local_session_command_ms_p50"]
        ratio = theirs / found["session_command_ms_p50"]
    found["ratio_swerex_session_command"] = ratio
    return found


def show(found: dict[str, Any]) -> None:
    """Print the results as a table and sentences."""
    table = Table(title=f"Sandboxes of tier {found['tier']}, milliseconds", title_justify="left")
    for name in ("what", "median", "90th percentile"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for key in found:
        name = key.removesuffix("_ms_p50")
        if name == key or f"{name}_ms_p90" not in found:
            continue
        table.add_row(
            name.replace("_", " "),
            f"{found[f'{name}_ms_p50']:.2f}",
            f"{found[f'{name}_ms_p90']:.2f}",
        )
    table.add_row("bash without a sandbox", f"{found['floor']['bash_ms_p50']:.2f}", "")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{found['live']} at once: {found['live_seconds']:.1f} s, {found['live_mib_each']:.2f} MiB"
        f" each. {found['cycles']} made and ended, 8 at a time: {found['cycles_per_s']:.0f} a"
        f" second, {found['leaks']} things left behind."
    )
    console.print(
        f"A request at a door: {found['door_ms_p50']:.2f} ms; over this host's loopback:"
        f" {found['host_loopback_ms_p50']:.2f} ms."
    )
    if found["ratio_docker"]:
        console.print(
            f"Docker: {found['docker_create_ms_p50']:.0f} ms to the first output,"
            f" {found['ratio_docker']:.0f} times ours; {found['docker_exec_ms_p50']:.0f} ms for a"
            f" command. Our Docker backend: {found['docker_backend_create_ms_p50']:.0f} ms,"
            f" {found['docker_backend_execute_ms_p50']:.0f} ms,"
            f" {found['docker_backend_session_command_ms_p50']:.1f} ms in a session."
        )
    else:
        console.print(f"Docker: not measured, {found['docker_none']}.")
    if found["ratio_swerex_local"]:
        for name in ("local", "docker"):
            if f"ratio_swerex_{name}" not in found:
                continue
            console.print(
                f"SWE-ReX, {name}: {found[f'swerex_{name}_create_ms_p50']:.0f} ms to the first"
                f" output of a shell, {found[f'ratio_swerex_{name}']:.0f} times ours"
                f" ({found['shell_first_output_ms_p50']:.0f} ms);"
                f" {found[f'swerex_{name}_session_command_ms_p50']:.1f} ms for a command in it."
            )
    else:
        console.print(f"SWE-ReX: not measured, {found['swerex_none']}.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--live", type=int, default=200)
    parser.add_argument(
        "--docker_image", default="", help="an image with a shell; empty: no comparison"
    )
    parser.add_argument(
        "--swerex_image",
        default="",
        help="an image with swerex-remote; empty: only its local deployment is compared",
    )
    flags = parser.parse_args(argv)
    # All sandboxes of a user keep their files in one directory, unless a process has its own.
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as own:
        os.chmod(own, 0o711)  # sandboxes have user ids of their own
        tempfile.tempdir = own
        found = asyncio.run(
            measure(flags.repeats, flags.cycles, flags.live, flags.docker_image, flags.swerex_image)
        )
        tempfile.tempdir = None
    show(found)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
