"""A simulator of asynchronous rollouts: the real scheduler on a virtual clock.

`simulate` runs the `RolloutScheduler` that trains, with its rules, in virtual time. Around it
everything is a model (`PodModel`): an episode alternates between a turn of a simulated engine and
the latency of its environment, and a training step is a wait. What it predicts about staleness,
dropped samples and waiting is therefore what the scheduler does.

The n-th episode to start has the same turns, tokens and latencies in every simulation with the
same seed, so two models are compared on the same samples.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.episode import Episode
from rome.rollout.group import GroupPlan, Taken
from rome.rollout.outcomes import staleness
from rome.rollout.rules import Rules
from rome.rollout.scheduler import RolloutScheduler
from rome.rollout.simulator.clock import Level, VirtualLoop, run
from rome.rollout.simulator.engines import Sample, SimulatedEngines, SimulatedEpisode
from rome.rollout.simulator.pod import PodModel, step_seconds_bound


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The result of a simulation. Rates and shares leave out the warm-up, counts do not.

    Args:
      steps: training steps.
      seconds: simulated seconds of the whole run.
      step_seconds: mean seconds of a step.
      trajectories_per_s: trajectories trained on in a second.
      trainer_wait: share of the time in which the trainer waits for trajectories.
      engine_idle: share of the engines' time without a single request.
      slot_use: mean share of the slots that run a request.
      open_episodes: mean number of episodes in play.
      staleness: number of trained trajectories by staleness, in versions.
      started: episodes started.
      trained: episodes trained on.
      dropped: episodes dropped, by reason.
      in_flight: episodes running, or finished and not yet trained on.
      short_bias: mean length of the trained episodes relative to that of all trained or dropped
        ones, minus 1. The length is the time an episode takes if it has the pod for itself. Below
        0, long episodes are underrepresented.
      episode_seconds: mean time from start to finish of the trained episodes.
    """

    steps: int
    seconds: float
    step_seconds: float
    trajectories_per_s: float
    trainer_wait: float
    engine_idle: float
    slot_use: float
    open_episodes: float
    staleness: dict[int, int]
    started: int
    trained: int
    dropped: dict[str, int]
    in_flight: int
    short_bias: float
    episode_seconds: float


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Asynchronous against synchronous training on the same samples.

    Args:
      predicted: ratio of their step times.
      bound: the largest ratio that any async_ratio could give (`step_seconds_bound`).
      synchronous: the simulation with async_ratio 0.
      asynchronous: the simulation of the model itself.
    """

    predicted: float
    bound: float
    synchronous: Prediction
    asynchronous: Prediction


def simulate(
    model: PodModel, *, steps: int, seed: int = 0, warm_up: int | None = None
) -> Prediction:
    """Simulate `steps` training steps.

    Args:
      model: the pod.
      steps: number of training steps.
      seed: seed of the episodes.
      warm_up: first steps, which rates and shares leave out; by default a quarter.

    Raises:
      ValueError: no step is left after the warm-up.
    """
    if warm_up is None:
        warm_up = steps // 4
    if not 0 <= warm_up < steps:
        raise ValueError(f"steps={steps} with warm_up={warm_up}; set steps above it")

    async def train() -> Prediction:
        return await _Simulation(model, steps, seed, warm_up).train()

    return run(train())


def speedup(model: PodModel, *, steps: int, seed: int = 0) -> Speedup:
    """Predict how much faster `model` trains than the same model with async_ratio 0."""
    [found] = speedups(model, [model.async_ratio], steps=steps, seed=seed)
    return found


def speedups(
    model: PodModel, async_ratios: Sequence[int], *, steps: int, seed: int = 0
) -> list[Speedup]:
    """Predict the speed-up of each async_ratio over synchronous training.

    Args:
      model: the pod; its own async_ratio does not matter.
      async_ratios: the bounds on staleness to compare.
      steps: number of training steps.
      seed: seed of the episodes.
    """
    models = {ratio: dataclasses.replace(model, async_ratio=ratio) for ratio in {0, *async_ratios}}
    predictions = {ratio: simulate(each, steps=steps, seed=seed) for ratio, each in models.items()}
    synchronous = predictions[0]
    largest = synchronous.step_seconds / step_seconds_bound(model)
    return [
        Speedup(
            predicted=synchronous.step_seconds / predictions[ratio].step_seconds,
            bound=largest,
            synchronous=synchronous,
            asynchronous=predictions[ratio],
        )
        for ratio in async_ratios
    ]


def with_train_share(model: PodModel, share: float, *, seed: int = 0, steps: int = 100) -> PodModel:
    """Return the model with a train step of this share of the mean synchronous rollout time."""
    rollouts_only = dataclasses.replace(model, async_ratio=0, train_s=0.0, publish_s=0.0)
    rollout = simulate(rollouts_only, steps=steps, seed=seed, warm_up=0)
    return dataclasses.replace(model, train_s=share * rollout.step_seconds)


@dataclasses.dataclass(frozen=True)
class _Finished:
    sample: Sample
    seconds: float


class _Simulation:
    """One run: it plays what the scheduler starts, and trains on what it hands over."""

    def __init__(self, model: PodModel, steps: int, seed: int, warm_up: int) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.model = model
        self.steps = steps
        self.seed = seed
        self.warm_up = warm_up
        self.loop = loop
        self.engines = SimulatedEngines(model, loop)
        self.accounting = Accounting()
        self.scheduler = RolloutScheduler(
            _rules(model, steps),
            self.play,
            self.plan,
            accounting=self.accounting,
            forget=self.forget,
        )
        self.drawn = 0  # samples
        self.playing = Level(loop)
        self.finished: dict[str, _Finished] = {}  # episodes that no step has taken yet, by name
        self.trained: list[_Finished] = []
        self.dropped: list[Sample] = []
        self.staleness: collections.Counter[int] = collections.Counter()
        self.waited = 0.0
        self.measured_from = 0.0

    # -- what the scheduler calls
    # ---------------------------------------------------------------------------------------------

    def plan(self, wave: int) -> list[GroupPlan]:
        """Return the plans of a wave; tasks do not matter to the simulation."""
        return [GroupPlan("task")] * self.model.groups_per_step

    async def play(self, episode: Episode) -> Trajectory:
        """Play the next sample and return a trajectory that says which version started it."""
        sample = self._draw()
        version = self.scheduler.version
        started_at = self.loop.now
        self.playing.add(1)
        try:
            await SimulatedEpisode(sample, self.engines, self.loop).play()
        except asyncio.CancelledError:
            self.dropped.append(sample)
            raise
        finally:
            self.playing.add(-1)
        self.finished[episode.name] = _Finished(sample, self.loop.now - started_at)
        chunk = Chunk([0], [0], [0.0], [(version, 0, 1)])
        return Trajectory(
            episode.task, "simulated", [chunk], 1.0, "success", episode.group, episode.episode
        )

    def forget(self, episode: Episode) -> None:
        """Count a finished sample as dropped: the scheduler plays its episode again."""
        finished = self.finished.pop(episode.name, None)
        if finished is not None:
            self.dropped.append(finished.sample)

    def _draw(self) -> Sample:
        model = self.model
        rng = np.random.default_rng((self.seed, self.drawn))
        self.drawn += 1
        turns = max(1, round(float(model.turns.draw(rng, 1)[0])))
        latencies = model.latency.draw(rng, turns)
        tokens = model.tokens.draw(rng, turns)
        prompt_tokens = model.prompt_tokens.draw(rng, turns)
        alone = model.turn_seconds(latencies.sum(), tokens.sum(), prompt_tokens.sum())
        return Sample(
            latencies=latencies.tolist(),
            tokens=tokens.tolist(),
            prefills=[model.prefill_seconds(each) for each in prompt_tokens.tolist()],
            alone=float(alone),
        )

    # -- the trainer
    # ---------------------------------------------------------------------------------------------

    async def train(self) -> Prediction:
        """Run all training steps and return what was measured."""
        for step in range(self.steps):
            if step == self.warm_up:
                self._start_measuring()
            await self.scheduler.advance(step)
            taken = await self.scheduler.take(step)
            self._count(step, taken)
            self.engines.lend()
            await asyncio.sleep(self.model.train_s)
            self.engines.take_back()
            self.engines.pause()
            await asyncio.sleep(self.model.publish_s)
            self.engines.resume()
        prediction = self._prediction()
        await self.scheduler.close()
        return prediction

    def _start_measuring(self) -> None:
        self.waited = 0.0
        self.measured_from = self.loop.now
        for level in (self.playing, self.engines.busy_slots, self.engines.idle_engines):
            level.reset()

    def _count(self, step: int, taken: Taken) -> None:
        self.waited += taken.waited
        for group, names in zip(taken.groups, taken.names, strict=True):
            self.accounting.train(len(group))
            self.staleness.update(staleness(group, step))
            for name in names:
                self.trained.append(self.finished.pop(name))

    def _prediction(self) -> Prediction:
        self.accounting.check()
        model = self.model
        counts = self.accounting.to_json()
        steps = self.steps - self.warm_up
        seconds = self.loop.now - self.measured_from
        per_second = 1 / seconds if seconds else 0.0
        trained = [finished.sample.alone for finished in self.trained]
        used_or_dropped = trained + [sample.alone for sample in self.dropped]
        mean_length = float(np.mean(used_or_dropped))
        slots = model.engines * model.slots
        return Prediction(
            steps=self.steps,
            seconds=self.loop.now,
            step_seconds=seconds / steps,
            trajectories_per_s=steps * model.batch * per_second,
            trainer_wait=self.waited * per_second,
            engine_idle=self.engines.idle_engines.integral() * per_second / model.engines,
            slot_use=self.engines.busy_slots.integral() * per_second / slots,
            open_episodes=self.playing.integral() * per_second,
            staleness=dict(sorted(self.staleness.items())),
            started=counts["started"],
            trained=counts["trained"],
            dropped=counts["dropped"],
            in_flight=counts["in_flight"],
            short_bias=float(np.mean(trained)) / mean_length - 1 if mean_length else 0.0,
            episode_seconds=float(np.mean([finished.seconds for finished in self.trained])),
        )


def _rules(model: PodModel, steps: int) -> Rules:
    """Return the scheduler's rules, under which rollouts do not end with the last step."""
    return Rules(
        groups_per_step=model.groups_per_step,
        group_size=model.group_size,
        concurrency=model.concurrency,
        steps=steps + model.async_ratio,
        async_ratio=model.async_ratio,
        redundancy=model.redundancy,
        stale_samples=model.stale_samples,
    )
