r"""How much does asynchrony bring, on identical samples, with the scheduler that trains: and what
does the scheduler itself cost.

python -m benchmarks.rollout --json rollout.json [--scale 0.05] [--steps 40] [--latencies lognormal,terminal]

64 episodes at once in groups of 8, 8 turns each; an environment that takes a lognormal latency a
turn (mean 1 s, sigma 1), or one drawn from what terminal commands were recorded to take here,
brought to the same mean; an engine that answers in 0.05 s; 64 trajectories a step; a train step of
a quarter of the synchronous rollout time. Engine, environment and trainer are sleeps, multiplied by
--scale; agent loop, scheduler and trajectories are those of training. The n-th episode has the same
latencies in every row.

Each row prints its speed-up over the synchronous row of the same run, what
`rome.rollout.simulator.simulate` predicts for it, and the bound: all slots full at all times.
`speedup_alpha1` is the row in which nothing is dropped and steps take single episodes as they
finish; the shares of samples by staleness stand beside it, because such a step trains on a few that
are older than alpha. The rows with "wait" never do, and pay for it.

Overhead: 10,000 episodes at once, 8 turns of a second each; CPU seconds with the scheduler less
those of the same sleeps without it, as a share of one core.
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
from rome.rollout.player import Accounting, Episode, EpisodePlayer
from rome.rollout.scheduler import GroupPlan, RolloutScheduler, Rules
from rome.rollout.simulator import simulate

GROUPS, GROUP_SIZE, CONCURRENCY, TURNS, ENGINE_S, TRAIN_SHARE = 8, 8, 64, 8, 0.05, 0.25
ROWS = {  # name: what differs from synchronous training
    "alpha 1, groups, wait": {"async_ratio": 1},
    "alpha 1, groups, keep": {"async_ratio": 1, "late": "keep"},
    "alpha 1, groups, drop": {"async_ratio": 1, "late": "drop"},
    "alpha 1, groups, wait, 2 redundant": {"async_ratio": 1, "redundancy": 2},
    "alpha 1, episodes, keep": {"async_ratio": 1, "late": "keep", "apart": True},
    "alpha 1, episodes, drop": {"async_ratio": 1, "late": "drop", "apart": True},
    "alpha 2, groups, wait": {"async_ratio": 2},
    "alpha 2, episodes, keep": {"async_ratio": 2, "late": "keep", "apart": True},
}
HEADLINE = "alpha 1, episodes, keep"


@dataclasses.dataclass
class Task:
    name: str
    family: str = "sleep"


class SleepingEnv(Env):
    """Answers after the latencies that belong to the episode; the last turn ends it."""

    tools: list = []

    def __init__(self, task: str, latencies: list[float]) -> None:
        self.task, self._latencies, self._turn = Task(task), latencies, 0

    def reset(self, seed: int | None = None) -> Any:
        raise NotImplementedError("asynchronous only")

    def step(self, action: str) -> Any:
        raise NotImplementedError("asynchronous only")

    async def areset(self, seed: int | None = None) -> tuple[str, dict]:
        return "wait", {}

    async def astep(self, action: str) -> tuple[str, float, bool, bool, dict]:
        await asyncio.sleep(self._latencies[self._turn])
        self._turn += 1
        info = {"status": "ok", "use_tool": False, "ending": "success"}
        return "ok", 1.0, self._turn == len(self._latencies), False, info

    async def aclose(self) -> None:
        pass


@dataclasses.dataclass
class SleepingEngine:
    seconds: float
    version: int = 0
    said: tuple[int, ...] = ()

    async def generate(
        self, input_ids: list[int], sampling: Any, deadline_s: float, *, affinity: str | None = None
    ) -> Completion:
        began = self.version
        await asyncio.sleep(self.seconds)
        return Completion(
            list(self.said), [-0.5] * len(self.said), "stop", [(began, 0, len(self.said))]
        )


@dataclasses.dataclass
class Row:
    step_seconds: float
    trainer_wait: float
    staleness: dict[int, int]
    dropped: dict[str, int]
    # mean unhindered length of what was trained on, against that of all that began; below 0:
    # batches lean towards short episodes
    short_bias: float


async def play(
    latency: simulate.Distribution,
    scale: float,
    steps: int,
    train_s: float,
    *,
    async_ratio: int = 0,
    late: str = "wait",
    redundancy: int = 0,
    apart: bool = False,
) -> Row:
    """`steps` steps; seconds as if scale were 1.

    The first async_ratio + 1 steps fill the pipeline and are not timed.
    """
    chat, warm_up = Chat(Tokenizer.load(TINY)), async_ratio + 1
    engine, accounting, lengths = (
        SleepingEngine(ENGINE_S * scale, said=tuple(chat.turn("go"))),
        Accounting(),
        {},
    )
    rules = Rules(
        GROUPS * (GROUP_SIZE if apart else 1),
        1 if apart else GROUP_SIZE,
        CONCURRENCY,
        steps + warm_up,
        async_ratio,
        redundancy,
        late=late,
        siblings=GROUP_SIZE if apart else 1,
    )

    def play_one(episode: Episode) -> Any:
        drawn = latency.draw(
            np.random.default_rng(episode.seed), TURNS
        )  # an episode's seed is the same in every row
        lengths[episode.name] = float(drawn.sum()) + TURNS * ENGINE_S
        player = EpisodePlayer(
            engine,
            lambda task: SleepingEnv(task, (scale * drawn).tolist()),
            chat,
            Limits(1000, 40, 1e6),
            CONCURRENCY,
        )
        return player.play_one(episode, temperature=1.0, accounting=accounting)

    rollouts = RolloutScheduler(
        rules,
        play_one,
        lambda wave: [
            GroupPlan(f"sleep/{wave}_{index // rules.siblings}")
            for index in range(rules.groups_per_wave)
        ],
        accounting=accounting,
    )
    staleness, trained, waited, began = collections.Counter(), [], 0.0, time.monotonic()
    await rollouts.advance(0)
    for step in range(steps + warm_up):
        if step == warm_up:
            began, waited = time.monotonic(), 0.0
        taken = await rollouts.take(step)
        waited += taken.waited
        for group, names in zip(taken.groups, taken.names):
            accounting.train(len(group))
            staleness.update(step - trajectory.oldest_version for trajectory in group)
            trained += [lengths[name] for name in names]
        await asyncio.sleep(train_s * scale)
        engine.version = step + 1
        await rollouts.advance(step + 1)
    seconds = (time.monotonic() - began) / scale
    await rollouts.close()
    accounting.check()
    everything = list(lengths.values())
    bias = (sum(trained) / len(trained)) / (sum(everything) / len(everything)) - 1
    return Row(
        seconds / steps,
        waited / scale / seconds,
        dict(sorted(staleness.items())),
        dict(accounting.dropped),
        bias,
    )


async def record_terminal(episodes: int = 60) -> tuple[float, ...]:
    """Seconds that the commands of demonstrations take in real sandboxes here."""
    from envs.rock import SandboxConfig
    from envs.tasks.terminal import FAMILIES, train_seed
    from envs.tasks.terminal.demonstrator import play_demonstration
    from envs.tasks.terminal.env import TerminalEnv

    seconds: list[float] = []

    class Timed(TerminalEnv):
        async def astep(self, action: str):
            began = time.perf_counter()
            result = await super().astep(action)
            seconds.append(time.perf_counter() - began)
            return result

    for number in range(episodes):
        family = FAMILIES[number % len(FAMILIES)]
        await play_demonstration(
            Timed(f"{family}/{train_seed(number)}", SandboxConfig(isolation="best_available")),
            random.Random(number),
        )
    return tuple(seconds)


async def measure(latency: simulate.Distribution, scale: float, steps: int) -> dict[str, Any]:
    rollout = await play(latency, scale, steps, 0.0)
    train_s = TRAIN_SHARE * rollout.step_seconds
    synchronous = await play(latency, scale, steps, train_s)
    base = simulate.Plan(
        token_s=ENGINE_S / 50,
        latency=latency,
        async_ratio=0,
        train_s=train_s,
        concurrency=CONCURRENCY,
        group_size=GROUP_SIZE,
        groups_per_step=GROUPS,
    )
    rows = {}
    for name, options in ROWS.items():
        row = await play(latency, scale, steps, train_s, **options)
        apart = (
            {"group_size": 1, "groups_per_step": GROUPS * GROUP_SIZE}
            if options.get("apart")
            else {}
        )
        planned = dataclasses.replace(
            base, **{key: value for key, value in options.items() if key != "apart"}, **apart
        )
        predicted = (
            simulate.simulate(dataclasses.replace(base), steps=200).step_seconds
            / simulate.simulate(planned, steps=200).step_seconds
        )
        rows[name] = dataclasses.asdict(row) | {
            "speedup": synchronous.step_seconds / row.step_seconds,
            "predicted": predicted,
        }
    return {
        "rollout_seconds": rollout.step_seconds,
        "train_seconds": train_s,
        "synchronous": dataclasses.asdict(synchronous),
        "bound": synchronous.step_seconds / simulate.bound(base),
        "rows": rows,
    }


async def measure_overhead(
    episodes: int = 10_000, turns: int = 8, turn_s: float = 1.0
) -> dict[str, float]:
    """CPU seconds, as shares of the wall clock, of 10,000 sleeping episodes: with the scheduler,
    and bare.
    """
    rules = Rules(episodes // GROUP_SIZE // 2, GROUP_SIZE, episodes, 2, async_ratio=1)
    spent = {}

    async def sleep(episode: Episode) -> Trajectory:
        for _ in range(turns):
            await asyncio.sleep(turn_s * 2 * ((episode.seed + _ * 7919) % 1000) / 1000)
        return Trajectory(
            episode.task,
            "f",
            [Chunk([1], [2], [0.0], [(0, 0, 1)])],
            1.0,
            "success",
            episode.group,
            episode.episode,
        )

    async def with_scheduler() -> None:
        accounting = Accounting()
        rollouts = RolloutScheduler(
            rules,
            sleep,
            lambda wave: [
                GroupPlan(f"sleep/{wave}_{index}") for index in range(rules.groups_per_wave)
            ],
            accounting=accounting,
        )
        await rollouts.advance(0)
        for step in range(rules.steps):
            taken = await rollouts.take(step)
            accounting.train(sum(map(len, taken.groups)))
            await rollouts.advance(step + 1)

    async def bare() -> None:
        await asyncio.gather(
            *(sleep(Episode("sleep/0", 0, 0, derive_seed(number))) for number in range(episodes))
        )

    for name, work in (("bare", bare), ("scheduler", with_scheduler), ("bare_again", bare)):
        cpu, wall = time.process_time(), time.monotonic()
        await work()
        spent[name] = (time.process_time() - cpu) / (time.monotonic() - wall)
    bare_share = (spent["bare"] + spent["bare_again"]) / 2
    return {
        "bare": bare_share,
        "with_scheduler": spent["scheduler"],
        "share": spent["scheduler"] - bare_share,
    }


def show(name: str, found: dict[str, Any]) -> None:
    table = Table(
        title=(
            f"{name}: rollout {found['rollout_seconds']:.1f} s, train step"
            f" {found['train_seconds']:.1f} s, synchronous step"
            f" {found['synchronous']['step_seconds']:.1f} s; bound {found['bound']:.2f}x"
        )
    )
    for column in (
        "row",
        "s/step",
        "speed-up",
        "predicted",
        "trainer waits",
        "staleness 0/1/2/3+ %",
        "dropped",
        "bias to short",
    ):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row_name, row in found["rows"].items():
        total = sum(row["staleness"].values())
        shares = [
            sum(
                count
                for age, count in row["staleness"].items()
                if (age == kind if kind < 3 else age >= 3)
            )
            / total
            for kind in range(4)
        ]
        table.add_row(
            row_name,
            f"{row['step_seconds']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['predicted']:.2f}x",
            f"{100 * row['trainer_wait']:.0f} %",
            "/".join(f"{100 * share:.0f}" for share in shares),
            str(sum(row["dropped"].values())),
            f"{100 * row['short_bias']:+.1f} %",
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--scale", type=float, default=0.05, help="of all sleeps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--latencies", default="lognormal,terminal")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.latencies.split(","):
        if name == "lognormal":
            latency: simulate.Distribution = simulate.Lognormal(1.0, 1.0)
        else:
            recorded = asyncio.run(record_terminal())
            mean = sum(recorded) / len(recorded)
            latency = simulate.Recorded(tuple(one / mean for one in recorded))
        found[name] = asyncio.run(measure(latency, options.scale, options.steps))
        show(name, found[name])
    overhead = asyncio.run(measure_overhead())
    print(
        f"10,000 episodes at once: {100 * overhead['with_scheduler']:.1f} % of a core,"
        f" {100 * overhead['bare']:.1f} % of it the sleeps; the scheduler's share"
        f" {100 * overhead['share']:.1f} %"
    )
    headline = found.get("lognormal") or next(iter(found.values()))
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "speedup_alpha1": headline["rows"][HEADLINE]["speedup"],
                    "bound_alpha1": headline["bound"],
                    "scheduler_core_share_10k": overhead["share"],
                    "scale": options.scale,
                    "steps": options.steps,
                    "overhead": overhead,
                    **found,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
