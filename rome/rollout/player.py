"""ROLL's player: one episode until it counts, or a list of them at once; `groups.py` decides which
of them training plays, and when.

Each episode moves alone (generation, commands and grading of different episodes overlap) under one
limit of episodes at once. A finished trajectory is on disk before it is counted, so a killed run
takes it up again instead of paying for it twice. An episode that the infrastructure spoiled is
replaced from the same initial state with another seed; it never becomes a reward of 0.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import pathlib
import threading
from collections.abc import Callable, Sequence

from envs.gem.core import Env
from rome.agent.loop import Generator, Limits, run_episode
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.model.tokenizer import Chat
from rome.rollout.anchors import anchor_of
from rome.rollout.forks import Forks


class Stopped(Exception):
    """The user asked the run to stop while episodes were in flight.

    Those that had finished are on disk.
    """


class RolloutError(RuntimeError):
    """The infrastructure spoiled one episode several times over."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """What to play: a task by name, its place among the groups, the seed of its sampling.

    name: of its file. prefix: an expert's chunks that are replayed before the policy takes over.
    forks: environments in which they were replayed already.
    """

    task: str
    group: int
    episode: int
    seed: int
    name: str = ""
    prefix: tuple[Chunk, ...] = ()
    forks: Forks | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass
class Accounting:
    """started = trained + dropped (by reason) + in_flight, at every moment.

    The trainer counts in its own thread, the rollouts in theirs.
    """

    started: int = 0
    trained: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    in_flight: int = 0
    _lock: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )

    def begin(self) -> None:
        with self._lock:
            self.started += 1
            self.in_flight += 1

    def drop(self, reason: str, number: int = 1) -> None:
        if number:
            with self._lock:
                self.in_flight -= number
                self.dropped[reason] += number

    def train(self, number: int) -> None:
        with self._lock:
            self.in_flight -= number
            self.trained += number

    def check(self) -> None:
        counts = self.to_json()
        if (
            counts["started"]
            != counts["trained"] + sum(counts["dropped"].values()) + counts["in_flight"]
            or counts["in_flight"] < 0
        ):
            raise AssertionError(f"sample accounting does not add up: {counts}")

    def to_json(self) -> dict:
        with self._lock:
            return {
                "started": self.started,
                "trained": self.trained,
                "dropped": dict(self.dropped),
                "in_flight": self.in_flight,
            }

    @classmethod
    def from_json(cls, document: dict) -> Accounting:
        """As of a checkpoint: what was in flight then is started anew."""
        counts = cls(
            document["started"], document["trained"], collections.Counter(document["dropped"]), 0
        )
        counts.started -= document["in_flight"]
        return counts


@dataclasses.dataclass
class EpisodePlayer:
    """Plays lists of episodes over one engine (or pool) and environments made by name.

    Args:
      make_env: task name -> a fresh environment for one episode.
      concurrency: episodes at once.
      should_stop: asked twice a second; True cancels what is in flight and raises Stopped.
      attempts: how often an episode spoiled by infrastructure is tried in all.
    """

    engine: Generator
    make_env: Callable[[str], Env]
    chat: Chat
    limits: Limits
    concurrency: int
    should_stop: Callable[[], bool] = lambda: False
    attempts: int = 3

    async def play(
        self,
        episodes: Sequence[Episode],
        *,
        temperature: float,
        accounting: Accounting | None = None,
        record: Callable[[Episode], pathlib.Path] | None = None,
        on_finish: Callable[[Trajectory], None] | None = None,
        routes: bool = False,
    ) -> list[Trajectory]:
        """Plays all episodes; returns their trajectories in the order asked for, each of them
        trainable.

        Args:
          record: where an episode's trajectory is kept. One that is there already is taken, not
            played again.
          accounting: counts of training samples; evaluations pass none.
          routes: trajectories keep the experts of their tokens, as the engine returns them.
        Raises: Stopped; RolloutError when one episode is spoiled `attempts` times.
        """
        accounting = accounting or Accounting()
        gate = asyncio.Semaphore(self.concurrency)

        async def finish(episode: Episode) -> Trajectory:
            async with gate:
                accounting.begin()
                trajectory = await self.play_one(
                    episode,
                    temperature=temperature,
                    accounting=accounting,
                    path=record and record(episode),
                    routes=routes,
                )
            if on_finish is not None:
                on_finish(trajectory)
            return trajectory

        futures = [asyncio.ensure_future(finish(episode)) for episode in episodes]
        try:
            await self._watch(futures)
        finally:
            for future in futures:
                future.cancel()
            await asyncio.gather(
                *futures, return_exceptions=True
            )  # sandboxes are closed before anyone goes on
        return [future.result() for future in futures]

    async def _watch(self, futures: list[asyncio.Future]) -> None:
        """Waits for all of them; the first error, or the wish to stop, ends the wait."""
        pending = set(futures)
        while pending:
            if self.should_stop():
                raise Stopped
            done, pending = await asyncio.wait(
                pending, timeout=0.5, return_when=asyncio.FIRST_EXCEPTION
            )
            for future in done:
                future.result()

    async def play_one(
        self,
        episode: Episode,
        *,
        temperature: float,
        accounting: Accounting,
        path: pathlib.Path | None = None,
        routes: bool = False,
    ) -> Trajectory:
        """One trainable trajectory, from `path` where it is kept already.

        The caller has counted its beginning; here only replacements are.

        Raises: RolloutError.
        """
        if path is not None and (kept := _kept(path, episode)) is not None:
            return kept
        for attempt in range(self.attempts):
            # A command may answer otherwise each time (the date, a process id). Then its turns
            # cannot be taken again: the last attempt is from the beginning.
            prefix = episode.prefix if attempt == 0 or attempt + 1 < self.attempts else ()
            env = (
                await episode.forks.env_at(prefix)
                if episode.forks and not attempt
                else self.make_env(episode.task)
            )
            trajectory = await run_episode(
                self.engine,
                env,
                self.chat,
                self.limits,
                temperature=temperature,
                seed=(
                    episode.seed if attempt == 0 else derive_seed(episode.seed, "attempt", attempt)
                ),
                group=episode.group,
                episode=episode.episode,
                routes=routes,
                prefix=prefix,
            )
            if trajectory.trainable:
                if path is not None:
                    save_trajectory(trajectory, path)
                return trajectory
            accounting.drop(trajectory.ending)
            if attempt + 1 < self.attempts:
                accounting.begin()
        raise RolloutError(
            f"{episode.task} was spoiled {self.attempts} times in a row, last as"
            f" {trajectory.ending}: {trajectory.note or 'no detail'}. Finished trajectories are"
            " kept; mend the cause and run the same command again."
        )


def _kept(path: pathlib.Path, episode: Episode) -> Trajectory | None:
    """The episode's trajectory, None where it must be played.

    A run that resumes may give the name to another task, or to another anchor of it, than the run
    before it did: which task comes next depends on what was finished when. A file that cannot be
    read was cut off by a power failure.
    """
    if not path.exists():
        return None
    try:
        kept = load_trajectory(path)
    except ValueError as error:
        logging.warning("%s cannot be read and is played again: %s", path, error)
        return None
    begun = anchor_of(kept)  # 0 also where the prefix could not be replayed
    led = begun in (0, len(episode.prefix)) and all(
        ours.action_ids == theirs.action_ids
        for ours, theirs in zip(kept.chunks[:begun], episode.prefix)
    )
    return kept if kept.task == episode.task and led else None
