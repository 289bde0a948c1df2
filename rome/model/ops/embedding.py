"""The embedding of tokens on a mesh, without moving the table.

B rows, T time, V vocabulary, D model; v and d are one device's part of V and D; n tokens of one
device, f devices of a group, along the mesh axes that split D.

The table lies split over V and D. Gathering it would move gigabytes for the few rows that are read;
here the devices of a group tell each other their tokens, each looks up its columns for all of them,
and the columns return to the device that asked. On an engine's mesh all devices have the same
tokens, and the table is split over V alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.ops.gathered import WIDE
from rome.model.ops.rounding import round_straight_through
from rome.model.sharding import ENGINE_RULES, RULES, is_on_engine_mesh, is_split


def embed(table_VD: Array, tokens_BT: Array, dtype: str) -> Array:
    """Return table[tokens] in `dtype`, [B, T, D]."""
    if is_on_engine_mesh():
        return _embed_for_engine(table_VD, tokens_BT, dtype)
    if not is_split():
        return _as_published(jnp.take(table_VD, tokens_BT, axis=0), dtype)

    def on_each_device(table_vd: Array, tokens_BT: Array) -> Array:
        f = jax.lax.axis_size(WIDE)
        all_tokens_fn = jax.lax.all_gather(tokens_BT.reshape(-1), WIDE)
        x_fnd = _own_rows(table_vd, all_tokens_fn, ("tensor",), dtype)
        x_nD = jax.lax.all_to_all(x_fnd, WIDE, split_axis=0, concat_axis=2, tiled=True)
        x_nD = x_nD.reshape(-1, table_vd.shape[1] * f)
        return jax.lax.psum(x_nD, "tensor").reshape(*tokens_BT.shape, -1)

    by_token = PartitionSpec(RULES["batch"], RULES["time"])
    return jax.shard_map(
        on_each_device,
        in_specs=(PartitionSpec("tensor", WIDE), by_token),
        out_specs=PartitionSpec(RULES["batch"], RULES["time"], None),
        check_vma=False,
    )(table_VD, tokens_BT)


def _embed_for_engine(table_VD: Array, tokens_BT: Array, dtype: str) -> Array:
    over = ENGINE_RULES["vocab"]

    def on_each_device(table_vD: Array, tokens_BT: Array) -> Array:
        return jax.lax.psum(_own_rows(table_vD, tokens_BT, over, dtype), over)

    return jax.shard_map(
        on_each_device,
        in_specs=(PartitionSpec(over, None), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(table_VD, tokens_BT)


def _own_rows(table_vd: Array, tokens: Array, over: tuple[str, ...], dtype: str) -> Array:
    """Return the rows of tokens in this device's part of a table that is split over mesh axes.

    Zeros for tokens of another device's part.
    """
    v = table_vd.shape[0]
    local = tokens - jax.lax.axis_index(over) * v
    local = jnp.where((local >= 0) & (local < v), local, v)  # v is past the end
    return _as_published(jnp.take(table_vd, local, axis=0, mode="fill", fill_value=0), dtype)


def _as_published(x: Array, dtype: str) -> Array:
    """Return rows of the table in `dtype`, rounded also where XLA would keep them in float32."""
    return round_straight_through(x, dtype).astype(dtype)
