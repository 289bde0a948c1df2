"""The scheduler of asynchronous rollouts: which episode starts when, and what a step trains on.

Episodes are played in groups beside the trainer. Four terms describe how far rollouts may run
ahead of it:

  version    number of training steps that the weights have seen
  wave       the groups planned for one training step, `groups_per_step` of them
  staleness  of a sample: the version that it is trained at minus the version that started it
  alpha      `async_ratio`, the bound on staleness; 0 means synchronous training

**Start.** At version v the waves 0 to v + alpha may have started. This is the capacity rule of
AReaL (arXiv 2505.24298, Eq. 3), counted in groups. Within it, episodes start in the order of their
groups, at most `concurrency` at once. Each episode then moves alone. It continues when the weights
are updated, and each of its tokens keeps the version that sampled it.

**Complete.** A group is complete when `group_size` of its episodes have finished; those of its
`redundancy` that still run are cancelled. With `replace_equal`, a group without spread (equal
rewards, so no advantage to learn from) is replaced by a group of another task. So is, with all of
its siblings, a group whose task cannot be played (`rome.rollout.spoiled`).

**Take.** A step takes the `groups_per_step` oldest complete groups, as soon as they exist. The
capacity rule bounds how many samples are ahead, but not how old the slowest of them gets: short
episodes overtake long ones. `stale_samples` decides about a sample that would be trained on at a
staleness above alpha:

  wait  Do not let it happen. A step takes its groups only when every other group that has started
        can still be taken within the bound by a later step. Nothing is dropped; the trainer waits.
  keep  Train on it. The staleness metric shows it, and the loss bounds the weight of such samples.
  drop  Drop it, or cancel it if it still runs, and play it again from the same initial state. The
        trainer waits less, but batches lean towards short episodes.

**Resume.** The journal records which groups and episodes each step took, on disk before the step
trains. A run that resumes from a checkpoint repeats the steps after it with the same trajectories
and reaches the same weights: no finished episode is lost, none is trained on twice. Groups that
those steps do not take start after them, because their samples would otherwise be older than in
the first run.
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import math
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from rome.data.seeds import derive_seed
from rome.data.trajectory import Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.episode import Episode, RolloutError, SpoiledTaskError
from rome.rollout.group import Group, GroupPlan, Taken
from rome.rollout.journal import Journal
from rome.rollout.pending import PendingEpisodes
from rome.rollout.spoiled import Replacement, SpoiledTasks
from rome.stopping import POLL_SECONDS, raise_if_stopped

StaleSamples = Literal["wait", "keep", "drop"]
MAX_REPLACEMENTS = 4  # of a group without spread; the last one is taken as it is
MAX_DRAWS = 100  # of another task for a group, before none counts as left


@dataclasses.dataclass(frozen=True)
class Rules:
    """The numbers that a RolloutScheduler follows.

    Args:
      groups_per_step: groups that a training step takes.
      group_size: episodes of a group that are trained on.
      concurrency: episodes in play at once.
      steps: training steps of the run; no wave starts beyond the last one.
      async_ratio: alpha, the bound on staleness in versions.
      redundancy: further episodes of a group. The first `group_size` to finish count.
      replace_equal: replace a group without spread by a group of another task (the dynamic
        sampling of DAPO, arXiv 2503.14476), up to MAX_REPLACEMENTS times.
      stale_samples: what happens to samples beyond the bound.
      siblings: number of consecutive groups that are episodes of the same task. With group_size=1
        a step takes single episodes without waiting for their siblings.
      seed: seed of the run, from which every episode's seed is derived.
    """

    groups_per_step: int
    group_size: int
    concurrency: int
    steps: int
    async_ratio: int = 0
    redundancy: int = 0
    replace_equal: bool = False
    stale_samples: StaleSamples = "wait"
    siblings: int = 1
    seed: int = 0


class RolloutScheduler:
    """Plays groups of episodes under the rules and hands complete groups to the trainer.

    It lives on one event loop: create it anywhere, but call all of its coroutines there.

    Args:
      rules: how many episodes may start, and what a step takes.
      play: plays one episode and returns a trainable trajectory. It counts the replacements that
        infrastructure failures make necessary, but not the start of the episode.
      plan: returns the plans of a wave's groups. It is called when the wave may start, so it can
        use what was trained on until then.
      replan: called with (number, attempt); returns the plan of the group that replaces one
        without spread, or one whose task cannot be played (of siblings, the first one's number).
        None: groups are never replaced, and a task that cannot be played ends the run.
      accounting: where samples are counted.
      should_stop: polled while a step waits; True makes `take` raise Stopped.
      forget: removes the file of an episode, so that it is played again.
      journal: file of the record of what each step took; None keeps the record in memory.
      spoiled: the tasks that were set aside, with those of a run that is resumed.
      quiet_seconds: for which a step waits although no episode ends; longer than one may take.
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
        spoiled: SpoiledTasks | None = None,
        quiet_seconds: float = math.inf,
    ) -> None:
        self.rules = rules
        self.accounting = accounting
        self.version = 0
        self._play = play
        self._plan = plan
        self._replan = replan
        self._spoiled = SpoiledTasks() if spoiled is None else spoiled
        self._spoiled_in_wave: collections.Counter[int] = collections.Counter()
        self._quiet_seconds = quiet_seconds
        self._ended_at = -math.inf  # when an episode ended last
        self._forget = forget
        self._should_stop = should_stop
        self._journal = Journal(journal)
        self._pending = PendingEpisodes(self._journal)

        self._started_waves = 0
        self._groups: dict[int, Group] = {}  # started and not yet taken, in order of their numbers
        self._complete: list[int] = []  # numbers of the complete groups among them, in order
        self._replaced: list[Group] = []  # groups without spread, since the last step took its own

        self._playing: dict[asyncio.Task, tuple[Group, int]] = {}  # cancelled ones until they end
        self._closing_forks: set[asyncio.Task] = set()
        self._changed = asyncio.Event()  # a step that waits should look again
        self._failure: BaseException | None = None
        self._taken_at: float | None = None
        self._closing = False

    # -- interface to the trainer
    # ---------------------------------------------------------------------------------------------

    async def advance(self, version: int) -> None:
        """Start the waves that may start now that the engines serve weights of `version`."""
        self.version = version
        step_is_repeated = self._journal.groups(version) is not None
        self._pending.restrict_to(self._journal.groups_from(version) if step_is_repeated else None)
        if self.rules.stale_samples == "drop":
            self._drop_stale()
        allowed_waves = min(version + self.rules.async_ratio + 1, self.rules.steps)
        while self._started_waves < allowed_waves:
            self._start_wave()
        self._start_pending()

    async def take(self, step: int) -> Taken:
        """Wait until the groups of a step may be taken, record them and return them.

        Raises:
          Stopped: `should_stop` returned True.
          RolloutError: an episode failed for good, too many tasks of a wave cannot be played, or
            no episode ended for `quiet_seconds`.
        """
        now = asyncio.get_running_loop().time
        called_at = now()
        if self._taken_at is None:
            self._taken_at = called_at
        chosen = await self._wait_for_groups(step)
        replaced = sorted(self._replaced, key=lambda group: group.key)
        self._journal.add(step, chosen, replaced)
        self._replaced.clear()
        for group in chosen:
            self._remove(group)
        taken_at = now()
        taken = Taken(
            groups=[group.trajectories() for group in chosen],
            names=[self._episode_names(group) for group in chosen],
            sources=[group.plan.source for group in chosen],
            replaced=[trajectory for group in replaced for trajectory in group.trajectories()],
            seconds=taken_at - self._taken_at,
            waited=taken_at - called_at,
            open_episodes=len(self._playing),
        )
        self._taken_at = taken_at
        return taken

    async def check(self) -> None:
        """Compare the accounting with the episodes that are here. Call it between two steps.

        Raises:
          AssertionError: an episode was started and neither trained on, dropped nor kept here.
        """
        self.accounting.check()
        if self._failure is not None:  # the next step raises it
            return
        finished = sum(len(group.finished) for group in self._groups.values())
        running = sum(
            group.running.get(number) is task for task, (group, number) in self._playing.items()
        )
        if finished + running != self.accounting.in_flight:
            raise AssertionError(
                f"{finished + running} episodes are in flight, and the sample accounting says"
                f" {self.accounting}"
            )

    async def close(self) -> None:
        """Cancel the episodes in play and wait until their sandboxes are gone.

        They stay in flight in the accounting: a resumed run starts them again.
        """
        self._closing = True
        for task in self._playing:
            task.cancel()
        forks = [group.plan.forks for group in self._groups.values()]
        closings = [fork.aclose() for fork in forks if fork is not None]
        await asyncio.gather(
            *self._playing, *self._closing_forks, *closings, return_exceptions=True
        )

    async def get_state(self) -> dict[str, Any]:
        """Return what a resumed run must know, as JSON values.

        Finished trajectories are files: the resumed run starts their groups again and finds them.
        A group is listed as it was before it was replaced until a step has returned the replaced
        trajectories, so that the resumed run returns them.
        """
        before_replacement: dict[int, Group] = {}
        for group in self._replaced:
            before_replacement.setdefault(group.number, group)
        groups = [before_replacement.get(group.number, group) for group in self._groups.values()]
        unreturned = sum(
            len(group.finished) for group in self._replaced if group.number in self._groups
        )
        counts = self.accounting.to_json()
        if unreturned:
            counts["dropped"]["equal_group"] -= unreturned
            counts["in_flight"] += unreturned
        return {
            "waves": self._started_waves,
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
        """Restore what `get_state` returned. Call it before the first `advance`.

        Args:
          state: the state.
          plan_of: makes the plan of a group from its entry in the state.
        """
        self._started_waves = state["waves"]
        for entry in sorted(state["groups"], key=lambda entry: entry["number"]):
            self._add_group(Group(entry["number"], plan_of(entry), entry["attempt"]))

    # -- episodes
    # ---------------------------------------------------------------------------------------------

    def episode(self, group: Group, number: int) -> Episode:
        """Return the n-th episode of a group. It does not depend on when it is asked for."""
        rules = self.rules
        wave, index = divmod(group.number, rules.groups_per_step)
        again: list[Any] = []  # what makes a second try another sample
        if group.attempt:
            again += ["again", group.attempt]
        if group.retries[number]:
            again += ["stale", group.retries[number]]
        if rules.siblings > 1:
            index, number = divmod(index, rules.siblings)
        replacement = f"r{group.attempt}" if group.attempt else ""
        return Episode(
            task=group.plan.task,
            group=group.number // rules.siblings,
            episode=number,
            seed=derive_seed(rules.seed, group.plan.task, wave, index, number, *again),
            name=f"{wave:06d}_g{index:03d}{replacement}_e{number:02d}",
            prefix=group.plan.prefix(number),
            forks=group.plan.forks,
        )

    def _episode_names(self, group: Group) -> list[str]:
        return [self.episode(group, number).name for number in sorted(group.finished)]

    def _start_pending(self) -> None:
        """Start pending episodes as far as concurrency allows."""
        while len(self._playing) < self.rules.concurrency and not self._closing:
            pending = self._pending.pop()
            if pending is None:
                return
            self._start_episode(*pending)

    def _start_episode(self, group: Group, number: int) -> None:
        self.accounting.begin()
        task = asyncio.get_running_loop().create_task(self._run(group, number))
        group.versions[number] = self.version
        group.running[number] = task
        self._playing[task] = (group, number)
        task.add_done_callback(self._on_task_end)  # called also if it is cancelled before it runs

    def _on_task_end(self, task: asyncio.Task) -> None:
        del self._playing[task]
        self._ended_at = asyncio.get_running_loop().time()
        self._start_pending()

    async def _run(self, group: Group, number: int) -> None:
        """Play one episode and report its result, unless it was cancelled or dropped meanwhile."""
        this_task = asyncio.current_task()
        try:
            trajectory = await self._play(self.episode(group, number))
        except (Exception, asyncio.CancelledError) as error:
            if group.running.get(number) is this_task and not self._closing:
                self._on_failure(group, number, error)
            return
        if group.running.get(number) is this_task:
            del group.running[number]
            self._on_finish(group, number, trajectory)

    def _on_failure(self, group: Group, number: int, error: BaseException) -> None:
        """Set a task aside that cannot be played; any other error ends the step that waits."""
        del group.running[number]
        if isinstance(error, SpoiledTaskError) and self._replan is not None:
            try:
                self._set_aside(group, error)
                return
            except RolloutError as failure:
                error = failure
        if isinstance(error, asyncio.CancelledError):
            error = RolloutError(
                f"episode {self.episode(group, number).name} of {group.plan.task} was cancelled,"
                " and not by the rollouts: an error of the program"
            )
        self._failure = self._failure or error
        self._changed.set()

    def _on_finish(self, group: Group, number: int, trajectory: Trajectory) -> None:
        spans = [span for chunk in trajectory.chunks for span in chunk.versions]
        first_version = min((version for version, _, _ in spans), default=self.version)
        if self._is_too_old(first_version):
            self._replay(group, number)
            return
        group.versions[number] = first_version
        group.finished[number] = trajectory
        if len(group.finished) == self.rules.group_size:
            self._complete_group(group)

    def _is_too_old(self, version: int) -> bool:
        """Whether a sample that started at `version` must be dropped.

        With "wait" this happens only in a run that resumed without its journal: `_choose` lets no
        sample grow too old.
        """
        if self.rules.stale_samples == "keep":
            return False
        return self.version - version > self.rules.async_ratio

    def _replay(self, group: Group, number: int) -> None:
        """Drop a sample that is too old, and its file, and play the episode again."""
        self.accounting.drop("stale")
        self._forget(self.episode(group, number))
        group.retries[number] += 1
        group.versions.pop(number, None)
        self._pending.push(group, number)

    def _drop_stale(self) -> None:
        """Replay every sample of the open groups that is too old, running or finished."""
        for group in self._groups.values():
            versions = list(group.versions.items())
            stale = [number for number, version in versions if self._is_too_old(version)]
            for number in stale:
                task = group.running.pop(number, None)
                if task is not None:
                    task.cancel()
                group.finished.pop(number, None)
                self._replay(group, number)
            if stale and group.closed:
                group.closed = False
                self._complete.remove(group.number)

    # -- groups
    # ---------------------------------------------------------------------------------------------

    def _start_wave(self) -> None:
        wave = self._started_waves
        self._started_waves += 1
        first = wave * self.rules.groups_per_step
        for number, plan in enumerate(self._plan(wave), start=first):
            self._add_group(Group(number, plan))

    def _add_group(self, group: Group) -> None:
        group = self._playable(group)
        self._groups[group.number] = group
        recorded = self._journal.episodes(group)
        for number in recorded or range(self.rules.group_size + self.rules.redundancy):
            self._pending.push(group, number)

    def _complete_group(self, group: Group) -> None:
        self._close_group(group)
        if self._replan is not None and self._should_replace(group):
            self.accounting.drop("equal_group", len(group.finished))
            self._replaced.append(group)
            attempt = group.attempt + 1
            self._add_group(Group(group.number, self._replan(group.number, attempt), attempt))
        else:
            bisect.insort(self._complete, group.number)
        self._changed.set()

    def _should_replace(self, group: Group) -> bool:
        if not self.rules.replace_equal or group.attempt >= MAX_REPLACEMENTS:
            return False
        # How a resampled group ends decides where its task starts next, so it is always taken.
        is_resampled = bool(group.plan.source)
        return not is_resampled and not group.has_spread

    def _set_aside(self, group: Group, fault: SpoiledTaskError) -> None:
        """Let the group of a task that cannot be played, and its siblings, go on with another one.

        Siblings change together: what a step takes of them counts as one group of one task.

        Raises:
          RolloutError: too many tasks of the wave are spoiled, or no other task is left.
        """
        siblings = [
            other
            for other in self._groups.values()
            if self._task_group(other) == self._task_group(group)
            and other.plan.task == group.plan.task
        ]
        self._spoiled.note(fault)
        try:
            successor = self._playable(self._successor(group))
        except RolloutError:
            self._spoiled.add(fault)
            raise
        key = self._task_group(group), group.attempt
        self._spoiled.add(fault, key, Replacement(successor.plan.task, successor.attempt))
        for sibling in siblings:
            self._leave(sibling)
            self._add_group(Group(sibling.number, successor.plan, successor.attempt))
        self._changed.set()

        wave = group.number // self.rules.groups_per_step
        self._spoiled_in_wave[wave] += 1
        number = self._spoiled_in_wave[wave]
        tasks_per_wave = self.rules.groups_per_step // self.rules.siblings
        if self._spoiled.too_many(number, tasks_per_wave):
            raise RolloutError(self._spoiled.failure(number, tasks_per_wave))

    def _leave(self, group: Group) -> None:
        """Drop the episodes of a group whose task was set aside."""
        group.closed = True
        if group.number in self._complete:
            self._complete.remove(group.number)
        self.accounting.drop("spoiled_task", len(group.finished) + len(group.running))
        for task in group.running.values():
            task.cancel()
        group.running.clear()
        self._close_unused_forks(group)

    def _playable(self, group: Group) -> Group:
        """Return the group, or the one that replaces it where its task was set aside.

        A group that a step has taken stays as it was, so that a resumed run can repeat the step.

        Raises:
          RolloutError: no other task is left.
        """
        first_attempt = group.attempt
        while group.plan.task in self._spoiled and self._replan is not None:
            if self._journal.episodes(group) is not None:
                return group
            if group.attempt - first_attempt >= MAX_DRAWS:
                raise RolloutError(
                    f"the last {MAX_DRAWS} tasks that were drawn for group {group.number} are all"
                    f" set aside in {self._spoiled.path or 'the record'}: no task is left that can"
                    " be played"
                )
            group = self._successor(group)
        return group

    def _successor(self, group: Group) -> Group:
        """Return the group that takes the place of one whose task was set aside."""
        known = self._spoiled.replacement((self._task_group(group), group.attempt))
        if known is not None:
            return Group(group.number, GroupPlan(known.task), known.attempt)
        assert self._replan is not None
        attempt = group.attempt + 1
        first_sibling = self._task_group(group) * self.rules.siblings
        return Group(group.number, self._replan(first_sibling, attempt), attempt)

    def _task_group(self, group: Group) -> int:
        """Return the number that the group shares with its siblings."""
        return group.number // self.rules.siblings

    def _close_group(self, group: Group) -> None:
        """Start no further episode of a complete group and cancel those that still run."""
        group.closed = True
        group.versions = {number: group.versions[number] for number in group.finished}
        for task in group.running.values():
            self.accounting.drop("redundant")
            task.cancel()
        group.running.clear()

    async def _wait_for_groups(self, step: int) -> list[Group]:
        since = asyncio.get_running_loop().time()
        while True:
            if self._failure is not None:
                raise self._failure
            raise_if_stopped(self._should_stop)
            self._require_progress(step, since)
            self._changed.clear()
            chosen = self._choose(step)
            if chosen is not None:
                return chosen
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _require_progress(self, step: int, since: float) -> None:
        """Raise RolloutError where no episode has ended for longer than one may take."""
        quiet = asyncio.get_running_loop().time() - max(since, self._ended_at)
        if quiet > self._quiet_seconds:
            raise RolloutError(
                f"step {step} waits for its groups, and none of {len(self._playing)} episodes has"
                f" ended for {quiet:.0f} s, longer than one may take: a sandbox or an engine hangs;"
                " see its log. Finished trajectories are kept; run the same command again."
            )

    def _choose(self, step: int) -> list[Group] | None:
        """Return the groups that the step takes; None while it must wait."""
        recorded = self._journal.groups(step)
        if recorded is not None and self._can_repeat(recorded):
            return self._find_recorded(recorded)
        if self._pending.is_restricted:
            self._pending.restrict_to(None)
            self._start_pending()
        if len(self._complete) < self.rules.groups_per_step:
            return None
        chosen = [self._groups[number] for number in self._complete[: self.rules.groups_per_step]]
        return None if self._would_exceed_bound(chosen) else chosen

    def _can_repeat(self, recorded: list[tuple[int, int]]) -> bool:
        """Whether the step can still take what it took once.

        It cannot if files were lost and a group went another way: it is gone, was replaced more
        often than then, or is complete where it was replaced then.
        """
        for number, attempt in recorded:
            group = self._groups.get(number)
            if group is None or group.attempt > attempt:
                return False
            if group.attempt < attempt and number in self._complete:
                return False
        return True

    def _find_recorded(self, recorded: list[tuple[int, int]]) -> list[Group] | None:
        """Return the recorded groups; None until all of them are complete."""
        groups = [self._groups[number] for number, _ in recorded]
        if [group.key for group in groups] != recorded:
            return None
        if any(group.number not in self._complete for group in groups):
            return None
        return groups

    def _would_exceed_bound(self, chosen: list[Group]) -> bool:
        """Whether another group would exceed the staleness bound if `chosen` were taken now.

        The other groups are taken in their order by the steps after this one.
        """
        if self.rules.stale_samples != "wait":
            return False
        numbers = {group.number for group in chosen}
        others = [group for group in self._groups.values() if group.number not in numbers]
        for place, group in enumerate(others):
            steps_until_taken = 1 + place // self.rules.groups_per_step
            if group.age(self.version) + steps_until_taken > self.rules.async_ratio:
                return True
        return False

    def _remove(self, group: Group) -> None:
        """Remove a group that was taken; the last group that uses its forks closes them."""
        del self._groups[group.number]
        self._complete.remove(group.number)
        self._close_unused_forks(group)

    def _close_unused_forks(self, group: Group) -> None:
        """Close the forks of a group that is not played any more, unless others use them."""
        forks = group.plan.forks
        others = (other for other in self._groups.values() if other is not group)
        if forks is None or any(other.plan.forks is forks for other in others):
            return
        closing = asyncio.get_running_loop().create_task(forks.aclose())
        self._closing_forks.add(closing)
        closing.add_done_callback(self._closing_forks.discard)
