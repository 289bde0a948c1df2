"""Routes of packed rows, read for the rows of one process only.

Packing needs no routes. It keeps for each token where its route is: the number of its trajectory
from 1 (0 is padding), the number of its chunk, and its place in the chunk. The routes themselves,
many times the other bytes of a trajectory, are fetched for the rows that are fed here.

B rows, T tokens a row, P tokens of some chunks, L layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rome.data.lines import name_of
from rome.data.routes import join_routes, route_dtype
from rome.data.trajectory import Trajectory
from rome.model.config import ModelConfig


def fetch_routes(
    places_BT3: np.ndarray,
    trajectories: Sequence[Trajectory],
    config: ModelConfig,
    *,
    own_rows: Sequence[int],
    load: Callable[[Trajectory], Trajectory],
) -> np.ndarray:
    """Return the routes of rows, [B, T, L, k]; those of rows that are not own are zeros.

    Args:
      places_BT3: (trajectory, chunk, token of the chunk) of each token.
      trajectories: that the rows were packed from.
      config: of the model that is to replay the routes; they are checked against it.
      own_rows: numbers of the rows that are needed here.
      load: returns a trajectory with its routes.

    Raises:
      ValueError: a trajectory has no routes, or those of another model.
    """
    rows, length, _ = places_BT3.shape
    shape = (rows, length, config.num_layers, config.experts_per_token)
    routes_BTLk = np.zeros(shape, route_dtype(config))
    own = np.asarray(own_rows, np.int64)
    numbers_OT = places_BT3[own, :, 0]
    for number in np.unique(numbers_OT[numbers_OT > 0]).tolist():
        row_P, token_P = np.nonzero(numbers_OT == number)
        places_P3 = places_BT3[own[row_P], token_P]
        routes_PLk = _routes_at(load(trajectories[number - 1]), places_P3[:, 1:], config)
        routes_BTLk[own[row_P], token_P] = routes_PLk
    return routes_BTLk


def hash_routes(trajectory: Trajectory, places_P2: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return a number of at least 0 for the routes of each token: different routes, other numbers.

    Args:
      trajectory: with its routes.
      places_P2: (chunk, token of the chunk) of each token.
      config: of the model that is to replay the routes.

    Raises:
      ValueError: as `fetch_routes`.
    """
    routes_PLk = _routes_at(trajectory, places_P2, config)
    flat_PR = routes_PLk.reshape(len(routes_PLk), -1).astype(np.uint64)
    # Sums with random 64-bit weights: two given rows meet in the upper bits once in 2**62 or less.
    weights_R = np.random.default_rng(0).integers(2**64, size=flat_PR.shape[1], dtype=np.uint64)
    hashed_P = (flat_PR * (weights_R | np.uint64(1))).sum(axis=1, dtype=np.uint64)
    return (hashed_P >> np.uint64(2)).astype(np.int64)


def _routes_at(trajectory: Trajectory, places_P2: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return the routes at (chunk, token of the chunk); 0 where no engine sampled."""
    if any(chunk.versions and chunk.routes is None for chunk in trajectory.chunks):
        raise ValueError(
            f"{name_of(trajectory)} was sampled without routes, so there is nothing to replay; play"
            " it again with an engine that returns them (SGLang: --enable-return-routed-experts),"
            " or set routing_replay to off or recompute"
        )
    pieces = []
    for chunk in trajectory.chunks:
        pieces.append((chunk.routes, len(chunk.prompt_ids) + len(chunk.action_ids)))
    starts = np.cumsum([0, *(tokens for _, tokens in pieces)])
    try:
        routes_QLk = join_routes(pieces, config)  # of all its tokens
    except ValueError as error:
        raise ValueError(
            f"{name_of(trajectory)}: {error}; it was sampled by another model, or its file is"
            " damaged"
        ) from error
    return routes_QLk[starts[places_P2[:, 0]] + places_P2[:, 1]]
