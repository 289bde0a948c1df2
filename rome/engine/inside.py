"""The engine inside the trainer: the embedded engine's scheduler as a thread of this process.

    engine = InsideEngine(hand_over(params, config, device), shapes)
    engine.start()
    pool = EnginePool([engine])

It is an `Engine` whose requests are carried by calls instead of HTTP, so pool, proof and
publication know no difference. Weights are handed over as arrays. It needs no supervisor: a thread
that has ended cannot be brought back, so every call after that is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from rome.engine.client import Engine
from rome.engine.connection import Deadline, Response
from rome.engine.control import CONTROL_SECONDS, MEMORY_TAGS
from rome.engine.dialect import Dialect
from rome.engine.errors import EngineDead, EngineError, EngineFailed, RequestRejected
from rome.engine.handover import Handover, checksums
from rome.engine.process import START_SECONDS
from rome.engine.weights import Weights
from rome.model.config import ModelConfig
from rome.model.qwen3 import Params
from rome.serve.answer import make_answer
from rome.serve.programs import Shapes
from rome.serve.protocol import BadRequest, Bounds, parse_generate
from rome.serve.request import Request
from rome.serve.scheduler import Scheduler
from rome.stopping import ShouldStop, never, raise_if_stopped

NAME = "the engine inside the trainer"  # in the place of a URL
VERSION = "rome.serve inside"
START_VERSION = "0"  # until the first publication
POLL_SECONDS = 0.1
STOP_SECONDS = 60.0  # for a step or a compilation of the thread to end
REMEDY = (
    "run the same command again to go on from the last checkpoint; if memory was short, lower"
    " --config.engine.slots"
)
log = logging.getLogger(__name__)


class InsideEngine(Engine):
    """The engine that shares process and device with the trainer.

    Args:
      weights: that it starts with.
      shapes: of its programs.
    """

    def __init__(self, weights: Handover, shapes: Shapes):
        config = weights.config
        start = [weights.params]  # handed on once: nothing here keeps the first weights alive

        def load() -> tuple[Params, ModelConfig]:
            checksums(start[0])  # compiles it now, not in the pause of the first publication
            return start.pop(), config

        self._scheduler = Scheduler(load, shapes, None, START_VERSION)
        bounds = Bounds(config.vocab_size, shapes.max_context, frozenset([config.eos_token_id]))
        super().__init__(NAME, model=config, wire=SchedulerWire(self._scheduler, bounds))

    def start(
        self, deadline_seconds: float = START_SECONDS, should_stop: ShouldStop = never
    ) -> None:
        """Start the thread, and return when its programs are compiled.

        Raises:
          EngineError: the thread failed, or is not ready within the deadline.
          Stopped: `should_stop` returned True.
        """
        self._scheduler.start()
        ends = time.monotonic() + deadline_seconds
        while not self._scheduler.ready.wait(POLL_SECONDS):
            raise_if_stopped(should_stop)
            if self._scheduler.failure is not None:
                raise EngineDead(f"{self._scheduler.failure}; {REMEDY}")
            if time.monotonic() > ends:
                raise EngineError(
                    f"{NAME} was not ready within {deadline_seconds:g} s; is the device held by"
                    " another process?"
                )

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the thread and its requests, and free its memory.

        A thread that does not hear it within `seconds` is left behind, which is logged: it ends
        with the process.
        """
        scheduler = self._scheduler

        def free() -> None:
            scheduler.pause("abort")
            scheduler.release_memory(MEMORY_TAGS)

        try:
            freed = scheduler.call(free)
        except RuntimeError:  # it has ended
            return
        try:
            freed.result(seconds)
        except TimeoutError:
            log.warning("%s did not stop within %g s; it ends with the process", NAME, seconds)
        except Exception as error:
            log.warning("the memory of %s was not freed: %s", NAME, error)
        scheduler.stop()

    async def load(self, weights: Weights, *, flush: bool) -> None:
        """Exchange the weights between two steps; memory that was released is taken back."""
        arrays = weights.arrays
        scheduler = self._scheduler

        def exchange() -> None:
            scheduler.take_back_memory(MEMORY_TAGS)
            scheduler.swap(arrays.params, str(weights.version), flush)

        async with self._connection.deadline(CONTROL_SECONDS, "an exchange of weights"):
            await in_thread(scheduler, exchange)

    async def expected_checksums(self, weights: Weights) -> dict[str, str]:
        """Return the checksums of the trainer's own arrays."""
        return weights.arrays.checksums

    async def dialect(self) -> Dialect:
        """Return what the embedded engine understands."""
        return Dialect(VERSION, embedded=True, version_spans=True, checksums=True)


class SchedulerWire:
    """Answers the routes of the protocol from a scheduler in this process.

    Args:
      scheduler: runs the requests.
      bounds: of requests.
    """

    def __init__(self, scheduler: Scheduler, bounds: Bounds):
        self._scheduler = scheduler
        self._bounds = bounds
        self._posts: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/pause_generation": lambda body: scheduler.pause(body["mode"]),
            "/continue_generation": lambda body: scheduler.resume(),
            "/release_memory_occupation": lambda body: self._release(body["tags"]),
            "/resume_memory_occupation": lambda body: scheduler.take_back_memory(body["tags"]),
            "/weights_checker": lambda body: self._checksums(),
        }
        self._gets: dict[str, Callable[[], dict[str, Any]]] = {
            "/model_info": lambda: {"weight_version": scheduler.version},
            "/server_info": self._server_info,
        }

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def deadline(self, seconds: float, what: str) -> Deadline:
        """Return a context that raises EngineError when `what` takes longer than `seconds`."""
        return Deadline(
            seconds, f"{NAME} did not give {what} within {seconds:g} s; is the device stuck?"
        )

    async def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of a route.

        Raises:
          RequestRejected: the engine does not take this request.
          EngineFailed: it failed for this request.
          EngineDead: its thread has ended.
        """
        return await self.post_for_any(route, body)

    async def post_for_any(self, route: str, body: dict[str, Any]) -> Any:
        """Do as `post`, for routes whose answer is no object."""
        if route == "/generate":
            return await self._generate(body)
        return await in_thread(self._scheduler, lambda: self._posts[route](body))

    async def request(self, method: str, route: str, body: dict[str, Any] | None) -> Response:
        """Return the answer of one of the routes that tell the engine's state."""
        return Response(200, await in_thread(self._scheduler, self._gets[route]), 0.0)

    async def status(self, route: str) -> int:
        """Return 200 while the thread runs.

        Raises:
          ConnectionRefusedError: it has ended.
        """
        if self._scheduler.failure is not None:
            raise ConnectionRefusedError(self._scheduler.failure)
        return 200

    async def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        scheduler = self._scheduler
        try:
            (request,), _ = parse_generate(body, self._bounds, None)
        except BadRequest as error:
            raise RequestRejected(f"{NAME} does not take a request: {error}") from None
        ended = asyncio.Event()
        request.notify = _notifier(ended)
        try:
            scheduler.submit(request)
            await ended.wait()
        except RuntimeError as error:
            raise EngineDead(f"{error}; {REMEDY}") from None
        finally:
            if request.finish is None:
                with contextlib.suppress(RuntimeError):  # it has ended, and the request with it
                    scheduler.cancel(request)
        finish = request.finish or {}
        if finish.get("status_code"):
            kind = EngineFailed if scheduler.failure is None else EngineDead
            raise kind(f"{finish['message']}; {REMEDY}")
        return make_answer(request, scheduler.version, None)

    # -- in the scheduler's thread
    # ---------------------------------------------------------------------------------------------

    def _release(self, tags: list[str]) -> None:
        """Free memory. Requests that came since the pause are aborted, and sent again later."""
        self._scheduler.pause("abort")
        self._scheduler.release_memory(tags)

    def _checksums(self) -> dict[str, Any]:
        params = self._scheduler.device.params
        if params is None:
            raise ValueError("its weights are released; publish first")
        return {"ranks": [{"rank": 0, "checksums": checksums(params)}]}

    def _server_info(self) -> dict[str, Any]:
        return {
            "engine": "rome.serve",
            "version": VERSION,
            "dtype": self._scheduler.device.config.dtype,
            "internal_states": [self._scheduler.load_metrics()],
        }


async def in_thread(scheduler: Scheduler, function: Callable[[], Any]) -> Any:
    """Run a function in the scheduler's thread, between two steps, and return its result.

    Raises:
      EngineDead: the thread has ended.
      EngineError: the function refused what was asked of it (ValueError).
      EngineFailed: it failed in another way.
    """
    try:
        return await asyncio.wrap_future(scheduler.call(function))
    except ValueError as error:
        raise EngineError(f"{NAME}: {error}") from None
    except Exception as error:
        if scheduler.failure is None:
            raise EngineFailed(f"{NAME}: {type(error).__name__} {error}") from error
        raise EngineDead(f"{scheduler.failure}; {REMEDY}") from None


def _notifier(ended: asyncio.Event) -> Callable[[Request], None]:
    """Return a function that sets an event of this event loop, from any thread."""
    loop = asyncio.get_running_loop()

    def notify(request: Request) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ended.set)

    return notify
