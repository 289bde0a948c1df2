"""Placement of the parameters: the logical axes of each one, and its sharding on a mesh.

Axis names are those of `rome.model.sharding.RULES`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from rome.model.config import ModelConfig
from rome.model.qwen3 import init_params
from rome.model.sharding import ENGINE_AXES, ENGINE_RULES, partition_spec

# path of a parameter -> logical name of each axis; None: whole on every device
PARAM_AXES: dict[str, tuple[str | None, ...]] = {
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


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> Any:
    """Return a jax.ShapeDtypeStruct for each parameter, in the structure of init_params."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def param_shardings(mesh: Mesh, config: ModelConfig) -> Any:
    """Return a NamedSharding for each parameter, in the structure of init_params."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes_of(path, leaf)))

    return jax.tree_util.tree_map_with_path(place, parameter_shapes(config))


def engine_sharding(place: Mesh | jax.Device, name: str) -> Sharding:
    """Return the sharding of a parameter of an engine, whose layers are not stacked.

    Args:
      place: the engine's mesh, or its one device.
      name: as in PARAM_AXES.
    """
    if not isinstance(place, Mesh):
        return SingleDeviceSharding(place)
    axes = PARAM_AXES[name]
    own = axes[1:] if name.startswith("layers/") else axes
    return NamedSharding(place, partition_spec(own, ENGINE_RULES))


def engine_mesh_of(params: Any) -> Mesh | None:
    """Return the mesh that an engine's parameters lie on; None for one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == ENGINE_AXES:
        return sharding.mesh
    return None


def axes_of(path: tuple[Any, ...], leaf: Any) -> tuple[str | None, ...]:
    """Return the logical axis names of a parameter.

    Args:
      path: keys, as jax.tree_util.tree_map_with_path gives them for stacked layers.
      leaf: the parameter or its shape.

    Raises:
      ValueError: PARAM_AXES has no entry for it, or one of another number of axes.
    """
    name = "/".join(str(key.key) for key in path)
    if name not in PARAM_AXES:
        raise ValueError(f"parameter {name!r} has no entry in PARAM_AXES; add its logical axes")
    axes = PARAM_AXES[name]
    if len(axes) != len(leaf.shape):
        raise ValueError(
            f"parameter {name!r} has shape {leaf.shape}, but PARAM_AXES names {len(axes)} axes"
        )
    return axes
