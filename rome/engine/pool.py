"""Several engines as one: routing, and one state for each.

An engine is `ready`, `updating` (its server holds new requests until it goes on) or `dead`: nobody answers there, or an update failed to prove
itself, so that nothing sampled there could be trained on.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from rome.engine.client import Completion, Engine, EngineDead, EngineError, Sampling

KEPT_AFFINITIES = 100_000
Answer = TypeVar("Answer")


class EnginePool:
    """Routes an episode to the engine that has its prefix cached, and new episodes to the engine with the least in flight."""

    def __init__(self, engines: Sequence[Engine]):
        if not engines:
            raise ValueError("a pool needs at least one engine; give --config.engines=URL[,URL...] or let launch.train start one")
        self.engines = list(engines)
        self.states = {engine.url: "ready" for engine in engines}
        self.in_flight = {engine.url: 0 for engine in engines}
        self._causes: dict[str, str] = {}  # url -> why it is dead
        self._homes: collections.OrderedDict[str, Engine] = collections.OrderedDict()

    async def __aenter__(self) -> EnginePool:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for engine in self.engines:
            await engine.close()

    async def generate(self, input_ids: list[int], sampling: Sampling, deadline_s: float, *, affinity: str | None = None) -> Completion:
        """As `Engine.generate`, on the engine of this affinity. An engine that dies hands its request to another one.

        Raises: EngineError; at once when no engine is left.
        """
        ends = time.monotonic() + deadline_s
        while True:
            engine = self._choose(affinity)
            self.in_flight[engine.url] += 1
            try:
                return await engine.generate(input_ids, sampling, ends - time.monotonic())
            except EngineDead as error:
                self.mark_dead(engine, str(error))
            finally:
                self.in_flight[engine.url] -= 1

    def alive(self) -> list[Engine]:
        """The engines that are not dead. Raises EngineError, with every cause, when there are none."""
        alive = [engine for engine in self.engines if self.states[engine.url] != "dead"]
        if not alive:
            raise EngineError("no engine is left: " + "; ".join(self._causes.values()))
        return alive

    def mark_dead(self, engine: Engine, cause: str) -> None:
        """No request goes there any more; what lived there moves elsewhere."""
        self.states[engine.url] = "dead"
        self._causes[engine.url] = cause
        engine.refuse(cause)

    async def pause_all(self, mode: str = "abort") -> None:
        """Stops sampling everywhere. `generate` waits on this side too, so that nothing starts before `resume_all`, whoever lets a server go on."""
        for engine in self.alive():
            self.states[engine.url] = "updating"
            engine.hold()
        await self.on_all(lambda engine: engine.pause(mode))

    async def resume_all(self) -> None:
        await self.on_all(lambda engine: engine.resume())
        for engine in self.alive():
            self.states[engine.url] = "ready"
            engine.release()

    async def on_all(self, act: Callable[[Engine], Awaitable[Answer]]) -> list[Answer]:
        """Does one thing on every living engine at once. An engine that fails is marked dead, and its error raised when all have ended."""

        async def attempt(engine: Engine) -> Answer | EngineError:
            try:
                return await act(engine)
            except EngineError as error:
                self.mark_dead(engine, str(error))
                return error

        answers = await asyncio.gather(*(attempt(engine) for engine in self.alive()))
        for answer in answers:
            if isinstance(answer, EngineError):
                raise answer
        return answers

    def _choose(self, affinity: str | None) -> Engine:
        home = self._homes.get(affinity) if affinity is not None else None
        if home is None or self.states[home.url] == "dead":
            home = min(self.alive(), key=lambda engine: (self.states[engine.url] != "ready", self.in_flight[engine.url]))
        if affinity is not None:
            self._homes[affinity] = home
            self._homes.move_to_end(affinity)
            if len(self._homes) > KEPT_AFFINITIES:
                self._homes.popitem(last=False)
        return home
