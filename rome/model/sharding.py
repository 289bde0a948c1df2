"""The mesh: which logical axis of an array lies on which axes of it.

Mesh axes: replica (whole copies, across slices), fsdp (parameters split, rows split), expert
(experts split, rows split), sequence (time split, parameters split), tensor (heads, expert hidden
and vocabulary split). Every mesh of a trainer has all five; an axis of size 1 costs nothing.

An engine's mesh has two, expert and tensor: each device has all tokens of a call, and the parts of
the parameters that it multiplies with. Nothing is gathered but tokens' sums.

`rome.model.params` names the logical axes of each parameter.
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
    # Long rows leave few devices to fsdp: devices that share a row share the parameters too.
    "embed": ("fsdp", "sequence"),
    # For matrices outside the experts: the master copy and its moments lie on all of these.
    "embed_wide": ("fsdp", "expert", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "expert_hidden": ("tensor",),
    "vocab": ("tensor",),
}
ENGINE_AXES = ("expert", "tensor")
ENGINE_RULES: dict[str, tuple[str, ...]] = {  # the same for an engine's mesh
    "batch": (),
    "time": (),
    "embed": (),
    "embed_wide": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "experts": ("expert",),
    "expert_hidden": ("tensor",),
    "vocab": ("expert", "tensor"),
}


def partition_spec(
    logical: Sequence[str | None], rules: Mapping[str, tuple[str, ...]] = RULES
) -> PartitionSpec:
    """Return the mesh axes of an array whose axes have these logical names.

    Args:
      logical: a name in `rules` for each axis; None: the axis is whole on every device.
      rules: logical axis -> mesh axes.

    Raises:
      ValueError: a name has no rule, or two of the array's axes would lie on one mesh axis.
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
    return PartitionSpec(*((rules[name] or None) if name else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pin an activation to its place on the current mesh; without a mesh, return it unchanged.

    `jax.set_mesh` makes a mesh current.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    rules = ENGINE_RULES if is_on_engine_mesh() else RULES
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, rules))


def is_split() -> bool:
    """Return whether a trainer's mesh of more than one device is current.

    Parts of the model then say themselves (`jax.shard_map`) what each device does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and mesh.axis_names == AXES


def is_on_engine_mesh() -> bool:
    """Return whether an engine's mesh is current."""
    return jax.sharding.get_abstract_mesh().axis_names == ENGINE_AXES


def in_turn(x: jax.Array) -> jax.Array:
    """Return x; on CPU devices of several processes, wait for it first.

    For computations that do not need each other's results. Collectives that run at once share a CPU
    backend's few threads: two processes that give them to different ones wait for each other for
    ever. Accelerators run what they are given in order.
    """
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        return x.block_until_ready()
    return x


def make_mesh(
    shape: Mapping[str, int],
    config: ModelConfig | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Return a mesh of all five axes.

    Args:
      shape: sizes of axes; absent ones have size 1, and one may be -1: all devices that are left.
      config: check that the mesh divides this model.
      devices: all of the process group's by default.

    Raises:
      ValueError: the mesh cannot be made or does not divide the model; names every problem.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill_sizes(shape, len(devices))
    needed = math.prod(sizes.values())
    problems: list[str] = []
    remedies: list[str] = []
    if config:
        problems, remedies = _indivisible(config, sizes, at_most=len(devices))
    if needed > len(devices):
        problems.insert(0, f"needs {needed} devices, {len(devices)} are there")
        remedies = remedies or [f"Lower an axis until their product is at most {len(devices)}."]
    if problems:
        raise ValueError(f"mesh ({_spell(shape)}) {'; and '.join(problems)}. {' '.join(remedies)}")
    arranged = _arrange(sizes, devices[:needed])
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_engine_mesh(
    expert: int, tensor: int, config: ModelConfig, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """Return the mesh of an engine; None for one device, which needs none.

    Args:
      expert: devices that share the experts.
      tensor: devices that share heads and the hidden units of each expert.
      config: of the model.
      devices: all of this process by default.

    Raises:
      ValueError: there are too few devices, or they do not divide this model; names every problem.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    _check_engine(expert, tensor, config, len(devices))
    if expert * tensor == 1:
        return None
    arranged = mesh_utils.create_device_mesh(
        (expert, tensor), devices[: expert * tensor], allow_split_physical_axes=True
    )
    return Mesh(arranged, ENGINE_AXES, axis_types=(AxisType.Auto,) * len(ENGINE_AXES))


def engine_part(mesh: Mesh, config: ModelConfig) -> Mesh | None:
    """Return the engine's mesh inside of a trainer's; None for one device.

    It has the expert and tensor axes, and the first devices of the others: its experts, heads and
    hidden units lie where the trainer has them.

    Raises:
      ValueError: these axes do not divide the model as an engine needs it.
    """
    devices = mesh.devices[0, 0, :, 0, :]
    _check_engine(*devices.shape, config, devices.size)
    if devices.size == 1:
        return None
    return Mesh(devices, ENGINE_AXES, axis_types=(AxisType.Auto,) * len(ENGINE_AXES))


def check_mesh(
    config: ModelConfig,
    mesh_shape: Mapping[str, int],
    batch: int | None = None,
    length: int | None = None,
) -> None:
    """Check that a mesh divides a model, and a batch where its sizes are given.

    Args:
      config: the model.
      mesh_shape: sizes of axes; absent ones have size 1.
      batch: rows of a micro-batch.
      length: tokens of a row.

    Raises:
      ValueError: names everything that the mesh does not divide, and sizes that would fit.
    """
    sizes = {axis: mesh_shape.get(axis, 1) for axis in AXES}
    at_most = math.prod(sizes.values())
    problems, remedies = _indivisible(config, sizes, batch, length, at_most=at_most)
    if problems:
        raise ValueError(
            f"mesh ({_spell(mesh_shape)}) does not fit: {'; and '.join(problems)}."
            f" {' '.join(remedies)}"
        )


def extent(mesh: Mesh, axis: str) -> tuple[int, ...]:
    """Return the part of the torus that a mesh axis covers: chips along each of its dimensions.

    Dimensions of one chip are left out. Devices without coordinates lie in a line.
    """
    along_axis_last = np.moveaxis(mesh.devices, AXES.index(axis), -1)
    first_group = along_axis_last.reshape(-1, mesh.shape[axis])[0]
    places = []
    for number, device in enumerate(first_group):
        places.append(getattr(device, "coords", (number,)))
    found = []
    for coordinates in zip(*places, strict=True):
        chips = len(set(coordinates))
        if chips > 1:
            found.append(chips)
    return tuple(found)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of any array whose first axis is B: rows over replica, fsdp, expert."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def row_shards(mesh: Mesh) -> int:
    """Return the number that the rows of a micro-batch must be a multiple of."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def _arrange(sizes: Mapping[str, int], devices: list[Any]) -> np.ndarray:
    """Arrange devices so that the last axes, which communicate most, lie on whole rings.

    Rings are those of the interconnect. An axis may be a part of a ring, unlike in jax.make_mesh.
    With several slices each is one part of the replica axis: only gradients cross between them.
    """
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["replica"] % slices:
        raise ValueError(
            f"the devices are {slices} slices, which do not divide replica={sizes['replica']}. Set"
            f" --config.mesh.replica to a multiple of {slices}."
        )
    inside = (sizes["replica"] // slices, *shape[1:])
    across = (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def _fill_sizes(shape: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the size of all five axes, -1 replaced by what is left of the devices."""
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is unknown; choose from {', '.join(AXES)}")
    bad = [f"{axis}={size}" for axis, size in shape.items() if size != -1 and size < 1]
    num_open = list(shape.values()).count(-1)
    if bad or num_open > 1:
        raise ValueError(
            f"mesh ({_spell(shape)}): sizes are positive, and at most one is -1 (all devices that"
            " are left)"
        )
    rest = math.prod(size for size in shape.values() if size != -1)
    if num_open and devices % rest:
        raise ValueError(
            f"mesh ({_spell(shape)}): {rest} does not divide the {devices} devices. Choose axes"
            " whose product divides them."
        )
    sizes = {axis: shape.get(axis, 1) for axis in AXES}
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = devices // rest
    return sizes


def _targets(config: ModelConfig, length: int | None) -> dict[str, dict[str, int]]:
    """Return for each mesh axis the sizes that it must divide, by their description."""
    over_tensor = {
        f"the {config.num_heads} query heads": config.num_heads,
        f"the {config.num_kv_heads} key heads": config.num_kv_heads,
        f"the vocabulary of {config.vocab_size}": config.vocab_size,
    }
    over_expert = {"the 1 that a model without experts needs": 1}
    if not config.is_dense:
        description = f"the expert hidden size {config.moe_intermediate_size}"
        over_tensor[description] = config.moe_intermediate_size
        over_expert = {f"the {config.num_experts} experts": config.num_experts}
    if config.mlp_layers:
        description = f"the dense layers' hidden size {config.intermediate_size}"
        over_tensor[description] = config.intermediate_size
    over_sequence = {} if length is None else {f"the {length} tokens of a row": length}
    return {
        "fsdp": {f"the hidden size {config.hidden_size}": config.hidden_size},
        "expert": over_expert,
        "sequence": over_sequence,
        "tensor": over_tensor,
    }


def _indivisible(
    config: ModelConfig,
    sizes: Mapping[str, int],
    batch: int | None = None,
    length: int | None = None,
    *,
    at_most: int,
) -> tuple[list[str], list[str]]:
    """Return every size that the mesh does not divide, and for each mesh axis sizes that would."""
    problems = []
    remedies = []
    for axis, targets in _targets(config, length).items():
        faults = [description for description, size in targets.items() if size % sizes[axis]]
        if faults:
            choices = _choices(math.gcd(*targets.values()), at_most)
            problems.append(f"{sizes[axis]} does not divide {' nor '.join(faults)}")
            remedies.append(f"Set --config.mesh.{axis} to {choices}.")
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


def _check_engine(expert: int, tensor: int, config: ModelConfig, num_devices: int) -> None:
    """Raise ValueError where an engine's mesh cannot be made; name every problem."""
    given = f"expert_parallel={expert}, tensor_parallel={tensor}"
    if expert < 1 or tensor < 1:
        raise ValueError(f"{given}: both must be at least 1")
    needed = expert * tensor
    problems = []
    remedies = []
    if needed > num_devices:
        problems.append(f"they need {needed} devices, {num_devices} are there")
        remedies.append("Lower one of them.")
    divided = _targets(config, None)
    vocabulary = {f"the vocabulary of {config.vocab_size}": config.vocab_size}
    for name, size, targets in (
        ("expert_parallel", expert, divided["expert"]),
        ("tensor_parallel", tensor, divided["tensor"]),
        ("expert_parallel * tensor_parallel", needed, vocabulary),
    ):
        faults = [description for description, total in targets.items() if total % size]
        if faults:
            choices = _choices(math.gcd(*targets.values()), num_devices)
            problems.append(f"{name} = {size} does not divide {' nor '.join(faults)}")
            remedies.append(f"Set {name} to {choices}.")
    if problems:
        raise ValueError(f"{given}: {'; and '.join(problems)}. {' '.join(remedies)}")


def _choices(number: int, at_most: int) -> str:
    divisors = [str(d) for d in range(1, min(number, at_most) + 1) if number % d == 0]
    if len(divisors) == 1:
        return divisors[0]
    return f"{', '.join(divisors[:-1])} or {divisors[-1]}"


def _spell(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in shape.items())
