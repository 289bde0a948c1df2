"""Compile a learner's step for a TPU slice that need not exist, and measure and show its cost.

Needs libtpu, not a TPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rome.cost.estimate import Program, measure, state_bytes, too_large
from rome.cost.h100 import TARGET
from rome.cost.roofline import GIB, Chip
from rome.data.batch import Batch
from rome.data.packing import pack
from rome.data.routes import route_dtype
from rome.model.config import ModelConfig
from rome.model.ops.balanced_time import busiest_share, query_places
from rome.model.ops.expert_exchange import PARTS, chunks_of
from rome.model.ops.experts import room, row_tile
from rome.train.step import Learner

_SHOWN_COLLECTIVES = 8
_SHOWN_ARRAYS = 6
_MAX_NAME = 60  # last characters of an op's name
_MAX_MAKER = 90


def topology_devices(topology: str) -> list[Any]:
    """Return the devices of a slice, or of several ("v5p:4x4x4*2"), from a description alone.

    A shape of ones ("v5e:1x1") is a single chip. "h100:8" are the GPUs of a node.

    Raises:
      ValueError: libtpu or JAX's CUDA plugin is missing, or knows no such slice.
    """
    from jax.experimental import topologies

    if topology.partition(":")[0] == "h100":
        return _h100s(topology)
    name, _, slices = topology.partition("*")
    options: dict[str, Any] = {"num_slices": int(slices)} if slices else {}
    if set(name.partition(":")[2].split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host has four otherwise
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(described.devices)
    except Exception as error:  # libtpu raises errors of any type
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no topology {topology!r}: {reason}. It takes libtpu (pip install"
            f" 'jax[tpu]=={jax.__version__}') and a shape that exists, such as v5p:4x4x4."
        ) from error


def _h100s(topology: str) -> list[Any]:
    from jax.experimental import topologies

    try:
        count = int(topology.partition(":")[2])
        if count < 1:
            raise ValueError(f"{count} GPUs are none")
        jax.devices()  # plugins are found now, and not by an error of the next call
        described = topologies.get_topology_desc(
            "h100", platform="cuda", topology=f"1x1x{count}", target_config=TARGET
        )
        return list(described.devices)
    except Exception as error:  # a missing plugin raises errors of several types
        reason = " ".join(str(error).split())[:200]
        version = jax.__version__
        raise ValueError(
            f"no topology {topology!r}: {reason}. Give a number of GPUs of one node (h100:8) and"
            f" JAX's CUDA plugin beside the environment: pip install --no-deps --target=DIR"
            f" jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}, and PYTHONPATH=DIR"
        ) from error


def batch_shapes(
    rows: int,
    row_length: int,
    chunks_per_row: int,
    routes_for: ModelConfig | None,
    prefix_tree: bool = False,
) -> Batch[jax.ShapeDtypeStruct]:
    """Return the shapes of one micro-batch.

    Args:
      rows: B.
      row_length: T.
      chunks_per_row: C.
      routes_for: the model whose routes are replayed; None: no routes.
      prefix_tree: whether the rows are prefix trees.
    """
    empty = pack(
        [], row_length=row_length, chunks_per_row=chunks_per_row, gamma=1.0, failure_reward=0.0
    )
    batch = empty.map(lambda field: jax.ShapeDtypeStruct((rows, *field.shape[1:]), field.dtype))
    if prefix_tree:
        places = jax.ShapeDtypeStruct((rows, row_length), np.int32)
        batch = batch._replace(ends_BT=places, about_BT=places, predictor_BT=places)
    if routes_for is None:
        return batch
    shape = (rows, row_length, routes_for.num_layers, routes_for.experts_per_token)
    routes = jax.ShapeDtypeStruct(shape, route_dtype(routes_for))
    return batch._replace(routes_BTLk=routes)


def compile_programs(
    learner: Learner,
    batch: Batch[jax.ShapeDtypeStruct],
    chip: Chip,
    only: Collection[str] | None = None,
    imbalance: float = 1.0,
) -> dict[str, Program]:
    """Compile the programs of a step and measure each.

    Args:
      learner: on the devices of a topology.
      batch: shapes of a micro-batch.
      chip: of the topology.
      only: names of the programs; None: all of them.
      imbalance: as for `visited_rows`.

    Returns:
      name -> Program. One that the compiler refused for memory has only the bytes it needs.
    """
    T = batch.tokens_BT.shape[1]
    time_shards = learner.mesh.shape["sequence"]
    score_share = busiest_share(query_places(T, time_shards), time_shards)
    rows = visited_rows(learner, batch, imbalance)
    programs = {}
    with asked_by_kernels(learner.mesh):
        all_lowered = learner.lower(batch)
    for name, lowered in all_lowered.items():
        if only and name not in only:
            continue
        print(f"compiling {name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            seconds = time.monotonic() - began
            programs[name] = too_large(name, error, seconds, state_bytes(learner))
            continue
        seconds = time.monotonic() - began
        programs[name] = measure(name, compiled, seconds, learner.mesh, chip, rows, score_share)
    return programs


def asked_by_kernels(mesh: Mesh) -> AbstractContextManager[Any]:
    """Return a context in which kernels of GPUs find one: they ask the default device."""
    first = mesh.devices.flat[0]
    return jax.default_device(first) if first.platform == "gpu" else nullcontext()


def visited_rows(learner: Learner, batch: Batch[Any], imbalance: float = 1.0) -> float:
    """Return the rows of the tiles that a grouped matmul visits at a time on the busiest device.

    It has its tokens' choices, shared by the ring of the expert axis; or as many as a part of a
    chunk of its tokens has where choices are exchanged. Each of its experts but the first begins
    inside of a tile that another one has rows in, and such a tile is computed for both.

    Args:
      learner: on the devices of a topology.
      batch: shapes of a micro-batch.
      imbalance: choices of the busiest device over the mean of all.
    """
    shape = learner.mesh.shape
    config = learner.model_config
    if config.is_dense:
        return 0.0
    B, T = batch.tokens_BT.shape
    tokens = B * T // learner.mesh.size * shape["tensor"]
    exchanged = learner.chosen_kernels.exchange == "all_to_all"
    parts = chunks_of(tokens) * PARTS if exchanged else shape["expert"]
    even_rows = tokens * config.experts_per_token / parts
    experts = config.num_experts // shape["expert"]
    tile = row_tile(room(even_rows), experts)
    shared = (experts - 1) / (PARTS if exchanged else 1)  # a part has the rows of some experts
    return imbalance * even_rows + shared * tile


def show(found: dict[str, Any]) -> None:
    """Print a report (`rome.cost.estimate.report`) of an experiment for a reader."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    print(
        f"{found['experiment']} of {found['model']} ({found['layers']} layers) on"
        f" {found['topology']}: {found['devices']} devices, {mesh}; {found['rows_per_microbatch']}"
        f" rows of {found['row_length']} tokens a micro-batch"
    )
    print(
        f"\nbytes a device{_gib(found['bytes_per_device'])} of{_gib(found['usable_bytes'])}:"
        f" {verdict} (peak in {found['peak_program']})"
    )
    for kind, size in found["bytes"].items():
        print(f"  {kind:<12}{_gib(size)}")
    for name, program in found["programs"].items():
        print(
            f"  program {name:<11}{_gib(program['peak_bytes'])},"
            f" temporaries{_gib(program['temporary_bytes'])}, compiled in"
            f" {program['compile_seconds']:.0f} s"
        )
    if "seconds" in found:
        _show_speed(found)
    for line in found["advice"]:
        print(f"\n-> {line}", end="")
    print()


def _show_speed(found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    tera_flops = found["flops"] / 1e12
    model_tera_flops = found["model_flops"] / 1e12
    sent_gib = found["collective_bytes"] / GIB
    passes = ", ".join(f"{name} {times} x" for name, times in found["passes"].items() if times)
    print(
        f"\none micro-batch, one device: {passes}\n  (lower bounds: no latency, every rate at its"
        f" peak; sequences of {found['sequence_length']} tokens, the busiest device has"
        f" {found['imbalance']:g} x its share of experts)"
    )
    print(
        f"  compute     {seconds['compute']:9.4f} s  {tera_flops:.1f} TFLOP, of which the model's"
        f" own {model_tera_flops:.1f}"
    )
    print(
        f"  HBM         {seconds['memory']:9.4f} s  {found['hbm_bytes'] / GIB:.1f} GiB (estimate)"
    )
    print(f"  collectives {seconds['collectives']:9.4f} s  {sent_gib:.1f} GiB sent")
    for one in found["collectives"][:_SHOWN_COLLECTIVES]:
        print(
            f"    {one['kind']:<20}{one['axes']:<16}{one['seconds']:9.4f} s"
            f" {one['bytes'] / GIB:8.2f} GiB in {one['runs']:6.0f} runs "
            f" {one['largest'][-_MAX_NAME:]}"
        )
    if found["overlap"]:
        print("  of them hidden behind compute in the order of the compiled schedule:")
    for one in found["overlap"][:_SHOWN_COLLECTIVES]:
        print(
            f"    {one['kind']:<20}{one['axes']:<16}{one['seconds']:9.4f} s"
            f" {100 * one['hidden_share']:5.0f} %"
        )
    print(f"  scheduled   {seconds['scheduled']:9.4f} s  all of it in that order")
    print(
        f"  MFU at most {100 * found['roofline_mfu']:.1f} % where collectives hide behind compute,"
        f" {100 * found['roofline_mfu_serial']:.1f} % where none does,"
        f" {100 * found['roofline_mfu_scheduled']:.1f} % as scheduled"
    )
    if found["kernels_not_counted"]:
        print(f"  kernels whose FLOPs are not counted: {', '.join(found['kernels_not_counted'])}")
    print("  largest arrays:")
    for array in found["largest_arrays"][:_SHOWN_ARRAYS]:
        maker = array["made_by"][-_MAX_MAKER:]
        print(f"   {array['bytes'] / GIB:7.2f} GiB  {array['shape']}  {maker}")


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB"
