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
from rome.model.ops.paged import make_pages, page_sharding, whole_sharding
from rome.model.params import engine_mesh_of
from rome.model.qwen3 import Params
from rome.serve.adapters import AdapterRoom, AdapterTable
from rome.serve.adjusting import Adjustments, empty_adjustments, make_adjustments
from rome.serve.decoding import Front, Program, Steps, empty_front, make_program
from rome.serve.programs import Call, PageArrays, Shapes, empty_call, set_sampling, set_stops
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
    """A call, and steps of decoding after it, that the device takes or has taken.

    Attributes:
      batch: what the call computes; piece by piece in the order of rows. For a dispatch that goes
        on from another: what that one computed first.
      size: of the call.
      call: its inputs.
      front: where the rows stand after it, on the device.
      steps: what it computes, on the device.
      goes_on: whether it began where another ended.
      prompt_tokens: that the call computes.
      started: time.monotonic() of the dispatch.
    """

    batch: list[Piece]
    size: int
    call: Call
    front: Front
    steps: Steps
    goes_on: bool
    prompt_tokens: int
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
        # By size of a call: no row is begun, and none asks for anything.
        self._fronts: dict[int, Front] = {}
        self._unadjusted: dict[int, Adjustments] = {}
        self._idle_since = 0.0  # end of the last dispatch

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
        self._program = self._make_program()
        everywhere = whole_sharding(self.place)
        started = time.monotonic()
        for size in self.shapes.call_sizes:
            rows = self.shapes.rows(size)
            self._fronts[size] = empty_front(rows, everywhere)
            unadjusted = empty_adjustments(rows, self.shapes.max_context, self.config.vocab_size)
            self._unadjusted[size] = jax.device_put(unadjusted, everywhere)
            call = empty_call(self.shapes, size, self._unadjusted[size])
            _, steps = self._run(call, self._fronts[size])
            jax.block_until_ready(steps)
        logging.info("compiled in %.1f s", time.monotonic() - started)

    def _make_program(self) -> Program:
        tensor = 1 if self.mesh is None else self.mesh.shape["tensor"]
        kernels = choose_serving_kernels(jax.default_backend(), self.config, tensor)
        place = self.place
        return make_program(
            self.config,
            kernels,
            self.shapes.decode_steps,
            page_sharding(place),
            whole_sharding(place),
        )

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

    def begin(self, batch: list[Piece], size: int, steps: int = 1) -> Dispatch:
        """Begin to compute pieces of at most `size` tokens together.

        Args:
          batch: at most `shapes.rows(size)` pieces. Tokens are drawn in the order of those that
            draw.
          size: of the call.
          steps: above 1 only for requests that all decode: up to so many tokens are drawn for each,
            as far as its pages go.
        """
        call = make_call(batch, self.shapes, size, self._adjustments(batch, size), steps)
        prompts = sum(piece.length for piece in batch if not piece.request.is_decoding)
        return self._dispatch(batch, size, call, self._fronts[size], prompts)

    def _adjustments(self, batch: Sequence[Piece], size: int) -> Adjustments:
        requests = [piece.request for piece in batch if piece.draws]
        empty = self._unadjusted[size]
        if not any(request.adjusts_logits for request in requests):
            return empty
        return make_adjustments(requests, empty, whole_sharding(self.place))

    def go_on(self, last: Dispatch) -> Dispatch:
        """Begin further steps of the rows of a dispatch from where it ends, before it is read."""
        requests = [piece.request for piece in last.batch]
        call = set_limits(last.call, requests, self.shapes)
        return self._dispatch(last.batch, last.size, call, last.front, 0, goes_on=True)

    def _dispatch(
        self,
        batch: list[Piece],
        size: int,
        call: Call,
        front: Front,
        prompt_tokens: int,
        goes_on: bool = False,
    ) -> Dispatch:
        started = time.monotonic()
        front, steps = self._run(call, front)
        return Dispatch(batch, size, call, front, steps, goes_on, prompt_tokens, started)

    def read(self, dispatch: Dispatch) -> Steps:
        """Wait for what a dispatch has computed. Routes stay where no request wants them."""
        steps = dispatch.steps
        host = Steps(*jax.device_get(steps[:-1]), steps.routes_NLTk)
        if any(piece.request.return_routes for piece in dispatch.batch):
            host = host._replace(routes_NLTk=np.asarray(steps.routes_NLTk))
        began = max(dispatch.started, self._idle_since)
        self._idle_since = time.monotonic()
        tokens = int(host.count_R.sum())  # of a call that others follow: one of each row
        calls = int(host.count_R.max())
        if not dispatch.goes_on:
            draws = int(dispatch.call.draws)
            tokens += int(dispatch.call.starts_R[-1]) - draws
            calls = max(calls, 1)
        self._count(
            dispatches=int(dispatch.call.steps > 1),
            calls=calls,
            call_tokens=tokens,
            call_room=calls * dispatch.size,
            prefill_tokens=dispatch.prompt_tokens,
            call_ms=1000 * (self._idle_since - began),
        )
        return host

    def _run(self, call: Call, front: Front) -> tuple[Front, Steps]:
        assert self.params is not None and self._pages is not None
        with self._on_mesh():
            self._pages, front, steps = self._program(
                self.params, self.adapters.arrays, self._pages, call, front
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


def make_call(
    batch: Sequence[Piece], shapes: Shapes, size: int, adjustments: Adjustments, steps: int = 1
) -> Call:
    """Return the inputs of a call of `size` tokens for these pieces, and of steps after it."""
    call = empty_call(shapes, size, adjustments)
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
        call.lengths_R[row] = end
        call.starts_R[row] = at
        if request.adapter is not None:
            call.slot_T[own] = request.adapter.slot
        at += piece.length
        scores = scores or request.wants_scores
        if piece.draws:
            call.last_R[draws] = at - 1
            set_sampling(call.sampling, draws, request.sampling)
            set_stops(call, draws, request.sampling)
            draws += 1
    call.starts_R[len(batch) :] = at
    call = call._replace(
        draws=np.asarray(draws, np.int32),
        scores=np.asarray(scores),
        steps=np.asarray(steps, np.int32),
    )
    return set_limits(call, [piece.request for piece in batch], shapes)


def set_limits(call: Call, requests: Sequence[Request], shapes: Shapes) -> Call:
    """Return the inputs with the pages that requests have now.

    The arrays are new: a dispatch that runs may still read the old ones. Requests that have ended
    have no pages, and their rows no positions.
    """
    table_RM = np.zeros_like(call.table_RM)
    limit_R = np.zeros_like(call.limit_R)
    for row, request in enumerate(requests):
        table_RM[row, : len(request.pages)] = request.pages
        limit_R[row] = min(len(request.pages) * shapes.page_tokens, request.last_position)
    return call._replace(table_RM=table_RM, limit_R=limit_R)
