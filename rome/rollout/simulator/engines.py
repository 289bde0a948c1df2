"""Simulated episodes and engines: slots, prefill, and decoding that requests slow down."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import heapq
import itertools

from rome.rollout.simulator.clock import Level, VirtualLoop
from rome.rollout.simulator.pod import PodModel

MIN_TOKEN_SECONDS = 1e-12  # in place of 0, by which seconds cannot be divided


@dataclasses.dataclass(frozen=True)
class Sample:
    """What an episode does: seconds and tokens of each turn.

    Args:
      prefills: seconds in which an engine reads the prompt.
      tokens: tokens that are sampled.
      latencies: seconds of the environment.
      alone: seconds of the whole episode if it has the pod for itself.
    """

    prefills: list[float]
    tokens: list[float]
    latencies: list[float]
    alone: float


class SimulatedEpisode:
    """An episode in play: it alternates between its engine and its environment.

    Args:
      sample: what it does.
      engines: where its turns are sampled.
      loop: the virtual event loop.
    """

    def __init__(self, sample: Sample, engines: SimulatedEngines, loop: VirtualLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.engine = engines.least_used()
        self.tokens_left = 0.0  # of the turn that is being sampled
        self.is_decoding = False
        self._sample = sample
        self._engines = engines
        self._loop = loop
        self._turn = 0

    @property
    def is_cancelled(self) -> bool:
        """Whether the scheduler cancelled the episode."""
        return self.done.cancelled()

    @property
    def prefill_seconds(self) -> float:
        """Seconds in which its engine reads the prompt of the current turn."""
        return self._sample.prefills[self._turn]

    async def play(self) -> None:
        """Wait until the last turn is answered. If cancelled, leave the engine."""
        self.engine.episodes += 1
        self._start_turn()
        try:
            await self.done
        except asyncio.CancelledError:
            self.engine.abort(self)
            raise
        finally:
            self.engine.episodes -= 1

    def on_sampled(self) -> None:
        """Continue with the environment: the engine has sampled the turn."""
        latency = self._sample.latencies[self._turn]
        self._loop.call_later(latency, self._on_observation)

    def move(self) -> None:
        """Continue the current turn on another engine."""
        self.engine.episodes -= 1
        self.engine = self._engines.least_used()
        self.engine.episodes += 1
        self.engine.submit(self)

    def _start_turn(self) -> None:
        self.tokens_left = self._sample.tokens[self._turn]
        if self.engine.is_lent:
            self.move()
        else:
            self.engine.submit(self)

    def _on_observation(self) -> None:
        if self.is_cancelled:
            return
        self._turn += 1
        if self._turn < len(self._sample.latencies):
            self._start_turn()
        else:
            self.done.set_result(None)


class SimulatedEngines:
    """The engines of a pod, and the totals that a simulation measures.

    Args:
      model: numbers and speeds of the engines.
      loop: the virtual event loop.
    """

    def __init__(self, model: PodModel, loop: VirtualLoop) -> None:
        self.busy_slots = Level(loop)
        self.idle_engines = Level(loop, model.engines)
        self._engines = [SimulatedEngine(model, loop, self) for _ in range(model.engines)]
        self._lent = self._engines[: model.lent_engines]

    def least_used(self) -> SimulatedEngine:
        """Return the engine with the fewest episodes, among those that are not lent."""
        available = (engine for engine in self._engines if not engine.is_lent)
        return min(available, key=lambda engine: engine.episodes)

    def lend(self) -> None:
        """Lend the model's `lent_engines` to the trainer: their requests move to the others."""
        for engine in self._lent:
            engine.is_lent = True
        for engine in self._lent:
            for episode in engine.evict():
                episode.move()

    def take_back(self) -> None:
        """End the lending. Episodes that moved stay with their new engines."""
        for engine in self._lent:
            engine.is_lent = False

    def pause(self) -> None:
        """Stop all decoding and start no request, while weights are published."""
        for engine in self._engines:
            engine.pause()

    def resume(self) -> None:
        """Continue after a publication."""
        for engine in self._engines:
            engine.resume()


class SimulatedEngine:
    """One engine, which shares its speed equally between the requests that decode.

    An episode has at most one request. `_clock` counts the tokens of a request that had decoded
    from the beginning. A request that starts at clock c with n tokens to sample is done at clock
    c + n, whatever other requests start or end meanwhile. So the order of completions is a heap,
    and only the next one needs a timer.
    """

    def __init__(self, model: PodModel, loop: VirtualLoop, engines: SimulatedEngines) -> None:
        self.episodes = 0
        self.is_lent = False
        self._model = model
        self._loop = loop
        self._engines = engines
        self._is_paused = False
        self._running = 0  # requests that have a slot: they read their prompt, or decode
        self._waiting: collections.deque[SimulatedEpisode] = collections.deque()
        self._decoding: list[tuple[float, int, SimulatedEpisode]] = []  # a heap by completion
        self._order = itertools.count()
        self._clock = 0.0
        self._clock_time = 0.0  # when `_clock` was right
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, episode: SimulatedEpisode) -> None:
        """Start the request of an episode, or queue it until a slot is free."""
        self._waiting.append(episode)
        self._start_waiting()

    def abort(self, episode: SimulatedEpisode) -> None:
        """End the request of a cancelled episode.

        A request that decodes ends at once. One that reads its prompt keeps its slot until it is
        read, and one that waits for a slot is skipped when its turn comes.
        """
        if not episode.is_decoding:
            return
        self._advance_clock()
        self._decoding = [entry for entry in self._decoding if entry[2] is not episode]
        heapq.heapify(self._decoding)
        self._free_slot()

    def evict(self) -> list[SimulatedEpisode]:
        """Return the episodes that must move because the engine is lent.

        Those that read their prompt move when it is read. Others keep the tokens that they have,
        but their prompt is read again elsewhere.
        """
        self._advance_clock()
        moved = []
        for done_at, _, episode in self._decoding:
            episode.tokens_left = done_at - self._clock
            episode.is_decoding = False
            moved.append(episode)
        self._count_running(-len(moved))
        moved.extend(self._waiting)
        self._decoding.clear()
        self._waiting.clear()
        self._set_timer()
        return [episode for episode in moved if not episode.is_cancelled]

    def pause(self) -> None:
        """Stop decoding and start no request."""
        self._advance_clock()
        self._is_paused = True
        self._set_timer()

    def resume(self) -> None:
        """Continue after a pause."""
        self._advance_clock()
        self._is_paused = False
        self._set_timer()
        self._start_waiting()

    def _start_waiting(self) -> None:
        while self._waiting and self._running < self._model.slots:
            if self._is_paused or self.is_lent:
                return
            episode = self._waiting.popleft()
            if episode.is_cancelled:
                continue
            self._count_running(1)
            if episode.prefill_seconds > 0:
                self._loop.call_later(episode.prefill_seconds, self._on_prompt_read, episode)
            else:
                self._decode(episode)

    def _on_prompt_read(self, episode: SimulatedEpisode) -> None:
        if episode.is_cancelled:
            self._free_slot()
        elif self.is_lent:
            self._free_slot()
            episode.move()
        else:
            self._decode(episode)

    def _decode(self, episode: SimulatedEpisode) -> None:
        self._advance_clock()
        episode.is_decoding = True
        done_at = self._clock + episode.tokens_left
        heapq.heappush(self._decoding, (done_at, next(self._order), episode))
        self._set_timer()

    def _on_timer(self) -> None:
        """Complete the requests that have all their tokens."""
        self._timer = None
        self._advance_clock()
        self._clock = max(self._clock, self._decoding[0][0])  # rounding may leave it below
        while self._decoding and self._decoding[0][0] <= self._clock:
            _, _, episode = heapq.heappop(self._decoding)
            episode.is_decoding = False
            episode.on_sampled()
            self._count_running(-1)
        self._set_timer()
        self._start_waiting()

    def _free_slot(self) -> None:
        self._count_running(-1)
        self._set_timer()
        self._start_waiting()

    def _count_running(self, change: int) -> None:
        was_idle = self._running == 0
        self._running += change
        is_idle = self._running == 0
        self._engines.busy_slots.add(change)
        if is_idle != was_idle:
            self._engines.idle_engines.add(is_idle - was_idle)

    def _token_seconds(self) -> float:
        return max(self._model.token_seconds(len(self._decoding)), MIN_TOKEN_SECONDS)

    def _advance_clock(self) -> None:
        """Bring the clock up to now. Call it before the set of decoding requests changes."""
        now = self._loop.now
        if self._decoding and not self._is_paused:
            self._clock += (now - self._clock_time) / self._token_seconds()
        self._clock_time = now

    def _set_timer(self) -> None:
        """Set the timer to the next completion. Call it when the decoding requests have changed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._decoding and not self._is_paused:
            tokens_left = max(0.0, self._decoding[0][0] - self._clock)
            seconds_left = tokens_left * self._token_seconds()
            self._timer = self._loop.call_at(self._loop.now + seconds_left, self._on_timer)
