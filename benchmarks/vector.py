r"""How many steps a second does a vector of terminal environments make, beside a loop of `docker
exec`s?

python -m benchmarks.vector --json vector.json [--envs 256] [--rounds 5] [--docker_image IMAGE] [--docker_containers 32]

A step is one command of an agent in the sandbox of its episode: parsed out of the turn's text, run
as a process of its own, its output cut to size. All environments are stepped together
(AsyncioVectorEnv, one event loop). With --docker_image (one that is there and has a shell and a
`sleep`) rounds of the same command by the engine's API, in containers that run already and from as
many threads as there are processors, are timed between ours; `ratio_docker` is the median of the
pairs' ratios. Also: what a Harbor task's environment costs to build, and to start again from the
snapshot of the first one.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import os
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console

from envs.gem import format_tool_call
from envs.gem.vector import AsyncioVectorEnv
from envs.rock import Sandbox, SandboxConfig, probe
from envs.rock.docker.probe import probe_docker
from envs.tasks.harbor import EXAMPLES, load_dataset
from envs.tasks.harbor.build import build
from envs.tasks.harbor.env import sandbox_for
from envs.tasks.terminal.env import TerminalEnv

COMMAND = "cat * | wc -c"
LIMITS = {
    "mem_limit": "256m",
    "pids_limit": 64,
    "network_mode": "none",
    "cap_drop": ["ALL"],
    "user": "65534:65534",
    "read_only": True,
}


def make_vector(envs: int, turns: int) -> AsyncioVectorEnv:
    config = SandboxConfig(isolation="best_available")
    return AsyncioVectorEnv(
        ["count"] * envs,
        [
            lambda seed=seed: TerminalEnv(
                family="count", seed=seed, sandbox_config=config, max_turns=turns
            )
            for seed in range(envs)
        ],
    )


@contextlib.contextmanager
def docker_round(image: str, containers: int) -> Iterator[Any]:
    """A function that runs the command so many times, spread over containers, and gives executions
    a second; None where no engine answers.
    """
    if not image or probe_docker().tier is None:
        yield None
        return
    from envs.rock.docker.engine import engine as docker_engine

    client = docker_engine().client
    made = []
    try:
        for _ in range(containers):
            made.append(
                client.create_container(
                    image,
                    ["sleep", "3600"],
                    host_config=client.create_host_config(
                        **{key: value for key, value in LIMITS.items() if key != "user"},
                        tmpfs={"/workspace": ""},
                    ),
                    user=LIMITS["user"],
                    working_dir="/workspace",
                )["Id"]
            )
            client.start(made[-1])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

            def execute(identity: str) -> None:
                output = client.exec_start(
                    client.exec_create(identity, ["sh", "-c", COMMAND])["Id"]
                )
                if output.strip() != b"0" and b"No such file" not in output:
                    raise RuntimeError(f"a container answered {output!r}")

            def rate(count: int) -> float:
                began = time.perf_counter()
                list(pool.map(execute, [made[number % containers] for number in range(count)]))
                return count / (time.perf_counter() - began)

            yield rate
    finally:
        for identity in made:
            client.remove_container(identity, force=True)


def measure(envs: int, rounds: int, image: str, containers: int) -> dict[str, Any]:
    vector = make_vector(envs, rounds + 3)
    began = time.perf_counter()
    vector.reset(seed=0)
    found: dict[str, Any] = {
        "envs": envs,
        "tier": probe().tier,
        "cpus": len(os.sched_getaffinity(0)),
        "reset_seconds": time.perf_counter() - began,
    }
    actions = [format_tool_call("bash", {"command": COMMAND})] * envs
    try:
        vector.step(actions)  # what is loaded only once
        ours, theirs = [], []
        with docker_round(image, containers) as docker:
            if docker:
                docker(containers)
            for _ in range(rounds):
                began = time.perf_counter()
                _, _, terminated, truncated, infos = vector.step(actions)
                ours.append(envs / (time.perf_counter() - began))
                if (
                    terminated.any()
                    or truncated.any()
                    or any(info["status"] != "ok" for info in infos)
                ):
                    raise RuntimeError(
                        "a step did not end well:"
                        f" {next(info for info in infos if info['status'] != 'ok')}"
                    )
                if docker:
                    theirs.append(docker(2 * containers))
    finally:
        vector.close()
    found |= {
        "steps_per_s": statistics.median(ours),
        "docker_execs_per_s": statistics.median(theirs) if theirs else None,
        "docker_containers": containers if theirs else 0,
        "ratio_docker": statistics.median(a / b for a, b in zip(ours, theirs)) if theirs else None,
    }
    return found | asyncio.run(measure_builds())


async def measure_builds() -> dict[str, float]:
    """Milliseconds until an agent could begin in each Harbor example, built anew and started from a
    snapshot; medians over the examples of the median of five.
    """
    fresh, forked = [], []
    for task in load_dataset(EXAMPLES):
        config = sandbox_for(task, SandboxConfig(isolation="best_available"))
        built, again = [], []
        for _ in range(5):
            began = time.perf_counter()
            async with Sandbox(config) as sandbox:
                await build(sandbox, task)
                built.append(1000 * (time.perf_counter() - began))
                snapshot = await sandbox.snapshot()
            began = time.perf_counter()
            async with Sandbox(config, snapshot):
                again.append(1000 * (time.perf_counter() - began))
            await snapshot.delete()
        fresh.append(statistics.median(built))
        forked.append(statistics.median(again))
    return {
        "harbor_build_ms": statistics.median(fresh),
        "harbor_build_ms_most": max(fresh),
        "harbor_fork_ms": statistics.median(forked),
        "harbor_fork_ratio": statistics.median(one / other for one, other in zip(fresh, forked)),
    }


def main(argv: Sequence[str] | None = None) -> None:
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
    flags = parser.parse_args(argv)
    found = measure(flags.envs, flags.rounds, flags.docker_image, flags.docker_containers)
    console = Console(highlight=False)
    console.print(
        f"{found['envs']} terminal environments on {found['cpus']} processors, tier"
        f" {found['tier']}: {found['steps_per_s']:.0f} steps/s; reset"
        f" {found['reset_seconds']:.1f} s"
    )
    console.print(
        f"docker exec in {found['docker_containers']} running containers:"
        f" {found['docker_execs_per_s']:.0f} a second; ratio {found['ratio_docker']:.1f}"
        if found["ratio_docker"]
        else "docker exec: not measured (no --docker_image, or no engine answers)"
    )
    console.print(
        f"Harbor examples: built in {found['harbor_build_ms']:.0f} ms (at most"
        f" {found['harbor_build_ms_most']:.0f}), from a snapshot in {found['harbor_fork_ms']:.0f}"
        f" ms, {found['harbor_fork_ratio']:.1f} times as fast"
    )
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
