"""Routes: the experts that each token went through, compact, from the engine that sampled to the
trainer that replays them.

Rollout routing replay (R3, arXiv 2510.11370): near a tie two programs, or two precisions, send a
token to different experts, and its logprob jumps. The trainer therefore takes the experts that the
engine took, and weighs them with its own router.

P tokens of one sequence, B rows, T tokens a row, L layers, k experts a token.

Wherever routes are kept (chunk, file, batch) an expert is its id + 1, in the smallest unsigned type
that the model's experts fit, and 0 says that there is none: the token chooses for itself. So
padding is 0 as in all other arrays. Layers without experts have 0 throughout.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rome.model.config import ModelConfig


def route_dtype(config: ModelConfig) -> np.dtype:
    return np.dtype(np.uint8 if config.num_experts < 2**8 else np.uint16)


def encode_routes(ids_PLk: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Routes from an engine's expert ids.

    Raises ValueError for ids that this model cannot have used.

    Args:
      ids_PLk: integers; all layers of the model. Those without experts may hold anything: SGLang
        leaves zeros there, the embedded engine -1.
    """
    expected = (len(ids_PLk), config.num_layers, config.experts_per_token)
    if ids_PLk.shape != expected:
        raise ValueError(
            f"expert ids have shape {ids_PLk.shape}; this model's have [tokens, layers, k] ="
            f" {expected}"
        )
    sparse = list(config.sparse_layers)
    ids_PSk = ids_PLk[:, sparse] if config.dense_layers else ids_PLk
    if ids_PSk.size and not 0 <= ids_PSk.min() <= ids_PSk.max() < config.num_experts:
        raise ValueError(
            f"expert ids go from {ids_PSk.min()} to {ids_PSk.max()}; this model has experts 0 to"
            f" {config.num_experts - 1}"
        )
    # An engine that does not record some layer, or some kernel's choices, leaves one id in all
    # places.
    if _repeats(ids_PSk):
        raise ValueError(
            "a token has one expert twice in a layer: the engine did not record its routes there"
        )
    routes_PLk = np.zeros(expected, route_dtype(config))
    routes_PLk[:, sparse] = np.add(
        ids_PSk, 1, dtype=np.int32
    )  # on the wire they may be bytes, and 255 + 1 is 0
    return routes_PLk


def check_routes(routes_PLk: np.ndarray, config: ModelConfig) -> None:
    """Raises ValueError unless each token has k different experts of this model in every layer that
    has experts, or none in any.

    An id out of range would be a NaN in the forward pass, and a route that is there only in part
    would be read as an expert.
    """
    expected, dtype = (
        (len(routes_PLk), config.num_layers, config.experts_per_token),
        route_dtype(config),
    )
    if routes_PLk.shape != expected or routes_PLk.dtype != dtype:
        raise ValueError(
            f"routes are {routes_PLk.dtype} {routes_PLk.shape}; this model's are {dtype} [tokens,"
            f" layers, k] = {expected}"
        )
    if routes_PLk.max(initial=0) > config.num_experts:
        raise ValueError(
            f"routes name expert {routes_PLk.max() - 1}; this model has experts 0 to"
            f" {config.num_experts - 1}"
        )
    recorded_P = routes_PLk[:, config.sparse_layers[0], 0] > 0
    routes_RSk = routes_PLk[recorded_P][:, list(config.sparse_layers)]
    if not routes_RSk.all() or np.count_nonzero(routes_PLk) != routes_RSk.size:
        raise ValueError(
            "some token has a route in a part of its layers only, or in a layer without experts;"
            " routes are recorded whole or not at all"
        )
    if _repeats(routes_RSk):
        raise ValueError(
            "a token has one expert twice in a layer; its routes were not recorded there"
        )


def extend_routes(earlier: np.ndarray | None, routes_PLk: np.ndarray, tokens: int) -> np.ndarray:
    """The routes of a chunk of `tokens` tokens, out of those that its turn brought; fills in the
    last row of the chunk before it.

    A turn brings one row more than it has tokens before its last one: its first row is that of the
    last token before it, which was sampled without being run, so that the turn that sampled it
    could not know. Its own last token waits for the next turn in the same way.

    So each token keeps the route of the first turn that ran it. For whatever the turn sampled these
    are the passes that its logprobs came from, and for what it read they made the keys and values
    that later turns found in the engine's prefix cache. Only where the engine had to compute a
    prefix again (evicted, or other weights) did later tokens see another route there; one pass over
    a trajectory can replay one.
    """
    if earlier is not None:
        earlier[-1], routes_PLk = routes_PLk[0], routes_PLk[1:]
    if len(routes_PLk) != tokens - 1:
        raise ValueError(
            f"{len(routes_PLk)} routes came for a chunk of {tokens} tokens, the last of which has"
            " none yet"
        )
    return np.concatenate([routes_PLk, np.zeros_like(routes_PLk, shape=(1, *routes_PLk.shape[1:]))])


def join_routes(pieces: Sequence[tuple[np.ndarray | None, int]], config: ModelConfig) -> np.ndarray:
    """[P, L, k] of consecutive pieces (routes or None, tokens); checked."""
    shape, dtype = (config.num_layers, config.experts_per_token), route_dtype(config)
    routes_PLk = np.concatenate(
        [
            np.zeros((tokens, *shape), dtype) if routes is None else routes
            for routes, tokens in pieces
        ]
    )
    check_routes(routes_PLk, config)
    return routes_PLk


def routes_to_json(routes_PLk: np.ndarray) -> dict[str, Any]:
    """For an ATIF file: the bytes, deflated, as base64. Little-endian, rows first."""
    little = np.ascontiguousarray(routes_PLk, routes_PLk.dtype.newbyteorder("<"))
    return {
        "dtype": routes_PLk.dtype.name,
        "shape": list(routes_PLk.shape),
        "encoding": "zlib+base64",
        "data": base64.b64encode(zlib.compress(little.tobytes(), 1)).decode(),
    }


def routes_from_json(document: dict[str, Any]) -> np.ndarray:
    """The inverse of `routes_to_json`; a ValueError says what of it does not fit."""
    dtype, shape = document["dtype"], tuple(document["shape"])
    if document["encoding"] != "zlib+base64" or dtype not in ("uint8", "uint16") or len(shape) != 3:
        raise ValueError(
            f"routes are {document['encoding']} {dtype} {shape}; expected zlib+base64, uint8 or"
            " uint16, and [tokens, layers, k]"
        )
    try:
        data = zlib.decompress(base64.b64decode(document["data"], validate=True))
    except (ValueError, zlib.error) as error:
        raise ValueError(f"routes cannot be unpacked ({error}); the file is damaged") from None
    if len(data) != np.dtype(dtype).itemsize * int(np.prod(shape)):
        raise ValueError(
            f"routes unpack to {len(data)} bytes, and {dtype} {shape} needs"
            f" {np.dtype(dtype).itemsize * int(np.prod(shape))}; the file is damaged"
        )
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)


def _repeats(ids_PSk: np.ndarray) -> bool:
    """Whether two of the k are equal anywhere.

    Compared shift by shift: sorting the short last axis is many times slower.
    """
    return any(
        (ids_PSk[..., shift:] == ids_PSk[..., :-shift]).any()
        for shift in range(1, ids_PSk.shape[-1])
    )
