r"""Measures a publication of weights to an engine inside the trainer and to one beside it.

python -m benchmarks.handover --json handover.json [--model tiny] [--publications 20]

Both engines are the embedded one, with the same weights, and publications to them alternate. Inside
the trainer weights are handed over as arrays; beside it they are written to a checkpoint, which a
process loads. `publication_ms` is all of it, from the trainer's arrays to the proof; `pause_ms` is
the part for which the engine does not sample. Medians, and the fastest of each, which load on the
machine distorts less; `ratio` is beside over inside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from rome.engine.client import Engine
from rome.engine.handover import hand_over
from rome.engine.inside import InsideEngine
from rome.engine.pool import EnginePool
from rome.engine.process import start_server
from rome.engine.publish import publish_weights, write_checkpoint
from rome.model.config import PRESETS, ModelConfig
from rome.model.hf.checkpoint import save_hf
from rome.model.qwen3 import init_params
from rome.serve.programs import Shapes

PROBE = list(range(20, 180))


async def measure(
    directory: pathlib.Path, config: ModelConfig, publications: int
) -> dict[str, list[dict[str, float]]]:
    """Return the milliseconds of each publication, by where the engine is."""
    device = jax.devices()[0]
    shapes = Shapes()
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    save_hf(params, config, directory / "start")
    flags = ["--skip_tokenizer_init", f"--dtype={config.dtype}"]
    inside = InsideEngine(hand_over(params, config, device), shapes)
    inside.start()
    with start_server(directory / "start", directory / "log", flags=flags) as server:
        pools = {"inside": EnginePool([inside]), "beside": EnginePool([Engine(server.url)])}

        def bring_out(where: str, version: int) -> Any:
            if where == "inside":
                return hand_over(params, config, device)
            return write_checkpoint(params, config, directory, version)

        expected = await inside.score(PROBE)
        rows: dict[str, list[dict[str, float]]] = {where: [] for where in pools}
        for version in range(publications + 1):
            for where, pool in pools.items():
                row = await publish(bring_out, where, version, pool, expected)
                if version:  # the first one compiles
                    rows[where].append(row)
        for pool in pools.values():
            await pool.close()
    inside.stop()
    return rows


async def publish(
    bring_out: Callable[[str, int], Any],
    where: str,
    version: int,
    pool: EnginePool,
    expected: list[float],
) -> dict[str, float]:
    """Publish one version, and return what it took in milliseconds."""
    started = time.monotonic()
    source = bring_out(where, version)
    done = await publish_weights(source, version, pool, PROBE, expected, tolerance=0.1)
    return {
        "publication_ms": 1000 * (time.monotonic() - started),
        "pause_ms": 1000 * done.seconds_pause,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.handover",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--model", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--publications", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = PRESETS[arguments.model]
        rows = asyncio.run(measure(pathlib.Path(directory), config, arguments.publications))
    result: dict[str, Any] = {}
    for name in ("publication_ms", "pause_ms"):
        for kind, choose in (("median", statistics.median), ("fastest", min)):
            chosen = {where: choose(row[name] for row in rows[where]) for where in rows}
            figures = {**chosen, "ratio": chosen["beside"] / chosen["inside"]}
            result[f"{kind}_{name}"] = figures
            text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{kind + '_' + name:>24}  {text}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
