"""Compile a learner's step for eight H100s that need not be there; print what was found as JSON.

python -m tests.rome.model.ops.compile_for_h100 ROW_LENGTH EXPERT SEQUENCE

In a process of its own, with JAX's CUDA plugin on its path: in a process without a GPU, the plugin
would stand in the way of all others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys

DEVICES = 8
LAYERS = 2


def main(row_length: int, expert: int, sequence: int) -> None:
    """Compile `accumulate` of a Qwen3-30B-A3B of two layers, and print memory and kernels."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # no GPU is looked for
    import jax
    import optax
    from jax.experimental import topologies

    from rome.cost.compile import batch_shapes
    from rome.cost.h100 import TARGET
    from rome.losses import LOSSES, LossConfig
    from rome.model.config import PRESETS
    from rome.model.sharding import make_mesh
    from rome.train.step import Learner

    jax.devices()  # the plugins are found now
    described = topologies.get_topology_desc(
        "h100", platform="cuda", topology=f"1x1x{DEVICES}", target_config=TARGET
    )
    devices = list(described.devices)
    config = dataclasses.replace(PRESETS["qwen3_30b_a3b"], num_layers=LAYERS, remat="full")
    shape = {"fsdp": DEVICES // expert // sequence, "expert": expert, "sequence": sequence}
    mesh = make_mesh(shape, config, devices)
    learner = Learner(config, LOSSES["ipa"], LossConfig(), optax.adamw(1e-4), mesh)
    batch = batch_shapes(DEVICES // sequence, row_length, 16, None)
    with jax.default_device(devices[0]):  # tokamax asks it what it can do
        compiled = learner.lower(batch)["accumulate"].compile()
    memory = compiled.memory_analysis()
    kernels = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
    found = {
        "chosen": learner.chosen_kernels._asdict(),
        "custom_calls": sorted(set(kernels)),
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
