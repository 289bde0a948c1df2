r"""Time a whole update (forward, loss, backward, clip, AdamW) beside transformers on torch.

python -m benchmarks.train_step --json step.json [--sizes small,medium] \
    [--precisions float32,bfloat16] [--rival_python DIR/bin/python] [--scaling]

Ours is `Learner.update` as training runs it: float32 weights and moments, layers in the precision
of the row. The rival has the same weights (through rome.model.hf.checkpoint), tokens, learning rate
and clip, the precision's fastest form that it has, and a process of its own; its first losses must
equal ours before anything is timed, the later of which also prove backward pass and optimizer. Then
the two take turns, and `ratio` is the median over the pairs. On a CPU the sizes are small and
medium, batches of 8 rows of 512; where JAX has a GPU there is one, a slice of Qwen3-30B-A3B (its
widths, experts and vocabulary, two layers), for which `share_of_peak` is the MFU.

`share_of_peak` counts the step's useful FLOPs (6 per active matmul parameter and token, and causal
attention) against the best matmul that this run measured in the precision. `floor` says what the
FLOPs of each piece and the optimizer's bytes take at peak, `alone` what the piece takes by itself,
forward and backward; so the gap explains itself. On the CPU it is made of three things: products
too thin for the peak (attention heads of 32 or 64, an expert's few hundred rows), the operations
between the products (softmax, SiLU, norms and gathers are bound by memory or by exp, and cost as
much in bfloat16 as in float32, which is why its share is lower), and the sum over a weight's
gradients in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.train_step_floor import floor_seconds, measured_peak, pieces_alone
from rome.data.batch import IMITATION, Batch
from rome.files import write_atomically
from rome.losses.sft import sft_loss
from rome.losses.types import LossConfig, count_denominators
from rome.model.config import PRESETS, ModelConfig
from rome.model.hf.checkpoint import save_hf
from rome.model.sharding import make_mesh
from rome.train.memory import keep_freed_memory
from rome.train.state import TrainState, make_optimizer
from rome.train.step import Learner

LEARNING_RATE = 1e-3
PROVING_STEPS = 3
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}  # of losses, relative
_CPU = dataclasses.replace(PRESETS["small"], router_aux_loss_coef=0.0)
SIZES: dict[str, tuple[ModelConfig, int, int]] = {  # config, rows, length
    "toy": (
        dataclasses.replace(
            _CPU,
            num_layers=1,
            hidden_size=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            num_experts=4,
            moe_intermediate_size=16,
            vocab_size=768,
            max_position=64,
        ),
        2,
        32,
    ),
    "small": (_CPU, 8, 512),
    "medium": (
        dataclasses.replace(
            _CPU,
            num_layers=8,
            hidden_size=512,
            head_dim=64,
            num_experts=32,
            moe_intermediate_size=256,
            vocab_size=8192,
        ),
        8,
        512,
    ),
    "slice": (
        dataclasses.replace(
            PRESETS["qwen3_30b_a3b"], num_layers=2, router_aux_loss_coef=0.0, remat="none"
        ),
        2,
        4096,
    ),
}


def random_batch(config: ModelConfig, rows: int, length: int, seed: int = 0) -> Batch:
    """Return rows of one segment each; all tokens but the first are learned."""
    random = np.random.default_rng(seed)
    tokens_BT = random.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    learned_BT = np.broadcast_to(np.arange(length) > 0, tokens_BT.shape)
    numbers_BT = np.zeros(tokens_BT.shape, np.float32)
    numbers_BC = np.zeros((rows, 1), np.float32)
    return Batch(
        tokens_BT=tokens_BT,
        positions_BT=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segments_BT=np.ones_like(tokens_BT),
        action_mask_BT=learned_BT,
        chunk_ids_BT=np.where(learned_BT, 0, -1).astype(np.int32),
        version_BT=np.zeros_like(tokens_BT),
        logp_rollout_BT=numbers_BT,
        logp_old_BT=numbers_BT,
        return_BC=numbers_BC,
        reward_BC=numbers_BC,
        sign_BC=numbers_BC,
        advantage_BC=numbers_BC,
        trajectory_BC=np.ones((rows, 1), np.int32),
        kind_BC=np.full((rows, 1), IMITATION, np.int8),
        valid_BC=np.ones((rows, 1), bool),
    )


class Ours:
    """The train step as launch.train runs it."""

    def __init__(self, config: ModelConfig, batch: Batch) -> None:
        mesh = make_mesh({}, config, jax.devices()[:1])
        optimizer = make_optimizer(
            learning_rate=LEARNING_RATE,
            warmup_updates=0,
            decay_updates=0,
            weight_decay=0.0,
            clip=1.0,
        )
        self.learner = Learner(config, sft_loss, LossConfig(), optimizer, mesh)
        self.state: TrainState = self.learner.init(seed=0)
        self.batch = batch
        self.denominators = count_denominators([batch])

    def step(self) -> dict[str, float]:
        """Run one update; return its seconds and its loss."""
        started = time.perf_counter()
        self.state, metrics = self.learner.update(self.state, [self.batch], self.denominators)
        _, metrics = jax.block_until_ready((self.state, metrics))
        loss = float(metrics["loss"])
        return {"seconds": time.perf_counter() - started, "loss": loss}


@contextlib.contextmanager
def rival(
    python: str, ours: Ours, config: ModelConfig
) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Start the rival's process with our current weights; yield its name and its step."""
    with tempfile.TemporaryDirectory() as directory:
        save_hf(ours.state.params, config, directory)
        tokens = pathlib.Path(directory, "tokens.npy")
        np.save(tokens, ours.batch.tokens_BT)
        settings = {
            "weights": directory,
            "tokens": str(tokens),
            "precision": config.dtype,
            "learning_rate": LEARNING_RATE,
            "threads": len(os.sched_getaffinity(0)),
            "device": "cuda" if jax.default_backend() == "gpu" else "cpu",
        }
        command = [
            python,
            str(pathlib.Path(__file__).with_name("train_step_rival.py")),
            json.dumps(settings),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def read() -> dict[str, Any]:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(
                    f"the rival's process ended with status {process.wait()}; its own message"
                    " stands above"
                )
            return json.loads(line)

        def step() -> dict[str, float]:
            process.send_signal(signal.SIGCONT)
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = read()
            # its threads may keep looking for work, and would take time from ours
            process.send_signal(signal.SIGSTOP)
            return answer

        try:
            yield read()["rival"], step
        finally:
            process.send_signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                process.communicate("end\n")


def compare(name: str, precision: str, python: str, pairs: int, peak: float) -> dict[str, Any]:
    """Check that both compute the same, time them in turns, and return a row of the report."""
    config, rows, length = SIZES[name]
    config = dataclasses.replace(config, dtype=precision)
    ours = Ours(config, random_batch(config, rows, length))
    with rival(python, ours, config) as (rival_name, rival_step):
        losses = [(ours.step()["loss"], rival_step()["loss"]) for _ in range(PROVING_STEPS)]
        for own, other in losses:
            if not abs(own - other) <= TOLERANCE[precision] * abs(other):
                raise RuntimeError(
                    f"{name} {precision}: losses of the first steps differ, ours and the rival's:"
                    f" {losses}; the timing would compare two things"
                )
        times = [(ours.step()["seconds"], rival_step()["seconds"]) for _ in range(pairs)]
    tokens = rows * length
    own_seconds, rival_seconds = (statistics.median(side) for side in zip(*times, strict=True))
    floor = floor_seconds(config, rows, length, peak)
    return {
        "name": name,
        "precision": precision,
        "tokens_per_s": tokens / own_seconds,
        "rival": rival_name,
        "rival_tokens_per_s": tokens / rival_seconds,
        "ratio": statistics.median(other / own for own, other in times),
        "share_of_peak": floor["flops"] / own_seconds / peak,
        "pairs": times,
        "losses": losses,
        "floor": floor,
        "alone": pieces_alone(config, rows, length),
    }


def measure_scaling(precision: str = "float32") -> list[dict[str, Any]]:
    """Time ours alone at size small, over lengths of rows and numbers of experts.

    16,384 tokens a step in rows of 512 to 16,384; then 8 to 128 experts in rows of 512.
    """
    config = dataclasses.replace(SIZES["small"][0], dtype=precision, max_position=16384)
    cases = [(config, 16384 // length, length) for length in (512, 1024, 2048, 4096, 8192, 16384)]
    cases += [
        (dataclasses.replace(config, num_experts=count), 8, 512) for count in (8, 16, 32, 64, 128)
    ]
    results = []
    for case, rows, length in cases:
        ours = Ours(case, random_batch(case, rows, length))
        ours.step()
        seconds = statistics.median(ours.step()["seconds"] for _ in range(3))
        results.append(
            {
                "length": length,
                "rows": rows,
                "experts": case.num_experts,
                "precision": precision,
                "tokens_per_s": rows * length / seconds,
            }
        )
    return results


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print the report as a table."""
    table = Table(
        title="Tokens a second of one whole update", title_justify="left", title_style="bold"
    )
    for name in ("size", "precision", "ours", "rival", "ratio", "share of peak", "floor"):
        table.add_column(name, justify="left" if name in ("size", "precision") else "right")
    for row in result["sizes"]:
        floor = result_tokens(row) / row["floor"]["total_seconds"]
        table.add_row(
            row["name"],
            row["precision"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['rival_tokens_per_s']:,.0f}",
            f"{row['ratio']:.2f}",
            f"{row['share_of_peak']:.1%}",
            f"{floor:,.0f}",
        )
    console.print(table)
    for row in result["sizes"]:
        console.print(f"{row['name']} {row['precision']}: {row['rival']}", soft_wrap=True)
    for row in result["scaling"]:
        console.print(
            f"rows of {row['length']}, {row['experts']} experts: {row['tokens_per_s']:,.0f}"
            " tokens/s",
            soft_wrap=True,
        )


def result_tokens(row: dict[str, Any]) -> int:
    """Return the tokens of a step of a row of the report."""
    _, rows, length = SIZES[row["name"]]
    return rows * length


def rival_python(given: str | None) -> str:
    """Return the Python that runs the rival; this one by default.

    Raises:
      ValueError: this one has no torch or no transformers.
    """
    packages = ("torch", "transformers")
    if given is None and not all(importlib.util.find_spec(name) for name in packages):
        raise ValueError(
            "this Python has no torch and transformers to compare with; pip install -r"
            " tests/requirements-live.txt, or name one that has by --rival_python"
        )
    return given or sys.executable


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    # Before the first use of a device: the threads that it starts keep the arenas they begin with.
    keep_freed_memory()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="The train step beside transformers on torch.",
    )
    on_gpu = jax.default_backend() == "gpu"
    parser.add_argument(
        "--sizes",
        default="slice" if on_gpu else "small,medium",
        help=f"of {', '.join(SIZES)}; by default %(default)s",
    )
    parser.add_argument(
        "--precisions",
        default="bfloat16" if on_gpu else "float32,bfloat16",
        help="by default %(default)s",
    )
    parser.add_argument(
        "--pairs", type=int, default=7, help="turns of each side; by default %(default)s"
    )
    parser.add_argument(
        "--rival_python",
        metavar="FILE",
        help="a Python that has torch and transformers; by default this one",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="also lengths up to 16k and experts up to 128, ours alone",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    options = parser.parse_args(arguments)
    sizes = options.sizes.split(",")
    precisions = options.precisions.split(",")
    try:
        unknown = [name for name in (*sizes, *precisions) if name not in (*SIZES, *TOLERANCE)]
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is no size or precision; choose from"
                f" {', '.join((*SIZES, *TOLERANCE))}"
            )
        python = rival_python(options.rival_python)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    peaks = {precision: measured_peak(precision) for precision in precisions}
    rows = [
        compare(name, precision, python, options.pairs, peaks[precision])
        for name in sizes
        for precision in precisions
    ]
    device = jax.devices()[0].device_kind
    result = {
        "sizes": rows,
        "scaling": measure_scaling() if options.scaling else [],
        "peak_flops": peaks,
        "device": device,
        "jax": jax.__version__,
    }
    print_result(result, Console(highlight=False))
    if options.json:
        write_atomically(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
