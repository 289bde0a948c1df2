"""Continuous batching: one thread that owns the device and decides what it computes next.

scheduler.submit(request)    from any thread; `request.notify` is called when it has ended
scheduler.call(function)     from any thread; runs function() between two steps, returns a future
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rome.model.config import ModelConfig
from rome.model.qwen3 import Params
from rome.serve.adapters import AdapterRoom
from rome.serve.batching import Batcher
from rome.serve.decoding import Steps
from rome.serve.device import NO_ROOM, Device, Dispatch, Piece
from rome.serve.programs import Shapes
from rome.serve.request import Grammar, Request, TextCodec
from rome.serve.stopping import find_end

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
      room: for adapters.

    Attributes:
      ready: set when the weights are loaded and the programs compiled.
      failure: why the thread ended; None while it runs.
      paused: whether sampling is paused.
      refuses: why requests are refused: an update failed midway. None while they are not.
      version: of the weights.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Params, ModelConfig]],
        shapes: Shapes,
        tokenizer: TextCodec | None,
        version: str,
        room: AdapterRoom = NO_ROOM,
    ):
        self.shapes = shapes
        self.version = version
        self.device = Device(load, shapes, room)
        self.ready = threading.Event()
        self.failure: str | None = None
        self.paused = False
        self.refuses: str | None = None
        self._tokenizer = tokenizer
        self._wake = threading.Condition()
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._stopping = False
        self._batcher = Batcher(shapes)
        self._in_flight: Dispatch | None = None
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
        self._post(lambda: self._queue(request))

    def abort(self, prefix: str, everything: bool = False) -> None:
        """End the requests whose id begins with `prefix`, or all, with what they have so far."""

        def is_meant(request: Request) -> bool:
            return everything or request.rid.startswith(prefix)

        self._post(lambda: self._abort_now(is_meant, "aborted on request"))

    def cancel(self, request: Request) -> None:
        """End a request whose client has disconnected."""
        self._post(lambda: self._abort_now(lambda other: other is request, "the client went away"))

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
                self._finish_dispatch()
                future.set_result(function())
            except Exception as error:  # for the caller to handle
                future.set_exception(error)

        self._post(run)
        return future

    def _queue(self, request: Request) -> None:
        """Queue a request; end it where there are no weights, or its adapter is not there."""
        if self.refuses is not None:
            self._end(request, {"type": "abort", "message": self.refuses, "status_code": 503})
            return
        if request.adapter_name:
            try:
                request.adapter = self.device.adapters.take(request.adapter_name)
            except ValueError as error:
                self._end(request, {"type": "abort", "message": str(error), "status_code": 400})
                return
        self._batcher.queue(request)

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
            self._batcher.retract_all()

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
        return self._batcher.busy()

    def try_probe(self, request: Request) -> bool:
        """Queue a request if nothing is in its way; return False where it would have to wait."""
        if self.paused or self.device.missing or self.busy():
            return False
        self._batcher.queue(request)
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
            self._batcher.forget_prefixes()

    def take_back_memory(self, tags: Sequence[str]) -> None:
        """Allocate an empty cache again; weights must be loaded anew."""
        self.device.take_back(tags)

    def flush(self) -> bool:
        """Forget all cached prefixes; do nothing and return False while requests are in flight."""
        if self.busy():
            return False
        self._batcher.forget_prefixes()
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
        running = len(self._batcher.running)
        self.device.swap(params)
        self.refuses = None
        self.version = version
        self._batcher.note_new_weights(fresh)
        return running

    def rename(self, version: str) -> None:
        """Give the weights another version; tokens that are sampled from now on have it."""
        self.version = version

    def take_weights(self, why: str) -> Params | None:
        """Return the weights, for others to take their place one by one. Requests wait.

        `swap` or `lose_weights` ends it.
        """
        return self.device.take_weights(why)

    def lose_weights(self, why: str) -> None:
        """End all requests, and refuse new ones until `swap`: there are no weights.

        Args:
          why: what happened, and the remedy; requests get it with status 503.
        """
        self.device.missing["weights"] = why
        self.refuses = why
        self._abort(lambda request: True, why, status_code=503)

    def load_metrics(self) -> dict[str, Any]:
        """Return how busy the engine is, and what it has computed so far. From any thread."""
        return {
            **self._batcher.metrics(),
            "slots": self.shapes.slots,
            "paused": self.paused,
            "released": sorted(self.device.missing),
            "refuses": self.refuses,
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
                self._step()
        except Exception as error:
            if self.ready.is_set():  # weights that cannot be loaded need no stack to be understood
                logging.exception("the scheduler ended")
            cause = f"the engine's scheduler ended: {type(error).__name__} {error}"
        else:
            cause = "the engine is shutting down"
        self._in_flight = None
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

    # -- a step
    # ---------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Compute the next tokens of some running requests, in one call or dispatch."""
        if self._in_flight is not None:
            self._finish_dispatch(goes_on=True)
            return
        batch, size = self._batcher.next_batch()
        steps = self.shapes.decode_steps
        follows = any(piece.request.grammar is not None for piece in batch)
        if steps > 1 and self._batcher.only_decodes() and not follows:
            self._batcher.give_pages([piece.request for piece in batch], steps)
            self._in_flight = self.device.begin(batch, size, steps)
            return
        result = self.device.read(self.device.begin(batch, size))
        at = 0
        draws = 0
        for piece in batch:
            self._note_computed(piece, at, result)
            at += piece.length
        for piece in batch:
            if piece.request.computed < len(piece.request.ids):
                continue
            self._take_drawn(piece.request, draws, result)
            draws += 1

    def _finish_dispatch(self, goes_on: bool = False) -> None:
        """Read what the device has drawn since the last dispatch, if there was one.

        Args:
          goes_on: begin the next dispatch of the same requests first, where that makes sense.
        """
        dispatch = self._in_flight
        if dispatch is None:
            return
        steps = self.shapes.decode_steps
        self._in_flight = None
        requests = [piece.request for piece in dispatch.batch]
        if goes_on and self._batcher.can_go_on(requests, dispatch.size, steps):
            self._in_flight = self.device.go_on(dispatch)
        taken = self.device.read(dispatch)
        for row, request in enumerate(requests):
            if request.finish is None:  # not one that a stop string has ended before
                self._take_steps(request, row, taken)

    def _take_steps(self, request: Request, row: int, steps: Steps) -> None:
        """Append what a dispatch has drawn for a request, and end it where its answer ends."""
        count = int(steps.count_R[row])
        drawn = steps.token_NR[:count, row].tolist()
        logprobs = steps.logprob_NR[:count, row].tolist()
        finish = self._append(request, drawn, logprobs)
        taken = len(request.ids) - 1 - request.computed
        if request.return_routes:
            request.note_routes(steps.routes_NLTk[:taken, :, row])
        self._batcher.note_computed(Piece(request, taken))
        self._conclude(request, finish)

    def _note_computed(self, piece: Piece, at: int, result: Steps) -> None:
        """Record what the call has computed for a piece, whose tokens begin at `at`."""
        request, length = piece
        own = slice(at, at + length)
        if request.return_routes:
            request.note_routes(result.routes_NLTk[0, :, own].swapaxes(0, 1))
        if request.wants_scores:
            num_scores = len(request.prompt_ids) - 1
            request.prompt_logprobs += result.target_logprob_T[own].tolist()
            del request.prompt_logprobs[num_scores:]
        self._batcher.note_computed(piece)

    def _take_drawn(self, request: Request, number: int, result: Steps) -> None:
        """Append the token that the call has drawn after a request's last one."""
        if not request.output_ids and not all(map(math.isfinite, request.prompt_logprobs)):
            self._end(request, self._not_finite())
            return
        if request.sampling.max_new_tokens == 0:
            self._end(request, {"type": "length", "length": 0})
            return
        drawn = [int(result.token_NR[0, number])]
        finish = self._append(request, drawn, [float(result.logprob_NR[0, number])])
        self._conclude(request, finish)

    def _append(
        self, request: Request, drawn: list[int], logprobs: list[float]
    ) -> dict[str, Any] | None:
        """Append drawn tokens up to the end of the answer.

        Args:
          request: that they were drawn for.
          drawn: tokens, in order.
          logprobs: of tokens.

        Returns:
          SGLang's finish_reason; None if the answer continues.
        """
        if not all(map(math.isfinite, logprobs)):
            return self._not_finite()
        before = len(request.output_ids)
        if request.first_token is None:
            request.first_token = time.monotonic()
        taken, finish = find_end(request, drawn, self._tokenizer)
        request.logprobs += logprobs[:taken]
        if request.versions and request.versions[-1][0] == self.version:
            request.versions[-1][2] = before + taken
        else:
            request.versions.append([self.version, before, before + taken])
        # Last: a stream that is answered meanwhile counts these, and must find all of the above.
        request.ids += drawn[:taken]
        request.output_ids += drawn[:taken]
        self.device.stats["generated_tokens"] += taken
        if finish is None and request.grammar is not None:
            return _follow(request.grammar, drawn)
        return finish

    def _not_finite(self) -> dict[str, Any]:
        message = f"logits are not finite with weights {self.version}"
        return {"type": "abort", "message": message, "status_code": 500}

    def _conclude(self, request: Request, finish: dict[str, Any] | None) -> None:
        """End a request that has ended, and tell a stream of its tokens."""
        if finish is not None:
            self._end(request, finish)
        elif request.stream:
            request.notify(request)

    # -- ends
    # ---------------------------------------------------------------------------------------------

    def _end(self, request: Request, finish: dict[str, Any]) -> None:
        self._batcher.remove(request)
        if request.adapter is not None:
            self.device.adapters.give_back(request.adapter)
        request.finish = finish
        request.notify(request)

    def _abort_now(self, is_meant: Callable[[Request], bool], message: str) -> None:
        """End requests with all that was sampled for them, what is in flight included."""
        self._finish_dispatch()
        self._abort(is_meant, message)

    def _abort(self, is_meant: Callable[[Request], bool], message: str, **more: Any) -> None:
        for request in self._batcher.requests():
            if is_meant(request):
                self._end(request, {"type": "abort", "message": message, **more})


def _follow(grammar: Grammar, drawn: list[int]) -> dict[str, Any] | None:
    """Let a grammar read what was drawn; return SGLang's finish_reason where it is complete."""
    fault = grammar.take(drawn)
    if fault:
        return {"type": "abort", "message": f"the grammar gave up: {fault}", "status_code": 400}
    return {"type": "stop", "matched": None} if grammar.is_complete else None
