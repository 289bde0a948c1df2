"""Several engines used as one: routing of requests, and a state for each engine.

    starting    joined or restarted; serves once it has proven the current weights
    ready       serves
    updating    loads new weights, or leaves its device to an update of the trainer until then; its
                requests wait on the client's side until new weights are proven
    suspect     in quarantine: an update failed or was not proven, or the engine does not answer;
                serves again once it has proven the current weights
    dead        nothing answers at its URL
    lent        the learner uses its devices (`EnginePool.lend`)

A request that runs on an engine which is taken out of service continues on another one, from the
tokens that it has. A request that meets a failure of its engine takes the engine out at once; an
engine that rejects a request is taken out if another one takes it. `rome.engine.supervise` brings
engines back.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Literal

from rome.engine.client import Engine
from rome.engine.completion import Completion, Sampling
from rome.engine.connection import growing_wait
from rome.engine.control import PauseMode
from rome.engine.errors import (
    EngineDead,
    EngineError,
    EngineFailed,
    EngineRefused,
    EngineUnproven,
    RequestRejected,
)
from rome.engine.proof import Proof, disagreement, load_and_prove
from rome.engine.weights import Weights

State = Literal["starting", "ready", "updating", "suspect", "dead", "lent"]
MAX_AFFINITIES = 100_000  # remembered episodes; the least recently used are forgotten
# Time for answers that a pause cut to arrive; later ones are sampled again elsewhere.
DRAIN_SECONDS = 2.0
# A request whose engines failed this many times may itself be the reason. In a pool of more engines
# it is tried on each of them.
MAX_MOVES = 8
MAX_MOVE_WAIT_SECONDS = 2.0
# An episode leaves its engine when that has more requests in flight than twice the least busy
# engine's and this many: the cached prefix is then not worth the wait.
AFFINITY_SLACK = 16
log = logging.getLogger(__name__)


class EnginePool:
    """Route each episode to the engine that has its prefix cached.

    New episodes go to the engine with the fewest requests in flight.

    Args:
      engines: must have been started with the weights that are wanted; they count as ready.
      restart: by URL, a function that restarts a dead engine at the same URL. It blocks until the
        engine answers and raises EngineError if it does not. Engines without an entry are restarted
        by other means, and are used again when they answer.
    """

    def __init__(
        self, engines: Sequence[Engine], restart: Mapping[str, Callable[[], None]] | None = None
    ):
        if not engines:
            raise ValueError(
                "a pool needs at least one engine; give --config.engine.urls=URL[,URL...] or let"
                " launch.train start one"
            )
        self.engines: list[Engine] = []
        self.states: dict[str, State] = {}
        self.in_flight: collections.Counter[str] = collections.Counter()
        self.causes: dict[str, str] = {}  # url -> why the engine was last taken out of service
        # url -> how often in a row it was taken out by requests, without an answer in between
        self.strikes: collections.Counter[str] = collections.Counter()
        self.restart = dict(restart or {})
        self.weights: Weights | None = None  # the current ones; None until the first publication
        self.proofs: dict[str, Proof] = {}  # by url: the last one that the engine gave
        self.supervised = False  # whether `supervise` brings engines back
        self._update_locks: dict[str, asyncio.Lock] = {}
        self._became_ready: asyncio.Event | None = None  # set when the next engine becomes ready
        self._homes: collections.OrderedDict[str, Engine] = collections.OrderedDict()
        for engine in engines:
            self.join(engine, "ready")

    async def __aenter__(self) -> EnginePool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections to all engines."""
        for engine in self.engines:
            await engine.close()

    def join(self, engine: Engine, state: State = "starting") -> None:
        """Add an engine, at any time.

        It serves once a publication or the supervisor has brought it to the current weights.

        Raises:
          ValueError: the pool has an engine at this URL.
        """
        url = engine.url
        if url in self.states:
            raise ValueError(
                f"the pool has an engine at {url} already; each needs a URL of its own"
            )
        self.engines.append(engine)
        self.states[url] = state
        self.in_flight[url] = 0
        self._update_locks[url] = asyncio.Lock()
        if state != "ready":
            self.causes[url] = f"{url} has not proven its weights yet"
            engine.refuse(self.causes[url])

    def engines_in(self, *states: State) -> list[Engine]:
        """Return the engines in one of these states, in the order in which they joined."""
        return [engine for engine in self.engines if self.states[engine.url] in states]

    # -- sampling
    # ---------------------------------------------------------------------------------------------

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_seconds: float,
        *,
        affinity: str | None = None,
    ) -> Completion:
        """Sample a continuation of `input_ids` on one of the engines.

        If that engine fails, is taken out of service or rejects the request, the request continues
        on another one.

        Args:
          input_ids: tokens of the prompt.
          sampling: how to sample, and how much.
          deadline_seconds: for the whole call, apart from the time in which weights are published.
          affinity: requests with the same text go to the same engine where possible, because its
            cache holds their common prefix.

        Raises:
          EngineError: the engines failed; at once if none is left and no supervisor runs.
          RequestRejected: no engine that serves takes the request.
        """
        ends = time.monotonic() + deadline_seconds
        completion = Completion.unfinished()
        moves = 0
        rejections: dict[Engine, RequestRejected] = {}
        while True:
            engine = self._choose(affinity, rejections)
            if engine is None and rejections:
                raise next(iter(rejections.values()))
            if engine is None:
                await self.wait_ready(ends + completion.seconds_held - time.monotonic())
                continue
            self.in_flight[engine.url] += 1
            try:
                remaining = ends + completion.seconds_held - time.monotonic()
                done = await engine.generate(input_ids, sampling, remaining, begun=completion)
            except EngineDead as error:
                self.mark_dead(engine, str(error))
            except (EngineFailed, EngineUnproven) as error:
                self._strike(engine, error)
            except EngineRefused:  # taken out already, by another request or the supervisor
                pass
            except RequestRejected as error:
                rejections[engine] = error
                continue
            else:
                self.strikes.pop(engine.url, None)
                for other, rejection in rejections.items():
                    self._strike(other, rejection)
                return done
            finally:
                self.in_flight[engine.url] -= 1
            if moves:  # the first move is free: another engine may well be healthy
                wait = growing_wait(moves - 1, MAX_MOVE_WAIT_SECONDS)
                await asyncio.sleep(min(wait, max(ends - time.monotonic(), 0.0)))
            moves += 1
            if moves >= max(MAX_MOVES, len(self.engines)):
                raise EngineError(
                    f"{moves} engines failed while they had this request, {engine.url} last:"
                    f" {self.causes.get(engine.url)}"
                )

    async def wait_ready(self, seconds: float) -> None:
        """Wait until an engine serves.

        Raises:
          EngineError: none served within `seconds`, or no supervisor runs that could bring one
            back. The message has the cause for every engine.
        """
        ends = time.monotonic() + seconds
        while not self.engines_in("ready", "updating"):
            if not self.supervised:
                raise EngineError("no engine is left: " + "; ".join(self.causes.values()))
            if self._became_ready is None:
                self._became_ready = asyncio.Event()
            try:
                async with asyncio.timeout(max(ends - time.monotonic(), 0.0)):
                    await self._became_ready.wait()
            except TimeoutError:
                causes = "; ".join(self.causes.values())
                raise EngineError(f"no engine came back within {seconds:.0f} s: {causes}") from None

    def _choose(self, affinity: str | None, avoid: Collection[Engine]) -> Engine | None:
        """Return the engine for a request, or None while no engine serves but those to avoid."""
        ready = self._engines_apart_from(avoid, "ready")
        serving = ready or self._engines_apart_from(avoid, "updating")
        if not serving:
            return None
        least_busy = min(serving, key=lambda engine: self.in_flight[engine.url])
        if affinity is None:
            return least_busy
        engine = self._homes.get(affinity)
        if engine is None or engine in avoid or not self._should_stay(engine, least_busy):
            engine = least_busy
        self._homes[affinity] = engine
        self._homes.move_to_end(affinity)
        if len(self._homes) > MAX_AFFINITIES:
            self._homes.popitem(last=False)
        return engine

    def _engines_apart_from(self, avoid: Collection[Engine], state: State) -> list[Engine]:
        return [engine for engine in self.engines_in(state) if engine not in avoid]

    def _should_stay(self, home: Engine, least_busy: Engine) -> bool:
        """Return whether an episode's next request goes to the engine that has its prefix."""
        if self.states[home.url] not in ("ready", "updating"):
            return False
        if home is least_busy:
            return True
        limit = 2 * self.in_flight[least_busy.url] + AFFINITY_SLACK
        return self.in_flight[home.url] <= limit

    # -- states
    # ---------------------------------------------------------------------------------------------

    def mark_dead(self, engine: Engine, cause: str) -> None:
        """Take out an engine that does not answer; its requests move to other engines."""
        self._take_out(engine, "dead", cause)

    def quarantine(self, engine: Engine, cause: str) -> None:
        """Take out an engine that may answer but has not proven the current weights."""
        self._take_out(engine, "suspect", cause)

    def _strike(self, engine: Engine, error: EngineError) -> None:
        """Take out an engine that a request could not use, unless it is out already.

        Its own probes may succeed all the same, so the supervisor waits longer each time.
        """
        if self.states[engine.url] not in ("ready", "updating"):
            return
        self.strikes[engine.url] += 1
        self.quarantine(engine, str(error))

    def admit(self, engine: Engine) -> None:
        """Put an engine into service."""
        if self.states[engine.url] in ("starting", "suspect", "dead"):
            weights = f", weights {self.weights.version}" if self.weights else ""
            log.info("engine %s is ready%s", engine.url, weights)
        self.states[engine.url] = "ready"
        self.causes.pop(engine.url, None)
        engine.accept()
        engine.release()
        if self._became_ready is not None:
            self._became_ready.set()
            self._became_ready = None

    async def bring(self, engine: Engine, mode: PauseMode = "abort") -> float:
        """Bring one engine to the pool's current weights, and admit it.

        Args:
          engine: one of the pool's.
          mode: how its running requests are paused, see `Engine.pause`.

        Returns:
          The mean error of its probe, in nats.

        Raises:
          EngineError: it did not prove the weights. The engine is then suspect or dead, and so it
            is when this call is cancelled.
        """
        async with self._update_locks[engine.url]:
            if self.weights is None:
                raise EngineError(
                    f"{engine.url} cannot be brought to the current weights: nothing was"
                    " published yet"
                )
            while True:
                weights = self.weights
                proof = await self._load_or_quarantine(engine, weights, mode)
                if weights is self.weights:  # no other publication came in between
                    break
            self._require_agreement(engine, proof)
            self.proofs[engine.url] = proof
            engine.prove(weights.version)
            self.admit(engine)
            return proof.error

    def _require_agreement(self, engine: Engine, proof: Proof) -> None:
        """Quarantine an engine whose hashes differ from those of the engines that serve.

        One against one, nobody can say which is right: both are out, and are brought back anew.

        Raises:
          EngineError: they differ.
        """
        serving = [other for other in self.engines_in("ready") if other is not engine]
        differing = {
            other: disagreement(proof, self.proofs[other.url])
            for other in serving
            if other.url in self.proofs
        }
        rivals = [other for other, tensors in differing.items() if tensors]
        if not rivals:
            return
        cause = (
            f"{engine.url} and {rivals[0].url} hold different bytes of weights {proof.version} in"
            f" {differing[rivals[0]]}; engines of one pool need one kind of GPU and the same flags."
            " Start the wrong one again"
        )
        if len(rivals) == 1:
            rival = rivals[0]
            doubted = self.proofs[rival.url]  # its hashes may be the wrong ones
            self.proofs[rival.url] = dataclasses.replace(doubted, checksums=None)
            self.quarantine(rival, cause)
        self.quarantine(engine, cause)
        raise EngineError(cause)

    async def _load_or_quarantine(self, engine: Engine, weights: Weights, mode: PauseMode) -> Proof:
        """Load and verify weights; on any failure take the engine out and raise EngineError."""
        if self.states[engine.url] in ("ready", "updating"):
            self.states[engine.url] = "updating"
            engine.hold()
        else:
            self.states[engine.url] = "starting"
        try:
            return await load_and_prove(engine, weights, mode, self.proofs.get(engine.url))
        except EngineDead as failure:
            self.mark_dead(engine, str(failure))
            raise
        except EngineError as failure:
            self.quarantine(engine, str(failure))
            raise
        except (AttributeError, LookupError, TypeError, ValueError, OSError) as failure:
            cause = (
                f"{engine.url} answered an update unlike an SGLang server, or its checkpoint"
                f" cannot be read: {failure!r}"
            )
            self.quarantine(engine, cause)
            raise EngineError(cause) from failure
        except asyncio.CancelledError:
            cause = f"{engine.url} did not take weights {weights.version} in time; see its log"
            self.quarantine(engine, cause)
            raise

    def _take_out(self, engine: Engine, state: State, cause: str) -> None:
        if self.states[engine.url] != state:
            level = logging.INFO if state == "lent" else logging.WARNING
            log.log(level, "engine %s is %s: %s", engine.url, state, cause)
        self.states[engine.url] = state
        self.causes[engine.url] = cause
        engine.refuse(cause)

    # -- time division of devices
    # ---------------------------------------------------------------------------------------------

    async def lend(self, count: int) -> None:
        """Free the devices of the last `count` engines for the learner.

        Their running requests continue on the remaining engines, or wait if all are lent. Call
        `take_back` and publish weights to end it: what the memory holds afterwards is undefined. An
        engine that fails to free its memory goes into quarantine.
        """

        async def lend(engine: Engine) -> None:
            async with self._update_locks[engine.url]:
                engine.hold()
                await engine.pause("abort")
                await engine.drain(DRAIN_SECONDS)  # partial answers come back
                self._take_out(engine, "lent", f"the devices of {engine.url} are training")
                await engine.release_memory()

        serving = self.engines_in("ready", "updating")
        await self._for_each(
            [engine for engine in self.engines[-count:] if engine in serving], lend
        )

    async def take_back(self) -> None:
        """Give the lent engines their memory back.

        They hold requests until a publication has brought weights there.
        """

        async def take(engine: Engine) -> None:
            await engine.resume_memory()
            engine.hold()
            engine.accept()
            self.states[engine.url] = "updating"

        await self._for_each(self.engines_in("lent"), take)

    async def suspend(self, mode: PauseMode, tags: Sequence[str]) -> None:
        """Stop sampling on devices that the learner needs now, until the next publication.

        For engines inside the trainer. Requests wait and go on with the published weights; their
        deadlines stand still.

        Args:
          mode: how running requests are paused, see `Engine.pause`.
          tags: memory that is freed (MEMORY_TAGS); running requests are then aborted.
        """

        async def suspend(engine: Engine) -> None:
            async with self._update_locks[engine.url]:
                self.states[engine.url] = "updating"
                engine.hold()
                await engine.pause(mode)
                if tags:
                    await engine.release_memory(tuple(tags))

        await self._for_each(self.engines_in("ready", "updating"), suspend)

    async def _for_each(
        self, engines: Sequence[Engine], act: Callable[[Engine], Awaitable[None]]
    ) -> None:
        """Run `act` on several engines at once; an engine that fails goes into quarantine."""

        async def attempt(engine: Engine) -> None:
            try:
                await act(engine)
            except EngineError as error:
                self.quarantine(engine, str(error))

        await asyncio.gather(*(attempt(engine) for engine in engines))
