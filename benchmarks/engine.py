"""Time the embedded engine beside what a user would pick on a CPU: HF `generate`.

python -m benchmarks.engine --json engine.json [--sizes small,medium] [--rounds 3] \
    [--rival_python DIR/bin/python]

Three workloads at the two sizes of benchmarks/train_step.py, float32, random weights:

    batch32   32 prompts of 64 tokens, 64 new tokens each, all at once
    batch1    one prompt of 64 tokens, 64 new tokens
    sessions  32 conversations of four turns: 40 tokens are added, 32 are sampled; the first prompt
              has 192 tokens

The engine runs in this process, without HTTP. The rival, in a process of its own with torch and
transformers, has the same weights through a checkpoint, and its greedy tokens are compared first.
The two take turns; a row's figures are medians. Processor seconds are given beside the clock: on a
busy machine they are what can be compared. `cached_prompt_share` is the share of the prompt tokens
of later turns that an earlier turn had and that came from the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import SIZES
from rome.files import write_atomically
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import save_hf
from rome.model.qwen3 import Params, init_params
from rome.model.stacking import unstack_layers
from rome.serve.programs import Shapes
from rome.serve.request import Request, SamplingParams
from rome.serve.scheduler import Scheduler

WORKLOADS = ("batch32", "batch1", "sessions")
CONVERSATIONS, TURNS, FIRST, ADDED, SAMPLED = 32, 4, 192, 40, 32
START_SECONDS = 600.0
ANSWER_SECONDS = 1800.0
RIVAL = pathlib.Path(__file__).with_name("engine_rival.py")


class Engine:
    """The scheduler of `rome.serve` on these weights.

    Attributes:
      cached: tokens of later turns that came from the cache.
      reusable: tokens of later turns that an earlier turn had.
    """

    def __init__(self, params: Params, config: ModelConfig):
        def load() -> tuple[Params, ModelConfig]:
            return jax.device_put(unstack_layers(params, config)), config

        self.scheduler = Scheduler(load, Shapes(max_context=448), None, "0")
        self.cached = 0
        self.reusable = 0
        self.first_token_ms: list[float] = []
        self.scheduler.start()
        if not self.scheduler.ready.wait(START_SECONDS):
            raise TimeoutError(f"the engine did not start: {self.scheduler.failure}")

    def answer(self, prompts: list[list[int]], new: int, temperature: float = 1.0) -> list[Request]:
        """Answer all prompts at once."""
        done = threading.Semaphore(0)
        requests = []
        for number, prompt in enumerate(prompts):
            sampling = SamplingParams(max_new_tokens=new, temperature=temperature, seed=number)
            request = Request(str(number), prompt, sampling, return_logprob=True)
            request.notify = lambda _: done.release()
            requests.append(request)
            self.scheduler.submit(request)
        for _ in requests:
            if not done.acquire(timeout=ANSWER_SECONDS):
                raise TimeoutError(f"no answer; the scheduler: {self.scheduler.failure}")
        return requests

    def run(self, workload: str, rng: random.Random, vocabulary: int) -> int:
        """Run one workload; return the number of sampled tokens."""
        if workload != "sessions":
            rows = 32 if workload == "batch32" else 1
            prompts = [random_ids(rng, vocabulary, 64) for _ in range(rows)]
            return sum(len(one.output_ids) for one in self.answer(prompts, 64))
        contexts = [random_ids(rng, vocabulary, FIRST - ADDED) for _ in range(CONVERSATIONS)]
        for turn in range(TURNS):
            known = sum(map(len, contexts))
            contexts = [ids + random_ids(rng, vocabulary, ADDED) for ids in contexts]
            requests = self.answer(contexts, SAMPLED)
            if turn:
                self.reusable += known
                self.cached += sum(one.cached_tokens for one in requests)
            contexts = [ids + one.output_ids for ids, one in zip(contexts, requests, strict=True)]
        return CONVERSATIONS * TURNS * SAMPLED


def random_ids(rng: random.Random, vocabulary: int, count: int) -> list[int]:
    """Return token ids without the first ones, which may be special."""
    return [rng.randrange(8, vocabulary) for _ in range(count)]


class Rival:
    """HF `generate` in another process: one JSON object a line, both ways."""

    def __init__(self, python: str, directory: str):
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        self.process = subprocess.Popen(
            [python, str(RIVAL), directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Send one question and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the rival ended with status {self.process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def rival_process(python: str | None, directory: str) -> Iterator[Rival | None]:
    """Give the rival, and end its process; None without a Python for it."""
    if python is None:
        yield None
        return
    rival = Rival(python, directory)
    try:
        yield rival
    finally:
        rival.process.kill()
        rival.process.wait()


def measure(function: Callable[[], int]) -> tuple[float, float]:
    """Return tokens a second, and tokens a second of processor time."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    tokens = function()
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return tokens / seconds, tokens / used


def require_equal_tokens(engine: Engine, rival: Rival, vocabulary: int) -> None:
    """Raise unless both continue two prompts greedily with the same first tokens."""
    rng = random.Random(1)
    prompts = [random_ids(rng, vocabulary, 64) for _ in range(2)]
    ours = [one.output_ids for one in engine.answer(prompts, 8, temperature=0.0)]
    theirs = rival.ask(prompts=prompts, new=8, greedy=True)["ids"]
    if ours != theirs:
        raise RuntimeError(f"the rival has other numbers: {theirs}, ours are {ours}")


def run_size(name: str, rounds: int, rival_python: str | None) -> list[dict[str, Any]]:
    """Return one row for each workload of a size."""
    config = dataclasses.replace(SIZES[name][0], remat="none")
    params = jax.device_get(init_params(config, jax.random.key(0)))
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        save_hf(params, config, directory)
        engine = Engine(params, config)
        with rival_process(rival_python, directory) as rival:
            if rival is not None:
                require_equal_tokens(engine, rival, config.vocab_size)
            for workload in WORKLOADS:
                rows.append(_run_workload(name, workload, engine, rival, config, rounds))
        rows[-1]["cached_prompt_share"] = engine.cached / engine.reusable
        engine.scheduler.stop()
    return rows


def _run_workload(
    size: str,
    workload: str,
    engine: Engine,
    rival: Rival | None,
    config: ModelConfig,
    rounds: int,
) -> dict[str, Any]:
    ours, theirs = [], []
    for number in range(rounds):
        rng = random.Random(number)
        ours.append(measure(lambda rng=rng: engine.run(workload, rng, config.vocab_size)))
        if rival is not None:
            answer = rival.ask(workload=workload, seed=number, vocabulary=config.vocab_size)
            theirs.append((answer["tokens"] / answer["wall"], answer["tokens"] / answer["cpu"]))
    row: dict[str, Any] = {"size": size, "workload": workload, "rounds": rounds}
    row["tokens_per_s"], row["tokens_per_cpu_s"] = np.median(ours, axis=0).tolist()
    if theirs:
        row["hf_tokens_per_s"], row["hf_tokens_per_cpu_s"] = np.median(theirs, axis=0).tolist()
        ratios = [own[0] / other[0] for own, other in zip(ours, theirs, strict=True)]
        cpu_ratios = [own[1] / other[1] for own, other in zip(ours, theirs, strict=True)]
        row["ratio_hf"] = statistics.median(ratios)
        row["ratio_hf_cpu"] = statistics.median(cpu_ratios)
    return row


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the document: rows, and the figures that other programs read."""
    document: dict[str, Any] = {"rows": rows}
    for row in rows:
        if row["workload"] == "batch32" and "ratio_hf" in row:
            document["ratio_hf_batch32"] = row["ratio_hf"]  # of the largest size
        if "cached_prompt_share" in row:
            document["cached_prompt_share"] = row["cached_prompt_share"]
    return document


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    columns = ("size", "workload", "tokens_per_s", "tokens_per_cpu_s", "ratio_hf", "ratio_hf_cpu")
    table = Table(*columns, "cached_prompt_share")
    for row in rows:
        values = [row.get(name, "") for name in (*columns, "cached_prompt_share")]
        table.add_row(*(f"{one:.3g}" if isinstance(one, float) else str(one) for one in values))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--sizes", default="small,medium", help="of small, medium, toy")
    parser.add_argument("--rounds", type=int, default=3, help="runs of a workload")
    parser.add_argument("--rival_python", help="a Python that has torch and transformers")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sizes.split(",")) - SIZES.keys())
    if unknown or arguments.rounds < 1:
        sys.exit(f"benchmarks.engine: --sizes takes {', '.join(SIZES)}, --rounds at least 1")
    rows: list[dict[str, Any]] = []
    for name in arguments.sizes.split(","):
        rows += run_size(name, arguments.rounds, arguments.rival_python)
    show(rows)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(summarize(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
