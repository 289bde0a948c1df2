"""What an engine's calls cost on a TPU slice that need not exist: bytes, and least times.

A call computes up to so many tokens, of sequences that are decoded and of prompts. Bytes on a
device, operations and collectives are those of the compiled program. What it reads from memory is
counted by formula, since kernels do not say it: each weight once, but of the experts only those
that some token is likely to have chosen, and the keys and values of every sequence that is decoded.
Rates are peaks and nothing waits: seconds are lower bounds.

T tokens of a call, E experts, k experts a token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rome.cost.compile import asked_by_kernels
from rome.cost.estimate import Program, measure
from rome.cost.roofline import GIB, Chip
from rome.model.config import ModelConfig
from rome.model.hf.leaves import leaves
from rome.model.ops.experts import room, row_tile
from rome.model.ops.kernels import Kernels, choose_serving_kernels
from rome.model.ops.paged import page_shapes, page_sharding
from rome.model.params import engine_sharding
from rome.model.qwen3 import Params
from rome.serve.adjusting import empty_adjustments
from rome.serve.programs import FEW_SAMPLES, Shapes, compute_call, empty_call

LOOKED_UP = "embed/embedding"  # of which a call reads a few rows only


def report_engine(
    config: ModelConfig, shapes: Shapes, mesh: Mesh, chip: Chip, sizes: Sequence[int], context: int
) -> dict[str, Any]:
    """Compile an engine's calls and return what they cost.

    Args:
      config: of the model; weights and cache are of its dtype.
      shapes: of the engine.
      mesh: of the engine, on the devices of a topology.
      chip: of these devices.
      sizes: tokens of the calls.
      context: positions of each sequence that is decoded.

    Raises:
      ValueError: the context is longer than the engine's.
    """
    if not 0 < context <= shapes.max_context:
        raise ValueError(f"a context of {context} must be in 1..{shapes.max_context} (max_context)")
    platform = mesh.devices.flat[0].platform
    kernels = choose_serving_kernels(platform, config, mesh.shape["tensor"])
    params = abstract_params(config, mesh)
    pages = page_shapes(config, shapes.pages, shapes.page_tokens, page_sharding(mesh))
    weights = _local_bytes(params)
    cache = _local_bytes(pages)
    calls = {}
    for size in sizes:
        program = _compile(config, shapes, kernels, mesh, chip, params, pages, size)
        calls[size] = _costs(program, config, shapes, mesh, chip, params, size, context)
    needed = max(call["needed_bytes"] for call in calls.values())
    return {
        "fits": needed <= chip.usable,
        "bytes_per_device": needed,
        "usable_bytes": round(chip.usable),
        "bytes": {
            "weights": weights,
            "cache": cache,
            "temporaries": needed - weights - cache,
        },
        "cache_tokens": shapes.pages * shapes.page_tokens,
        "context": context,
        "kernels": list(kernels[:2]),
        "calls": calls,
    }


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Return a jax.ShapeDtypeStruct for each parameter of an engine."""
    params: Params = {"layers": tuple({} for _ in range(config.num_layers))}
    for leaf in leaves(config):
        leaf.in_tree(params)[leaf.path[-1]] = jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(config.dtype), sharding=engine_sharding(mesh, leaf.name)
        )
    return params


def show_engine(found: dict[str, Any]) -> None:
    """Print a report for a reader."""
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    print(
        f"an engine of {found['model']} ({found['layers']} layers) on {found['topology']}:"
        f" expert={found['mesh']['expert']} tensor={found['mesh']['tensor']};"
        f" {' and '.join(found['kernels'])}"
    )
    print(
        f"\nbytes a device {found['bytes_per_device'] / GIB:.2f} GiB of"
        f" {found['usable_bytes'] / GIB:.2f}: {verdict}"
    )
    for kind, size in found["bytes"].items():
        print(f"  {kind:<12}{size / GIB:8.2f} GiB")
    print(f"  the cache has room for {found['cache_tokens']:,} tokens")
    print(
        "\ncalls (lower bounds of milliseconds: every rate at its peak, no latency;"
        f" {found['context']} positions before each token that is decoded)"
    )
    print("  tokens  compute   memory  collectives  decoded/s  of prompts/s  compiled in")
    for size, call in found["calls"].items():
        milliseconds = {kind: 1e3 * value for kind, value in call["seconds"].items()}
        print(
            f"  {size:6}{milliseconds['compute']:9.3f}{milliseconds['memory']:9.3f}"
            f"{milliseconds['collectives']:13.3f}{call['decoded_tokens_per_s']:11,.0f}"
            f"{call['prompt_tokens_per_s']:14,.0f}{call['compile_seconds']:11.0f} s"
        )


def _compile(
    config: ModelConfig,
    shapes: Shapes,
    kernels: Kernels,
    mesh: Mesh,
    chip: Chip,
    params: Params,
    pages: tuple[jax.ShapeDtypeStruct, ...],
    size: int,
) -> Program:
    everywhere = NamedSharding(mesh, PartitionSpec())
    unadjusted = empty_adjustments(shapes.rows(size), shapes.max_context, config.vocab_size)
    call = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere),
        empty_call(shapes, size, unadjusted),
    )
    program = jax.jit(
        functools.partial(compute_call, config, kernels),
        donate_argnums=2,
        out_shardings=(page_sharding(mesh), None),
    )
    print(f"compiling a call of {size} tokens ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    with jax.set_mesh(mesh), asked_by_kernels(mesh):
        compiled = program.lower(params, None, pages, call).compile()
    seconds = time.monotonic() - began
    rows = _visited_rows(config, mesh, size)
    return measure(f"call_{size}", compiled, seconds, mesh, chip, rows, score_share=0.5)


def _costs(
    program: Program,
    config: ModelConfig,
    shapes: Shapes,
    mesh: Mesh,
    chip: Chip,
    params: Params,
    size: int,
    context: int,
) -> dict[str, Any]:
    """Return the costs of one call, as of `report_engine`."""
    rows = shapes.rows(size)
    tensor = mesh.shape["tensor"]
    heads = config.num_heads * config.head_dim // tensor
    attention_flops = 4.0 * rows * context * heads * config.num_layers
    weights = _weights_read(config, mesh, params, size)
    kv_heads = 2 * config.num_kv_heads * config.head_dim // tensor
    position_bytes = kv_heads * jnp.dtype(config.dtype).itemsize * config.num_layers
    compute = program.flops / chip.device_flops
    collectives = _collective_seconds(program, rows, size, drawn=rows)
    seconds = {
        "compute": (program.flops + attention_flops) / chip.device_flops,
        "memory": (weights + rows * context * position_bytes) / chip.device_hbm,
        "collectives": collectives,
    }
    # A layer needs the sums of the one before: nothing hides them.
    decode = max(seconds["compute"], seconds["memory"]) + collectives
    alone = _collective_seconds(program, rows, size, drawn=min(rows, FEW_SAMPLES))
    prompts = max(compute, weights / chip.device_hbm) + alone
    return {
        "needed_bytes": round(program.needed),
        "temporary_bytes": round(program.temporaries),
        "flops": program.flops + attention_flops,
        "hbm_bytes": round(weights + rows * context * position_bytes),
        "collective_bytes": round(sum(one.bytes for one in program.sent)),
        "seconds": seconds,
        "decoded_tokens_per_s": rows / decode,
        "prompt_tokens_per_s": size / prompts,
        "compile_seconds": round(program.compile_seconds, 1),
        "collectives": [dataclasses.asdict(one) for one in program.sent],
    }


def _collective_seconds(program: Program, rows: int, size: int, drawn: int) -> float:
    """Return the seconds of a call's collectives, with the logits of `drawn` rows alone.

    The program has branches that gather logits of a few rows, of all rows and, where prompts are
    scored, of all tokens.
    """
    gathered = sum(one.seconds for one in program.sent if one.kind == "all-gather")
    others = sum(one.seconds for one in program.sent if one.kind != "all-gather")
    few = FEW_SAMPLES if rows > FEW_SAMPLES else 0
    return others + gathered * drawn / (few + rows + size)


def _weights_read(config: ModelConfig, mesh: Mesh, params: Params, size: int) -> float:
    """Return the bytes of weights that a device reads for a call, at the least.

    The head is read once for all tokens, the embedding's few rows are not counted.
    """
    total = 0.0
    share = 0.0 if config.is_dense else _experts_chosen(config, size) / config.num_experts
    for leaf in leaves(config):
        own = _local_bytes(leaf.in_tree(params)[leaf.path[-1]])
        is_expert = leaf.path[:2] == ("layers", "moe") and leaf.path[-1] != "router"
        if leaf.name != LOOKED_UP or config.tie_embeddings:
            total += own * (share if is_expert else 1.0)
    return total


def _experts_chosen(config: ModelConfig, size: int) -> float:
    """Return how many experts of a layer some of `size` tokens choose, if they choose evenly."""
    unchosen = (1 - config.experts_per_token / config.num_experts) ** size
    return config.num_experts * (1 - unchosen)


def _visited_rows(config: ModelConfig, mesh: Mesh, size: int) -> float:
    """Return the rows of the tiles that a grouped matmul visits; see `costs.flops`."""
    if config.is_dense:
        return 0.0
    group = mesh.shape["expert"]
    choices = size * config.experts_per_token
    even = choices / group
    R = min(choices, room(even))
    tile = row_tile(-(-R // 8) * 8, config.num_experts // group)
    return (math.ceil(even / tile) + _experts_chosen(config, size) / group - 1) * tile


def _local_bytes(tree: Any) -> int:
    """Return the bytes a device of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
