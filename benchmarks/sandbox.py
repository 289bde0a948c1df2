r"""How long does a sandbox take: to be made, to run a command, to be forked; what 200 of them
weigh; and what they leave behind.

python -m benchmarks.sandbox --json sandbox.json [--cycles 1000] [--live 200] [--docker_image IMAGE] [--swerex_image IMAGE]

Medians in milliseconds, of one after the other on this machine. `floor` is bash itself, started and
waited for without any sandbox: no command in a process of its own can take less. With
--docker_image (one that is there already and has a shell) `docker run --rm --network none ...`,
limited as our sandboxes are, and `docker exec` are timed between ours, and `ratio_docker` is the
median of the pairs' ratios of creation; then the Docker backend. Without, or where no engine
answers, `ratio_docker` is null and `docker_none` says why.

Where SWE-ReX is installed (pip install swe-rex) its local deployment, which isolates nothing, is
timed between ours: creation to the first output of a shell, and a command in that shell. With
--swerex_image (one that has swerex-remote in it) its Docker deployment too, on the host's network
and without limits. Else `ratio_swerex_*` are null and `swerex_none` says why.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from envs.rock import Sandbox, SandboxConfig, probe
from envs.rock.docker.probe import probe_docker
from envs.rock.embedded import zygote_client

CONFIG = SandboxConfig(memory_mb=256, pids=64, disk_mb=64)
FILES, FILE_BYTES = 1000, 10_000  # of the tree that is kept and forked
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
    """Milliseconds of each call of `work`; `after` gets its result, untimed."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = await work()
        times.append(1000 * (time.perf_counter() - began))
        if after:
            await after(result)
    return times


async def create_and_echo(config: SandboxConfig = CONFIG) -> Sandbox:
    sandbox = Sandbox(config)
    await sandbox.start()
    result = await sandbox.execute("echo hi")
    if result.stdout != "hi\n":
        raise RuntimeError(f"a new sandbox answered {result}")
    return sandbox


async def measure_commands(repeats: int) -> dict[str, list[float]]:
    """One sandbox: its commands, its session, its files, its snapshot and the forks of that."""
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


async def measure_live(number: int) -> dict[str, float]:
    """That many at once: seconds until all have answered, and MiB each that they add to the machine
    (proportional set size).
    """
    async with Sandbox(CONFIG) as first:
        await first.execute("true")
        before, began = _proportional_bytes(), time.perf_counter()
        sandboxes = [Sandbox(CONFIG) for _ in range(number)]
        await asyncio.gather(*(sandbox.start() for sandbox in sandboxes))
        await asyncio.gather(*(sandbox.execute("echo hi") for sandbox in sandboxes))
        seconds, added = time.perf_counter() - began, _proportional_bytes() - before
        await asyncio.gather(*(sandbox.stop() for sandbox in sandboxes))
    return {"live": number, "live_seconds": seconds, "live_mib_each": added / number / (1 << 20)}


async def measure_leaks(cycles: int) -> dict[str, Any]:
    """Creates and ends many, and counts what was not there before: descriptors, processes, cgroups,
    files.
    """
    await (await create_and_echo()).stop()
    before, began = _possessions(), time.perf_counter()

    async def cycle(share: int) -> None:
        for _ in range(share):
            await (await create_and_echo()).stop()

    await asyncio.gather(*(cycle(cycles // 8) for _ in range(8)))
    seconds = time.perf_counter() - began
    left = {kind: sorted(now - before[kind]) for kind, now in _possessions().items()}
    return {
        "cycles": cycles // 8 * 8,
        "cycles_per_s": cycles // 8 * 8 / seconds,
        "leaks": sum(map(len, left.values())),
        "left": left,
    }


def _possessions() -> dict[str, set[str]]:
    zygote = zygote_client._zygote._process.pid
    state = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")
    return {
        "descriptors": (
            set(os.listdir("/proc/self/fd"))
            | {f"zygote {name}" for name in os.listdir(f"/proc/{zygote}/fd")}
        ),
        "processes": {str(pid) for pid in _descendants(zygote)},
        "files": (
            {path.name for path in state.iterdir() if _is_of(path, zygote)}
            if state.exists()
            else set()
        ),
        "cgroups": {str(path) for path in pathlib.Path("/sys/fs/cgroup").rglob(f"rock-*-{zygote}")},
    }


def _is_of(path: pathlib.Path, zygote: int) -> bool:
    """Whether a file of the state directory, which all processes of this user share, was written by
    this zygote.
    """
    try:
        return path.suffix != ".lock" or f'"zygote": {zygote},' in path.read_text()
    except FileNotFoundError:
        return False


def _descendants(pid: int) -> list[int]:
    try:
        children = [
            int(word)
            for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children")
            for word in path.read_text().split()
        ]
    except FileNotFoundError:
        return []
    return children + [one for child in children for one in _descendants(child)]


def _proportional_bytes() -> int:
    total = 0
    for pid in _descendants(zygote_client._zygote._process.pid):
        try:
            lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


async def measure_beside_docker(image: str, repeats: int) -> dict[str, Any]:
    """Creation to first output, and a command in one that runs, ours and Docker's in turn; and both
    of our Docker backend.
    """
    report = await asyncio.to_thread(probe_docker)
    if not image or report.tier is None:
        return {
            "ratio_docker": None,
            "docker_none": report.missing[0].reason if image else "no --docker_image was given",
        }

    def docker(*arguments: str) -> None:
        subprocess.run(["docker", *arguments], check=True, stdout=subprocess.DEVNULL, timeout=120)

    async def create() -> None:
        docker("run", "--rm", *DOCKER_LIMITS, image, "sh", "-c", "echo hi")

    pairs = []
    for _ in range(repeats):
        (ours,) = await timed(1, create_and_echo, lambda sandbox: sandbox.stop())
        pairs.append((ours, (await timed(1, create))[0]))
    container = subprocess.check_output(
        ["docker", "run", "--detach", "--rm", *DOCKER_LIMITS, image, "sleep", "600"],
        text=True,
        timeout=120,
    ).strip()
    try:

        async def command() -> None:
            docker("exec", container, "sh", "-c", "true")

        commands = await timed(repeats, command)
    finally:
        docker("kill", container)
    config = SandboxConfig(backend="docker", image=image, memory_mb=256, pids=64, disk_mb=64)
    made = await timed(repeats, lambda: create_and_echo(config), lambda sandbox: sandbox.stop())
    async with Sandbox(config) as sandbox:
        executed = await timed(repeats, lambda: sandbox.execute("true"))
        async with await sandbox.create_session() as session:
            told = await timed(repeats, lambda: session.run("true"))
    backend = {
        f"docker_backend_{name}_ms_p50": statistics.median(times)
        for name, times in (("create", made), ("execute", executed), ("session_command", told))
    }
    return backend | {
        "docker_create_ms_p50": statistics.median(theirs for _, theirs in pairs),
        "docker_exec_ms_p50": statistics.median(commands),
        "ratio_docker": statistics.median(theirs / ours for ours, theirs in pairs),
    }


async def measure_beside_swerex(image: str, repeats: int) -> dict[str, Any]:
    """A shell in a new place until its first output, and a command in it, ours and SWE-ReX's in
    turn.
    """
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
        if (
            "hi"
            not in (
                answer := await deployment.runtime.run_in_session(BashAction(command="echo hi"))
            ).output
        ):
            raise RuntimeError(f"a new shell of SWE-ReX answered {answer}")
        return deployment

    async def ours_to_a_shell() -> Sandbox:
        sandbox = Sandbox(CONFIG)
        await sandbox.start()
        await (await sandbox.create_session()).run("echo hi")
        return sandbox

    places = {"local": LocalDeployment}
    if image:  # on the host's network, since its port is fixed and an engine may have no bridge
        places["docker"] = lambda: DockerDeployment(
            image=image, port=8000, pull="never", docker_args=["--network", "host"]
        )
    found: dict[str, Any] = {}
    for name, make in places.items():
        pairs = []
        for _ in range(repeats if name == "local" else max(3, repeats // 3)):
            (ours,) = await timed(1, ours_to_a_shell, lambda sandbox: sandbox.stop())
            pairs.append(
                (
                    ours,
                    (
                        await timed(
                            1, lambda: open_shell(make()), lambda deployment: deployment.stop()
                        )
                    )[0],
                )
            )
        deployment = await open_shell(make())
        commands = await timed(
            repeats, lambda: deployment.runtime.run_in_session(BashAction(command="true"))
        )
        await deployment.stop()
        found |= {
            f"swerex_{name}_create_ms_p50": statistics.median(theirs for _, theirs in pairs),
            f"swerex_{name}_session_command_ms_p50": statistics.median(commands),
            f"ratio_swerex_{name}": statistics.median(theirs / ours for ours, theirs in pairs),
            "shell_first_output_ms_p50": statistics.median(ours for ours, _ in pairs),
        }
    return found


def bare_bash() -> float:
    began = time.perf_counter()
    os.waitpid(os.posix_spawn("/bin/bash", ["bash", "-c", "true"], {"PATH": "/usr/bin:/bin"}), 0)
    return 1000 * (time.perf_counter() - began)


async def measure(
    repeats: int, cycles: int, live: int, docker_image: str, swerex_image: str
) -> dict[str, Any]:
    report = probe("required")
    report.require("required")
    times = {
        "create_first_output": await timed(repeats, create_and_echo, lambda sandbox: sandbox.stop())
    } | await measure_commands(repeats)
    found = {f"{name}_ms_p50": statistics.median(values) for name, values in times.items()}
    found |= {
        f"{name}_ms_p90": sorted(values)[int(0.9 * len(values))] for name, values in times.items()
    }
    found |= {
        "tier": report.tier,
        "repeats": repeats,
        "floor": {"bash_ms_p50": statistics.median(bare_bash() for _ in range(repeats))},
    }
    found |= await measure_live(live)
    found |= await measure_leaks(cycles)
    found |= await measure_beside_docker(docker_image, max(5, repeats // 5))
    found |= await measure_beside_swerex(swerex_image, max(5, repeats // 5))
    found["ratio_swerex_session_command"] = (
        found["swerex_local_session_command_ms_p50"] / found["session_command_ms_p50"]
        if found["ratio_swerex_local"]
        else None
    )
    return found


def show(found: dict[str, Any]) -> None:
    table = Table(title=f"Sandboxes of tier {found['tier']}, milliseconds", title_justify="left")
    for name in ("what", "median", "90th percentile"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for name in [
        key[: -len("_ms_p50")]
        for key in found
        if f"{key.removesuffix('_ms_p50')}_ms_p90" in found and key.endswith("_ms_p50")
    ]:
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
        for name in [name for name in ("local", "docker") if f"ratio_swerex_{name}" in found]:
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
    found = asyncio.run(
        measure(flags.repeats, flags.cycles, flags.live, flags.docker_image, flags.swerex_image)
    )
    show(found)
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
