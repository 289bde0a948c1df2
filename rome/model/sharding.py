"""Which axis of which array lies on which axis of the mesh: one table of logical names, for
parameters and activations.

Mesh axes: replica (whole copies, across slices), fsdp (parameters split, rows split), expert
(experts split, rows split), sequence (time split, parameters split), tensor (heads, expert hidden
and vocabulary split). Every mesh has all five; an axis of size 1 costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rome.model.config import ModelConfig

AXES = ("replica", "fsdp", "expert", "sequence", "tensor")

RULES: dict[str, tuple[str, ...]] = {  # logical axis -> mesh axes
    "batch": ("replica", "fsdp", "expert"),
    "time": ("sequence",),
    "embed": (
        "fsdp",
        "sequence",
    ),  # long rows leave few devices to fsdp: those that share a row share the parameters too
    "embed_wide": (
        "fsdp",
        "expert",
        "sequence",
    ),  # of what is no expert: the master copy and its moments lie on every device of these axes
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "expert_hidden": ("tensor",),
    "vocab": ("tensor",),
}

PARAM_AXES: dict[
    str, tuple[str | None, ...]
] = {  # path of a parameter -> logical name of each axis; None: whole on every device
    "embed/embedding": ("vocab", "embed_wide"),
    "head/kernel": ("embed_wide", "vocab"),
    "norm/scale": (None,),
    "layers/attention_norm/scale": (None, None),
    "layers/moe_norm/scale": (None, None),
    "layers/attention/q": (None, "embed_wide", "heads", None),
    "layers/attention/k": (None, "embed_wide", "kv_heads", None),
    "layers/attention/v": (None, "embed_wide", "kv_heads", None),
    "layers/attention/o": (None, "heads", None, "embed_wide"),
    "layers/attention/q_bias": (None, "heads", None),
    "layers/attention/k_bias": (None, "kv_heads", None),
    "layers/attention/v_bias": (None, "kv_heads", None),
    "layers/attention/o_bias": (None, None),
    "layers/attention/q_norm/scale": (None, None),
    "layers/attention/k_norm/scale": (None, None),
    "layers/moe/router": (None, "embed", None),
    "layers/moe/gate": (None, "experts", "embed", "expert_hidden"),
    "layers/moe/up": (None, "experts", "embed", "expert_hidden"),
    "layers/moe/down": (None, "experts", "expert_hidden", "embed"),
    "layers/mlp/gate": (None, "embed_wide", "expert_hidden"),
    "layers/mlp/up": (None, "embed_wide", "expert_hidden"),
    "layers/mlp/down": (None, "expert_hidden", "embed_wide"),
}


def partition_spec(
    logical: Sequence[str | None], rules: Mapping[str, tuple[str, ...]] = RULES
) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names.

    Two of its axes on one mesh axis are an error.
    """
    unknown = [name for name in logical if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} has no rule; known: {', '.join(rules)}")
    used = [axis for name in logical if name for axis in rules[name]]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(
            f"logical axes {tuple(logical)} put mesh axis {twice[0]!r} on two dimensions of one"
            " array; change RULES"
        )
    return PartitionSpec(*(rules[name] if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation to its place on the mesh that `jax.set_mesh` made current; without one it
    does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical))


def is_split() -> bool:
    """Whether a mesh of more than one device is current, so that parts of the model say themselves
    what each device does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def in_turn(x: jax.Array) -> jax.Array:
    """x itself; on CPU devices of several processes it is waited for first.

    For computations that do not need each other's results.

    Collectives that are under way at once share a CPU backend's few threads: two processes that
    give them to different ones wait for each other for ever. Accelerators run what they are given
    in order.
    """
    return (
        x.block_until_ready() if jax.default_backend() == "cpu" and jax.process_count() > 1 else x
    )


def make_mesh(
    shape: Mapping[str, int],
    config: ModelConfig | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of all five axes; those that `shape` leaves out have size 1, and one may be -1: all
    devices that are left.

    With a config it is also checked that the model divides. Every problem is named in one error.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill_sizes(shape, len(devices))
    needed = math.prod(sizes.values())
    problems, remedies = _indivisible(config, sizes, at_most=len(devices)) if config else ([], [])
    if needed > len(devices):
        problems.insert(0, f"needs {needed} devices, {len(devices)} are there")
        remedies = remedies or [f"Lower an axis until their product is at most {len(devices)}."]
    if problems:
        raise ValueError(f"mesh ({_spell(shape)}) {'; and '.join(problems)}. {' '.join(remedies)}")
    return Mesh(_arrange(sizes, devices[:needed]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: Mapping[str, int], devices: list[Any]) -> np.ndarray:
    """Devices so that the last axes, which talk most, lie on whole rings of the interconnect; an
    axis may be a part of a ring, unlike in jax.make_mesh.

    Of several slices each is one part of the replica axis: only gradients cross between them.
    """
    shape, slices = (
        tuple(sizes.values()),
        len({getattr(device, "slice_index", 0) for device in devices}),
    )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["replica"] % slices:
        raise ValueError(
            f"the devices are {slices} slices, which do not divide replica={sizes['replica']}. Set"
            f" --config.mesh.replica to a multiple of {slices}."
        )
    inside = (sizes["replica"] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, *(1,) * (len(shape) - 1)), devices, allow_split_physical_axes=True
    )


def check_mesh(
    config: ModelConfig,
    mesh_shape: Mapping[str, int],
    batch: int | None = None,
    length: int | None = None,
) -> None:
    """Raises a ValueError that names everything which this mesh does not divide: model sizes, and
    rows and time where they are given.
    """
    sizes = {axis: mesh_shape.get(axis, 1) for axis in AXES}
    problems, remedies = _indivisible(
        config, sizes, batch, length, at_most=math.prod(sizes.values())
    )
    if problems:
        raise ValueError(
            f"mesh ({_spell(mesh_shape)}) does not fit: {'; and '.join(problems)}."
            f" {' '.join(remedies)}"
        )


def extent(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Of each dimension of the torus that the devices of an axis extend over: how many chips.

    Devices without coordinates lie in a line.
    """
    group = np.moveaxis(mesh.devices, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])[0]
    places = [getattr(device, "coords", (number,)) for number, device in enumerate(group)]
    return tuple(chips for chips in (len(set(line)) for line in zip(*places)) if chips > 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over replica, fsdp and expert; for any array whose first axis is B."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def row_shards(mesh: Mesh) -> int:
    """What the rows of a micro-batch must be a multiple of."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def logical_axes(params: Any) -> Any:
    """The logical axis names of each parameter, in a pytree of params' structure (stacked layers).

    Each leaf is a tuple of names.
    """
    return jax.tree_util.tree_map_with_path(_axes_of, params)


def param_shardings(mesh: Mesh, config: ModelConfig) -> Any:
    """A NamedSharding for each parameter, in the structure of init_params."""
    from rome.model.qwen3 import init_params  # qwen3 constrains its activations with this module

    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(_axes_of(path, leaf))), shapes
    )


def _axes_of(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
    name = "/".join(str(key.key) for key in path)
    if name not in PARAM_AXES:
        raise ValueError(f"parameter {name!r} has no entry in PARAM_AXES; add its logical axes")
    if len(PARAM_AXES[name]) != len(leaf.shape):
        raise ValueError(
            f"parameter {name!r} has shape {leaf.shape}, but PARAM_AXES names"
            f" {len(PARAM_AXES[name])} axes"
        )
    return PARAM_AXES[name]


def _fill_sizes(shape: Mapping[str, int], devices: int) -> dict[str, int]:
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown; choose from {', '.join(AXES)}")
    bad = [f"{axis}={size}" for axis, size in shape.items() if size != -1 and size < 1]
    if bad or list(shape.values()).count(-1) > 1:
        raise ValueError(
            f"mesh ({_spell(shape)}): sizes are positive, and at most one is -1 (all devices that"
            " are left)"
        )
    rest = math.prod(size for size in shape.values() if size != -1)
    if -1 in shape.values() and devices % rest:
        raise ValueError(
            f"mesh ({_spell(shape)}): {rest} does not divide the {devices} devices. Choose axes"
            " whose product divides them."
        )
    return {axis: devices // rest if shape.get(axis) == -1 else shape.get(axis, 1) for axis in AXES}


def _indivisible(
    config: ModelConfig,
    sizes: Mapping[str, int],
    batch: int | None = None,
    length: int | None = None,
    *,
    at_most: int,
) -> tuple[list[str], list[str]]:
    """What does not divide, and for each mesh axis at fault the sizes that would."""
    wanted = {
        "fsdp": {f"the hidden size {config.hidden_size}": config.hidden_size},
        "expert": {f"the {config.num_experts} experts": config.num_experts},
        "sequence": {} if length is None else {f"the {length} tokens of a row": length},
        "tensor": (
            {
                f"the {config.num_heads} query heads": config.num_heads,
                f"the {config.num_kv_heads} key heads": config.num_kv_heads,
                f"the expert hidden size {config.moe_intermediate_size}": (
                    config.moe_intermediate_size
                ),
                f"the vocabulary of {config.vocab_size}": config.vocab_size,
            }
            | (
                {
                    f"the dense layers' hidden size {config.intermediate_size}": (
                        config.intermediate_size
                    )
                }
                if config.dense_layers
                else {}
            )
        ),
    }
    problems, remedies = [], []
    for axis, targets in wanted.items():
        faults = [what for what, size in targets.items() if size % sizes[axis]]
        if faults:
            problems.append(f"{sizes[axis]} does not divide {' nor '.join(faults)}")
            remedies.append(
                f"Set --config.mesh.{axis} to {_choices(math.gcd(*targets.values()), at_most)}."
            )
    wide = math.prod(sizes[axis] for axis in RULES["embed_wide"])
    if config.hidden_size % wide and not problems:
        problems.append(
            f"fsdp * expert * sequence = {wide} does not divide the hidden size"
            f" {config.hidden_size}"
        )
        remedies.append("Lower one of them until their product divides it.")
    rows = math.prod(sizes[axis] for axis in RULES["batch"])
    if batch is not None and batch % rows:
        problems.append(
            f"the {rows} devices of {', '.join(RULES['batch'])} do not divide the {batch} rows of a"
            " batch"
        )
        remedies.append(f"Make the rows a multiple of {rows}.")
    return problems, remedies


def _choices(number: int, at_most: int) -> str:
    divisors = [str(d) for d in range(1, min(number, at_most) + 1) if number % d == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"


def _spell(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in shape.items())
