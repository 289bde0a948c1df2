"""Episodes and training steps over time for alpha 0, 1 and 2: docs/images/async_timeline.png.

The scheduler is the one that trains (`rome.rollout.scheduler`), on a virtual clock; an episode
waits for a drawn time instead of playing. The drawn times are the same for every alpha.

python -m docs.figures.async_timeline
"""

from __future__ import annotations

import asyncio
import dataclasses
import random

from matplotlib.axes import Axes

from docs.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, new_figure, save
from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.episode import Episode
from rome.rollout.group import GroupPlan
from rome.rollout.scheduler import RolloutScheduler, Rules
from rome.rollout.simulator.clock import run

PLACES = 16  # episodes at once
GROUPS = 4
GROUP_SIZE = 4
STEPS = 12
TRAIN_SECONDS = 4.0
SHOWN_SECONDS = 75.0
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED)


@dataclasses.dataclass(frozen=True)
class Span:
    """A stretch of time in one row of the picture."""

    row: int
    start: float
    end: float
    version: int  # of the weights at its start


class Recorder:
    """Plays episodes by waiting, and remembers when each ran and in which place."""

    def __init__(self) -> None:
        self.version = 0
        self.episodes: list[Span] = []
        self.updates: list[Span] = []
        self._free = list(range(PLACES))

    async def play(self, episode: Episode) -> Trajectory:
        """Wait for the episode's time and return a success or a failure."""
        draws = random.Random(episode.seed)
        version = self.version
        place = min(self._free)
        self._free.remove(place)
        started = asyncio.get_running_loop().time()
        await asyncio.sleep(draws.lognormvariate(2.0, 0.6))
        self.episodes.append(Span(place, started, asyncio.get_running_loop().time(), version))
        self._free.append(place)
        chunk = Chunk([1], [2], [-1.0], versions=[(version, 0, 1)])
        reward = float(draws.random() < 0.5)
        ending = "success" if reward else "failure"
        return Trajectory(
            episode.task,
            "family",
            [chunk],
            reward,
            ending,
            group=episode.group,
            episode=episode.episode,
            seed=episode.seed,
        )


async def train(alpha: int) -> Recorder:
    """Run the steps of one setting."""
    recorder = Recorder()
    rules = Rules(
        groups_per_step=GROUPS,
        group_size=GROUP_SIZE,
        concurrency=PLACES,
        steps=STEPS,
        async_ratio=alpha,
    )
    scheduler = RolloutScheduler(
        rules,
        recorder.play,
        lambda wave: [GroupPlan(f"task/{wave}/{number}") for number in range(GROUPS)],
        accounting=Accounting(),
    )
    now = asyncio.get_running_loop().time
    await scheduler.advance(0)
    for step in range(STEPS):
        await scheduler.take(step)
        started = now()
        await asyncio.sleep(TRAIN_SECONDS)
        recorder.updates.append(Span(-1, started, now(), step))
        recorder.version = step + 1
        await scheduler.advance(step + 1)
    await scheduler.close()
    return recorder


def draw_setting(axes: Axes, alpha: int, recorder: Recorder) -> None:
    """Draw the rows of one alpha: the trainer on top, the episodes below."""
    for span in recorder.updates:
        axes.barh(
            PLACES + 1,
            span.end - span.start,
            left=span.start,
            height=1.6,
            color=INK,
            edgecolor="white",
            linewidth=0.8,
        )
    for span in recorder.episodes:
        colour = COLOURS[span.version % len(COLOURS)]
        axes.barh(
            span.row,
            span.end - span.start,
            left=span.start,
            height=0.82,
            color=colour,
            edgecolor="white",
            linewidth=0.5,
        )
    steps = sum(span.end <= SHOWN_SECONDS for span in recorder.updates)
    axes.set_title(f"alpha = {alpha}: {steps} steps in {SHOWN_SECONDS:.0f} s", fontsize=10)
    axes.set_xlim(0, SHOWN_SECONDS)
    axes.set_ylim(-0.8, PLACES + 2.2)
    axes.set_yticks([PLACES + 1, PLACES / 2 - 0.5], ["trainer", "16 places\nfor episodes"])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)


def draw() -> None:
    """Draw the three settings below each other."""
    figure, rows = new_figure(8.0, 6.0, nrows=3, sharex=True)
    for axes, alpha in zip(rows, (0, 1, 2), strict=True):
        draw_setting(axes, alpha, run(train(alpha)))
    rows[-1].set_xlabel("seconds; the colour is the version of the weights that began the episode")
    rows[-1].xaxis.label.set_color(MUTED)
    save(figure, "async_timeline.png")


if __name__ == "__main__":
    draw()
