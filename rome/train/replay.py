"""How far a router is from the routes that are replayed in its place.

L layers, B rows, T tokens, k experts a token.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from rome.data.batch import Batch
from rome.losses.types import Metrics
from rome.model.config import ModelConfig


def replayed_ids(routes_BTLk: Array) -> Array:
    """[L, B, T, k] int32 expert ids as the model takes them; -1 where a token chooses for itself."""
    return routes_BTLk.astype(jnp.int32).transpose(2, 0, 1, 3) - 1


def recorded_routes(own_LBTk: Array, real_BT: Array, dtype: np.dtype) -> Array:
    """The inverse of `replayed_ids`: a forward pass' own choices, 0 on padding and in layers
    without experts.
    """
    return jnp.where(real_BT[:, :, None, None], own_LBTk.transpose(1, 2, 0, 3) + 1, 0).astype(dtype)


def count_replayed(batch: Batch, config: ModelConfig) -> int:
    """Pairs of a token and a layer whose experts are replayed, in a NumPy batch.

    A token has them in all layers with experts or in none.
    """
    sparse = config.sparse_layers
    return (
        0
        if batch.routes_BTLk is None
        else len(sparse) * np.count_nonzero(batch.routes_BTLk[:, :, sparse[0], 0])
    )


def route_agreement(routes_BTLk: Array, own_LBTk: Array, replayed: Array) -> Metrics:
    """What the routers would choose now against what is replayed, over every token, prompts
    included, and layer that have a replayed route.

    `route_agreement`: share of pairs (token, layer) whose k experts are the same, in any order.
    `route_overlap`: share of single experts.

    Args:
      replayed: pairs in the whole step (`count_replayed`); the metrics of its micro-batches add up.
    """
    replayed_LBTk = replayed_ids(routes_BTLk)
    kept_LBTk = (replayed_LBTk[..., :, None] == own_LBTk[..., None, :]).any(axis=-1) & (
        replayed_LBTk >= 0
    )
    pairs = jnp.maximum(replayed, 1.0)
    return {
        "route_agreement": jnp.sum(kept_LBTk.all(axis=-1)) / pairs,
        "route_overlap": jnp.sum(kept_LBTk) / (pairs * routes_BTLk.shape[-1]),
    }
