r"""Measures the transfer of weights to an engine's host: in full, and as differences.

python -m benchmarks.publish --json publish.json [--megabytes 90] [--steps 4] [--learning_rate 1e-6]

The weights change by AdamW steps with the learning rate of RL. Both ways begin with the same
bfloat16 checkpoint directory on the trainer's disk (`write_checkpoint`) and end with a verified
directory on the mirror's disk. The two disks are one here, so seconds are of hashing, differencing,
zstd and writing, and `bytes` is what a network would carry. Gradients are random and large against
AdamW's epsilon: each weight moves by about the learning rate, as in a real step. `ratio_bytes` and
`ratio_seconds` are full over delta, medians over the steps; seconds of delta include making and
applying it. After each step both copies are compared byte by byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import math
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax
import safetensors.numpy

from rome.engine.delta import directory_digest, read_header, write_delta
from rome.engine.mirror import Mirror
from rome.engine.publish import write_checkpoint
from rome.model.config import PRESETS, ModelConfig
from rome.model.qwen3 import init_params

HIDDEN = 512
EXPERTS = 16
EXPERT_HIDDEN = 256
VOCABULARY = 8192
BYTES_PER_WEIGHT = 2


def make_config(megabytes: float) -> ModelConfig:
    """Return a config of about this size in bfloat16: as many layers as it takes."""
    expert_weights = EXPERTS * 3 * HIDDEN * EXPERT_HIDDEN
    attention_weights = 3 * HIDDEN * HIDDEN
    embedding_weights = 2 * VOCABULARY * HIDDEN
    all_weights = megabytes * 1e6 / BYTES_PER_WEIGHT
    num_layers = round((all_weights - embedding_weights) / (expert_weights + attention_weights))
    return dataclasses.replace(
        PRESETS["small"],
        hidden_size=HIDDEN,
        num_layers=max(1, num_layers),
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        moe_intermediate_size=EXPERT_HIDDEN,
        vocab_size=VOCABULARY,
        dtype="bfloat16",
    )


def measure(
    directory: pathlib.Path, megabytes: float, steps: int, learning_rate: float
) -> list[dict[str, float]]:
    """Return the sizes and seconds of each step's transfers, in full and by delta."""
    config = make_config(megabytes)
    optimizer = optax.adamw(learning_rate)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params: dict, state: optax.OptState, key: jax.Array) -> tuple[dict, optax.OptState]:
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noise = [
            jax.random.normal(leaf_key, leaf.shape)
            for leaf_key, leaf in zip(keys, leaves, strict=True)
        ]
        grads = jax.tree.unflatten(structure, noise)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    full_mirror = Mirror(directory / "full")
    delta_mirror = Mirror(directory / "delta")
    earlier = write_checkpoint(params, config, directory / "source", 0)
    delta_mirror.fetch(earlier)
    digest = directory_digest(earlier)
    rows = []
    for number in range(1, steps + 1):
        params, state = step(params, state, jax.random.key(number))
        path = write_checkpoint(params, config, directory / "source", number)
        delta = path.with_name(path.name + ".delta")
        started = time.monotonic()
        write_delta(earlier, path, delta, digest)
        digest = read_header(delta)["result"]
        seconds_make_delta = time.monotonic() - started
        by_delta = delta_mirror.fetch(path)
        in_full = full_mirror.fetch(path, fresh=True)
        assert by_delta.way == "delta" and in_full.way == "full", (by_delta, in_full)
        assert_same_files(path, by_delta.path)
        assert_same_files(path, in_full.path)
        rows.append(
            {
                "bytes_full": in_full.bytes,
                "bytes_delta": by_delta.bytes,
                "seconds_full": in_full.seconds,
                "seconds_make_delta": seconds_make_delta,
                "seconds_apply_delta": by_delta.seconds,
                "changed_weights": changed_percent(earlier, path),
            }
        )
        earlier = path
    return rows


def assert_same_files(source: pathlib.Path, copy: pathlib.Path) -> None:
    """Compare all files of two directories byte by byte."""
    names = [file.name for file in source.iterdir()]
    same, _, _ = filecmp.cmpfiles(source, copy, names, shallow=False)
    assert same == names, (source, copy, same)


def changed_percent(old: pathlib.Path, new: pathlib.Path) -> float:
    """Return the share of bfloat16 weights that differ between two checkpoints, in percent."""
    old_tensors = safetensors.numpy.load_file(old / "model.safetensors")
    new_tensors = safetensors.numpy.load_file(new / "model.safetensors")
    changed = 0
    total = 0
    for name, tensor in old_tensors.items():
        changed += int(jnp.sum(tensor != new_tensors[name]))
        total += math.prod(tensor.shape)
    return 100 * changed / total


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--megabytes", type=float, default=90.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(
            pathlib.Path(directory), arguments.megabytes, arguments.steps, arguments.learning_rate
        )
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    seconds_delta = median["seconds_make_delta"] + median["seconds_apply_delta"]
    result = {
        **median,
        "ratio_bytes": median["bytes_full"] / median["bytes_delta"],
        "ratio_seconds": median["seconds_full"] / seconds_delta,
        "learning_rate": arguments.learning_rate,
        "steps": rows,
    }
    for name, value in result.items():
        if name != "steps":
            print(f"{name:>22} {value:,.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
