r"""Time the input pipeline of CPT beside the tiny train step, and beside HF `datasets` with torch.

python -m benchmarks.input_pipeline --json input.json [--size_mb 1000] [--rounds 5] \
    [--seconds 4] [--rival_python DIR/bin/python]

A synthetic corpus of that size is written (words of this repository's sources, drawn by seed, one
document a line). Ours reads, shuffles, tokenises and packs it into the rows of
experiments/cpt.py:tiny, whole documents best-fit; the rival, in a process of its own with torch,
datasets and tokenizers, has the same files, tokenizer and rows, and cuts through documents. The two
and the train step take turns, and figures are medians. Processor seconds are given beside the
clock: on a busy machine they are what can be compared. `packed_share` is the share of the slots of
rows that hold tokens; `memory_growth_mb` what the process, train step included, has grown by over
the second half of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.train_step import Ours as TrainStep
from rome.data.batch import Batch
from rome.data.sources import Batches
from rome.data.text import Corpus, read_corpus, text_batches
from rome.files import write_atomically
from rome.model.config import PRESETS
from rome.model.tokenizer import TINY, Tokenizer
from rome.train.memory import keep_freed_memory

ROOT = pathlib.Path(__file__).parents[1]
ROWS, ROW_LENGTH, CHUNKS = 16, 160, 16  # of experiments/cpt.py:tiny
BLOCK_DOCUMENTS = 4000  # different texts; a number makes each document of the corpus unique
Sample = dict[str, float]


def write_corpus(folder: pathlib.Path, size_mb: float, seed: int = 0) -> int:
    """Write a corpus of about that size; return the number of its documents."""
    rng = np.random.default_rng(seed)
    sources = sorted((ROOT / "rome").rglob("*.py"))
    words = np.array(sorted({word for path in sources for word in path.read_text().split()}))
    texts = [
        json.dumps(" ".join(words[rng.integers(0, len(words), int(rng.integers(20, 700)))]))[1:]
        for _ in range(BLOCK_DOCUMENTS)
    ]
    count = written = 0
    with open(folder / "corpus.jsonl", "w") as file:
        while written < size_mb * 1e6:
            line = f'{{"text": "{count:x} {texts[count % BLOCK_DOCUMENTS]}}}\n'
            written += file.write(line)
            count += 1
    return count


def resident_mb() -> float:
    """Return the memory that this process holds now, files that are only mapped left out."""
    pages, shared = pathlib.Path("/proc/self/statm").read_text().split()[1:3]
    return (int(pages) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 1e6


def take(stream: Iterator[Batch], seconds: float) -> Sample:
    """Draw batches for so long; return tokens, slots and times."""
    tokens = slots = 0
    started, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - started < seconds:
        batch = next(stream)
        tokens += int(np.count_nonzero(batch.segments_BT))
        slots += batch.segments_BT.size
    return {
        "tokens": tokens,
        "slots": slots,
        "wall": time.monotonic() - started,
        "cpu": time.process_time() - cpu,
    }


def open_stream(corpus: Corpus) -> Batches:
    """Return the batches of experiments/cpt.py:tiny."""
    return text_batches(
        corpus.training,
        Tokenizer.load(TINY),
        rows=ROWS,
        row_length=ROW_LENGTH,
        chunks_per_row=CHUNKS,
        seed=0,
    )


def time_steps(step: TrainStep, tokens: int, seconds: float) -> Sample:
    """Run train steps for so long."""
    count = 0
    started, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - started < seconds:
        step.step()
        count += 1
    wall = time.monotonic() - started
    return {"tokens": count * tokens, "wall": wall, "cpu": time.process_time() - cpu}


@contextlib.contextmanager
def rival(
    python: str, folder: pathlib.Path, workers: int
) -> Iterator[tuple[str, Callable[[float], Sample]]]:
    """Start the rival's process; yield its name, and what runs it for so many seconds."""
    tokenizer = Tokenizer.load(TINY)
    tokenizer.save(folder)
    settings = {
        "files": [str(folder / "corpus.jsonl")],
        "tokenizer": str(folder / "tokenizer.json"),
        "end": tokenizer.pad,
        "rows": ROWS,
        "row_length": ROW_LENGTH,
        "workers": workers,
    }
    script = pathlib.Path(__file__).with_name("input_pipeline_rival.py")
    environment = os.environ | {"HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"}
    process = subprocess.Popen(
        [python, str(script), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def read() -> Any:
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the rival's process ended with status {process.wait()}")
        return json.loads(line)

    def run(seconds: float) -> Sample:
        stdin.write(f"{seconds}\n")
        stdin.flush()
        answer: Sample = read()
        return answer

    try:
        yield read()["rival"], run
    finally:
        stdin.close()
        process.wait(60)


def summarize(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Return the medians of what was sampled, and their ratios."""
    found: dict[str, Any] = {}
    for name, taken in samples.items():
        if not taken:
            continue
        for unit, key in (("wall", "tokens_per_s"), ("cpu", "tokens_per_cpu_s")):
            found[f"{name}_{key}"] = statistics.median(one["tokens"] / one[unit] for one in taken)
    for other in ("train_step", "rival"):
        if samples.get(other):
            for key in ("tokens_per_s", "tokens_per_cpu_s"):
                found[f"ratio_{other}_{key}"] = found[f"ours_{key}"] / found[f"{other}_{key}"]
    ours = samples["ours"]
    found["packed_share"] = sum(one["tokens"] for one in ours) / sum(one["slots"] for one in ours)
    return found


def run(
    size_mb: float, rounds: int, seconds: float, rival_python: str | None, workers: int = 0
) -> dict[str, Any]:
    """Run the benchmark; return its figures."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as opened:
        folder = pathlib.Path(directory)
        documents = write_corpus(folder, size_mb)
        size = (folder / "corpus.jsonl").stat().st_size
        before = resident_mb()
        started = time.process_time()
        corpus = read_corpus(str(folder / "corpus.jsonl"), 0.001)
        found: dict[str, Any] = {
            "corpus_mb": size / 1e6,
            "documents": documents,
            "scan_mb_per_cpu_s": size / 1e6 / (time.process_time() - started),
            "scan_growth_mb": resident_mb() - before,
        }
        stream = open_stream(corpus)
        step = TrainStep(PRESETS["tiny"], next(stream))
        tokens = int(np.count_nonzero(step.batch.segments_BT))
        step.step()
        samples: dict[str, list[Sample]] = {"ours": [], "train_step": [], "rival": []}
        play = None
        if rival_python:
            found["rival"], play = opened.enter_context(rival(rival_python, folder, workers))
        take(stream, seconds)
        resident = []
        for _ in range(rounds):
            resident.append(round(resident_mb(), 1))
            samples["ours"].append(take(stream, seconds))
            samples["train_step"].append(time_steps(step, tokens, seconds))
            if play is not None:
                samples["rival"].append(play(seconds))
        found["resident_mb"] = resident
        found["memory_growth_mb"] = resident[-1] - resident[rounds // 2]
        return found | summarize(samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", required=True, help="file of the figures")
    parser.add_argument("--size_mb", type=float, default=1000.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("--rival_python", help="python with torch, datasets and tokenizers")
    parser.add_argument("--rival_workers", type=int, default=0, help="of its DataLoader")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    keep_freed_memory()
    found = run(
        arguments.size_mb,
        arguments.rounds,
        arguments.seconds,
        arguments.rival_python,
        arguments.rival_workers,
    )
    write_atomically(arguments.json, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
