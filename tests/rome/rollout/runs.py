"""Runs of the rollout scheduler in virtual time, for tests."""

import asyncio
import collections
import dataclasses
import random

from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.episode import SpoiledTaskError
from rome.rollout.group import GroupPlan
from rome.rollout.rules import Rules
from rome.rollout.scheduler import RolloutScheduler
from rome.rollout.simulator.clock import run
from rome.rollout.spoiled import SpoiledTasks

RULES = Rules(groups_per_step=3, group_size=2, concurrency=4, steps=6)


@dataclasses.dataclass
class World:
    """Plays an episode in a time that follows from its seed; a second attempt is another length.

    Keeps what it played, as files would.
    """

    rules: Rules
    seed: int = 0
    train_s: float = 1.0
    reward: object = None  # episode -> reward
    fault: object = None  # episode -> exception
    accounting: Accounting = dataclasses.field(default_factory=Accounting)
    files: dict = dataclasses.field(default_factory=dict)
    played: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    versions: dict = dataclasses.field(default_factory=dict)
    running: int = 0
    most_running: int = 0
    journal: object = None
    steps: list = dataclasses.field(default_factory=list)
    stop: bool = False
    spoiled: object = None  # path of the tasks that were set aside
    broken: frozenset = frozenset()  # tasks that cannot be played,
    breaks: object = None  # episode -> whether it breaks; None: all of them
    length: object = None  # episode -> seconds
    life: int = 0  # another one draws other tasks in place of those set aside
    tasks: set = dataclasses.field(default_factory=set)  # that were played
    set_aside: set = dataclasses.field(default_factory=set)
    saves_cancelled: bool = False  # a cancelled episode leaves its file, as if it had just ended

    def make(self):
        self.rollouts = RolloutScheduler(
            self.rules,
            self.play,
            self.plan,
            self.replan,
            accounting=self.accounting,
            forget=lambda episode: self.files.pop(episode.name, None),
            journal=self.journal,
            spoiled=SpoiledTasks(self.spoiled),
            should_stop=lambda: self.stop,
        )
        return self.rollouts

    def plan(self, wave):
        return [
            GroupPlan(f"task/{wave}_{index // self.rules.siblings}")
            for index in range(self.rules.groups_per_step)
        ]

    def replan(self, number, attempt):
        life = "" if self.rules.replace_equal else f"_in{self.life}"
        return GroupPlan(f"task/{number}_again{attempt}{life}")

    async def play(self, episode):
        kept = self.files.get(episode.name)
        if kept is not None and kept.task == episode.task:
            return kept
        self.played[episode.name] += 1
        self.tasks.add(episode.task)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            began = self.rollouts.version
            if self.fault is not None and (error := self.fault(episode)) is not None:
                raise error
            length = random.Random(f"{self.seed}/{episode.seed}").lognormvariate(0, 1)
            if self.length is not None:
                length = self.length(episode)
            if episode.task in self.broken and (self.breaks is None or self.breaks(episode)):
                await asyncio.sleep(length)
                self.set_aside.add(episode.task)
                self.accounting.drop("spoiled_task")  # as the player does
                raise SpoiledTaskError(episode.task, "infra_verifier", "it breaks", 3)
            try:
                await asyncio.sleep(length)
            except asyncio.CancelledError:
                if self.saves_cancelled:
                    self.files[episode.name] = self.trajectory(episode, began)
                raise
            self.files[episode.name] = self.trajectory(episode, began)
            return self.files[episode.name]
        finally:
            self.running -= 1

    def trajectory(self, episode, began):
        chunk = Chunk([1], [2, 3], [-0.5, -0.5], [(began, 0, 1), (self.rollouts.version, 1, 2)])
        reward = float(episode.seed % 2) if self.reward is None else self.reward(episode)
        return Trajectory(
            episode.task,
            "f",
            [chunk],
            reward,
            "success" if reward else "failure",
            episode.group,
            episode.episode,
            episode.seed,
        )

    async def train(self, first=0, last=None):
        """Steps first to last, as the trainer runs them; returns what each took."""
        await self.rollouts.advance(first)
        for step in range(first, self.rules.steps if last is None else last):
            async with asyncio.timeout(500):  # virtual seconds
                taken = await self.rollouts.take(step)
            self.accounting.train(sum(map(len, taken.groups)))
            await self.rollouts.check()
            self.steps.append((step, taken))
            await asyncio.sleep(self.train_s)
            await self.rollouts.advance(step + 1)
        return self.steps


def play_all(rules, **options):
    world = World(rules, **options)

    async def main():
        world.make()
        await world.train()
        await world.rollouts.close()

    run(main())
    return world


def names(steps):
    return [[(t.group, t.episode) for group in taken.groups for t in group] for _, taken in steps]


def staleness(steps):
    return [
        step - t.oldest_version for step, taken in steps for group in taken.groups for t in group
    ]
