"""Continuous batching: one thread that owns the device and decides what it computes next.

scheduler.submit(request)    from any thread; `request.notify` is called when it has ended
scheduler.call(function)     from any thread; runs function() between two steps, returns a future
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from rome.model.config import ModelConfig
from rome.model.qwen3 import Params
from rome.serve.device import Device
from rome.serve.programs import Prefilled, Shapes
from rome.serve.request import NO_SLOT, Request, TextCodec
from rome.serve.slots import SlotTable, chunk_keys
from rome.serve.stopping import find_end

# A burst of new prompts soon fills the rows, yet running requests never wait for more than this
# many prefill calls.
PREFILL_CALLS_PER_DECODE = 4
# Full decode calls for which a prefill call waits until all of its rows have work.
MAX_GATHER_CALLS = 4
STOP_SECONDS = 10.0
PAUSE_MODES = ("abort", "retract", "in_place")
Answer = TypeVar("Answer")


class Scheduler:
    """The thread of the engine.

    Public methods may be called from any thread unless they say otherwise.

    Args:
      load: returns the parameters (layers unstacked) and their config; called once, in the thread.
      shapes: of the compiled programs.
      tokenizer: for stop strings; None where the server has none.
      version: of the weights that it starts with.

    Attributes:
      ready: set when the weights are loaded and the programs compiled.
      failure: why the thread ended; None while it runs.
      paused: whether sampling is paused.
      version: of the weights.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Params, ModelConfig]],
        shapes: Shapes,
        tokenizer: TextCodec | None,
        version: str,
    ):
        self.shapes = shapes
        self.version = version
        self.device = Device(load, shapes)
        self.ready = threading.Event()
        self.failure: str | None = None
        self.paused = False
        self._tokenizer = tokenizer
        self._wake = threading.Condition()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._stopping = False
        self._waiting: collections.deque[Request] = collections.deque()
        self._prefilling: list[Request] = []
        # By slot; the request that has waited longest for a decode call comes first.
        self._decoding: dict[int, Request] = {}
        self._gathered_calls = 0
        self._slots = SlotTable(shapes.slots)
        self._swaps = 0  # part of every prefix key: nothing that other weights computed is reused
        self._thread = threading.Thread(target=self._main, name="scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and every request with it."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(STOP_SECONDS)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
          RuntimeError: the thread has ended.
        """
        self._post(lambda: self._waiting.append(request))

    def abort(self, prefix: str, everything: bool = False) -> None:
        """End the requests whose id begins with `prefix`, or all, with what they have so far."""

        def is_meant(request: Request) -> bool:
            return everything or request.rid.startswith(prefix)

        self._post(lambda: self._abort(is_meant, "aborted on request"))

    def cancel(self, request: Request) -> None:
        """End a request whose client has disconnected."""
        self._post(lambda: self._abort(lambda other: other is request, "the client went away"))

    def call(self, function: Callable[[], Answer]) -> concurrent.futures.Future[Answer]:
        """Run `function` in the thread, between two steps.

        Returns:
          A future of its result, or of its exception.
        """
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():  # the caller has left
                return
            try:
                if self.failure is not None:
                    raise RuntimeError(self.failure)
                future.set_result(function())
            except Exception as error:  # for the caller to handle
                future.set_exception(error)

        self._post(run)
        return future

    # -- control, through `call` only: these methods run in the thread
    # ---------------------------------------------------------------------------------------------

    def pause(self, mode: str) -> None:
        """Stop computing.

        Args:
          mode: "abort" ends running requests, "retract" puts them back into the queue, "in_place"
            freezes them.
        """
        self.paused = True
        if mode == "abort":
            self._abort(lambda request: True, "aborted by pause_generation")
        elif mode == "retract":
            self._retract_all()

    def resume(self) -> None:
        """Continue after `pause`.

        Raises:
          ValueError: memory is released, or weights are missing.
        """
        if self.device.missing:
            raise ValueError("cannot continue: " + "; ".join(self.device.missing.values()))
        self.paused = False

    def busy(self) -> bool:
        """Return whether any request is in flight."""
        return bool(self._waiting or self._prefilling or self._decoding)

    def try_probe(self, request: Request) -> bool:
        """Queue a request if nothing is in its way; return False where it would have to wait."""
        if self.paused or self.device.missing or self.busy():
            return False
        self._waiting.append(request)
        return True

    def release_memory(self, tags: Sequence[str]) -> None:
        """Delete the device's arrays behind these tags.

        Raises:
          ValueError: requests are in flight.
        """
        if self.busy():
            raise ValueError("requests are in flight; pause with mode abort first")
        self.device.release(tags)
        if "kv_cache" in tags:
            self._slots.forget_all()

    def take_back_memory(self, tags: Sequence[str]) -> None:
        """Allocate an empty cache again; weights must be loaded anew."""
        self.device.take_back(tags)

    def flush(self) -> bool:
        """Forget all cached prefixes; do nothing and return False while requests are in flight."""
        if self.busy():
            return False
        self._slots.forget_all()
        return True

    def swap(self, params: Params, version: str, fresh: bool) -> int:
        """Use new weights from the next step on.

        Args:
          params: layers unstacked, on the device.
          version: of these weights.
          fresh: whether running requests compute their cache anew, with the new weights.

        Returns:
          The number of running requests.
        """
        running = len(self._prefilling) + len(self._decoding)
        self.device.swap(params)
        self.version = version
        self._swaps += 1
        if fresh:
            self._retract_all()
            self._slots.forget_all()
        return running

    def load_metrics(self) -> dict[str, Any]:
        """Return how busy the engine is, and what it has computed so far. From any thread."""
        return {
            "running": len(self._decoding),
            "prefilling": len(self._prefilling),
            "waiting": len(self._waiting),
            "slots": self.shapes.slots,
            "paused": self.paused,
            "released": sorted(self.device.missing),
            "device_bytes": self.device.allocated_bytes(),
            **self.device.stats,
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
        """Serve requests until `stop` or an error, then end the remaining ones with the cause."""
        try:
            self.device.prepare()
            self.ready.set()
            while self._take_commands():
                self._admit()
                self._prefill_some()
                self._decode_once()
        except Exception as error:
            if self.ready.is_set():  # weights that cannot be loaded need no stack to be understood
                logging.exception("the scheduler ended")
            cause = f"the engine's scheduler ended: {type(error).__name__} {error}"
        else:
            cause = "the engine is shutting down"
        with self._wake:
            self.failure = cause
            remaining = self._take_all_commands()
        for command in remaining:  # requests and calls that would never be answered
            command()
        self._abort(lambda request: True, cause, status_code=500)

    def _take_commands(self) -> bool:
        """Run the commands of other threads; return False when the thread shall end.

        Sleeps while there is nothing to do, so that a trainer gets the cores.
        """
        while True:
            with self._wake:
                if not (self._commands or self._can_run() or self._stopping):
                    self._wake.wait()
                commands = self._take_all_commands()
            for command in commands:
                command()
            if self._stopping:
                return False
            if self._can_run():
                return True

    def _take_all_commands(self) -> collections.deque[Callable[[], None]]:
        commands = self._commands
        self._commands = collections.deque()
        return commands

    def _can_run(self) -> bool:
        return self.busy() and not self.paused and not self.device.missing

    # -- prefill
    # ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give free slots to waiting requests, first come first served."""
        while self._waiting and self._slots.free:
            request = self._waiting.popleft()
            request.ids = request.prompt_ids + request.output_ids
            request.keys = self._prefix_keys(request)
            request.slot = self._slots.acquire(request.keys)
            request.prefilled = 0
            request.owns_prefix = False
            request.routes = []
            request.prompt_logprobs = []
            self._prefilling.append(request)

    def _prefix_keys(self, request: Request) -> list[bytes]:
        if request.score_from is not None:  # computed in full: a cached chunk has no logits
            return []
        # Chunks of requests without routes have none to give to a request that wants them.
        kind = "routes" if request.return_routes else "plain"
        root = f"{self._swaps}/{kind}/{request.salt}"
        return chunk_keys(request.ids, self.shapes.prefill_chunk, root)

    def _prefill_some(self) -> None:
        """Make prefill calls while their rows are full, up to the limit between decode calls."""
        for _ in range(PREFILL_CALLS_PER_DECODE):
            if self._should_gather():
                return
            if self._prefill_once() < self.shapes.prefill_rows:
                return

    def _should_gather(self) -> bool:
        """Return whether prompts wait for more prompts to fill a prefill call.

        A call costs the same however many rows it has. Waiting costs nothing while the next decode
        call is full without these prompts.
        """
        is_decode_full = len(self._decoding) >= self.shapes.decode_rows
        num_prompts = len(self._prefilling)
        has_free_rows = 0 < num_prompts < self.shapes.prefill_rows
        if is_decode_full and has_free_rows and self._gathered_calls < MAX_GATHER_CALLS:
            self._gathered_calls += 1
            return True
        self._gathered_calls = 0
        return False

    def _prefill_once(self) -> int:
        """Make one call for the next chunks of the first prompts in line.

        Returns:
          The number of rows that had work.
        """
        batch: list[Request] = []
        sources: list[int] = []
        computing: set[bytes] = set()
        for request in self._prefilling:
            if len(batch) == self.shapes.prefill_rows:
                break
            chunk, source = self._find_prefix(request)
            if chunk < self._usable_chunks(request) and request.keys[chunk] in computing:
                continue  # another row computes this very chunk now; the next call copies it
            self._skip_to(request, chunk, source)
            computing.update(request.keys[chunk : chunk + 1])
            batch.append(request)
            sources.append(source)
        if not batch:
            return 0
        result = self.device.prefill(batch, sources)
        # Only now do the slots hold their new chunks: until here, rows of this call copied what
        # slots held before it.
        for row, request in enumerate(batch):
            self._finish_chunk(request, row, result)
        return len(batch)

    def _find_prefix(self, request: Request) -> tuple[int, int]:
        """Return the first chunk of a request that no slot holds, and the slot to start from."""
        chunk = request.prefilled // self.shapes.prefill_chunk
        source = request.slot
        while chunk < self._usable_chunks(request):
            holder = self._slots.find(request.keys[chunk])
            if holder is None:
                break
            source = holder
            chunk += 1
        return chunk, source

    def _skip_to(self, request: Request, chunk: int, source: int) -> None:
        """Count earlier chunks as done; the coming call copies them from the source slot."""
        skipped = chunk * self.shapes.prefill_chunk - request.prefilled
        if skipped == 0:
            return
        request.prefilled += skipped
        request.owns_prefix = False
        if request.return_routes:
            request.routes = self._slots.notes(source, chunk)
        if not request.output_ids:
            request.cached_tokens += skipped

    def _usable_chunks(self, request: Request) -> int:
        """Return how many chunks a request may take from others.

        Not the last one: the first token is drawn from its logits.
        """
        return min(len(request.keys), (len(request.ids) - 1) // self.shapes.prefill_chunk)

    def _finish_chunk(self, request: Request, row: int, result: Prefilled) -> None:
        """Record a computed chunk, and move the request on if its prompt is complete."""
        chunk_size = self.shapes.prefill_chunk
        chunk = request.prefilled // chunk_size
        length = min(chunk_size, len(request.ids) - request.prefilled)
        routes_PLk = None
        if request.return_routes:
            assert result.routes_LRPk is not None, "the call had a request that wants routes"
            routes_PLk = result.routes_LRPk[:, row, :length].transpose(1, 0, 2)
            request.routes.append(routes_PLk)
        self._hold_chunk(request, chunk, routes_PLk)
        if request.score_from is not None:
            num_scores = len(request.prompt_ids) - 1
            request.prompt_logprobs += result.target_logprob_RP[row, :length].tolist()
            del request.prompt_logprobs[num_scores:]
        request.prefilled += length
        if request.prefilled < len(request.ids):
            return
        self._prefilling.remove(request)
        if request.sampling.max_new_tokens == 0:
            self._end(request, {"type": "length", "length": 0})
            return
        self._decoding[request.slot] = request
        token = int(result.token_R[row])
        logprob = float(result.logprob_R[row])
        self._take_tokens(request, [token], [logprob], None)

    def _hold_chunk(self, request: Request, chunk: int, routes_PLk: np.ndarray | None) -> None:
        """Record which chunks the request's slot holds now that `chunk` was computed there."""
        if not request.owns_prefix:  # until this call the slot held what it had before
            held_keys = request.keys[: chunk + 1]
            notes = list(request.routes) if request.return_routes else [None] * len(held_keys)
            self._slots.hold(request.slot, held_keys, notes[: len(held_keys)])
            request.owns_prefix = True
        elif chunk < len(request.keys):  # an incomplete last chunk has no key
            self._slots.extend(request.slot, request.keys[chunk], routes_PLk)

    # -- decode
    # ---------------------------------------------------------------------------------------------

    def _decode_once(self) -> None:
        """Make one call for the requests that have waited longest."""
        if not self._decoding:
            return
        batch = list(self._decoding.values())[: self.shapes.decode_rows]
        result = self.device.decode(batch)
        tokens = result.token_QR.T.tolist()
        logprobs = result.logprob_QR.T.tolist()
        for row, request in enumerate(batch):
            self._decoding[request.slot] = self._decoding.pop(
                request.slot
            )  # to the end of the line
            routes_QLk = None
            if result.routes_QLRk is not None:
                routes_QLk = result.routes_QLRk[:, :, row]
            self._take_tokens(request, tokens[row], logprobs[row], routes_QLk)

    def _take_tokens(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[float],
        routes_QLk: np.ndarray | None,
    ) -> None:
        """Append drawn tokens up to the end of the request, and end it there.

        Args:
          request: that they were drawn for.
          tokens: in order.
          logprobs: of tokens.
          routes_QLk: of the token before each; None after a prefill, which has recorded its own,
            and where nobody asked for them.
        """
        before = len(request.output_ids)
        if not np.all(np.isfinite(logprobs)):
            message = f"logits are not finite with weights {self.version}"
            self._end(request, {"type": "abort", "message": message, "status_code": 500})
            return
        taken, finish = find_end(request, tokens, self._tokenizer)
        request.logprobs += logprobs[:taken]
        if request.return_routes and routes_QLk is not None:
            request.routes.append(routes_QLk[:taken])
        if request.versions and request.versions[-1][0] == self.version:
            request.versions[-1][2] = before + taken
        else:
            request.versions.append([self.version, before, before + taken])
        # Last: a stream that is answered meanwhile counts these, and must find all of the above.
        request.output_ids += tokens[:taken]
        self.device.stats["generated_tokens"] += taken
        if finish is not None:
            self._end(request, finish)
        elif request.stream:
            request.notify(request)

    # -- ends
    # ---------------------------------------------------------------------------------------------

    def _end(self, request: Request, finish: dict[str, Any]) -> None:
        self._leave_slot(request)
        request.finish = finish
        request.notify(request)

    def _leave_slot(self, request: Request) -> None:
        if request.slot != NO_SLOT:
            self._decoding.pop(request.slot, None)
            self._slots.release(request.slot)
            request.slot = NO_SLOT

    def _abort(self, is_meant: Callable[[Request], bool], message: str, **more: Any) -> None:
        for request in [*self._waiting, *self._prefilling, *self._decoding.values()]:
            if is_meant(request):
                self._drop_from_queues(request)
                self._end(request, {"type": "abort", "message": message, **more})

    def _retract_all(self) -> None:
        """Put running requests back to the head of the queue, in order, with their tokens."""
        for request in reversed([*self._decoding.values(), *self._prefilling]):
            self._drop_from_queues(request)
            self._leave_slot(request)
            self._waiting.appendleft(request)

    def _drop_from_queues(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._prefilling:
            self._prefilling.remove(request)
