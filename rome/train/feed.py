"""Move arrays from the hosts onto the mesh, also when the mesh spans several processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def feed(tree: Any, sharding: Sharding) -> Any:
    """Return host arrays as arguments of a jitted function whose in_shardings are `sharding`.

    Where the mesh is this process's own they stay as they are: jit copies them to their places
    itself, in a tenth of the time that it takes to place each of them here.

    Args:
      tree: arrays, equal in every process. Each process copies only the parts that its devices
        hold.
      sharding: of every array.
    """
    if sharding.is_fully_addressable:
        return tree
    return jax.tree.map(lambda array: put(array, sharding), tree)


def put(array: Any, sharding: Sharding) -> jax.Array:
    """Return one array laid out as `sharding` says.

    Args:
      array: a host array or local JAX array, equal in every process, or one that is on the mesh.
      sharding: where it goes.
    """
    is_on_mesh = isinstance(array, jax.Array) and not array.is_fully_addressable
    if sharding.is_fully_addressable or is_on_mesh:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
