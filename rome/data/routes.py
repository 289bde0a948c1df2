"""Routes: the experts that each token went through, from the engine that sampled to the trainer.

Rollout routing replay (R3, arXiv 2510.11370): near a tie two programs, or two precisions, send a
token to different experts, and its logprob jumps. The trainer therefore takes the experts that the
engine took, and weighs them with its own router.

P tokens of one sequence, R tokens with routes, S layers with experts, B rows, T tokens a row, L
layers, k experts a token.

Wherever routes are kept (chunk, file, batch) an expert is its id + 1, in the smallest unsigned type
that the model's experts fit, and 0 says that there is none: the token chooses for itself. So
padding is 0 as in all other arrays. Layers without experts have 0 throughout.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rome.model.config import ModelConfig


def route_dtype(config: ModelConfig) -> np.dtype:
    """Return the smallest unsigned type that holds this model's expert ids + 1."""
    return np.dtype(np.uint8 if config.num_experts < 2**8 else np.uint16)


def encode_routes(ids_PLk: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Return the routes for an engine's expert ids.

    Args:
      ids_PLk: integers; all layers of the model. Those without experts may hold anything: SGLang
        leaves zeros there, the embedded engine -1.
      config: the model.

    Raises:
      ValueError: this model cannot have used these ids.
    """
    expected = (len(ids_PLk), config.num_layers, config.experts_per_token)
    if ids_PLk.shape != expected:
        raise ValueError(
            f"expert ids have shape {ids_PLk.shape}; this model's have [tokens, layers, k] ="
            f" {expected}"
        )
    sparse = list(config.sparse_layers)
    ids_PSk = ids_PLk[:, sparse] if config.mlp_layers else ids_PLk
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
    # ids may be bytes, in which 255 + 1 is 0: add in a wider type
    routes_PLk[:, sparse] = np.add(ids_PSk, 1, dtype=np.int32)
    return routes_PLk


def check_routes(routes_PLk: np.ndarray, config: ModelConfig) -> None:
    """Check that each token has a whole route of this model, or none.

    A whole route has k different experts in every layer with experts. An id out of range would be a
    NaN in the forward pass, and a partial route would be read as an expert.

    Raises:
      ValueError: the routes break a rule; the message says which.
    """
    shape = (len(routes_PLk), config.num_layers, config.experts_per_token)
    dtype = route_dtype(config)
    if routes_PLk.shape != shape or routes_PLk.dtype != dtype:
        raise ValueError(
            f"routes are {routes_PLk.dtype} {routes_PLk.shape}; this model's are {dtype} [tokens,"
            f" layers, k] = {shape}"
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
    """Return the routes of a chunk from those that its turn brought.

    A turn brings one row more than the chunk has tokens before its last one. The first row is that
    of the last token before the chunk, which was sampled without being run, so the turn that
    sampled it could not know its route. The chunk's own last token waits for the next turn in the
    same way.

    So each token keeps the route of the first turn that ran it. For the tokens that the turn
    sampled these are the passes that its logprobs came from; for those that it read, they made the
    keys and values that later turns found in the engine's prefix cache. Only where the engine had
    to compute a prefix again (evicted, or other weights) did later tokens see another route there;
    one pass over a trajectory can replay only one.

    Args:
      earlier: routes of the chunk that it goes on from, whose last row is filled in here where it
        is empty; None where there is no such chunk.
      routes_PLk: what the engine returned for the turn.
      tokens: number of tokens of the chunk, prompt and actions.

    Raises:
      ValueError: the number of routes does not fit the number of tokens.
    """
    if earlier is not None:
        if not earlier[-1].any():  # else another turn that goes on from there was first
            earlier[-1] = routes_PLk[0]
        routes_PLk = routes_PLk[1:]
    if len(routes_PLk) != tokens - 1:
        raise ValueError(
            f"{len(routes_PLk)} routes came for a chunk of {tokens} tokens, the last of which has"
            " none yet"
        )
    unknown_1Lk = np.zeros_like(routes_PLk, shape=(1, *routes_PLk.shape[1:]))
    return np.concatenate([routes_PLk, unknown_1Lk])


def join_routes(pieces: Sequence[tuple[np.ndarray | None, int]], config: ModelConfig) -> np.ndarray:
    """Join the routes of consecutive chunks to [P, L, k] and check them.

    Args:
      pieces: (routes, tokens) of each chunk; None for a chunk without routes.
      config: the model.

    Raises:
      ValueError: as `check_routes`.
    """
    dtype = route_dtype(config)
    joined = []
    for routes, tokens in pieces:
        if routes is None:
            routes = np.zeros((tokens, config.num_layers, config.experts_per_token), dtype)
        joined.append(routes)
    routes_PLk = np.concatenate(joined)
    check_routes(routes_PLk, config)
    return routes_PLk


def routes_to_npz(routes: Mapping[int, np.ndarray]) -> bytes:
    """Return the routes of some chunks as the content of a NumPy .npz file.

    They are stored, not deflated: expert ids are nearly random, and deflating them would cost more
    processor time than playing the episode.

    Args:
      routes: [tokens, L, k] by the number of the chunk.
    """
    file = io.BytesIO()
    arrays: dict[str, Any] = {str(number): array for number, array in routes.items()}
    np.savez(file, **arrays)
    return file.getvalue()


def routes_from_npz(content: bytes) -> dict[int, np.ndarray]:
    """Return the routes of chunks, by their numbers, that `routes_to_npz` wrote.

    Raises:
      ValueError: the content is damaged, or it holds something else than routes.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            routes = {int(name): arrays[name] for name in arrays.files}
    except (ValueError, KeyError, EOFError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"routes cannot be read ({error})") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"routes cannot be unpacked ({error})") from error
    for array in routes.values():
        if array.dtype not in (np.uint8, np.uint16) or array.ndim != 3:
            raise ValueError(
                f"routes are {array.dtype} {array.shape}; they are uint8 or uint16 [tokens, layers,"
                " k]"
            )
    return routes


def _repeats(ids_PSk: np.ndarray) -> bool:
    """Return whether any token has the same expert twice in a layer.

    Compared shift by shift: sorting the short last axis is many times slower.
    """
    for shift in range(1, ids_PSk.shape[-1]):
        if (ids_PSk[..., shift:] == ids_PSk[..., :-shift]).any():
            return True
    return False
