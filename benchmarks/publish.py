r"""Seconds and bytes that weights take to an engine's host, in full and by delta, after AdamW steps
with the learning rate of RL.

python -m benchmarks.publish --json publish.json [--megabytes 90] [--steps 4] [--learning_rate 1e-6]

Both ways begin with the same bfloat16 checkpoint directory on the trainer's disk
(`write_checkpoint`) and end with a verified directory on the mirror's disk; the two disks are one
here, so seconds are of hashing, differencing, zstd and writing, and `bytes` is what a network would
carry. Gradients are random and large against AdamW's epsilon: each weight moves by about the
learning rate, as in a real step. `ratio_bytes` and `ratio_seconds` are full over delta, medians
over the steps; seconds of delta count making and applying it. After each step both copies are
compared byte by byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

from rome.engine.delta import directory_digest, read_header, write_delta
from rome.engine.mirror import Mirror
from rome.engine.publish import write_checkpoint
from rome.model.config import PRESETS, ModelConfig
from rome.model.qwen3 import init_params


def make_config(megabytes: float) -> ModelConfig:
    """About so many MB of bfloat16: widths of the medium size, and as many layers as it takes."""
    config = dataclasses.replace(
        PRESETS["small"],
        hidden_size=512,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        num_experts=16,
        moe_intermediate_size=256,
        vocab_size=8192,
        dtype="bfloat16",
    )
    layer = 16 * 3 * 512 * 256 + 3 * 512 * 512
    return dataclasses.replace(
        config, num_layers=max(1, round((megabytes * 1e6 / 2 - 2 * 8192 * 512) / layer))
    )


def measure(
    directory: pathlib.Path, megabytes: float, steps: int, learning_rate: float
) -> list[dict[str, float]]:
    config, optimizer = make_config(megabytes), optax.adamw(learning_rate)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params: dict, state: optax.OptState, key: jax.Array) -> tuple[dict, optax.OptState]:
        keys = jax.random.split(key, len(jax.tree.leaves(params)))
        grads = jax.tree.unflatten(
            jax.tree.structure(params),
            [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, jax.tree.leaves(params))],
        )
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    full, by_delta = Mirror(directory / "full"), Mirror(directory / "delta")
    earlier, rows = write_checkpoint(params, config, directory / "source", 0), []
    by_delta.fetch(earlier)
    digest = directory_digest(earlier)
    for number in range(1, steps + 1):
        params, state = step(params, state, jax.random.key(number))
        path = write_checkpoint(params, config, directory / "source", number)
        started = time.monotonic()
        write_delta(earlier, path, path.with_name(path.name + ".delta"), digest)
        digest = read_header(path.with_name(path.name + ".delta"))["result"]
        making = time.monotonic() - started
        transfer, whole = by_delta.fetch(path), full.fetch(path, fresh=True)
        assert transfer.way == "delta" and whole.way == "full", (transfer, whole)
        names = [file.name for file in path.iterdir()]
        assert all(
            filecmp.cmpfiles(path, copy, names, shallow=False)[0] == names
            for copy in (transfer.path, whole.path)
        )
        rows.append(
            {
                "bytes_full": whole.bytes,
                "bytes_delta": transfer.bytes,
                "seconds_full": whole.seconds,
                "seconds_make_delta": making,
                "seconds_apply_delta": transfer.seconds,
                "changed_weights": changed_share(earlier, path),
            }
        )
        earlier = path
    return rows


def changed_share(old: pathlib.Path, new: pathlib.Path) -> float:
    """Of bfloat16 weights, in percent."""
    import safetensors.numpy as st

    one, other = st.load_file(old / "model.safetensors"), st.load_file(new / "model.safetensors")
    return (
        100
        * sum(int(jnp.sum(one[name] != other[name])) for name in one)
        / sum(tensor.size for tensor in one.values())
    )


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
    result = median | {
        "ratio_bytes": median["bytes_full"] / median["bytes_delta"],
        "ratio_seconds": (
            median["seconds_full"] / (median["seconds_make_delta"] + median["seconds_apply_delta"])
        ),
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
