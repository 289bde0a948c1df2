"""Compile layers of experts for TPUs that need not be there; print which transfers are hidden.

python -m tests.rome.model.ops.compile_experts_for_tpu v5p:2x2x1 1 4 all_to_all

Arguments are a topology, the sizes of its fsdp and expert axes, and the form of the transfer
(`rome.model.ops.experts_on_mesh.FORMS`). Three rematerialised layers of Qwen3-30B-A3B's experts in
bfloat16, 4,096 tokens a device, forward and backward. Needs libtpu. In a process of its own, whose
flags are those of the chip.
"""

from __future__ import annotations

import json
import os
import sys

LAYERS, TOKENS = 3, 4096


def main(topology: str, fsdp: str, expert: str, form: str) -> None:
    """Print the seconds of the schedule, and {"kind axes": [seconds, share that is hidden]}."""
    from rome.train.xla_flags import environment_of

    os.environ.update(environment_of(topology.partition(":")[0], os.environ))
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from rome.cost.compile import topology_devices
    from rome.cost.estimate import find_chip
    from rome.cost.hlo import parse
    from rome.cost.schedule import play
    from rome.model.config import PRESETS
    from rome.model.ops.expert_exchange import PARTS, chunks_of
    from rome.model.ops.experts_on_mesh import experts_on_mesh
    from rome.model.sharding import RULES, make_mesh

    config = PRESETS["qwen3_30b_a3b"]
    D, E, F = config.hidden_size, config.num_experts, config.moe_intermediate_size
    k = config.experts_per_token
    shape = {"fsdp": int(fsdp), "expert": int(expert)}
    mesh = make_mesh(shape, config, topology_devices(topology))

    def like(sizes: tuple[int, ...], dtype: type, *axes) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    by_token = (RULES["batch"], RULES["time"], None)
    into = like((LAYERS, E, D, F), jnp.float32, None, "expert", RULES["embed"], "tensor")
    out_of = like((LAYERS, E, F, D), jnp.float32, None, "expert", "tensor", RULES["embed"])
    x = like((mesh.size, TOKENS, D), jnp.bfloat16, *by_token)
    weights = like((mesh.size, TOKENS, k), jnp.float32, *by_token)
    ids = like((mesh.size, TOKENS, k), jnp.int32, *by_token)

    def gradients(x, matrices, weights, ids):
        @jax.checkpoint
        def layer(x, matrices):
            rounded = [matrix.astype(jnp.bfloat16) for matrix in matrices]
            more, _ = experts_on_mesh(x, *rounded, weights, ids, "megablox", 0.0, form)
            return x + more, None

        def total(x, matrices):
            return jnp.square(jax.lax.scan(layer, x, matrices)[0].astype(jnp.float32)).sum()

        return jax.grad(total, argnums=(0, 1))(x, matrices)

    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(x, (into, into, out_of), weights, ids)
        text = lowered.compile().as_text()
    parts = chunks_of(TOKENS) * PARTS if form == "all_to_all" else int(expert)
    schedule = play(parse(text), mesh, find_chip(topology), grouped_rows=TOKENS * k / parts)
    found = {}
    for one in schedule.overlaps:
        found[f"{one.kind} {one.axes}"] = [one.seconds, 1 - one.waited / one.seconds]
    print(json.dumps({"seconds": schedule.seconds, "transfers": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
