"""Products with matrices that lie split over several mesh axes: gathered before, scattered after.

B rows, T time, D model, N heads, H head dim; d and n are one device's part of D and N.

Gradients are summed and split on the way back. Only an explicit gather has an explicit scatter as
its gradient: left to the partitioner, each layer's gradients are summed whole on every device
before all but one part of them is thrown away. Gathers of one mesh axis each are rings of the
interconnect; one over all of them is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.sharding import RULES, is_split

WIDE = RULES["embed_wide"]
BY_TOKEN = PartitionSpec(RULES["batch"], RULES["time"], None)
_BY_HEAD = PartitionSpec(RULES["batch"], RULES["time"], "tensor", None)


def gather(w: Array, axis: int, over: tuple[str, ...] = WIDE) -> Array:
    """Return the whole of an array whose `axis` is split over these mesh axes.

    On one device of a shard_map. Its gradient is a sum that is split again.
    """
    for name in reversed(over):
        w = jax.lax.all_gather(w, name, axis=axis, tiled=True)
    return w


def scatter_sum(w: Array, axis: int) -> Array:
    """Sum arrays over devices and split the sum: the transpose of `gather`."""
    for name in WIDE:
        w = jax.lax.psum_scatter(w, name, scatter_dimension=axis, tiled=True)
    return w


def to_heads(x_BTD: Array, w_DNH: Array) -> Array:
    """Project hidden states to heads, [B, T, N, H]."""
    if not is_split():
        return _project_to_heads(x_BTD, w_DNH)

    def on_each_device(x_BTD: Array, w_dnH: Array) -> Array:
        return _project_to_heads(x_BTD, gather(w_dnH, axis=0))

    return jax.shard_map(
        on_each_device,
        in_specs=(BY_TOKEN, PartitionSpec(WIDE, "tensor", None)),
        out_specs=_BY_HEAD,
        check_vma=False,
    )(x_BTD, w_DNH)


def from_heads(x_BTNH: Array, w_NHD: Array) -> Array:
    """Project heads to hidden states and sum over all heads, [B, T, D]."""
    if not is_split():
        return _project_from_heads(x_BTNH, w_NHD)

    def on_each_device(x_BTnH: Array, w_nHd: Array) -> Array:
        own_BTD = _project_from_heads(x_BTnH, gather(w_nHd, axis=2))
        return jax.lax.psum(own_BTD, "tensor")

    return jax.shard_map(
        on_each_device,
        in_specs=(_BY_HEAD, PartitionSpec("tensor", None, WIDE)),
        out_specs=BY_TOKEN,
        check_vma=False,
    )(x_BTNH, w_NHD)


def _project_to_heads(x_BTD: Array, w_DNH: Array) -> Array:
    return jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)


def _project_from_heads(x_BTNH: Array, w_NHD: Array) -> Array:
    return jnp.einsum("BTNH,NHD->BTD", x_BTNH, w_NHD)
