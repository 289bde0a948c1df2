"""How many sandboxes an admin gives out, and how long callers wait when very many ask at once.

    python -m benchmarks.rock_admin [--requests 5000] [--json FILE]

Every request asks for a sandbox, and gives it back as soon as it runs. Beside it, in the same run,
the same number of sandboxes made directly by this process: what the admin adds is the difference.
Goal: 100 creations a second, with the queue's p50 and p99 shown.
"""

import argparse
import asyncio
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web
from rich.console import Console
from rich.table import Table

from envs.rock import Sandbox, SandboxConfig
from envs.rock.service.apps import make_admin
from envs.rock.service.worker import Worker
from envs.rock.wire.client import Client
from rome.train.metrics import write_atomically

TOKENS = {"default": "token-of-the-benchmark", "worker": "token-of-its-worker-1"}
CONFIG = {"isolation": "best_available", "memory_mb": 64, "disk_mb": 8}
GOAL_PER_SECOND = 100.0
DIRECT_AT_ONCE = 16


async def ask_for(client: Client, number: int) -> tuple[float, float]:
    """(seconds until it ran, seconds until it was gone) of one sandbox."""
    began = time.perf_counter()
    answer = await client.call(
        "start", {"config": CONFIG | {"start_timeout": 3600}, "key": f"bench-{number}", "wait": 20}
    )
    while answer["state"] != "running":
        answer = await client.call("get_status", {"sandbox": answer["sandbox"], "wait": 20})
    ran = time.perf_counter() - began
    await client.call("stop", {"sandbox": answer["sandbox"]})
    return ran, time.perf_counter() - began


async def measure_admin(number: int, at_once: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as data:
        runner = web.AppRunner(
            make_admin(pathlib.Path(data), TOKENS, Worker(), 3600.0, (0, 0.0, 0, at_once)),
            access_log=None,
        )
        await runner.setup()
        try:
            listener = web.TCPSite(runner, "127.0.0.1", 0, backlog=8192)
            await listener.start()
            client = Client(
                f"http://127.0.0.1:{listener._server.sockets[0].getsockname()[1]}",
                TOKENS["default"],
            )
            await ask_for(client, -1)  # the zygote and all imports
            began = time.perf_counter()
            times = await asyncio.gather(*(ask_for(client, one) for one in range(number)))
            seconds = time.perf_counter() - began
            await client.close()
        finally:
            await runner.cleanup()
    waited = [ran for ran, _ in times]
    return {
        "requests": number,
        "per_second": number / seconds,
        "wait_p50": statistics.median(waited),
        "wait_p99": statistics.quantiles(waited, n=100)[98],
    }


async def measure_direct(number: int) -> float:
    """Creations a second without any service."""
    gate = asyncio.Semaphore(DIRECT_AT_ONCE)

    async def one() -> None:
        async with gate, Sandbox(SandboxConfig(**CONFIG)):
            pass

    await one()
    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(number)))
    return number / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> None:
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
    parser.add_argument("--json", metavar="FILE", help="leave the figures here")
    options = parser.parse_args(arguments)
    numbers = sorted({max(1, options.requests // divisor) for divisor in (50, 5, 1)})
    rows = [asyncio.run(measure_admin(number, options.sandboxes)) for number in numbers]
    result = {
        "rows": rows,
        "direct_per_second": asyncio.run(measure_direct(numbers[-2 if len(numbers) > 1 else -1])),
        "goal_per_second": GOAL_PER_SECOND,
    }
    table = Table(title="Sandboxes given out by an admin", title_justify="left", title_style="bold")
    for name in ("asked for at once", "a second", "wait p50", "wait p99"):
        table.add_column(name, justify="right")
    for row in rows:
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
    if options.json:
        write_atomically(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
