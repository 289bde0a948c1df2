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
import math
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

from rome.data.trajectory import Trajectory
from rome.rollout.accounting import Accounting
from rome.rollout.episode import Episode, RolloutError, SpoiledTaskError
from rome.rollout.group import Group, GroupPlan, Taken, episode_of
from rome.rollout.journal import Journal
from rome.rollout.pending import PendingEpisodes
from rome.rollout.rules import MAX_REPLACEMENTS, Rules
from rome.rollout.spoiled import SpoiledTasks
from rome.rollout.substitutes import Substitutes
from rome.rollout.taking import can_repeat, find_recorded, would_exceed_bound
from rome.stopping import POLL_SECONDS, raise_if_stopped


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
        self._quiet_seconds = quiet_seconds
        self._ended_at = -math.inf  # when an episode ended last
        self._forget = forget
        self._should_stop = should_stop
        self._journal = Journal(journal)
        self._pending = PendingEpisodes(self._journal)
        self._substitutes = Substitutes(
            rules, SpoiledTasks() if spoiled is None else spoiled, replan, self._journal
        )

        self._started_waves = 0
        self._groups: dict[int, Group] = {}  # started and not yet taken, in order of their numbers
        self._complete: list[int] = []  # numbers of the complete groups among them, in order
        self._replaced: list[Group] = []  # groups without spread, since the last step took its own

        self._playing: dict[asyncio.Task, tuple[Group, int]] = {}  # cancelled ones until they end
        self._stale: set[asyncio.Task] = set()  # those of them whose episodes are played again
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
            replaced_names=[name for group in replaced for name in self._episode_names(group)],
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

    def first_wave_left(self, step: int) -> int:
        """Return the first wave of which a group was not taken by any step before this one.

        A run that resumes at this step plays no episode of an earlier wave, nor reads its files.
        """
        return self._journal.first_left(step) // self.rules.groups_per_step

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
            "groups": [group.to_json() for group in groups],
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
        return episode_of(self.rules, group, number)

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
        group, number = self._playing.pop(task)
        if task in self._stale:
            self._stale.remove(task)
            self._play_again(group, number)
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
        group.versions.pop(number, None)
        self._play_again(group, number)

    def _play_again(self, group: Group, number: int) -> None:
        self._forget(self.episode(group, number))
        group.retries[number] += 1
        self._pending.push(group, number)

    def _drop_stale(self) -> None:
        """Replay every sample of the open groups that is too old, running or finished."""
        for group in self._groups.values():
            versions = list(group.versions.items())
            stale = [number for number, version in versions if self._is_too_old(version)]
            for number in stale:
                task = group.running.pop(number, None)
                group.finished.pop(number, None)
                if task is None:
                    self._replay(group, number)
                    continue
                # It may be writing its file, which is deleted when the task is gone.
                self.accounting.drop("stale")
                group.versions.pop(number)
                self._stale.add(task)
                task.cancel()
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
        group = self._substitutes.playable(group)
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
        return not is_resampled and not group.has_spread(self.rules.safety_cost)

    def _set_aside(self, group: Group, fault: SpoiledTaskError) -> None:
        """Let the group of a task that cannot be played, and its siblings, go on with another one.

        Siblings change together: what a step takes of them counts as one group of one task.

        Raises:
          RolloutError: too many tasks of the wave are spoiled, or no other task is left.
        """
        siblings = self._substitutes.siblings(group, self._groups.values())
        successor = self._substitutes.set_aside(group, fault)
        for sibling in siblings:
            self._leave(sibling)
            self._add_group(Group(sibling.number, successor.plan, successor.attempt))
        self._changed.set()
        self._substitutes.count(group)

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
        if recorded is not None and can_repeat(recorded, self._groups, self._complete):
            return find_recorded(recorded, self._groups, self._complete)
        if self._pending.is_restricted:
            self._pending.restrict_to(None)
            self._start_pending()
        if len(self._complete) < self.rules.groups_per_step:
            return None
        chosen = [self._groups[number] for number in self._complete[: self.rules.groups_per_step]]
        is_late = would_exceed_bound(chosen, self._groups.values(), self.rules, self.version)
        return None if is_late else chosen

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
