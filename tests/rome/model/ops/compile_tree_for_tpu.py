"""Compile attention over prefix trees for a TPU that need not be there; print its bytes as JSON.

python -m tests.rome.model.ops.compile_tree_for_tpu v5p:2x2x1 8192 32768

Forward and backward, one row with the heads of Qwen3-30B-A3B in bfloat16, on one chip of the
topology. Needs libtpu. In a process of its own, whose flags are those of the chip.
"""

from __future__ import annotations

import json
import os
import sys

HEADS, KEY_HEADS, HEAD_DIM = 32, 4, 128


def main(topology: str, *row_lengths: str) -> None:
    """Compile for each row length, and print {row length: bytes of temporaries}."""
    from rome.train.xla_flags import environment_of

    os.environ.update(environment_of(topology.partition(":")[0], os.environ))
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from rome.cost.compile import topology_devices
    from rome.model.ops.attention_kernels import splash

    here = SingleDeviceSharding(topology_devices(topology)[0])

    def gradients(q, k, v, segments_BT, ends_BT):
        def total(q, k, v):
            return splash(q, k, v, segments_BT, ends_BT).astype(jnp.float32).sum()

        return jax.grad(total, argnums=(0, 1, 2))(q, k, v)

    found = {}
    for length in map(int, row_lengths):
        q, k = (
            jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.bfloat16, sharding=here)
            for heads in (HEADS, KEY_HEADS)
        )
        row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=here)
        compiled = jax.jit(gradients).lower(q, k, k, row, row).compile()
        found[length] = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
