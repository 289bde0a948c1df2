r"""Compile an experiment's step for a TPU slice or GPUs that need not exist, and report its cost.

python -m launch.compile --config=experiments/ipa.py:qwen3_30b_a3b --topology=v5p:4x4x4 \
    [--sequence_length=N] [--imbalance=1.2] [--json=FILE] [--config.key=value ...]

Needs libtpu, not a TPU: pip install "jax[tpu]==VERSION OF JAX". --topology=h100:8 is a node of
GPUs, and needs JAX's CUDA plugin on PYTHONPATH (docs/engines.md). Prints bytes a device by kind,
FLOPs, collectives by mesh axis, the least time that each takes, the MFU that is left at most, and
what to change where it does not fit (exit status 1). All passes of a step are counted: the scoring
of pi_old, the counting of experts where nothing is scored, and the epochs.

    --engine=expert=4,tensor=2 [--calls=64,256,1024] [--page_tokens=128] [--sequence_length=N]

compiles the calls of the embedded engine of the same model on this mesh instead, with the config's
engine.slots, engine.cache_tokens and max_context; N is the context of the sequences in a call.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch._config import define_config, read_config
from launch._main import reject_arguments, run_command
from rome.train.xla_flags import environment_of

_CONFIG = define_config("experiments/ipa.py:qwen3_30b_a3b")
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "v5p:4x4x4",
    "CHIP:SHAPE of a slice (v5e, v5p, v6e, tpu7x) or chip (v5e:1x1), CHIP:SHAPE*SLICES, or h100:8.",
)
_LAYERS = flags.DEFINE_integer(
    "layers", 0, "Compile this many layers instead of the model's: quicker, for a first look."
)
_SEQUENCE = flags.DEFINE_integer(
    "sequence_length", 0, "Tokens of a sequence, several of which share a row; 0: the whole row."
)
_IMBALANCE = flags.DEFINE_float(
    "imbalance", 1.0, "Choices of experts on the busiest device over the mean of all devices."
)
_ENGINE = flags.DEFINE_string(
    "engine", "", "Compile an engine's calls on this mesh, such as expert=4,tensor=2, and no step."
)
_CALLS = flags.DEFINE_list("calls", "64,256,1024", "Tokens of the engine's calls.")
_PAGE = flags.DEFINE_integer("page_tokens", 128, "Tokens of a page of the engine's cache.")
_JSON = flags.DEFINE_string("json", "", "Write the report to this file.")


def compile_experiment(
    config: Any,
    topology: str,
    layers: int = 0,
    sequence_length: int = 0,
    imbalance: float = 1.0,
) -> dict[str, Any]:
    """Return the report of an experiment's step on a topology (`rome.cost.estimate.report`).

    Args:
      config: of the experiment.
      topology: such as v5p:4x4x4.
      layers: instead of the model's own; 0: all of them.
      sequence_length: as for `report`; 0: a row is one sequence.
      imbalance: as for `rome.cost.compile.visited_rows`.
    """
    import jax

    from rome.cost.compile import batch_shapes, compile_programs, topology_devices
    from rome.cost.estimate import find_chip, report, state_bytes
    from rome.model.sharding import check_mesh
    from rome.stages.config import ConfigError, check_config
    from rome.stages.learner import make_learner, shares_prefixes
    from rome.stages.settings import passes_of_step
    from rome.stages.weights import model_of

    check_config(config)
    sequence_length = sequence_length or config.row_length
    if not 0 < sequence_length <= config.row_length or imbalance < 1.0:
        raise ConfigError(
            f"--sequence_length={sequence_length} must be in 1..{config.row_length} (row_length),"
            f" and --imbalance={imbalance:g} at least 1"
        )
    chip = find_chip(topology)
    model = model_of(config)
    if layers:
        model = dataclasses.replace(model, num_layers=layers)
    devices = topology_devices(topology)
    mesh = config.mesh.to_dict()
    rows = config.rows_per_microbatch
    length = config.row_length
    if math.prod(mesh.values()) != len(devices):
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
        raise ConfigError(
            f"mesh ({sizes}) has {math.prod(mesh.values())} devices, {topology} has"
            f" {len(devices)}. Change --config.mesh."
        )
    check_mesh(model, mesh, batch=rows, length=length)
    learner = make_learner(config, model, devices)
    replays = config.get("routing_replay", "off") != "off"
    routes_for = model if replays else None
    prefix_tree = shares_prefixes(config, learner)
    batch = batch_shapes(rows, length, config.chunks_per_row, routes_for, prefix_tree)
    passes = passes_of_step(config, balances_experts=model.router_aux_loss_coef > 0)
    names = ("score", "accumulate", "apply") if passes["score"] else ("accumulate", "apply")
    programs = compile_programs(learner, batch, chip, names, imbalance)
    state = state_bytes(learner)
    found = {
        "experiment": config.experiment,
        "model": config.model,
        "layers": model.num_layers,
        "topology": topology,
        "devices": len(devices),
        "mesh": mesh,
        "row_length": length,
        "rows_per_microbatch": rows,
        "sequence_length": sequence_length,
        "imbalance": imbalance,
        "prefix_tree": prefix_tree,
        "remat": model.remat,
        "jax": jax.__version__,
    }
    return found | report(
        programs,
        state,
        chip,
        config=model,
        mesh=mesh,
        rows=rows,
        length=length,
        passes=passes,
        sequence_length=sequence_length,
    )


def compile_engine(
    config: Any,
    topology: str,
    mesh: str,
    calls: Sequence[str],
    page_tokens: int,
    layers: int = 0,
    sequence_length: int = 0,
) -> dict[str, Any]:
    """Return the report of an engine's calls on a topology (`rome.cost.serving.report_engine`).

    Args:
      config: of the experiment, whose model the engine has.
      topology: such as v6e:2x4.
      mesh: such as expert=4,tensor=2; an axis that is not named has one device.
      calls: tokens of each call.
      page_tokens: of a page of the cache.
      layers: instead of the model's own; 0: all of them.
      sequence_length: context of the sequences that are decoded; 0: config.max_context.
    """
    import jax

    from rome.cost.compile import topology_devices
    from rome.cost.estimate import find_chip
    from rome.cost.serving import report_engine
    from rome.model.sharding import make_engine_mesh
    from rome.serve.programs import Shapes
    from rome.stages.config import ConfigError, check_config
    from rome.stages.weights import model_of

    check_config(config)
    try:
        sizes = {"expert": 1, "tensor": 1}
        for part in mesh.split(","):
            axis, _, size = part.partition("=")
            if axis not in sizes:
                raise ValueError(f"the axis {axis!r} is unknown")
            sizes[axis] = int(size)
        tokens = [int(call) for call in calls]
    except ValueError as error:
        raise ConfigError(
            f"--engine={mesh} --calls={','.join(calls)}: {error}. Give them as in"
            " --engine=expert=4,tensor=2 --calls=64,1024"
        ) from None
    model = dataclasses.replace(model_of(config), remat="none", capacity_factor=0.0)
    if layers:
        model = dataclasses.replace(model, num_layers=layers)
    chip = find_chip(topology)
    devices = topology_devices(topology)
    if math.prod(sizes.values()) != len(devices) or len(devices) == 1:
        raise ConfigError(
            f"--engine={mesh} has {math.prod(sizes.values())} devices, {topology} has"
            f" {len(devices)}. Give as many, and at least 2"
        )
    engine_mesh = make_engine_mesh(sizes["expert"], sizes["tensor"], model, devices)
    assert engine_mesh is not None, "there are several devices"
    engine = config.engine
    shapes = Shapes(engine.slots, config.max_context, engine.cache_tokens, page_tokens, max(tokens))
    context = sequence_length or config.max_context
    found = {
        "model": config.model,
        "layers": model.num_layers,
        "topology": topology,
        "devices": len(devices),
        "mesh": sizes,
        "slots": engine.slots,
        "jax": jax.__version__,
    }
    return found | report_engine(model, shapes, engine_mesh, chip, tokens, context)


def main(argv: list[str]) -> int:
    """Compile, print and write the report; return 1 where the step does not fit."""
    reject_arguments(argv, "--config.key=value")
    # The compiler flags that a run on this chip has; JAX is not imported yet.
    chip_name = _TOPOLOGY.value.partition(":")[0].replace("h100", "gpu")
    os.environ.update(environment_of(chip_name, os.environ))
    config = read_config(_CONFIG)
    topology = _TOPOLOGY.value
    if _ENGINE.value:
        found = compile_engine(
            config,
            topology,
            _ENGINE.value,
            _CALLS.value,
            _PAGE.value,
            _LAYERS.value,
            _SEQUENCE.value,
        )

        from rome.cost.serving import show_engine

        show_engine(found)
    else:
        found = compile_experiment(
            config, topology, _LAYERS.value, _SEQUENCE.value, _IMBALANCE.value
        )

        from rome.cost.compile import show

        show(found)
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    # Before JAX is imported: no TPU is looked for, and several compilations may run beside each
    # other.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    run_command("launch.compile", main, failure_status=2)
