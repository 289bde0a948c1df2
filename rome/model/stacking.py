"""Parameters with layers stacked on a leading axis, or as a tuple of layers; both ways.

Layers of two kinds are two stacks: "moe" over the layers with experts, "mlp" over the others; all
other parameters are stacked over all layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rome.model.config import ModelConfig

Params = dict[str, Any]


def unstack_layers(params: Params, config: ModelConfig) -> Params:
    """Return the parameters with layers as a tuple, for `Qwen3(config, scan=False)`.

    A step then slices no stack. NumPy arrays become views.
    """
    parts_of = {name: jax.tree.map(_split, stack) for name, stack in params["layers"].items()}
    layers = []
    for number in range(config.num_layers):
        if number in config.mlp_layers:
            absent = "moe"
            place_of = {"mlp": config.mlp_layers.index(number)}
        else:
            absent = "mlp"
            place_of = {"moe": config.sparse_layers.index(number)}
        layer = {}
        for name, parts in parts_of.items():
            if name != absent:
                layer[name] = _take(parts, place_of.get(name, number))
        layers.append(layer)
    return params | {"layers": tuple(layers)}


def stack_layers(params: Params) -> Params:
    """Return the parameters with layers stacked: the inverse of `unstack_layers`."""
    layers = params["layers"]
    names = dict.fromkeys(name for layer in layers for name in layer)
    stacks = {}
    for name in names:
        parts = [layer[name] for layer in layers if name in layer]
        stacks[name] = jax.tree.map(_stack, *parts)
    return params | {"layers": stacks}


def _split(stack: Array | np.ndarray) -> list[Any]:
    if isinstance(stack, np.ndarray):
        return list(stack)
    # the gradient of a split is one concatenation
    return [part[0] for part in jax.lax.split(stack, (1,) * stack.shape[0])]


def _take(parts: Any, place: int) -> Any:
    return jax.tree.map(lambda own: own[place], parts, is_leaf=lambda node: isinstance(node, list))


def _stack(*parts: Any) -> Any:
    library = np if isinstance(parts[0], np.ndarray) else jnp
    return library.stack(parts)
