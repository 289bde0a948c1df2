"""Several engines as one: routing, and one state for each.

    starting    joined or started again; serves when it has proven the current weights
    ready       serves
    updating    takes new weights; this side holds its requests until they are proven
    suspect     in quarantine: an update failed or was not proven, or it does not answer; serves again when it has proven the current weights
    dead        nobody answers at its URL
    lent        the learner has its devices (`lend`)

What ran on an engine that is taken out goes on elsewhere, from the tokens that it had. Taking out
is done here and by whoever meets an error; bringing back is `rome.engine.supervise`'s.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from rome.engine.client import (
    Completion,
    Engine,
    EngineDead,
    EngineError,
    EngineRefused,
    EngineUnproven,
    Sampling,
)
from rome.engine.proof import Weights, load_and_prove

State = Literal["starting", "ready", "updating", "suspect", "dead", "lent"]
KEPT_AFFINITIES = 100_000
# for answers that a pause cut to arrive; later ones are sampled again elsewhere
DRAIN_SECONDS = 2.0
MOST_MOVES = 8  # a request that was on so many engines when they failed may be the reason
# in flight at an episode's engine, beyond twice the least elsewhere: the cached prefix is not worth
# the wait any more
CROWDED = 16
log = logging.getLogger(__name__)


class EnginePool:
    """Routes an episode to the engine that has its prefix cached, and new episodes to the engine
    with the least in flight.

    Args:
      engines: they count as ready: whoever hands them over has started them with the weights that
        are wanted.
      restart: by URL, what starts a dead engine of our own again, at the same URL; it blocks until
        the engine answers, and raises EngineError when it does not. The others are somebody else's
        to start, and are taken back when they answer again.
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
        self.causes: dict[str, str] = {}  # url -> why it was taken out last
        self.restart = dict(restart or {})
        self.weights: Weights | None = None  # the current ones; None until the first publication
        self.supervised = False  # whether somebody brings engines back
        self._bringing: dict[str, asyncio.Lock] = {}
        self._opened: asyncio.Event | None = None  # set when an engine becomes ready
        self._homes: collections.OrderedDict[str, Engine] = collections.OrderedDict()
        for engine in engines:
            self.join(engine, "ready")

    async def __aenter__(self) -> EnginePool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()

    def join(self, engine: Engine, state: State = "starting") -> None:
        """Adds an engine at any time.

        It serves when a publication or the supervisor has brought it to the current weights.
        """
        if engine.url in self.states:
            raise ValueError(
                f"the pool has an engine at {engine.url} already; each needs a URL of its own"
            )
        self.engines.append(engine)
        self.states[engine.url], self.in_flight[engine.url], self._bringing[engine.url] = (
            state,
            0,
            asyncio.Lock(),
        )
        if state != "ready":
            self.causes[engine.url] = f"{engine.url} has not proven its weights yet"
            engine.refuse(self.causes[engine.url])

    async def generate(
        self,
        input_ids: list[int],
        sampling: Sampling,
        deadline_s: float,
        *,
        affinity: str | None = None,
    ) -> Completion:
        """As `Engine.generate`, on the engine of this affinity.

        An engine that is taken out hands its request, as far as it came, to another one.

        Raises: EngineError; at once when no engine is left and nobody brings one back.
        """
        ends, begun, moves = time.monotonic() + deadline_s, Completion([], [], "abort", []), 0
        while True:
            engine = self._choose(affinity)
            if engine is None:
                await self.wait_ready(ends - time.monotonic())
                continue
            self.in_flight[engine.url] += 1
            try:
                return await engine.generate(
                    input_ids, sampling, ends - time.monotonic(), begun=begun
                )
            except EngineDead as error:
                self.mark_dead(engine, str(error))
            except EngineUnproven as error:
                self.quarantine(engine, str(error))
            except EngineRefused:  # somebody else has found it out
                pass
            finally:
                self.in_flight[engine.url] -= 1
            moves += 1
            if moves == MOST_MOVES:
                raise EngineError(
                    f"{moves} engines failed while they had this request, {engine.url} last:"
                    f" {self.causes.get(engine.url)}"
                )

    def engines_in(self, *states: State) -> list[Engine]:
        return [engine for engine in self.engines if self.states[engine.url] in states]

    def mark_dead(self, engine: Engine, cause: str) -> None:
        """No request goes there any more; what ran there moves elsewhere."""
        self._take_out(engine, "dead", cause)

    def quarantine(self, engine: Engine, cause: str) -> None:
        """As `mark_dead`, of an engine that may answer, but is not to be trusted until it has
        proven the current weights.
        """
        self._take_out(engine, "suspect", cause)

    def admit(self, engine: Engine) -> None:
        """It serves from now on."""
        if self.states[engine.url] in ("starting", "suspect", "dead"):
            log.info(
                "engine %s is ready%s",
                engine.url,
                f", weights {self.weights.version}" if self.weights else "",
            )
        self.states[engine.url] = "ready"
        self.causes.pop(engine.url, None)
        engine.accept()
        engine.release()
        if self._opened is not None:
            self._opened.set()
            self._opened = None

    async def bring(self, engine: Engine, mode: str = "abort") -> float:
        """Brings one engine to the pool's current weights and admits it.

        Returns the largest error of its probe, in nats.

        Raises: EngineError; the engine is then suspect or dead, and so it is when this is
        cancelled.
        """
        async with self._bringing[engine.url]:
            if self.weights is None:
                raise EngineError(
                    f"{engine.url} cannot be brought to the current weights: nothing was"
                    " published yet"
                )
            weights = None
            try:
                while weights is not self.weights:  # a publication may come in between
                    weights = self.weights
                    if self.states[engine.url] in ("ready", "updating"):
                        self.states[engine.url] = "updating"
                        engine.hold()
                    else:
                        self.states[engine.url] = "starting"
                    error = await load_and_prove(engine, weights, mode)
            except EngineDead as failure:
                self.mark_dead(engine, str(failure))
                raise
            except EngineError as failure:
                self.quarantine(engine, str(failure))
                raise
            except (LookupError, TypeError, ValueError, OSError) as failure:
                self.quarantine(
                    engine,
                    f"{engine.url} answered an update unlike an SGLang server, or its checkpoint"
                    f" cannot be read: {failure!r}",
                )
                raise EngineError(self.causes[engine.url]) from failure
            except asyncio.CancelledError:
                self.quarantine(
                    engine,
                    f"{engine.url} did not take weights {weights.version} in time; see its log",
                )
                raise
            engine.prove(weights.version)
            self.admit(engine)
            return error

    async def wait_ready(self, seconds: float) -> None:
        """Returns when an engine serves.

        Raises EngineError, with every cause, when none does within `seconds` or nobody brings one
        back.
        """
        ends = time.monotonic() + seconds
        while not self.engines_in("ready", "updating"):
            if not self.supervised:
                raise EngineError("no engine is left: " + "; ".join(self.causes.values()))
            self._opened = self._opened or asyncio.Event()
            try:
                async with asyncio.timeout(max(ends - time.monotonic(), 0.0)):
                    await self._opened.wait()
            except TimeoutError:
                raise EngineError(
                    f"no engine came back within {seconds:.0f} s: "
                    + "; ".join(self.causes.values())
                ) from None

    async def lend(self, count: int) -> None:
        """Time division: frees the devices of `count` engines for the learner, always of the last
        ones.

        What ran there goes on on the others, from the tokens that it had; where all are lent, it
        waits. `take_back`, then a publication, ends it: what the memory holds afterwards is
        undefined. One that cannot be lent goes into quarantine.
        """

        async def lend(engine: Engine) -> None:
            async with self._bringing[engine.url]:
                engine.hold()
                await engine.pause("abort")
                await engine.drain(DRAIN_SECONDS)  # what it had sampled comes back
                self._take_out(engine, "lent", f"the devices of {engine.url} are training")
                await engine.release_memory()

        await self._each(
            [
                engine
                for engine in self.engines[-count:]
                if self.states[engine.url] in ("ready", "updating")
            ],
            lend,
        )

    async def take_back(self) -> None:
        """The engines that were lent have their memory again.

        They hold requests until a publication has brought weights there.
        """

        async def take(engine: Engine) -> None:
            await engine.resume_memory()
            engine.hold()
            engine.accept()
            self.states[engine.url] = "updating"

        await self._each(self.engines_in("lent"), take)

    async def _each(self, engines: Sequence[Engine], act: Callable) -> None:
        """Does one thing on several engines at once. One that fails goes into quarantine."""

        async def attempt(engine: Engine) -> None:
            try:
                await act(engine)
            except EngineError as error:
                self.quarantine(engine, str(error))

        await asyncio.gather(*(attempt(engine) for engine in engines))

    def _take_out(self, engine: Engine, state: State, cause: str) -> None:
        if self.states[engine.url] != state:
            log.log(
                logging.INFO if state == "lent" else logging.WARNING,
                "engine %s is %s: %s",
                engine.url,
                state,
                cause,
            )
        self.states[engine.url] = state
        self.causes[engine.url] = cause
        engine.refuse(cause)

    def _choose(self, affinity: str | None) -> Engine | None:
        """None while no engine serves."""
        serving = self.engines_in("ready") or self.engines_in("updating")
        if not serving:
            return None
        home = self._homes.get(affinity) if affinity is not None else None
        least = min(serving, key=lambda engine: self.in_flight[engine.url])
        crowd = 2 * self.in_flight[least.url] + CROWDED
        if (
            home is None
            or self.states[home.url] not in ("ready", "updating")
            or (home is not least and self.in_flight[home.url] > crowd)
        ):
            home = least
        if affinity is not None:
            self._homes[affinity] = home
            self._homes.move_to_end(affinity)
            if len(self._homes) > KEPT_AFFINITIES:
                self._homes.popitem(last=False)
        return home
