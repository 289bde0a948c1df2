"""The arrays of the engine (weights and cache) and the calls that run on them.

Only the scheduler's thread uses a `Device`; other threads may read its public attributes.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rome.model.config import ModelConfig
from rome.model.qwen3 import Params
from rome.serve.forward import Cache, make_cache
from rome.serve.programs import Chunks, Decoded, Next, Prefilled, Shapes, make_programs
from rome.serve.request import Request
from rome.serve.sampling import RowSampling

MEMORY_TAGS = ("weights", "kv_cache")


class Device:
    """Weights, cache and compiled programs.

    Args:
      load: returns the parameters (layers unstacked) and their config; called once, by `prepare`.
      shapes: of the programs.

    Attributes:
      params: None before `prepare`, and while the weights are released.
      config: of the model; set by `prepare`.
      missing: memory tag -> what must happen before anything can run again.
      stats: calls, tokens and milliseconds so far.
    """

    def __init__(self, load: Callable[[], tuple[Params, ModelConfig]], shapes: Shapes):
        self.shapes = shapes
        self.params: Params | None = None
        self.config: ModelConfig
        self.missing: dict[str, str] = {}
        self.stats: collections.defaultdict[str, float] = collections.defaultdict(int)
        self._load = load
        self._cache: Cache | None = None

    def prepare(self) -> None:
        """Load the weights, and compile both programs by running them on no request."""
        self.params, self.config = self._load()
        self._cache = self._make_cache()
        self._prefill, self._decode = make_programs(self.config, self.shapes)
        started = time.monotonic()
        self.prefill([], [])
        self.decode([])
        logging.info("compiled in %.1f s", time.monotonic() - started)

    def swap(self, params: Params) -> None:
        """Replace the weights."""
        self.missing.pop("weights", None)
        self.params = params

    # -- calls
    # ---------------------------------------------------------------------------------------------

    def prefill(self, batch: Sequence[Request], sources: Sequence[int]) -> Prefilled:
        """Compute the next chunk of each request.

        Args:
          batch: at most `prefill_rows` requests, each with a slot.
          sources: for each, the slot whose cache its row starts from.
        """
        chunks = _prefill_inputs(batch, sources, self.shapes)
        scores = np.asarray(any(request.score_from is not None for request in batch))
        sampling = _row_sampling(batch, self.shapes.prefill_rows)
        started = time.monotonic()
        assert self.params is not None and self._cache is not None
        self._cache, result = self._prefill(self.params, self._cache, chunks, sampling, scores)
        if not _want_routes(batch):
            result = result._replace(routes_LRPk=None)  # stays on the device
        result = jax.tree.map(np.asarray, result)
        self._count(
            prefill_calls=1,
            prefill_tokens=int(chunks.length_R.sum()),
            prefill_ms=1000 * (time.monotonic() - started),
        )
        return result

    def decode(self, batch: Sequence[Request]) -> Decoded:
        """Draw `decode_steps` tokens for each of at most `decode_rows` requests."""
        inputs = _decode_inputs(batch, self.shapes)
        sampling = _row_sampling(batch, self.shapes.decode_rows)
        started = time.monotonic()
        assert self.params is not None and self._cache is not None
        self._cache, result = self._decode(self.params, self._cache, inputs, sampling)
        if not _want_routes(batch):
            result = result._replace(routes_QLRk=None)  # stays on the device
        result = jax.tree.map(np.asarray, result)
        self._count(
            decode_calls=1,
            decode_rows=len(batch),
            decode_ms=1000 * (time.monotonic() - started),
        )
        return result

    def _count(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.stats[name] += amount

    # -- memory
    # ---------------------------------------------------------------------------------------------

    def release(self, tags: Sequence[str]) -> None:
        """Delete the arrays behind these tags at once, even if something still refers to them."""
        for tag in tags:
            if tag in self.missing:
                continue
            self.missing[tag] = (
                f"the memory of {tag} is released; call /resume_memory_occupation first"
            )
            arrays = self.params if tag == "weights" else self._cache
            for array in jax.tree.leaves(arrays):
                array.delete()
        if "weights" in tags:
            self.params = None
        if "kv_cache" in tags:
            self._cache = None

    def take_back(self, tags: Sequence[str]) -> None:
        """Allocate an empty cache again; weights must be loaded anew, by `swap`."""
        if "kv_cache" in tags and self._cache is None:
            self._cache = jax.block_until_ready(self._make_cache())
            del self.missing["kv_cache"]
        if "weights" in tags and self.params is None:
            self.missing["weights"] = (
                "the weights were released; load them by /update_weights_from_disk first"
            )

    def allocated_bytes(self) -> int:
        """Return the size of weights and cache."""
        arrays = jax.tree.leaves((self.params, self._cache))
        return sum(array.nbytes for array in arrays if not array.is_deleted())

    def _make_cache(self) -> Cache:
        return make_cache(self.config, self.shapes.slots, self.shapes.max_context)


def _want_routes(batch: Sequence[Request]) -> bool:
    return any(request.return_routes for request in batch)


# -- inputs of calls
# -------------------------------------------------------------------------------------------------


def _prefill_inputs(batch: Sequence[Request], sources: Sequence[int], shapes: Shapes) -> Chunks:
    """Return the next chunk of each request; rows without a request have length 0."""
    R, P = shapes.prefill_rows, shapes.prefill_chunk
    inputs = Chunks(
        token_RP=np.zeros((R, P), np.int32),
        target_RP=np.zeros((R, P), np.int32),
        start_R=np.zeros(R, np.int32),
        length_R=np.zeros(R, np.int32),
        source_R=np.zeros(R, np.int32),
        slot_R=np.full(R, shapes.slots, np.int32),
    )
    for row, (request, source) in enumerate(zip(batch, sources, strict=True)):
        start = request.prefilled
        chunk = request.ids[start : start + P]
        targets = request.ids[start + 1 : start + P + 1]
        inputs.token_RP[row, : len(chunk)] = chunk
        inputs.target_RP[row, : len(targets)] = targets
        inputs.start_R[row] = start
        inputs.length_R[row] = len(chunk)
        inputs.source_R[row] = source
        inputs.slot_R[row] = request.slot
    return inputs


def _decode_inputs(batch: Sequence[Request], shapes: Shapes) -> Next:
    """Return the last token of each request; rows without a request have no slot."""
    R = shapes.decode_rows
    inputs = Next(
        token_R=np.zeros(R, np.int32),
        position_R=np.zeros(R, np.int32),
        slot_R=np.full(R, shapes.slots, np.int32),
    )
    for row, request in enumerate(batch):
        inputs.token_R[row] = request.output_ids[-1]
        inputs.position_R[row] = len(request.prompt_ids) + len(request.output_ids) - 1
        inputs.slot_R[row] = request.slot
    return inputs


def _row_sampling(batch: Sequence[Request], rows: int) -> RowSampling:
    """Return how each row of a call is sampled.

    Rows without a request ask for no filter, since one filter costs all rows a sort.
    """
    sampling = RowSampling(
        seed_B2=np.zeros((rows, 2), np.uint32),
        temperature_B=np.ones(rows, np.float32),
        top_p_B=np.ones(rows, np.float32),
        top_k_B=np.zeros(rows, np.int32),
        min_p_B=np.zeros(rows, np.float32),
    )
    for row, request in enumerate(batch):
        params = request.sampling
        sampling.seed_B2[row] = (params.seed >> 32, params.seed & 0xFFFFFFFF)
        sampling.temperature_B[row] = params.temperature
        sampling.top_p_B[row] = params.top_p
        sampling.top_k_B[row] = max(params.top_k, 0)
        sampling.min_p_B[row] = params.min_p
    return sampling
