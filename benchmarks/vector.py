r"""Measure the steps a second of a vector of terminal environments, beside `docker exec`.

    python -m benchmarks.vector --json vector.json [--envs 256] [--rounds 5] \
        [--docker_image IMAGE] [--docker_containers 32]

A step is one command of an agent in the sandbox of its episode: parsed from the turn's text, run as
a process of its own, its output cut to size. All environments are stepped together
(AsyncioVectorEnv, one event loop).

With --docker_image (an image on this machine that has a shell and `sleep`) the same command runs in
containers by the engine's API, from as many threads as there are processors; its rounds alternate
with ours, and `ratio_docker` is the median of the pairs' ratios. Also measured: how long the
environment of a Harbor task takes to build, and to start again from the first one's snapshot.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from envs.gem import format_tool_call
from envs.gem.vector import AsyncioVectorEnv
from envs.rock import Sandbox, SandboxConfig, probe
from envs.rock.docker.probe import probe_docker
from envs.tasks.harbor import EXAMPLES, load_dataset
from envs.tasks.harbor.build import build
from envs.tasks.harbor.environment import sandbox_for
from envs.tasks.harbor.task import HarborTask
from envs.tasks.terminal.env import TerminalEnv

COMMAND = "cat * | wc -c"
BUILDS = 5  # of each Harbor example
USER = "65534:65534"
HOST_LIMITS = {
    "mem_limit": "256m",
    "pids_limit": 64,
    "network_mode": "none",
    "cap_drop": ["ALL"],
    "read_only": True,
    "tmpfs": {"/workspace": ""},
}
Rate = Callable[[int], float]  # runs the command so many times; returns executions a second


def make_vector(envs: int, turns: int) -> AsyncioVectorEnv:
    """Build a vector of so many environments, with episodes of so many turns."""
    make_env = functools.partial(
        TerminalEnv,
        family="count",
        sandbox_config=SandboxConfig(isolation="best_available"),
        max_turns=turns,
    )
    builders = [functools.partial(make_env, seed=seed) for seed in range(envs)]
    return AsyncioVectorEnv(["count"] * envs, builders)


@contextlib.contextmanager
def docker_rate(image: str, containers: int) -> Iterator[Rate | None]:
    """Start containers and yield their Rate; None where no engine answers or no image is named."""
    if not image or probe_docker().tier is None:
        yield None
        return
    from envs.rock.docker.engine import engine  # needs the docker package, which is optional

    client = engine().client
    ids: list[str] = []
    try:
        for _ in range(containers):
            ids.append(_start_container(client, image))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def rate(count: int) -> float:
                targets = [ids[number % containers] for number in range(count)]
                began = time.perf_counter()
                list(pool.map(functools.partial(_execute_in_container, client), targets))
                return count / (time.perf_counter() - began)

            yield rate
    finally:
        for container_id in ids:
            client.remove_container(container_id, force=True)


def _start_container(client: Any, image: str) -> str:
    created = client.create_container(
        image,
        ["sleep", "3600"],
        host_config=client.create_host_config(**HOST_LIMITS),
        user=USER,
        working_dir="/workspace",
    )
    client.start(created["Id"])
    return created["Id"]


def _execute_in_container(client: Any, container_id: str) -> None:
    execution = client.exec_create(container_id, ["sh", "-c", COMMAND])
    output = client.exec_start(execution["Id"])
    if output.strip() != b"0" and b"No such file" not in output:
        raise RuntimeError(f"a container answered {output!r}")


def measure(envs: int, rounds: int, image: str, containers: int) -> dict[str, Any]:
    """Return all measured values, under the names of the JSON file."""
    vector = make_vector(envs, rounds + 3)
    began = time.perf_counter()
    vector.reset(seed=0)
    reset_seconds = time.perf_counter() - began
    try:
        vector.step(_actions(envs))  # loads what is loaded only once
        ours, theirs = _measure_rounds(vector, rounds, image, containers)
    finally:
        vector.close()
    ratios = [our / their for our, their in zip(ours, theirs, strict=False)]
    measured = {
        "envs": envs,
        "tier": probe().tier,
        "cpus": len(os.sched_getaffinity(0)),
        "reset_seconds": reset_seconds,
        "steps_per_s": statistics.median(ours),
        "docker_execs_per_s": statistics.median(theirs) if theirs else None,
        "docker_containers": containers if theirs else 0,
        "ratio_docker": statistics.median(ratios) if ratios else None,
    }
    return measured | asyncio.run(measure_builds())


def _actions(envs: int) -> list[str]:
    return [format_tool_call("bash", {"command": COMMAND})] * envs


def _measure_rounds(
    vector: AsyncioVectorEnv, rounds: int, image: str, containers: int
) -> tuple[list[float], list[float]]:
    """Return the steps a second of the vector and the executions a second of Docker, by round."""
    actions = _actions(vector.num_envs)
    ours: list[float] = []
    theirs: list[float] = []
    with docker_rate(image, containers) as docker:
        if docker:
            docker(containers)
        for _ in range(rounds):
            began = time.perf_counter()
            _, _, terminated, truncated, infos = vector.step(actions)
            ours.append(vector.num_envs / (time.perf_counter() - began))
            failed = [info for info in infos if info["status"] != "ok"]
            if failed or terminated.any() or truncated.any():
                raise RuntimeError(f"a step did not end well: {failed[:1]}")
            if docker:
                theirs.append(docker(2 * containers))
    return ours, theirs


async def measure_builds() -> dict[str, float]:
    """Measure how long it takes until an agent could begin in each Harbor example.

    Returns:
      Milliseconds for an environment that is built, and for one that starts from a snapshot:
      medians over the examples of the median of BUILDS.
    """
    built: list[float] = []
    forked: list[float] = []
    for task in load_dataset(EXAMPLES):
        build_ms, fork_ms = await _measure_task(task)
        built.append(build_ms)
        forked.append(fork_ms)
    ratios = [build_ms / fork_ms for build_ms, fork_ms in zip(built, forked, strict=True)]
    return {
        "harbor_build_ms": statistics.median(built),
        "harbor_build_ms_most": max(built),
        "harbor_fork_ms": statistics.median(forked),
        "harbor_fork_ratio": statistics.median(ratios),
    }


async def _measure_task(task: HarborTask) -> tuple[float, float]:
    """Return the median milliseconds to build a task's environment, and to fork it."""
    config = sandbox_for(task, SandboxConfig(isolation="best_available"))
    built: list[float] = []
    forked: list[float] = []
    for _ in range(BUILDS):
        began = time.perf_counter()
        async with Sandbox(config) as sandbox:
            await build(sandbox, task)
            built.append(1000 * (time.perf_counter() - began))
            snapshot = await sandbox.snapshot()
        began = time.perf_counter()
        async with Sandbox(config, snapshot):
            forked.append(1000 * (time.perf_counter() - began))
        await snapshot.delete()
    return statistics.median(built), statistics.median(forked)


def show(measured: dict[str, Any]) -> None:
    """Print the measured values."""
    console = Console(highlight=False)
    console.print(
        f"{measured['envs']} terminal environments on {measured['cpus']} processors, tier"
        f" {measured['tier']}: {measured['steps_per_s']:.0f} steps/s; reset"
        f" {measured['reset_seconds']:.1f} s"
    )
    if measured["ratio_docker"]:
        console.print(
            f"docker exec in {measured['docker_containers']} running containers:"
            f" {measured['docker_execs_per_s']:.0f} a second; ratio {measured['ratio_docker']:.1f}"
        )
    else:
        console.print("docker exec: not measured (no --docker_image, or no engine answers)")
    console.print(
        f"Harbor examples: built in {measured['harbor_build_ms']:.0f} ms (at most"
        f" {measured['harbor_build_ms_most']:.0f}), from a snapshot in"
        f" {measured['harbor_fork_ms']:.0f} ms, {measured['harbor_fork_ratio']:.1f} times as fast"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--envs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--docker_image", default="", help="an image with a shell; empty: no comparison"
    )
    parser.add_argument("--docker_containers", type=int, default=32)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and show the result."""
    options = parse(arguments)
    measured = measure(
        options.envs, options.rounds, options.docker_image, options.docker_containers
    )
    show(measured)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
