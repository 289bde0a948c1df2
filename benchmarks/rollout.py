r"""Measure the speed-up of asynchronous rollouts and the overhead of the scheduler.

python -m benchmarks.rollout --json rollout.json [--scale 0.05] [--steps 40] \
    [--latencies lognormal,terminal]

Speed-up: 64 episodes run at once in groups of 8, with 8 turns each; a step trains on 64
trajectories. A turn takes the environment a lognormal latency (mean 1 s, sigma 1), or one drawn
from recorded terminal commands and scaled to the same mean; the engine answers in 0.05 s. A train
step takes a quarter of the synchronous rollout time. Engine, environment and trainer are sleeps,
multiplied by --scale; agent loop, scheduler and trajectories are those of training. The n-th
episode has the same latencies in every row.

Each row prints its speed-up over the synchronous row of the same run, the prediction of
`rome.rollout.simulator` for it, and the bound: all places busy at all times. `speedup_alpha1` is
the row that drops nothing and whose steps take single episodes as they finish. Its shares by
staleness stand beside it, because such a step trains on a few samples that are older than alpha.
The rows with "wait" never do, and pay for it.

Overhead: 10,000 episodes at once, with 8 turns of a second each. It is the CPU time with the
scheduler minus that of the same sleeps without it, as a share of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import pathlib
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from envs.gem.core import Env
from rome.agent.loop import Limits
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory
from rome.engine.completion import Completion
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.rollout import outcomes
from rome.rollout.accounting import Accounting
from rome.rollout.episode import Episode
from rome.rollout.group import GroupPlan
from rome.rollout.player import EpisodePlayer
from rome.rollout.rules import Rules, StaleSamples
from rome.rollout.scheduler import RolloutScheduler
from rome.rollout.simulator.distributions import Distribution, Lognormal, Recorded
from rome.rollout.simulator.pod import PodModel, step_seconds_bound
from rome.rollout.simulator.simulate import simulate

GROUPS = 8
GROUP_SIZE = 8
CONCURRENCY = 64
TURNS = 8
ENGINE_SECONDS = 0.05  # of a turn
TURN_TOKENS = 50  # in the simulator; they set its seconds of a token
TRAIN_SHARE = 0.25  # of the synchronous rollout time
SIMULATED_STEPS = 200
OVERHEAD_EPISODES = 10_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a row differs from synchronous training.

    Args:
      async_ratio: the bound on staleness.
      stale_samples: what happens to samples beyond it.
      redundancy: further episodes of a group.
      apart: steps take single episodes instead of whole groups.
    """

    async_ratio: int = 0
    stale_samples: StaleSamples = "wait"
    redundancy: int = 0
    apart: bool = False

    @property
    def group_size(self) -> int:
        return 1 if self.apart else GROUP_SIZE

    @property
    def groups_per_step(self) -> int:
        return GROUPS * GROUP_SIZE // self.group_size


SETTINGS = {
    "alpha 1, groups, wait": Setting(1),
    "alpha 1, groups, keep": Setting(1, "keep"),
    "alpha 1, groups, drop": Setting(1, "drop"),
    "alpha 1, groups, wait, 2 redundant": Setting(1, redundancy=2),
    "alpha 1, episodes, keep": Setting(1, "keep", apart=True),
    "alpha 1, episodes, drop": Setting(1, "drop", apart=True),
    "alpha 2, groups, wait": Setting(2),
    "alpha 2, episodes, keep": Setting(2, "keep", apart=True),
}
HEADLINE = "alpha 1, episodes, keep"


@dataclasses.dataclass
class Task:
    """The name and family that trajectories keep."""

    name: str
    family: str = "sleep"


class SleepingEnv(Env):
    """Answers each turn after the episode's own latency; the last turn ends the episode."""

    tools = ()

    def __init__(self, task: str, latencies: list[float]) -> None:
        self.task = Task(task)
        self._latencies = latencies
        self._turn = 0

    def reset(self, seed: int | None = None) -> Any:
        raise NotImplementedError("a sleeping environment is asynchronous; use areset")

    def step(self, action: str) -> Any:
        raise NotImplementedError("a sleeping environment is asynchronous; use astep")

    async def areset(self, seed: int | None = None) -> tuple[str, dict]:
        return "wait", {}

    async def astep(self, action: str) -> tuple[str, float, bool, bool, dict]:
        await asyncio.sleep(self._latencies[self._turn])
        self._turn += 1
        is_last = self._turn == len(self._latencies)
        info = {"status": "ok", "use_tool": False, "ending": "success"}
        return "ok", 1.0, is_last, False, info

    async def aclose(self) -> None:
        pass


@dataclasses.dataclass
class SleepingEngine:
    """Answers each turn with the same tokens, after the same time."""

    seconds: float
    answer: tuple[int, ...]
    version: int = 0

    async def generate(
        self, input_ids: list[int], sampling: Any, deadline_s: float, *, affinity: str | None = None
    ) -> Completion:
        version = self.version
        await asyncio.sleep(self.seconds)
        tokens = len(self.answer)
        return Completion(list(self.answer), [-0.5] * tokens, "stop", [(version, 0, tokens)])


class Workload:
    """Episodes that sleep, played as in training.

    Args:
      latency: seconds of the environment, for each turn.
      scale: factor of all sleeps.
    """

    def __init__(self, latency: Distribution, scale: float) -> None:
        self.chat = Chat(Tokenizer.load(TINY))
        self.engine = SleepingEngine(ENGINE_SECONDS * scale, tuple(self.chat.turn("go")))
        self.accounting = Accounting()
        self.lengths: dict[str, float] = {}  # unscaled seconds by episode, if it ran alone
        self._latency = latency
        self._scale = scale

    async def play(self, episode: Episode) -> Trajectory:
        """Play one episode with the player that training uses."""
        # An episode has the same seed in every row.
        rng = np.random.default_rng(episode.seed)
        latencies = self._latency.draw(rng, TURNS)
        self.lengths[episode.name] = float(latencies.sum()) + TURNS * ENGINE_SECONDS
        sleeps = (self._scale * latencies).tolist()
        player = EpisodePlayer(
            self.engine,
            lambda task: SleepingEnv(task, sleeps),
            self.chat,
            Limits(1000, 40, 1e6),
        )
        return await player.play_one(episode, temperature=1.0, accounting=self.accounting)


@dataclasses.dataclass
class Row:
    """What one setting was measured to do.

    Args:
      step_seconds: mean of a step, as if scale were 1.
      trainer_wait: share of the time in which the trainer waits.
      staleness: number of trained trajectories by staleness.
      dropped: number of dropped ones by reason.
      short_bias: mean length of the trained episodes relative to all that started, minus 1. Below
        0, batches lean towards short episodes.
    """

    step_seconds: float
    trainer_wait: float
    staleness: dict[int, int]
    dropped: dict[str, int]
    short_bias: float


async def measure_row(
    latency: Distribution, scale: float, steps: int, train_seconds: float, setting: Setting
) -> Row:
    """Play `steps` steps. The first async_ratio + 1 steps fill the pipeline and are not timed."""
    workload = Workload(latency, scale)
    warm_up = setting.async_ratio + 1
    rules = Rules(
        groups_per_step=setting.groups_per_step,
        group_size=setting.group_size,
        concurrency=CONCURRENCY,
        steps=steps + warm_up,
        async_ratio=setting.async_ratio,
        redundancy=setting.redundancy,
        stale_samples=setting.stale_samples,
        siblings=GROUP_SIZE if setting.apart else 1,
    )
    rollouts = RolloutScheduler(
        rules, workload.play, _sleeping_wave(rules), accounting=workload.accounting
    )
    staleness: collections.Counter[int] = collections.Counter()
    trained_lengths = []
    waited = 0.0
    began = time.monotonic()
    for step in range(rules.steps):
        workload.engine.version = step
        await rollouts.advance(step)
        if step == warm_up:
            began = time.monotonic()
            waited = 0.0
        taken = await rollouts.take(step)
        waited += taken.waited
        for group, names in zip(taken.groups, taken.names, strict=True):
            workload.accounting.train(len(group))
            staleness.update(outcomes.staleness(group, step))
            trained_lengths += [workload.lengths[name] for name in names]
        await asyncio.sleep(train_seconds * scale)
    seconds = time.monotonic() - began
    await rollouts.close()
    workload.accounting.check()
    short_bias = np.mean(trained_lengths) / np.mean(list(workload.lengths.values())) - 1
    return Row(
        step_seconds=seconds / scale / steps,
        trainer_wait=waited / seconds,
        staleness=dict(sorted(staleness.items())),
        dropped=dict(workload.accounting.dropped),
        short_bias=float(short_bias),
    )


def _sleeping_wave(rules: Rules) -> Callable[[int], list[GroupPlan]]:
    def plan(wave: int) -> list[GroupPlan]:
        numbers = range(rules.groups_per_step)
        return [GroupPlan(f"sleep/{wave}_{number // rules.siblings}") for number in numbers]

    return plan


async def record_terminal(episodes: int = 60) -> tuple[float, ...]:
    """Return the seconds that the commands of demonstrations take in real sandboxes here."""
    from envs.gem.episode import play_demonstration
    from envs.rock import SandboxConfig
    from envs.tasks.terminal import FAMILIES, train_seed
    from envs.tasks.terminal.env import TerminalEnv

    seconds: list[float] = []

    class TimedEnv(TerminalEnv):
        async def astep(self, action: str) -> tuple[str, float, bool, bool, dict]:
            began = time.perf_counter()
            result = await super().astep(action)
            seconds.append(time.perf_counter() - began)
            return result

    for number in range(episodes):
        family = FAMILIES[number % len(FAMILIES)]
        env = TimedEnv(f"{family}/{train_seed(number)}", SandboxConfig(isolation="best_available"))
        await play_demonstration(env, random.Random(number))
    return tuple(seconds)


def recorded_latency() -> Recorded:
    """Record terminal latencies and scale them to a mean of 1 s."""
    seconds = asyncio.run(record_terminal())
    mean = sum(seconds) / len(seconds)
    return Recorded(tuple(each / mean for each in seconds))


def measure(latency: Distribution, scale: float, steps: int) -> dict[str, Any]:
    """Measure all settings with one distribution of latencies, and predict them."""

    def play(train_seconds: float, setting: Setting) -> Row:
        return asyncio.run(measure_row(latency, scale, steps, train_seconds, setting))

    rollout_seconds = play(0.0, Setting()).step_seconds
    train_seconds = TRAIN_SHARE * rollout_seconds
    synchronous = play(train_seconds, Setting())
    synchronous_model = pod_model(latency, train_seconds, Setting())
    predicted_synchronous = simulate(synchronous_model, steps=SIMULATED_STEPS)
    rows = {}
    for name, setting in SETTINGS.items():
        row = play(train_seconds, setting)
        model = pod_model(latency, train_seconds, setting)
        predicted = simulate(model, steps=SIMULATED_STEPS)
        rows[name] = {
            **dataclasses.asdict(row),
            "speedup": synchronous.step_seconds / row.step_seconds,
            "predicted": predicted_synchronous.step_seconds / predicted.step_seconds,
        }
    return {
        "rollout_seconds": rollout_seconds,
        "train_seconds": train_seconds,
        "synchronous": dataclasses.asdict(synchronous),
        "bound": synchronous.step_seconds / step_seconds_bound(synchronous_model),
        "rows": rows,
    }


def pod_model(latency: Distribution, train_seconds: float, setting: Setting) -> PodModel:
    """Return the simulator's model of a row."""
    return PodModel(
        token_s=ENGINE_SECONDS / TURN_TOKENS,
        latency=latency,
        train_s=train_seconds,
        concurrency=CONCURRENCY,
        group_size=setting.group_size,
        groups_per_step=setting.groups_per_step,
        async_ratio=setting.async_ratio,
        redundancy=setting.redundancy,
        stale_samples=setting.stale_samples,
    )


def measure_overhead(
    episodes: int = OVERHEAD_EPISODES, turns: int = 8, mean_turn_seconds: float = 1.0
) -> dict[str, float]:
    """Measure the CPU time of sleeping episodes with the scheduler and without it.

    Returns:
      Shares of one core: `bare`, `with_scheduler`, and `share`, their difference.
    """
    rules = Rules(
        groups_per_step=episodes // GROUP_SIZE // 2,
        group_size=GROUP_SIZE,
        concurrency=episodes,
        steps=2,
        async_ratio=1,
    )

    async def sleep(episode: Episode) -> Trajectory:
        for turn in range(turns):
            share = (episode.seed + turn * 7919) % 1000 / 1000
            await asyncio.sleep(2 * mean_turn_seconds * share)
        chunk = Chunk([1], [2], [0.0], [(0, 0, 1)])
        return Trajectory(
            episode.task, "sleep", [chunk], 1.0, "success", episode.group, episode.episode
        )

    async def play_with_scheduler() -> None:
        accounting = Accounting()
        rollouts = RolloutScheduler(rules, sleep, _sleeping_wave(rules), accounting=accounting)
        for step in range(rules.steps):
            await rollouts.advance(step)
            taken = await rollouts.take(step)
            accounting.train(sum(len(group) for group in taken.groups))

    async def play_bare() -> None:
        numbers = range(episodes)
        await asyncio.gather(
            *(sleep(Episode("sleep/0", 0, 0, derive_seed(number))) for number in numbers)
        )

    before = _core_share(play_bare())
    with_scheduler = _core_share(play_with_scheduler())
    after = _core_share(play_bare())
    bare = (before + after) / 2
    return {"bare": bare, "with_scheduler": with_scheduler, "share": with_scheduler - bare}


def _core_share(work: Coroutine[Any, Any, None]) -> float:
    """Run a coroutine and return its CPU time as a share of the time it took."""
    cpu_seconds = time.process_time()
    seconds = time.monotonic()
    asyncio.run(work)
    return (time.process_time() - cpu_seconds) / (time.monotonic() - seconds)


def print_rows(name: str, found: Mapping[str, Any]) -> None:
    """Print the table of one distribution of latencies."""
    title = (
        f"{name}: rollout {found['rollout_seconds']:.1f} s, train step"
        f" {found['train_seconds']:.1f} s, synchronous step"
        f" {found['synchronous']['step_seconds']:.1f} s; bound {found['bound']:.2f}x"
    )
    table = Table(title=title)
    table.add_column("row")
    for column in (
        "s/step",
        "speed-up",
        "predicted",
        "trainer waits",
        "staleness 0/1/2/3+ %",
        "dropped",
        "bias to short",
    ):
        table.add_column(column, justify="right")
    for row_name, row in found["rows"].items():
        table.add_row(
            row_name,
            f"{row['step_seconds']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['predicted']:.2f}x",
            f"{100 * row['trainer_wait']:.0f} %",
            _staleness_shares(row["staleness"]),
            str(sum(row["dropped"].values())),
            f"{100 * row['short_bias']:+.1f} %",
        )
    Console(width=150).print(table)


def _staleness_shares(staleness: Mapping[int, int]) -> str:
    """Return the percentages of samples with staleness 0, 1, 2, and 3 or more."""
    counts = [0, 0, 0, 0]
    for age, count in staleness.items():
        counts[min(age, 3)] += count
    total = sum(counts)
    return "/".join(f"{100 * count / total:.0f}" for count in counts)


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--scale", type=float, default=0.05, help="factor of all sleeps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--latencies", default="lognormal,terminal")
    flags = parser.parse_args()
    found: dict[str, Any] = {}
    for name in flags.latencies.split(","):
        latency = Lognormal(1.0, 1.0) if name == "lognormal" else recorded_latency()
        found[name] = measure(latency, flags.scale, flags.steps)
        print_rows(name, found[name])
    overhead = measure_overhead()
    print(
        f"{OVERHEAD_EPISODES:,} episodes at once: {100 * overhead['with_scheduler']:.1f} % of a"
        f" core, {100 * overhead['bare']:.1f} % of it the sleeps; the scheduler's share"
        f" {100 * overhead['share']:.1f} %"
    )
    if flags.json is not None:
        headline = found.get("lognormal") or next(iter(found.values()))
        document = {
            "speedup_alpha1": headline["rows"][HEADLINE]["speedup"],
            "bound_alpha1": headline["bound"],
            "scheduler_core_share_10k": overhead["share"],
            "scale": flags.scale,
            "steps": flags.steps,
            "overhead": overhead,
            **found,
        }
        flags.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
