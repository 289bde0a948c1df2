"""Move arrays from the hosts onto the mesh, also when the mesh spans several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Sharding

# A single scored sequence is padded to a multiple of this many tokens, as attention kernels and a
# sharded time axis need.
PROBE_MULTIPLE = 128


class OwnRows(NamedTuple):
    """The rows of a batch that this process puts onto its devices.

    Attributes:
      fed: in order; their contents are needed here.
      counted: those of them that no process with a lower number has too. Each row is counted by one
        process, so that counts add up.
    """

    fed: list[int]
    counted: list[int]


def own_rows(sharding: Sharding, rows: int, rows_per_microbatch: int) -> OwnRows:
    """Return the rows of this process, in batches that are fed a micro-batch at a time.

    Args:
      sharding: of an array whose first axis is the rows of a micro-batch.
      rows: of a batch; a multiple of rows_per_microbatch.
      rows_per_microbatch: of a micro-batch.
    """
    processes: list[set[int]] = [set() for _ in range(rows_per_microbatch)]
    device: Any
    for device, index in sharding.devices_indices_map((rows_per_microbatch,)).items():
        for row in range(*index[0].indices(rows_per_microbatch)):
            processes[row].add(device.process_index)
    here = jax.process_index()
    fed = [row for row in range(rows) if here in processes[row % rows_per_microbatch]]
    counted = [row for row in fed if here == min(processes[row % rows_per_microbatch])]
    return OwnRows(fed, counted)


def feed(tree: Any, sharding: Sharding) -> Any:
    """Return host arrays as arguments of a jitted function whose in_shardings are `sharding`.

    Where the mesh is this process's own they stay as they are: jit copies them to their places
    itself, in a tenth of the time that it takes to place each of them here.

    Args:
      tree: arrays of one shape in every process. Each copies only the parts that its devices hold,
        and only those need to hold what is meant.
      sharding: of every array.
    """
    if sharding.is_fully_addressable:
        return tree
    return jax.tree.map(lambda array: put(array, sharding), tree)


def put(array: Any, sharding: Sharding) -> jax.Array:
    """Return one array laid out as `sharding` says.

    Args:
      array: a host array or local JAX array, equal in every process that has devices for the same
        part of it, or one that is on the mesh.
      sharding: where it goes.
    """
    is_on_mesh = isinstance(array, jax.Array) and not array.is_fully_addressable
    if sharding.is_fully_addressable or is_on_mesh:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def one_sequence(
    ids: Sequence[int], copies: int, multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, positions and segments of one sequence, repeated in so many rows.

    Args:
      ids: of the sequence.
      copies: rows; every row shard needs one.
      multiple: the padded length is a multiple of this.
    """
    length = len(ids)
    padded = length + -length % multiple
    shape = (copies, padded)
    tokens_BT = np.zeros(shape, np.int32)
    tokens_BT[:, :length] = ids
    segments_BT = np.zeros(shape, np.int32)
    segments_BT[:, :length] = 1
    positions_BT = np.broadcast_to(np.arange(padded, dtype=np.int32), shape)
    return tokens_BT, positions_BT, segments_BT
