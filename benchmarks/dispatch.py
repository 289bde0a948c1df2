"""Time decoding by the steps of a dispatch: processor time of a token, of the program and the host.

python -m benchmarks.dispatch --json dispatch.json [--sizes tiny,small] [--steps 1,8] [--rounds 3]

Two workloads, float32, random weights, the real scheduler in one process, without HTTP:

    rows N    N requests decode 64 tokens each; nothing else waits
    agents    16 conversations of five turns: 24 tokens are added, 4 to 24 are sampled; each begins
              its next turn when its last has ended, so prompts come at any time

Figures are microseconds of processor time for each sampled token: of the whole process, and of the
scheduler's thread, which is Python and what the program does in it. Clock time is given beside
them. The smallest of all rounds counts, since other programs on the machine only add. Tokens and
logprobs of all step counts are compared and must be the same bits.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.engine import random_ids
from benchmarks.train_step import SIZES
from rome.files import write_atomically
from rome.model.config import PRESETS, ModelConfig
from rome.model.qwen3 import Params, init_params
from rome.model.stacking import unstack_layers
from rome.serve.programs import Shapes
from rome.serve.request import Request, SamplingParams
from rome.serve.scheduler import Scheduler

CONFIGS = {"tiny": PRESETS["tiny"], **{name: size[0] for name, size in SIZES.items()}}
ROWS = (1, 4, 16, 32)
PROMPT, ANSWER = 32, 65
CONVERSATIONS, TURNS, ADDED, LEAST, MOST = 16, 5, 24, 4, 24
Bits = list[tuple[list[int], list[float]]]


class Clocks:
    """Processor time of the process and of this thread, and the clock."""

    def __init__(self) -> None:
        self._started = self._now()

    def per(self, tokens: int) -> np.ndarray:
        """Return the three since the start, in microseconds for each of these tokens."""
        return 1e6 * (self._now() - self._started) / tokens

    def _now(self) -> np.ndarray:
        return np.array([time.process_time(), time.thread_time(), time.perf_counter()])


def make_scheduler(params: Params, config: ModelConfig, steps: int) -> Scheduler:
    """Return a scheduler whose steps the caller takes, in its own thread: it is not started."""
    shapes = Shapes(max_context=448, decode_steps=steps)
    scheduler = Scheduler(lambda: (params, config), shapes, None, "0")
    scheduler.device.prepare()
    return scheduler


def run_rows(scheduler: Scheduler, rows: int, vocabulary: int) -> tuple[np.ndarray, Bits]:
    """Decode requests that began together; their prompts are not counted."""
    rng = random.Random(rows)
    requests = [
        Request(str(row), random_ids(rng, vocabulary, PROMPT), SamplingParams(ANSWER, seed=row))
        for row in range(rows)
    ]
    for request in requests:
        scheduler._queue(request)
    while not all(request.is_decoding for request in requests):
        scheduler._step()
    before = sum(len(request.output_ids) for request in requests)
    clocks = Clocks()
    while scheduler.busy():
        scheduler._step()
    tokens = sum(len(request.output_ids) for request in requests) - before
    return clocks.per(tokens), [(one.output_ids, one.logprobs) for one in requests]


def run_agents(scheduler: Scheduler, vocabulary: int) -> tuple[np.ndarray, Bits]:
    """Take conversations to their ends, each at its own pace; prompts are counted too."""
    ended: collections.deque[tuple[int, Request]] = collections.deque()
    talks = [turns_of(number, vocabulary) for number in range(CONVERSATIONS)]
    done: dict[int, list[Request]] = {number: [] for number in range(CONVERSATIONS)}

    def go_on(number: int, last: Request | None) -> None:
        added, params = next(talks[number], (None, None))
        if added is None or params is None:
            return
        known = [] if last is None else last.prompt_ids + last.output_ids
        request = Request(str(number), known + added, params)
        request.notify = lambda request: ended.append((number, request))
        scheduler._queue(request)

    clocks = Clocks()
    for number in range(CONVERSATIONS):
        go_on(number, None)
    while scheduler.busy():
        scheduler._step()
        while ended:
            number, request = ended.popleft()
            done[number].append(request)
            go_on(number, request)
    requests = [request for number in done for request in done[number]]
    tokens = sum(len(request.output_ids) for request in requests)
    return clocks.per(tokens), [(one.output_ids, one.logprobs) for one in requests]


def turns_of(number: int, vocabulary: int) -> Iterator[tuple[list[int], SamplingParams]]:
    """Yield what is added in each turn of a conversation, and how it is answered."""
    rng = random.Random(number)
    for turn in range(TURNS):
        length = rng.randint(LEAST, MOST)
        yield random_ids(rng, vocabulary, ADDED), SamplingParams(length, seed=number * TURNS + turn)


def run_size(name: str, step_counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each workload and number of steps."""
    config = dataclasses.replace(CONFIGS[name], remat="none")
    host = jax.device_get(init_params(config, jax.random.key(0)))
    params = jax.device_put(unstack_layers(host, config))
    schedulers = {steps: make_scheduler(params, config, steps) for steps in step_counts}
    workloads = {f"rows {rows}": rows for rows in ROWS} | {"agents": 0}
    found = []
    for workload, rows in workloads.items():
        figures: dict[int, list[np.ndarray]] = {steps: [] for steps in step_counts}
        expected: Bits | None = None
        for _ in range(rounds):
            for steps, scheduler in schedulers.items():
                scheduler.flush()
                if rows:
                    figure, bits = run_rows(scheduler, rows, config.vocab_size)
                else:
                    figure, bits = run_agents(scheduler, config.vocab_size)
                figures[steps].append(figure)
                expected = expected or bits
                if bits != expected:
                    raise RuntimeError(f"{name}, {workload}: {steps} steps give other numbers")
        for steps in step_counts:
            process, thread, clock = np.min(figures[steps], axis=0).tolist()
            row = {"size": name, "workload": workload, "steps": steps}
            row |= {"process_us": process, "thread_us": thread, "clock_us": clock}
            found.append(row)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("size", "workload", "steps", "process_us", "thread_us", "clock_us")
    for row in rows:
        figures = (f"{row[name]:.0f}" for name in ("process_us", "thread_us", "clock_us"))
        table.add_row(row["size"], row["workload"], str(row["steps"]), *figures)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.dispatch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--sizes", default="tiny,small", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--steps", default="1,8", help="steps of a dispatch, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="runs of a workload")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sizes.split(",")) - CONFIGS.keys())
    steps = [int(one) for one in arguments.steps.split(",")]
    if unknown or arguments.rounds < 1 or min(steps) < 1:
        sys.exit(
            f"benchmarks.dispatch: --sizes takes {', '.join(CONFIGS)}; --steps and --rounds at"
            " least 1"
        )
    rows: list[dict[str, Any]] = []
    for name in arguments.sizes.split(","):
        rows += run_size(name, steps, arguments.rounds)
    show(rows)
    if arguments.json:
        write_atomically(arguments.json, json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
