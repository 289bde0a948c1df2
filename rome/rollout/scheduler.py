"""Asynchronous rollouts: groups of episodes that are played beside the trainer, under a bound on
how stale a sample may be.

    wave      the groups that were planned for one training step: `groups_per_step` of them, and `redundant_groups` more
    version   of the weights: how many steps have been trained. A sample's staleness is the version that it is trained at less the one that began it
    alpha     `async_ratio`, the bound of staleness. Waves 0 to version + alpha may be begun (the capacity rule of AReaL, arXiv 2505.24298, Eq. 3,
              in groups); with alpha = 0 that is exactly synchronous training

Episodes begin in the order of their groups and each moves alone, also across an update of the
weights: its tokens carry their versions. A group is complete when `group_size` of its episodes are;
a step takes complete groups, the oldest first. Waves alone bound how far rollouts run ahead, not
how old the slowest sample gets. `late` says what becomes of a sample that would be trained on
beyond the bound:

    wait   there is none: a step takes its groups only when all that remain can still be taken within the bound by later steps
    keep   it is trained on, and the figure of staleness shows it; losses bound the weight of such samples
    drop   it is dropped, or cancelled while it runs, and played again from the same initial state: batches lean towards short episodes

What is spoiled is played again from the same initial state at once (`scheduler.py`); a group whose
episodes all won or all lost may be replaced by another task.

Which groups and episodes a step took is on disk before it is trained on. A run that resumes from a
checkpoint takes the same again in the steps that it repeats, with their trajectories: it reaches
the same weights, nothing finished is lost, and nothing is trained on twice. What those steps do not
take begins after them: begun before, it would be older than it was the first time.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import heapq
import json
import os
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory
from rome.rollout.forks import Forks
from rome.rollout.player import Accounting, Episode, RolloutError, Stopped

Late = Literal["wait", "keep", "drop"]
POLL_SECONDS = 0.5  # between two looks at whether the user wants to stop
MOST_REPLACEMENTS = 4  # of a group without spread; then it is taken as it is


@dataclasses.dataclass(frozen=True)
class Rules:
    """How many of what.

    Args:
      redundancy: further episodes of a group; the first group_size results count.
      siblings: so many groups in a row are episodes of one task. With group_size 1 a step takes
        single episodes, whatever their siblings do.
    """

    groups_per_step: int
    group_size: int
    concurrency: int
    steps: int
    async_ratio: int = 0
    redundancy: int = 0
    redundant_groups: int = 0
    # they play on, and their trajectories are kept as files, untrained
    keep_redundant: bool = False
    replace_equal: bool = False
    late: Late = "wait"
    siblings: int = 1
    seed: int = 0

    @property
    def groups_per_wave(self) -> int:
        return self.groups_per_step + self.redundant_groups


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """What a group plays.

    prefixes: what the n-th episode replays first, () for all from the beginning. source: names the
    file they are from. forks: where they were replayed; closed with the group.
    """

    task: str
    prefixes: tuple[tuple[Chunk, ...], ...] = ()
    source: str = ""
    forks: Forks | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(eq=False)
class Group:
    """One that is begun and not yet trained on.

    `attempt`: how many groups without spread it replaces.
    """

    number: int
    plan: GroupPlan
    attempt: int = 0
    open: dict[int, asyncio.Task] = dataclasses.field(default_factory=dict)
    versions: dict[int, int] = dataclasses.field(default_factory=dict)  # that began its episodes
    finished: dict[int, Trajectory] = dataclasses.field(default_factory=dict)
    retries: collections.Counter[int] = dataclasses.field(
        default_factory=collections.Counter
    )  # of samples that became too old
    closed: bool = False  # it is complete or given up: what else finishes is redundant

    def age(self, version: int) -> int:
        return version - min(self.versions.values(), default=version)

    def trajectories(self) -> list[Trajectory]:
        return [self.finished[number] for number in sorted(self.finished)]


@dataclasses.dataclass
class Taken:
    """What a step trains on, and what it cost.

    names: of the episodes. sources: what each group was resampled from, "" for those from the
    beginning. replaced: trajectories of groups without spread, in the order of their groups.
    """

    groups: list[list[Trajectory]]
    names: list[list[str]]
    sources: list[str]
    replaced: list[Trajectory]
    seconds: float  # since the step before took its groups
    waited: float  # seconds of these in which the trainer had nothing to do
    open_episodes: int


class Journal:
    """Which groups each step took, which episodes of them, and which groups it gave up; one JSON
    line a step, on disk before the step is trained.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self._path, self._steps, self._given_up = path, {}, {}
        self._episodes: dict[tuple[int, int], list[int]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    self._keep(json.loads(line))
                except (
                    ValueError,
                    KeyError,
                    TypeError,
                    AttributeError,
                ):  # the line that a kill cut off: its step was not trained
                    continue

    def get(self, step: int) -> list[tuple[int, int]] | None:
        """[(number, attempt)] of the groups."""
        return self._steps.get(step)

    def after(self, step: int) -> set[int]:
        """Numbers of the groups that later steps took."""
        return {
            number for later, groups in self._steps.items() if later > step for number, _ in groups
        }

    def episodes(self, number: int, attempt: int) -> list[int] | None:
        """Of a group that some step took or that was replaced: with redundant ones, others of it
        may be on disk as well.
        """
        return self._episodes.get((number, attempt))

    def given_up(self, step: int) -> list[int]:
        return self._given_up.get(step, [])

    def add(
        self, step: int, groups: list[Group], given_up: list[Group], replaced: list[Group]
    ) -> None:
        entry = {
            "step": step,
            "groups": [(group.number, group.attempt) for group in groups],
            "episodes": [sorted(group.finished) for group in groups],
            "given_up": [group.number for group in given_up],
            "replaced": [
                (group.number, group.attempt, sorted(group.finished)) for group in replaced
            ],
        }
        if (
            self.get(step) == entry["groups"]
            and [self.episodes(*group) for group in entry["groups"]] == entry["episodes"]
        ):
            return
        self._keep(entry)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(
                    "\n" * (file.tell() > 0 and not _ends_with_newline(self._path))
                    + json.dumps(entry)
                    + "\n"
                )
                file.flush()
                os.fsync(file.fileno())

    def _keep(self, entry: dict[str, Any]) -> None:
        groups = [tuple(pair) for pair in entry["groups"]]
        self._steps[entry["step"]], self._given_up[entry["step"]] = groups, entry["given_up"]
        self._episodes.update(zip(groups, entry["episodes"]))
        self._episodes.update(
            {(number, attempt): episodes for number, attempt, episodes in entry["replaced"]}
        )


class RolloutScheduler:
    """Plays groups on the event loop that calls it; every coroutine of it is to be called there.

    Args:
      play: one episode to a trainable trajectory. It counts the replacements of what is spoiled,
        not the beginning.
      plan: (wave) -> the plans of its groups; asked when the wave may begin, so it knows what was
        trained on until then.
      replan: (number, attempt) -> the plan of a group that takes the place of one without spread.
      forget: (episode) removes its file, so that it is played anew.
      should_stop: True makes `take` raise Stopped.
      journal: path of the record of what each step took; None keeps it in memory.
    """

    def __init__(
        self,
        rules: Rules,
        play: Callable[[Episode], Awaitable[Trajectory]],
        plan: Callable[[int], list[GroupPlan]],
        replan: Callable[[int, int], GroupPlan] | None = None,
        *,
        accounting: Accounting,
        should_stop: Callable[[], bool] = lambda: False,
        forget: Callable[[Episode], None] = lambda episode: None,
        journal: pathlib.Path | None = None,
    ) -> None:
        self.rules, self.accounting, self.version = rules, accounting, 0
        self._play, self._plan, self._replan, self._forget, self._should_stop = (
            play,
            plan,
            replan,
            forget,
            should_stop,
        )
        self._journal = Journal(journal)
        self._groups: dict[int, Group] = {}  # in order of their numbers
        self._waves = 0  # that were begun
        self._waiting: list[
            tuple[int, int, int, Group]
        ] = []  # a heap of (group number, -attempt, episode number, group): what is to begin
        # numbers of the groups that the record names, while its steps are repeated
        self._repeats: set[int] | None = None
        self._held: list[tuple[int, int, int, Group]] = []  # what waits until they are
        self._complete: list[int] = []  # numbers, in order
        self._replaced: list[Group] = []  # since a step took its groups
        self._running = 0
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._taken_at: float | None = None
        self._playing: dict[
            asyncio.Task, tuple[Group, int]
        ] = {}  # what was cancelled stays until its sandbox is gone
        self._forks_closing: set[asyncio.Task] = set()
        self._closing = False

    # -- what the trainer calls
    # ---------------------------------------------------------------------------------------------

    async def advance(self, version: int) -> None:
        """Weights of `version` are on the engines: more waves may begin."""
        self.version = version
        self._hold_back(
            None if self._journal.get(version) is None else self._journal.after(version - 1)
        )
        if self.rules.late == "drop":
            self._drop_stale()
        while self._waves < min(version + self.rules.async_ratio + 1, self.rules.steps):
            first = self._waves * self.rules.groups_per_wave
            self._waves += 1
            for index, plan in enumerate(self._plan(self._waves - 1)):
                self._open(Group(first + index, plan))
        self._fill()

    async def take(self, step: int) -> Taken:
        """The groups of a step, as soon as they may be taken.

        Raises Stopped, or what ended an episode for good (RolloutError).
        """
        began = asyncio.get_running_loop().time()
        self._taken_at = began if self._taken_at is None else self._taken_at
        while True:
            if self._failure is not None:
                raise self._failure
            if self._should_stop():
                raise Stopped
            self._changed.clear()
            if (choice := self._choose(step)) is not None:
                chosen, given_up = choice
                break
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                pass
        self._replaced.sort(key=lambda group: (group.number, group.attempt))
        self._journal.add(step, chosen, given_up, self._replaced)
        for group in chosen:
            self._remove(group)
        self._give_up(
            given_up if step < self.rules.steps - 1 else list(self._groups.values())
        )  # after the last nobody will want the rest
        replaced = [trajectory for group in self._replaced for trajectory in group.trajectories()]
        self._replaced.clear()
        now = asyncio.get_running_loop().time()
        names = [
            [self.episode(group, number).name for number in sorted(group.finished)]
            for group in chosen
        ]
        taken = Taken(
            [group.trajectories() for group in chosen],
            names,
            [group.plan.source for group in chosen],
            replaced,
            now - self._taken_at,
            now - began,
            self._running,
        )
        self._taken_at = now
        return taken

    async def check(self) -> None:
        """Raises AssertionError where the accounting is not what is here: begun, and neither
        trained nor dropped.

        Between two steps.
        """
        self.accounting.check()
        here = sum(len(group.finished) for group in self._groups.values()) + sum(
            group.open.get(number) is task for task, (group, number) in self._playing.items()
        )
        if (
            here != self.accounting.in_flight and self._failure is None
        ):  # a failure is the next step's to raise
            raise AssertionError(
                f"{here} episodes are in flight, and the sample accounting says {self.accounting}"
            )

    async def close(self) -> None:
        """Cancels what is in flight and waits until its sandboxes are gone.

        It stays in flight in the accounting: a resumed run begins it again.
        """
        self._closing = True
        for task in self._playing:
            task.cancel()
        forks = [
            group.plan.forks.aclose()
            for group in self._groups.values()
            if group.plan.forks is not None
        ]
        await asyncio.gather(*self._playing, *self._forks_closing, *forks, return_exceptions=True)

    async def get_state(self) -> dict[str, Any]:
        """What a resumed run must know.

        Finished trajectories are files; their groups are begun again and find them.

        A group whose replaced trajectories no step has handed on yet is there as it was before it
        was replaced, so that they will be.
        """
        replaced: dict[int, Group] = {}
        for group in self._replaced:
            replaced.setdefault(group.number, group)
        groups = [replaced.get(number, group) for number, group in self._groups.items()]
        counts, again = (
            self.accounting.to_json(),
            sum(len(group.finished) for group in self._replaced if group.number in self._groups),
        )
        if again:
            counts["dropped"]["equal_group"] -= again
            counts["in_flight"] += again
        return {
            "waves": self._waves,
            "accounting": counts,
            "groups": [
                {
                    "number": group.number,
                    "attempt": group.attempt,
                    "task": group.plan.task,
                    "source": group.plan.source,
                    "prefixes": [len(prefix) for prefix in group.plan.prefixes],
                }
                for group in groups
            ],
        }

    def set_state(
        self, state: dict[str, Any], plan_of: Callable[[dict[str, Any]], GroupPlan]
    ) -> None:
        """To be called before the first `advance`.

        `plan_of` makes a plan of a group's entry in the state.
        """
        self._waves = state["waves"]
        for entry in sorted(state["groups"], key=lambda entry: entry["number"]):
            self._open(Group(entry["number"], plan_of(entry), entry["attempt"]))

    # -- episodes
    # ---------------------------------------------------------------------------------------------

    def episode(self, group: Group, number: int) -> Episode:
        """The n-th episode of a group: the same, whoever asks and when."""
        rules, plan = self.rules, group.plan
        wave, index = divmod(group.number, rules.groups_per_wave)
        again = (("again", group.attempt) if group.attempt else ()) + (
            ("stale", group.retries[number]) if group.retries[number] else ()
        )
        if rules.siblings > 1:
            index, number = divmod(index, rules.siblings)
        name = (
            f"{wave:06d}_g{index:03d}{f'r{group.attempt}' if group.attempt else ''}_e{number:02d}"
        )
        prefix = plan.prefixes[number % len(plan.prefixes)] if plan.prefixes else ()
        seed = derive_seed(rules.seed, plan.task, wave, index, number, *again)
        return Episode(
            plan.task, group.number // rules.siblings, number, seed, name, prefix, plan.forks
        )

    def _open(self, group: Group) -> None:
        self._groups[group.number] = group
        for number in self._journal.episodes(group.number, group.attempt) or range(
            self.rules.group_size + self.rules.redundancy
        ):
            heapq.heappush(self._waiting, (group.number, -group.attempt, number, group))

    def _hold_back(self, repeats: set[int] | None) -> None:
        """From now on only groups of these numbers begin, and those that were replaced; None for
        all.
        """
        self._repeats = repeats
        for entry in self._held:
            heapq.heappush(self._waiting, entry)
        self._held.clear()

    def _fill(self) -> None:
        """Begins what waits, as far as concurrency allows."""
        while self._running < self.rules.concurrency and self._waiting and not self._closing:
            *_, number, group = entry = heapq.heappop(self._waiting)
            if group.closed:
                continue
            if (
                self._repeats is not None
                and group.number not in self._repeats
                and self._journal.episodes(group.number, group.attempt) is None
            ):
                self._held.append(entry)
                continue
            group.versions[number] = self.version
            self.accounting.begin()
            self._running += 1
            task = asyncio.get_running_loop().create_task(self._run(group, number))
            group.open[number] = task
            self._playing[task] = group, number
            task.add_done_callback(self._ended)  # also of one that was cancelled before it ran

    async def _run(self, group: Group, number: int) -> None:
        episode = self.episode(group, number)
        try:
            trajectory = await self._play(episode)
        except (Exception, asyncio.CancelledError) as error:
            if (
                group.open.get(number) is asyncio.current_task() and not self._closing
            ):  # else nobody waits for it: it was cancelled here
                self._failed(group, number, error)
            return
        if (
            group.open.get(number) is asyncio.current_task()
        ):  # else it was cancelled as it ended, and is counted already
            del group.open[number]
            self._finished(group, number, trajectory)

    def _failed(self, group: Group, number: int, error: BaseException) -> None:
        """What ends an episode for good ends the run, but for a redundant one that nobody waits
        for.
        """
        del group.open[number]
        if isinstance(error, asyncio.CancelledError):
            error = RolloutError(
                f"episode {self.episode(group, number).name} of {group.plan.task} was cancelled,"
                " and not by the rollouts: an error of the program"
            )
        if not (group.closed and isinstance(error, RolloutError)):
            self._failure = self._failure or error
            self._changed.set()

    def _ended(self, task: asyncio.Task) -> None:
        del self._playing[task]
        self._running -= 1
        self._fill()

    def _finished(self, group: Group, number: int, trajectory: Trajectory) -> None:
        began = min(
            (span[0] for chunk in trajectory.chunks for span in chunk.versions),
            default=self.version,
        )
        if group.closed:
            self.accounting.drop("redundant")
        elif self._too_old(began):
            self._begin_again(group, number, "stale")
        else:
            group.versions[number] = began
            group.finished[number] = trajectory
            if len(group.finished) == self.rules.group_size:
                self._finish(group)

    def _too_old(self, began: int) -> bool:
        """With "wait" only in a run that was resumed without the record of what its steps took:
        `_choose` lets nothing grow too old.
        """
        return self.rules.late != "keep" and self.version - began > self.rules.async_ratio

    def _begin_again(self, group: Group, number: int, reason: str) -> None:
        """Its sample is dropped, and its file with it."""
        self.accounting.drop(reason)
        self._forget(self.episode(group, number))
        group.retries[number] += 1
        group.versions.pop(number, None)
        heapq.heappush(self._waiting, (group.number, -group.attempt, number, group))

    def _drop_stale(self) -> None:
        for group in self._groups.values():
            for number in [
                number for number, began in group.versions.items() if self._too_old(began)
            ]:
                if (task := group.open.pop(number, None)) is not None:
                    task.cancel()
                group.finished.pop(number, None)
                self._begin_again(group, number, "stale")
                if group.closed:
                    group.closed = False
                    self._complete.remove(group.number)

    # -- groups
    # ---------------------------------------------------------------------------------------------

    def _finish(self, group: Group) -> None:
        """All that it needs is there."""
        self._close_group(group)
        replaces = (
            self._replan is not None
            and self.rules.replace_equal
            and group.attempt < MOST_REPLACEMENTS
        )
        if (
            replaces and not group.plan.source and not _has_spread(group)
        ):  # how a resampled one ends decides where its task is begun next
            self.accounting.drop("equal_group", len(group.finished))
            self._replaced.append(group)
            self._open(
                Group(
                    group.number, self._replan(group.number, group.attempt + 1), group.attempt + 1
                )
            )
        else:
            bisect.insort(self._complete, group.number)
        self._changed.set()

    def _close_group(self, group: Group) -> None:
        """Nothing more of it counts: what runs is cancelled, or plays on for its file alone."""
        group.closed = True
        group.versions = {
            number: began for number, began in group.versions.items() if number in group.finished
        }
        if self.rules.keep_redundant:
            return
        for task in list(group.open.values()):
            self.accounting.drop("redundant")
            task.cancel()
        group.open.clear()

    def _choose(self, step: int) -> tuple[list[Group], list[Group]] | None:
        """The groups that the step takes, and those that redundancy allows to give up with it; None
        as long as it cannot be taken.
        """
        recorded = self._recorded(step)
        if recorded is not None:
            given_up = [
                self._groups[number]
                for number in self._journal.given_up(step)
                if number in self._groups
            ]
            return (recorded, given_up) if all(recorded) else None
        if self._repeats is not None:
            self._hold_back(None)
            self._fill()
        if len(self._complete) < self.rules.groups_per_step:
            return None
        chosen = [self._groups[number] for number in self._complete[: self.rules.groups_per_step]]
        late, spare = self._late(chosen), self._spare()
        if len(late) > spare:
            return None
        surplus = spare - len(late) - self.rules.async_ratio * self.rules.redundant_groups
        if surplus > 0:  # the slowest go
            others = [
                group
                for group in self._groups.values()
                if group not in chosen and group not in late
            ]
            late += sorted(others, key=lambda group: (group.closed, group.number))[:surplus]
        return chosen, late

    def _recorded(self, step: int) -> list[Group | None] | None:
        """The groups that this step took once, each None as long as it is not complete.

        None where there is no record, or where it cannot come true any more: files were lost, and
        it went otherwise.
        """
        if (wanted := self._journal.get(step)) is None:
            return None
        groups = []
        for number, attempt in wanted:
            group, complete = self._groups.get(number), number in self._complete
            if group is None or group.attempt > attempt or (group.attempt < attempt and complete):
                return None
            groups.append(group if group.attempt == attempt and complete else None)
        return groups

    def _late(self, chosen: list[Group]) -> list[Group]:
        """Those of the other groups that could not be taken within the bound any more, if these
        were taken now.
        """
        if self.rules.late != "wait":
            return []
        numbers, late, place, allowed = {group.number for group in chosen}, [], 0, self._spare()
        for number, group in self._groups.items():
            if number in numbers:
                continue
            if (
                group.age(self.version) + 1 + place // self.rules.groups_per_step
                > self.rules.async_ratio
            ):
                late.append(group)
                if len(late) > allowed:  # no need to know how many more
                    break
            else:
                place += 1
        return late

    def _spare(self) -> int:
        """How many of the groups that are there were begun beyond what the steps take."""
        return (
            max(0, len(self._groups) - (self._waves - self.version) * self.rules.groups_per_step)
            if self.rules.redundant_groups
            else 0
        )

    def _give_up(self, groups: list[Group]) -> None:
        for group in groups:
            self.accounting.drop("redundant", len(group.finished))
            self._close_group(group)
            self._remove(group)

    def _remove(self, group: Group) -> None:
        del self._groups[group.number]
        if group.number in self._complete:
            self._complete.remove(group.number)
        forks = group.plan.forks
        if forks is not None and not any(
            other.plan.forks is forks for other in self._groups.values()
        ):  # siblings have theirs in common
            closing = asyncio.get_running_loop().create_task(forks.aclose())
            self._forks_closing.add(closing)
            closing.add_done_callback(self._forks_closing.discard)


def _has_spread(group: Group) -> bool:
    return len({trajectory.reward > 0 for trajectory in group.finished.values()}) == 2


def _ends_with_newline(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
