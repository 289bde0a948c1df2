"""Routing replay: experts that were chosen earlier, and how a router would choose now.

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
    """Return expert ids [L, B, T, k] int32 for the model; -1: the token chooses for itself."""
    return routes_BTLk.astype(jnp.int32).transpose(2, 0, 1, 3) - 1


def recorded_routes(own_LBTk: Array, real_BT: Array, dtype: np.dtype) -> Array:
    """Return the choices of a forward pass as they are stored: the inverse of `replayed_ids`.

    Args:
      own_LBTk: expert ids of the pass; -1 in layers without experts.
      real_BT: False on padding.
      dtype: of the stored routes.

    Returns:
      [B, T, L, k]: expert id + 1; 0 on padding and in layers without experts.
    """
    routes_BTLk = own_LBTk.transpose(1, 2, 0, 3) + 1
    return jnp.where(real_BT[:, :, None, None], routes_BTLk, 0).astype(dtype)


def count_replayed(batch: Batch, config: ModelConfig) -> int:
    """Count the pairs of a token and a layer whose experts are replayed, in a NumPy batch.

    A token has replayed routes in all layers with experts, or in none.
    """
    if batch.routes_BTLk is None:
        return 0
    sparse = config.sparse_layers
    tokens = int(np.count_nonzero(batch.routes_BTLk[:, :, sparse[0], 0]))
    return len(sparse) * tokens


def route_agreement(routes_BTLk: Array, own_LBTk: Array, replayed: Array) -> Metrics:
    """Compare what the routers would choose now with the routes that are replayed.

    Every pair of a token (prompts included) and a layer with a replayed route counts.

    Args:
      routes_BTLk: the replayed routes, as stored in a batch.
      own_LBTk: expert ids that the routers choose now.
      replayed: pairs in the whole step (`count_replayed`); the metrics of its micro-batches add up.

    Returns:
      route_agreement: share of pairs whose k experts are the same, in any order.
      route_overlap: share of single experts that are the same.
    """
    replayed_LBTk = replayed_ids(routes_BTLk)
    is_same_LBTkk = replayed_LBTk[..., :, None] == own_LBTk[..., None, :]
    kept_LBTk = is_same_LBTkk.any(axis=-1) & (replayed_LBTk >= 0)
    pairs = jnp.maximum(replayed, 1.0)
    return {
        "route_agreement": jnp.sum(kept_LBTk.all(axis=-1)) / pairs,
        "route_overlap": jnp.sum(kept_LBTk) / (pairs * routes_BTLk.shape[-1]),
    }
