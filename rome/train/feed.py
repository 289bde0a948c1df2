"""Arrays from the hosts onto the mesh, also when the mesh spans several processes: each feeds its
own part.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


def feed(tree: Any, sharding: Sharding) -> Any:
    """Host arrays, equal in every process, as arrays on the mesh: a process copies to its devices
    what they hold, nothing else moves.
    """
    return jax.tree.map(lambda array: put(array, sharding), tree)


def put(array: Any, sharding: Sharding) -> jax.Array:
    """One array laid out as `sharding` says: a host array or local JAX array, equal in every
    process, or one that is on the mesh already.
    """
    if sharding.is_fully_addressable or (
        isinstance(array, jax.Array) and not array.is_fully_addressable
    ):
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
