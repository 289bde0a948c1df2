r"""Measures the memory that an engine takes to load weights, and to replace them.

python -m benchmarks.load [--mb=1024] [--dtype=float32] [--json=FILE]

It writes a checkpoint of about so many megabytes of random numbers, loads it on the CPU as
`launch.serve` does, and replaces it by itself as /update_weights_from_disk does. Shown are the
peaks of the process's memory over what it had before, in copies of the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import resource
import tempfile
import threading
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rome.model.config import PRESETS, ModelConfig
from rome.model.hf.checkpoint import write_checkpoint
from rome.model.hf.names import checkpoint_tensors
from rome.model.hf.writer import MAX_SHARD_BYTES, CheckpointWriter
from rome.serve.weights import load_weights, open_weights

MB = 1e6
SAMPLE_SECONDS = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1024, help="of the checkpoint, about")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(scratch) / "model"
        size = write_random(directory, arguments.mb * MB, arguments.dtype)
        found = measure(directory, arguments.dtype)
    found = {"weights_mb": size / MB} | found
    for name, value in found.items():
        print(f"{name:<28}{value:10.2f}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(found, indent=1))


def measure(directory: pathlib.Path, dtype: str) -> dict[str, float]:
    """Load a checkpoint and replace it; return seconds, and peaks in copies of the weights."""
    jax.block_until_ready(jnp.zeros(1))  # what JAX itself takes is not counted
    before = resident()
    began = time.monotonic()
    with Peak() as loading:
        params, config = load_weights(directory, dtype)
        jax.block_until_ready(params)
    loaded = time.monotonic()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with Peak() as replacing, open_weights(directory, config) as reader:
        params = reader.read_all(jax.local_devices()[0], params)
        jax.block_until_ready(params)
    return {
        "load_seconds": loaded - began,
        "load_peak_copies": (loading.bytes - before) / size,
        "replace_seconds": time.monotonic() - loaded,
        "replace_peak_copies": (replacing.bytes - before) / size,
    }


class Peak:
    """The most memory that this process had while the context was open.

    Attributes:
      bytes: the peak.
    """

    def __enter__(self) -> Peak:
        self.bytes = resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Return the bytes of memory that this process has now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def write_random(directory: pathlib.Path, size: float, dtype: str) -> int:
    """Write a checkpoint of about `size` bytes; return its size.

    It is drawn and written block by block: nothing of it stays in this process.
    """
    config = model_of(size / jnp.dtype(dtype).itemsize, dtype)
    tensors = checkpoint_tensors(config)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    writer = CheckpointWriter(directory, shapes, np.dtype(dtype), MAX_SHARD_BYTES, 0, 1)
    random = np.random.default_rng(0)

    def blocks() -> Iterator[tuple[str, int, object]]:
        for tensor in tensors:
            drawn = random.standard_normal(tensor.shape, np.float32).astype(dtype)
            yield tensor.name, 0, lambda drawn=drawn: drawn

    write_checkpoint(writer, blocks(), config.to_hf() | {"torch_dtype": dtype})
    return sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(dtype).itemsize


def model_of(parameters: float, dtype: str) -> ModelConfig:
    """Return a model of about so many parameters, nearly all of them experts'."""
    config = dataclasses.replace(
        PRESETS["tiny"], hidden_size=512, moe_intermediate_size=512, num_experts=32, dtype=dtype
    )
    layer = 3 * 512 * 512 * 32
    return dataclasses.replace(config, num_layers=max(round(parameters / layer), 1))


if __name__ == "__main__":
    main()
