"""Continuous batching: one thread that owns the device, the cache and the weights, and takes
everything else's wishes between two steps.

engine.submit(request)          any thread; the request's `notify` is called when it has ended
engine.call(function)           any thread; runs function() between two steps and returns its result as a future
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from rome.model.config import ModelConfig
from rome.model.qwen3 import Params
from rome.serve.forward import make_cache
from rome.serve.programs import Chunks, Next, Shapes, make_programs
from rome.serve.protocol import Request, TextCodec
from rome.serve.sampling import RowSampling
from rome.serve.slots import SlotTable, chunk_keys
from rome.serve.stopping import find_end

# A burst of new prompts fills the rows soon, yet running requests never wait for more than this
# many prefill calls.
PREFILL_CALLS_PER_DECODE = 4
GATHER_CALLS = 4  # full decode calls for which a prefill call waits until all of its rows have work
PAUSE_MODES = ("abort", "retract", "in_place")
MEMORY_TAGS = ("weights", "kv_cache")
Answer = TypeVar("Answer")


class Scheduler:
    """The engine's one thread.

    Methods without underscore may be called from any thread unless they say otherwise.

    Args:
      load: gives the parameters (layers unstacked) and config; called once, in the thread.
      tokenizer: for stop strings; None where the server has none.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Params, ModelConfig]],
        shapes: Shapes,
        tokenizer: TextCodec | None,
        version: str,
    ):
        self.shapes, self.version = shapes, version
        self.ready = threading.Event()
        self.failure: str | None = None  # why the thread ended; None while it lives
        self.paused = False
        self.lent: dict[
            str, str
        ] = {}  # memory tag -> what must happen before anything can run again
        self.stats = collections.Counter()
        self._load, self._tokenizer = load, tokenizer
        self._wake = threading.Condition()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._stopping = False
        self._waiting: collections.deque[Request] = collections.deque()
        self._prefilling: list[Request] = []
        self._decoding: dict[
            int, Request
        ] = {}  # by slot; who has waited longest for a decode call comes first
        self._gathered = 0
        self._slots = SlotTable(shapes.slots)
        self._swaps = 0  # part of every prefix key: nothing computed by other weights is reused
        self._thread = threading.Thread(target=self._main, name="scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(10)

    def submit(self, request: Request) -> None:
        self._post(lambda: self._waiting.append(request))

    def abort(self, prefix: str, everything: bool = False) -> None:
        """Ends the requests whose id begins with prefix, with what they have so far."""
        self._post(
            lambda: self._abort(
                lambda request: everything or request.rid.startswith(prefix), "aborted on request"
            )
        )

    def cancel(self, request: Request) -> None:
        """Ends one request that nobody waits for any more."""
        self._post(lambda: self._abort(lambda other: other is request, "the client went away"))

    def call(self, function: Callable[[], Answer]) -> concurrent.futures.Future[Answer]:
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()

        def run() -> None:
            try:
                if self.failure is not None:
                    raise RuntimeError(self.failure)
                future.set_result(function())
            except Exception as error:  # the caller's to handle
                future.set_exception(error)

        self._post(run)
        return future

    # -- by `call` only: these run in the thread
    # ---------------------------------------------------------------------------------------------

    def pause(self, mode: str) -> None:
        self.paused = True
        if mode == "abort":
            self._abort(lambda request: True, "aborted by pause_generation")
        elif mode == "retract":
            self._retract_all()

    def resume(self) -> None:
        """Raises ValueError while memory is lent out or weights are missing."""
        if self.lent:
            raise ValueError("cannot continue: " + "; ".join(self.lent.values()))
        self.paused = False

    def busy(self) -> bool:
        return bool(self._waiting or self._prefilling or self._decoding)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Deletes the device's arrays behind these tags.

        Raises ValueError while requests are in flight.
        """
        if self.busy():
            raise ValueError("requests are in flight; pause with mode abort first")
        for tag in tags:
            if tag in self.lent:
                continue
            self.lent[tag] = (
                f"the memory of {tag} is released; call /resume_memory_occupation first"
            )
            kept = self.params if tag == "weights" else self._cache
            for array in jax.tree.leaves(kept):
                array.delete()  # now, whoever still refers to them
        if "weights" in tags:
            self.params = None
        if "kv_cache" in tags:
            self._cache = None
            self._slots.forget_all()

    def take_back_memory(self, tags: Sequence[str]) -> None:
        """The cache is there again, empty; weights must be loaded anew."""
        if "kv_cache" in tags and self._cache is None:
            self._cache = jax.block_until_ready(
                make_cache(self.config, self.shapes.slots, self.shapes.max_context)
            )
            del self.lent["kv_cache"]
        if "weights" in tags and self.params is None:
            self.lent["weights"] = (
                "the weights were released; load them by /update_weights_from_disk first"
            )

    def flush(self) -> bool:
        """Forgets all cached prefixes. False, and nothing is done, while requests are in flight."""
        if self.busy():
            return False
        self._slots.forget_all()
        return True

    def swap(self, params: Params, version: str, fresh: bool) -> int:
        """New weights from the next step on.

        `fresh`: running requests compute their cache anew, by them. Returns how many were running.
        """
        running = len(self._prefilling) + len(self._decoding)
        self.lent.pop("weights", None)
        self.params, self.version = params, version
        self._swaps += 1
        if fresh:
            self._retract_all()
            self._slots.forget_all()
        return running

    def load_figures(self) -> dict[str, Any]:
        return {
            "running": len(self._decoding),
            "prefilling": len(self._prefilling),
            "waiting": len(self._waiting),
            "slots": self.shapes.slots,
            "paused": self.paused,
            "released": sorted(self.lent),
            "device_bytes": sum(
                array.nbytes
                for array in jax.tree.leaves((self.params, self._cache))
                if not array.is_deleted()
            ),
            **self.stats,
        }

    # -- the thread
    # ---------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self.failure is not None:
                raise RuntimeError(self.failure)
            self._commands.append(command)
            self._wake.notify()

    def _main(self) -> None:
        try:
            self._prepare()
            self.ready.set()
            while self._take_commands():
                self._admit()
                for _ in range(PREFILL_CALLS_PER_DECODE):
                    if self._lets_gather() or self._prefill_once() < self.shapes.prefill_rows:
                        break
                self._decode_once()
        except Exception as error:
            if self.ready.is_set():  # weights that cannot be loaded need no stack to be understood
                logging.exception("the scheduler ended")
            cause = f"the engine's scheduler ended: {type(error).__name__} {error}"
        else:
            cause = "the engine is shutting down"
        with self._wake:
            self.failure = cause
            left, self._commands = self._commands, collections.deque()
        for command in left:  # submissions and calls that nobody would answer any more
            command()
        self._abort(lambda request: True, cause, status_code=500)

    def _prepare(self) -> None:
        """Loads, and compiles both programs by running them on nothing."""
        params, config = self._load()
        self.params, self.config = params, config
        self._cache = make_cache(config, self.shapes.slots, self.shapes.max_context)
        self._prefill, self._decode = make_programs(config, self.shapes)
        started = time.monotonic()
        self._run_prefill([], [])
        self._run_decode([])
        logging.info("compiled in %.1f s", time.monotonic() - started)

    def _take_commands(self) -> bool:
        """Runs what was asked for.

        Sleeps while there is nothing to do, so that a trainer gets the cores. False at the end.
        """
        while True:
            with self._wake:
                if not (self._commands or self._may_run() or self._stopping):
                    self._wake.wait()
                commands, self._commands = self._commands, collections.deque()
            for command in commands:
                command()
            if self._stopping:
                return False
            if self._may_run():
                return True

    def _may_run(self) -> bool:
        return self.busy() and not self.paused and not self.lent

    def _admit(self) -> None:
        """Gives free slots to waiting requests, first come first served."""
        while self._waiting and self._slots.free:
            request = self._waiting.popleft()
            request.ids = request.prompt_ids + request.output_ids
            # A prompt that is to be scored is computed whole: a cached chunk has no logits.
            root = f"{self._swaps}/{request.salt}"
            request.keys = (
                []
                if request.score_from is not None
                else chunk_keys(request.ids, self.shapes.prefill_chunk, root)
            )
            request.slot = self._slots.acquire(request.keys)
            request.prefilled, request.routes, request.prompt_logprobs = 0, [], []
            self._prefilling.append(request)

    def _lets_gather(self) -> bool:
        """Whether prompts wait for others: a call costs the same however many rows it has, and the
        next decode call is full without them.
        """
        full = (
            len(self._decoding) >= self.shapes.decode_rows
            and len(self._prefilling) < self.shapes.prefill_rows
        )
        self._gathered = (
            self._gathered + 1 if full and self._prefilling and self._gathered < GATHER_CALLS else 0
        )
        return self._gathered > 0

    def _prefill_once(self) -> int:
        """One call for the next chunks of the first prompts in line.

        Returns how many rows it had.
        """
        batch: list[Request] = []
        sources: list[int] = []
        computing: set[bytes] = set()
        for request in self._prefilling:
            if len(batch) == self.shapes.prefill_rows:
                break
            chunk, source = self._find_prefix(request)
            if chunk < self._usable(request) and request.keys[chunk] in computing:
                continue  # another row computes this very chunk now; the next call copies it
            self._skip_to(request, chunk, source)
            computing.update(request.keys[chunk : chunk + 1])
            batch.append(request)
            sources.append(source)
        if not batch:
            return 0
        result = self._run_prefill(batch, sources)
        # Only now do the slots hold what they were given: until here, rows of this call copied from
        # what slots held before it.
        for row, request in enumerate(batch):
            self._finish_chunk(request, row, *result)
        return len(batch)

    def _find_prefix(self, request: Request) -> tuple[int, int]:
        """The first chunk of the request that no slot holds, and the slot to start from."""
        chunk, source = request.prefilled // self.shapes.prefill_chunk, request.slot
        while (
            chunk < self._usable(request)
            and (holder := self._slots.find(request.keys[chunk])) is not None
        ):
            chunk, source = chunk + 1, holder
        return chunk, source

    def _skip_to(self, request: Request, chunk: int, source: int) -> None:
        """Counts the chunks before this one as done; the coming call copies them from the source."""
        skipped = chunk * self.shapes.prefill_chunk - request.prefilled
        if skipped:
            request.prefilled += skipped
            request.routes = self._slots.notes(source, chunk)
            request.cached_tokens += 0 if request.output_ids else skipped

    def _usable(self, request: Request) -> int:
        """How many chunks it may take from others.

        Not the last one: the first token is drawn from its logits.
        """
        return min(len(request.keys), (len(request.ids) - 1) // self.shapes.prefill_chunk)

    def _run_prefill(self, batch: list[Request], sources: list[int]) -> tuple[np.ndarray, ...]:
        R, P = self.shapes.prefill_rows, self.shapes.prefill_chunk
        token_RP, target_RP = np.zeros((R, P), np.int32), np.zeros((R, P), np.int32)
        start_R, length_R, source_R = (
            np.zeros(R, np.int32),
            np.zeros(R, np.int32),
            np.zeros(R, np.int32),
        )
        slot_R = np.full(R, self.shapes.slots, np.int32)
        for row, (request, source) in enumerate(zip(batch, sources)):
            chunk = request.ids[request.prefilled : request.prefilled + P]
            after = request.ids[request.prefilled + 1 : request.prefilled + P + 1]
            token_RP[row, : len(chunk)], target_RP[row, : len(after)] = chunk, after
            start_R[row], length_R[row], source_R[row], slot_R[row] = (
                request.prefilled,
                len(chunk),
                source,
                request.slot,
            )
        chunks = Chunks(token_RP, target_RP, start_R, length_R, source_R, slot_R)
        scores = np.asarray(any(request.score_from is not None for request in batch))
        started = time.monotonic()
        self._cache, result = self._prefill(
            self.params, self._cache, chunks, _sampling_of(batch, R), scores
        )
        result = tuple(np.asarray(leaf) for leaf in result)
        self.stats.update(
            prefill_calls=1,
            prefill_tokens=int(length_R.sum()),
            prefill_ms=1000 * (time.monotonic() - started),
        )
        return result

    def _finish_chunk(
        self,
        request: Request,
        row: int,
        token_R: np.ndarray,
        logprob_R: np.ndarray,
        target_RP: np.ndarray,
        routes_LRPk: np.ndarray,
    ) -> None:
        size = self.shapes.prefill_chunk
        chunk = request.prefilled // size
        length = min(size, len(request.ids) - request.prefilled)
        routes = routes_LRPk[:, row, :length].transpose(1, 0, 2)
        request.routes.append(routes)
        self._slots.hold(
            request.slot, request.keys[: chunk + 1], request.routes[: len(request.keys)]
        )
        if (
            request.score_from is not None
            and len(request.prompt_logprobs) < len(request.prompt_ids) - 1
        ):
            request.prompt_logprobs += target_RP[row, :length].tolist()
            del request.prompt_logprobs[len(request.prompt_ids) - 1 :]
        request.prefilled += length
        if request.prefilled < len(request.ids):
            return
        self._prefilling.remove(request)
        if request.sampling.max_new_tokens == 0:
            self._end(request, {"type": "length", "length": 0})
            return
        self._decoding[request.slot] = request
        self._take_tokens(request, [int(token_R[row])], [float(logprob_R[row])], None)

    def _decode_once(self) -> None:
        if not self._decoding:
            return
        batch = list(self._decoding.values())[: self.shapes.decode_rows]
        token_QR, logprob_QR, routes_QLRk = self._run_decode(batch)
        tokens, logprobs = token_QR.T.tolist(), logprob_QR.T.tolist()
        for row, request in enumerate(batch):
            self._decoding[request.slot] = self._decoding.pop(request.slot)
            self._take_tokens(request, tokens[row], logprobs[row], routes_QLRk[:, :, row])

    def _run_decode(self, batch: list[Request]) -> tuple[np.ndarray, ...]:
        R = self.shapes.decode_rows
        token_R, position_R, slot_R = (
            np.zeros(R, np.int32),
            np.zeros(R, np.int32),
            np.full(R, self.shapes.slots, np.int32),
        )
        for row, request in enumerate(batch):
            token_R[row], slot_R[row] = request.output_ids[-1], request.slot
            position_R[row] = len(request.prompt_ids) + len(request.output_ids) - 1
        started = time.monotonic()
        self._cache, result = self._decode(
            self.params, self._cache, Next(token_R, position_R, slot_R), _sampling_of(batch, R)
        )
        result = tuple(np.asarray(leaf) for leaf in result)
        self.stats.update(
            decode_calls=1, decode_rows=len(batch), decode_ms=1000 * (time.monotonic() - started)
        )
        return result

    def _take_tokens(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[float],
        routes_QLk: np.ndarray | None,
    ) -> None:
        """Appends drawn tokens up to the request's end, and ends it there.

        Routes are those of the tokens before each; a prefill has noted its own.
        """
        before = len(request.output_ids)
        if not np.all(np.isfinite(logprobs)):
            self._end(
                request,
                {
                    "type": "abort",
                    "message": f"logits are not finite with weights {self.version}",
                    "status_code": 500,
                },
            )
            return
        taken, finish = find_end(request, tokens, self._tokenizer)
        request.output_ids += tokens[:taken]
        request.logprobs += logprobs[:taken]
        if request.return_routes and routes_QLk is not None:
            request.routes.append(routes_QLk[:taken])
        if request.versions and request.versions[-1][0] == self.version:
            request.versions[-1][2] = len(request.output_ids)
        else:
            request.versions.append([self.version, before, len(request.output_ids)])
        self.stats["generated_tokens"] += taken
        if finish is not None:
            self._end(request, finish)
        elif request.stream:
            request.notify(request)

    def _end(self, request: Request, finish: dict[str, Any]) -> None:
        self._leave_slot(request)
        request.finish = finish
        request.notify(request)

    def _leave_slot(self, request: Request) -> None:
        if request.slot is not None:
            self._decoding.pop(request.slot, None)
            self._slots.release(request.slot)
            request.slot = None

    def _abort(self, chosen: Callable[[Request], bool], message: str, **more: Any) -> None:
        for request in [*self._waiting, *self._prefilling, *self._decoding.values()]:
            if chosen(request):
                self._drop_from_queues(request)
                self._end(request, {"type": "abort", "message": message, **more})

    def _retract_all(self) -> None:
        """Running requests go back to the head of the line, in their order, with the tokens they
        have.
        """
        for request in reversed([*self._decoding.values(), *self._prefilling]):
            self._drop_from_queues(request)
            self._leave_slot(request)
            self._waiting.appendleft(request)

    def _drop_from_queues(self, request: Request) -> None:
        for queue in (self._waiting, self._prefilling):
            if request in queue:
                queue.remove(request)


def _sampling_of(batch: list[Request], rows: int) -> RowSampling:
    """How each row of a call is sampled; those without a request plainly, since one filter costs
    all rows its sorting.
    """
    sampling = RowSampling(
        np.zeros((rows, 2), np.uint32),
        np.ones(rows, np.float32),
        np.ones(rows, np.float32),
        np.zeros(rows, np.int32),
        np.zeros(rows, np.float32),
    )
    for row, request in enumerate(batch):
        params = request.sampling
        sampling.seed_B2[row] = params.seed >> 32, params.seed & 0xFFFFFFFF
        sampling.temperature_B[row] = params.temperature
        sampling.top_p_B[row], sampling.top_k_B[row], sampling.min_p_B[row] = (
            params.top_p,
            max(params.top_k, 0),
            params.min_p,
        )
    return sampling
