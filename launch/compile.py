"""Compiles an experiment's step for a TPU slice that need not be there, and says what it costs.

python -m launch.compile --config=experiments/ipa.py:qwen3_30b_a3b --topology=v5p:4x4x4 [--json=FILE] [--save=DIR] [--config.key=value ...]

Needs libtpu, not a TPU: pip install "jax[tpu]==VERSION OF JAX". Prints bytes a device by kind,
FLOPs, collectives by mesh axis, the time that each bounds, the MFU that is left, and what to change
where it does not fit (exit status 1). `--save` keeps the executables.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import pickle
import sys
import time
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from rome.train.xla_flags import environment_of

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    "experiments/ipa.py:qwen3_30b_a3b",
    "An experiment file, with :PRESET after it where it has several.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5p:4x4x4", "CHIP:SHAPE of a slice (v5e, v5p, v6e, tpu7x), or CHIP:SHAPE*SLICES."
)
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "Compile this many layers instead of the model's: quicker, for looking around."
)
_JSON = flags.DEFINE_string("json", "", "Write the figures here.")
_SAVE = flags.DEFINE_string("save", "", "Keep the executables in this directory.")

SAVE_NOTE = """Executables of launch.compile for {topology}, jax {jax}. On such a slice, with the same jax and libtpu:

    from launch.compile import load_programs
    programs = load_programs("{path}")     # trusted files only: loading runs what is in them
    gradients, metrics = programs["accumulate"](params, gradients, batch, denominators, tokens)
"""


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice, or of several ("v5p:4x4x4*2"), by description alone."""
    from jax.experimental import topologies

    name, _, slices = topology.partition("*")
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu",
                topology_name=name,
                **({"num_slices": int(slices)} if slices else {}),
            ).devices
        )
    except Exception as error:  # libtpu raises whatever it likes
        import jax

        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no topology {topology!r}: {reason}. It takes libtpu (pip install"
            f" 'jax[tpu]=={jax.__version__}') and a shape that exists, such as v5p:4x4x4."
        ) from error


def compile_programs(
    learner, batch, chip, only: tuple[str, ...] | None = None
) -> tuple[dict, dict]:
    """name -> Program, and name -> the executable of each that fits."""
    import jax

    from rome.cost.estimate import measure, state_bytes, too_large
    from rome.model.ops.balanced_time import busiest_share, query_places

    T, time_shards = batch.tokens_BT.shape[1], learner.mesh.shape["sequence"]
    score_share = busiest_share(query_places(T, time_shards), time_shards)
    programs, executables = {}, {}
    for name, lowered in learner.lower(batch).items():
        if only and name not in only:
            continue
        print(f"compiling {name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        try:
            executables[name] = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            programs[name] = too_large(
                name, error, time.monotonic() - began, state_bytes(learner.state)
            )
            continue
        programs[name] = measure(
            name,
            executables[name],
            time.monotonic() - began,
            learner.mesh,
            chip,
            grouped_rows(learner, batch),
            score_share,
        )
    return programs, executables


def batch_shapes(config, model_config):
    """One micro-batch of a config as shapes, with routes where they are replayed."""
    import jax

    from rome.data.packing import pack
    from rome.data.routes import route_dtype

    rows = config.rows_per_microbatch
    empty = pack(
        [],
        row_length=config.row_length,
        chunks_per_row=config.chunks_per_row,
        gamma=1.0,
        failure_reward=0.0,
    )
    batch = jax.tree.map(
        lambda field: jax.ShapeDtypeStruct((rows, *field.shape[1:]), field.dtype), empty
    )
    if config.get("routing_replay", "off") == "off":
        return batch
    return batch._replace(
        routes_BTLk=jax.ShapeDtypeStruct(
            (rows, config.row_length, model_config.num_layers, model_config.experts_per_token),
            route_dtype(model_config),
        )
    )


def grouped_rows(learner, batch) -> float:
    """Choices of experts that one device computes at a time when they are even: its tokens'
    choices, shared by the ring of the expert axis, or as many as a chunk of its tokens has where
    choices are exchanged.
    """
    from rome.model.ops.expert_exchange import chunks_of

    tokens = batch.tokens_BT.size // learner.mesh.size * learner.mesh.shape["tensor"]
    parts = (
        chunks_of(tokens)
        if learner.chosen_kernels.exchange == "all_to_all"
        else learner.mesh.shape["expert"]
    )
    return tokens * learner.model_config.experts_per_token / parts


def compile_experiment(config, topology: str, layers: int = 0) -> tuple[dict[str, Any], dict]:
    """(the report, the executables) of an experiment's step on a topology."""
    import jax

    from rome.cost.estimate import find_chip, report, state_bytes
    from rome.model.sharding import check_mesh
    from rome.stages.base import make_learner, model_of
    from rome.stages.config import ConfigError, check_config

    check_config(config)
    chip = find_chip(topology)
    model_config = model_of(config)
    if layers:
        model_config = dataclasses.replace(model_config, num_layers=layers)
    devices = topology_devices(topology)
    mesh = config.mesh.to_dict()
    if math.prod(mesh.values()) != len(devices):
        raise ConfigError(
            f"mesh ({', '.join(f'{axis}={size}' for axis, size in mesh.items())}) has"
            f" {math.prod(mesh.values())} devices, {topology} has {len(devices)}. Change"
            " --config.mesh."
        )
    check_mesh(model_config, mesh, batch=config.rows_per_microbatch, length=config.row_length)
    learner = make_learner(config, model_config, devices)
    batch = batch_shapes(config, model_config)
    scored = config.get("logp_old_from") == "trainer"
    programs, executables = compile_programs(
        learner, batch, chip, None if scored else ("accumulate", "apply")
    )
    found = {
        "experiment": config.experiment,
        "model": config.model,
        "layers": model_config.num_layers,
        "topology": topology,
        "devices": len(devices),
        "mesh": mesh,
        "row_length": config.row_length,
        "rows_per_microbatch": config.rows_per_microbatch,
        "remat": model_config.remat,
        "jax": jax.__version__,
    }
    return (
        found
        | report(
            programs,
            state_bytes(learner.state),
            chip,
            config=model_config,
            mesh=mesh,
            rows=config.rows_per_microbatch,
            length=config.row_length,
        ),
        executables,
    )


def save_programs(directory: pathlib.Path, executables: dict, topology: str) -> None:
    """directory/NAME.pickle of each program, and how to load them."""
    import jax
    from jax.experimental import serialize_executable

    directory.mkdir(parents=True, exist_ok=True)
    for name, executable in executables.items():
        (directory / f"{name}.pickle").write_bytes(
            pickle.dumps(serialize_executable.serialize(executable))
        )
    (directory / "README.txt").write_text(
        SAVE_NOTE.format(topology=topology, jax=jax.__version__, path=directory)
    )


def load_programs(directory: str | pathlib.Path) -> dict[str, Any]:
    """name -> callable, on the machine that the programs were compiled for.

    The files are pickles: load none that you do not trust.
    """
    from jax.experimental import serialize_executable

    paths = sorted(pathlib.Path(directory).glob("*.pickle"))
    if not paths:
        raise ValueError(
            f"{directory} holds no executables; make them with launch.compile --save={directory}"
        )
    return {
        path.stem: serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
        for path in paths
    }


def show(found: dict[str, Any]) -> None:
    """The report for a reader."""
    gib = lambda size: f"{size / 2**30:8.2f} GiB"
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    print(
        f"{found['experiment']} of {found['model']} ({found['layers']} layers) on"
        f" {found['topology']}: {found['devices']} devices, {mesh}; {found['rows_per_microbatch']}"
        f" rows of {found['row_length']} tokens a micro-batch"
    )
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    print(
        f"\nbytes a device{gib(found['bytes_per_device'])} of{gib(found['usable_bytes'])}:"
        f" {verdict} (peak in {found['peak_program']})"
    )
    for kind, size in found["bytes"].items():
        print(f"  {kind:<12}{gib(size)}")
    for name, program in found["programs"].items():
        print(
            f"  program {name:<11}{gib(program['peak_bytes'])},"
            f" temporaries{gib(program['temporary_bytes'])}, compiled in"
            f" {program['compile_seconds']:.0f} s"
        )
    if "seconds" in found:
        _show_speed(found)
    for line in found["advice"]:
        print(f"\n-> {line}", end="")
    print()


def _show_speed(found: dict[str, Any]) -> None:
    seconds = found["seconds"]
    print(
        "\none micro-batch, one device (a bound: no latency, every rate at its peak)\n  compute   "
        f"  {seconds['compute']:9.4f} s  {found['flops'] / 1e12:.1f} TFLOP, of which the model's"
        f" own {found['model_flops'] / 1e12:.1f}\n  HBM         {seconds['memory']:9.4f} s "
        f" {found['hbm_bytes'] / 2**30:.1f} GiB (estimate)\n  collectives"
        f" {seconds['collectives']:9.4f} s  {found['collective_bytes'] / 2**30:.1f} GiB sent"
    )
    for one in found["collectives"][:8]:
        print(
            f"    {one['kind']:<20}{one['axes']:<16}{one['seconds']:9.4f} s"
            f" {one['bytes'] / 2**30:8.2f} GiB in {one['runs']:6.0f} runs  {one['largest'][-60:]}"
        )
    print(
        f"  MFU bound   {100 * found['roofline_mfu']:.1f} % where collectives hide behind compute,"
        f" {100 * found['roofline_mfu_serial']:.1f} % where none does"
    )
    if found["kernels_not_counted"]:
        print(f"  kernels whose FLOPs are not counted: {', '.join(found['kernels_not_counted'])}")
    print("  largest arrays:")
    for array in found["largest_arrays"][:6]:
        print(f"   {gib_of(array['bytes'])}  {array['shape']}  {array['made_by'][-90:]}")


def gib_of(size: float) -> str:
    return f"{size / 2**30:7.2f} GiB"


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(
            f"argument {argv[1]!r} is not understood; flags look like --config.key=value"
        )
    os.environ.update(
        environment_of(_TOPOLOGY.value.partition(":")[0], os.environ)
    )  # the flags that a run on this chip has; JAX is not imported yet
    found, executables = compile_experiment(_CONFIG.value, _TOPOLOGY.value, _LAYERS.value)
    show(found)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1))
    if _SAVE.value and executables:
        save_programs(pathlib.Path(_SAVE.value), executables, _TOPOLOGY.value)
        print(f"executables: {_SAVE.value}")
    return 0 if found["fits"] else 1


def run_main(argv: list[str]) -> int:
    """`main`; a known kind of failure becomes one line. ROME_DEBUG=1 keeps the traceback."""
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        if os.environ.get("ROME_DEBUG"):
            raise
        print(f"launch.compile: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Before JAX is imported: no TPU is looked for, and several compilations may run beside each
    # other.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    app.run(run_main)
