"""Measure how many sandboxes an admin gives out, and how long callers wait when many ask at once.

    python -m benchmarks.rock_admin [--requests 5000] [--json FILE]

Every request asks for a sandbox, and gives it back as soon as it runs. For comparison the same run
makes sandboxes without a service: the difference is what the admin costs. The goal is 100 sandboxes
a second; the median and the 99th percentile of the waiting time are shown.
"""

import argparse
import asyncio
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from aiohttp import web
from rich.console import Console
from rich.table import Table

from envs.rock import Sandbox, SandboxConfig
from envs.rock.service.apps import make_admin
from envs.rock.service.serving import listen, url_of
from envs.rock.service.worker import Worker
from envs.rock.wire.client import Client
from rome.files import write_atomically

TOKENS = {"default": "token-of-the-benchmark", "worker": "token-of-its-worker-1"}
LIMITS: dict[str, Any] = {"isolation": "best_available", "memory_mb": 64, "disk_mb": 8}
QUEUE_SECONDS = 3600.0  # that a request may wait
ROUND_SECONDS = 20.0
GOAL_PER_SECOND = 100.0
DIRECT_AT_ONCE = 16


class Times(NamedTuple):
    """How long one request took, in seconds."""

    until_running: float
    until_gone: float


async def request_one(client: Client, number: int) -> Times:
    """Ask for a sandbox, wait until it runs, and give it back."""
    began = time.perf_counter()
    config = LIMITS | {"start_timeout": QUEUE_SECONDS}
    request = {"config": config, "key": f"bench-{number}", "wait": ROUND_SECONDS}
    answer = await client.ask("start", request)
    while answer["state"] != "running":
        status = {"sandbox": answer["sandbox"], "wait": ROUND_SECONDS}
        answer = await client.ask("get_status", status)
    until_running = time.perf_counter() - began
    await client.ask("stop", {"sandbox": answer["sandbox"]})
    return Times(until_running, time.perf_counter() - began)


async def measure_admin(requests: int, places: int) -> dict[str, Any]:
    """Send so many requests at once to an admin whose worker has so many places."""
    with tempfile.TemporaryDirectory() as data:
        resources = (0, 0.0, 0, places)
        admin = make_admin(pathlib.Path(data), TOKENS, Worker(), QUEUE_SECONDS, resources)
        runner = web.AppRunner(admin, access_log=None)
        await runner.setup()
        try:
            listener = listen("127.0.0.1", 0)
            await web.SockSite(runner, listener, backlog=8192).start()
            client = Client(url_of("127.0.0.1", listener), TOKENS["default"])
            await request_one(client, -1)  # starts the zygote and imports everything
            began = time.perf_counter()
            work = [request_one(client, number) for number in range(requests)]
            times = await asyncio.gather(*work)
            seconds = time.perf_counter() - began
            await client.close()
        finally:
            await runner.cleanup()
    waits = [one.until_running for one in times]
    return {
        "requests": requests,
        "per_second": requests / seconds,
        "wait_p50": statistics.median(waits),
        "wait_p99": _percentile_99(waits),
    }


def _percentile_99(values: list[float]) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100)[98]


async def measure_direct(number: int) -> float:
    """Return the sandboxes made a second without a service."""
    gate = asyncio.Semaphore(DIRECT_AT_ONCE)

    async def make_one() -> None:
        async with gate, Sandbox(SandboxConfig(**LIMITS)):
            pass

    await make_one()
    began = time.perf_counter()
    await asyncio.gather(*(make_one() for _ in range(number)))
    return number / (time.perf_counter() - began)


def show(result: dict[str, Any]) -> None:
    """Print the measured rows as a table."""
    table = Table(title="Sandboxes given out by an admin", title_justify="left", title_style="bold")
    for name in ("asked for at once", "a second", "wait p50", "wait p99"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['requests']:,}",
            f"{row['per_second']:.0f}",
            f"{row['wait_p50']:.2f} s",
            f"{row['wait_p99']:.2f} s",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"without a service: {result['direct_per_second']:.0f} a second; goal:"
        f" {GOAL_PER_SECOND:.0f}"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rock_admin", description="An admin under many requests at once."
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=5000,
        help="the largest number at once; by default %(default)s",
    )
    parser.add_argument(
        "--sandboxes",
        type=int,
        default=DIRECT_AT_ONCE,
        help="places on its worker; by default %(default)s",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and show the result."""
    options = parse(arguments)
    numbers = sorted({max(1, options.requests // divisor) for divisor in (50, 5, 1)})
    rows = [asyncio.run(measure_admin(number, options.sandboxes)) for number in numbers]
    direct_number = numbers[-2] if len(numbers) > 1 else numbers[-1]
    result = {
        "rows": rows,
        "direct_per_second": asyncio.run(measure_direct(direct_number)),
        "goal_per_second": GOAL_PER_SECOND,
    }
    show(result)
    if options.json:
        write_atomically(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
