"""The arrays of the engine (weights and cache) and the calls that run on them.

Only the scheduler's thread uses a `Device`; other threads may read its public attributes.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rome.model.config import ModelConfig
from rome.model.ops.kernels import choose_serving_kernels
from rome.model.ops.paged import make_pages, page_sharding
from rome.model.params import engine_mesh_of
from rome.model.qwen3 import Params
from rome.serve.adapters import AdapterRoom, AdapterTable
from rome.serve.decoding import (
    Front,
    Rows,
    Steps,
    empty_rows,
    make_decoder,
    make_rows,
    set_limits,
)
from rome.serve.programs import (
    Call,
    PageArrays,
    Result,
    Shapes,
    empty_call,
    make_program,
    set_sampling,
)
from rome.serve.request import Request

MEMORY_TAGS = ("weights", "kv_cache")
NO_ROOM = AdapterRoom()


class Piece(NamedTuple):
    """Tokens of one request for a call: ids[computed : computed + length]."""

    request: Request
    length: int

    @property
    def draws(self) -> bool:
        """Whether a token follows these."""
        return self.request.computed + self.length == len(self.request.ids)


class Dispatch(NamedTuple):
    """Decode steps that the device takes, or has taken.

    Attributes:
      requests: one for each row.
      size: of the program.
      rows: its inputs.
      front: where the rows stand after it, on the device.
      steps: what it draws, on the device.
      started: time.monotonic() of the dispatch.
    """

    requests: list[Request]
    size: int
    rows: Rows
    front: Front
    steps: Steps
    started: float


class Device:
    """Weights, cache and compiled programs, on one device or on the mesh that the weights lie on.

    Args:
      load: returns the parameters (layers unstacked) and their config; called once, by `prepare`.
      shapes: of the calls.
      room: for adapters.

    Attributes:
      params: None before `prepare`, and while the weights are released.
      config: of the model; set by `prepare`.
      mesh: of the weights; None: one device. Set by `prepare`.
      adapters: that requests may name.
      missing: memory tag -> what must happen before anything can run again.
      stats: calls, tokens and milliseconds so far.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Params, ModelConfig]],
        shapes: Shapes,
        room: AdapterRoom = NO_ROOM,
    ):
        self.shapes = shapes
        self.adapters = AdapterTable(room)
        self.params: Params | None = None
        self.config: ModelConfig
        self.mesh: Mesh | None = None
        self.missing: dict[str, str] = {}
        self.stats: collections.defaultdict[str, float] = collections.defaultdict(int)
        self._load = load
        self._pages: PageArrays | None = None
        self._idle_since = 0.0  # end of the last call or dispatch

    @property
    def place(self) -> Mesh | jax.Device:
        """The mesh, or the one device."""
        return self.mesh or jax.local_devices()[0]

    def prepare(self) -> None:
        """Load the weights, and compile the program for each size of a call by running it."""
        self.params, self.config = self._load()
        self.mesh = engine_mesh_of(self.params)
        self.adapters.prepare(self.config, self.mesh)
        self._pages = self._make_pages()
        tensor = 1 if self.mesh is None else self.mesh.shape["tensor"]
        kernels = choose_serving_kernels(jax.default_backend(), self.config, tensor)
        self._program = make_program(self.config, kernels, page_sharding(self.place))
        steps = self.shapes.decode_steps
        sharding = page_sharding(self.place)
        self._decoder = make_decoder(self._program, self.config, steps, sharding)
        started = time.monotonic()
        for size in self.shapes.call_sizes:
            self._run_program(empty_call(self.shapes, size), wants_routes=False)
            if steps > 1:
                rows, front = empty_rows(self.shapes, size)
                for _ in range(2):  # from the host's numbers, then from where the last one stood
                    front, taken = self._run_decoder(rows, front)
                jax.block_until_ready(taken)
        logging.info("compiled in %.1f s", time.monotonic() - started)

    def take_weights(self, why: str) -> Params | None:
        """Return the weights, for others to take their place one by one; None if there are none.

        Args:
          why: nothing can run until `swap`.
        """
        params = self.params
        self.params = None
        self.missing["weights"] = why
        return params

    def swap(self, params: Params) -> None:
        """Replace the weights."""
        self.missing.pop("weights", None)
        self.params = params

    def run(self, batch: Sequence[Piece], size: int) -> Result:
        """Compute pieces of at most `size` tokens together, at most `shapes.rows(size)` of them.

        The tokens that are drawn are in the order of the pieces that draw.
        """
        call = make_call(batch, self.shapes, size)
        started = time.monotonic()
        wants_routes = any(piece.request.return_routes for piece in batch)
        result = self._run_program(call, wants_routes)
        tokens = int(call.starts_R[-1])
        self._count(
            calls=1,
            call_tokens=tokens,
            call_room=size,
            prefill_tokens=tokens - sum(piece.request.is_decoding for piece in batch),
            call_ms=1000 * (time.monotonic() - started),
        )
        return result

    def _run_program(self, call: Call, wants_routes: bool) -> Result:
        assert self.params is not None and self._pages is not None
        with self._on_mesh():
            self._pages, result = self._program(
                self.params, self.adapters.arrays, self._pages, call
            )
        if not wants_routes:
            result = result._replace(routes_LTk=None)  # stays on the device
        return jax.tree.map(np.asarray, result)

    def decode(self, requests: list[Request], size: int) -> Dispatch:
        """Begin up to `decode_steps` steps of requests that decode, at most `shapes.rows(size)`.

        Each needs a page for the position that it computes next; it goes on as far as its pages do.
        """
        rows, front = make_rows(requests, self.shapes, size)
        return self._dispatch(requests, size, rows, front)

    def decode_on(self, last: Dispatch) -> Dispatch:
        """Begin further steps of the rows of a dispatch from where it ends, before it is read."""
        return self._dispatch(last.requests, last.size, last.rows, last.front)

    def _dispatch(self, requests: list[Request], size: int, rows: Rows, front: Front) -> Dispatch:
        started = time.monotonic()
        rows = set_limits(rows, requests, self.shapes)
        front, steps = self._run_decoder(rows, front)
        return Dispatch(requests, size, rows, front, steps, started)

    def read(self, dispatch: Dispatch) -> Steps:
        """Wait for what a dispatch has drawn. `routes_NLRk` stays where no request wants it."""
        steps = dispatch.steps
        token_NR, logprob_NR, count_R = jax.device_get(steps[:3])
        routes_NLRk = steps.routes_NLRk
        if any(request.return_routes for request in dispatch.requests):
            routes_NLRk = np.asarray(routes_NLRk)
        started = max(dispatch.started, self._idle_since)
        self._idle_since = time.monotonic()
        self._count(
            dispatches=1,
            calls=int(count_R.max()),
            call_tokens=int(count_R.sum()),
            call_room=int(count_R.max()) * len(count_R),
            call_ms=1000 * (self._idle_since - started),
        )
        return Steps(token_NR, logprob_NR, count_R, routes_NLRk)

    def _run_decoder(self, rows: Rows, front: Front) -> tuple[Front, Steps]:
        assert self.params is not None and self._pages is not None
        with self._on_mesh():
            self._pages, front, steps = self._decoder(
                self.params, self.adapters.arrays, self._pages, rows, front
            )
        return front, steps

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

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
            arrays = self.params if tag == "weights" else self._pages
            for array in jax.tree.leaves(arrays):
                array.delete()
        if "weights" in tags:
            self.params = None
        if "kv_cache" in tags:
            self._pages = None

    def take_back(self, tags: Sequence[str]) -> None:
        """Allocate an empty cache again; weights must be loaded anew, by `swap`."""
        if "kv_cache" in tags and self._pages is None:
            self._pages = jax.block_until_ready(self._make_pages())
            del self.missing["kv_cache"]
        if "weights" in tags and self.params is None:
            self.missing["weights"] = (
                "the weights were released; load them by /update_weights_from_disk first"
            )

    def allocated_bytes(self) -> int:
        """Return the size of weights, adapters and cache, on each device of a mesh."""
        arrays = jax.tree.leaves((self.params, self.adapters.arrays, self._pages))
        return sum(_bytes_each(array) for array in arrays if not array.is_deleted())

    def _make_pages(self) -> PageArrays:
        sharding = page_sharding(self.place)
        return make_pages(self.config, self.shapes.pages, self.shapes.page_tokens, sharding)


def _bytes_each(array: jax.Array) -> int:
    """Return the bytes of an array on each device that it lies on."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


# -- inputs of calls
# -------------------------------------------------------------------------------------------------


def make_call(batch: Sequence[Piece], shapes: Shapes, size: int) -> Call:
    """Return the inputs of a call of `size` tokens for these pieces."""
    call = empty_call(shapes, size)
    at = 0
    draws = 0
    scores = False
    for row, piece in enumerate(batch):
        request = piece.request
        start = request.computed
        end = start + piece.length
        own = slice(at, at + piece.length)
        call.token_T[own] = request.ids[start:end]
        targets = request.ids[start + 1 : end + 1]
        call.target_T[at : at + len(targets)] = targets
        call.position_T[own] = np.arange(start, end)
        call.row_T[own] = row
        call.table_RM[row, : len(request.pages)] = request.pages
        call.lengths_R[row] = end
        call.starts_R[row] = at
        if request.adapter is not None:
            call.slot_T[own] = request.adapter.slot
        at += piece.length
        scores = scores or request.wants_scores
        if piece.draws:
            call.last_R[draws] = at - 1
            set_sampling(call.sampling, draws, request.sampling)
            draws += 1
    call.starts_R[len(batch) :] = at
    return call._replace(draws=np.asarray(draws, np.int32), scores=np.asarray(scores))
