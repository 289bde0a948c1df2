"""What a step of reinforcement learning trains on: the episodes it takes, packed and scored.

Process 0 plays. The others are told which files of the workdir the step is made of, and pack the
same rows. WORKDIR/steps.jsonl records the groups that each step took. WORKDIR/trajectories/ holds
the sampled episodes, NAME_WAVE_gGROUP_eEPISODE.json, and those that were imitated
(rome/stages/imitation.py). Once no checkpoint goes back to a step, the routes of its episodes are
deleted, and after `keep_trajectories` further steps the episodes (rome/stages/prune.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from envs.rock.sync import run as run_async
from rome.data.batch import Batch
from rome.data.costs import parse_costs
from rome.data.lines import fits_row
from rome.data.packing import microbatches, pack
from rome.data.trajectory import Trajectory, load_trajectory
from rome.data.tree import parse_credit
from rome.losses import count_denominators
from rome.model.config import ModelConfig
from rome.rollout.anchors import anchor_of
from rome.rollout.forks import REPLAY_SECONDS
from rome.rollout.group import Taken
from rome.rollout.outcomes import chosen_episodes, mixed_groups, rollout_metrics, staleness
from rome.rollout.player import Accounting, Episode
from rome.rollout.rules import Rules
from rome.rollout.scheduler import RolloutScheduler
from rome.stages.imitation import Shown, TaskGroup, show_solutions, worth_imitating
from rome.stages.old_logprobs import OldLogprobs
from rome.stages.own_code import own_advantage, own_filter, own_reward
from rome.stages.planner import Planner
from rome.stages.players import Players, wait_until_visible
from rome.stages.prune import Pruner, sources_of
from rome.stages.settings import imitation_weight
from rome.stages.waiting import wait_for_episodes
from rome.train.alarms import check_mismatch
from rome.train.feed import OwnRows
from rome.train.loop import Minibatch, StepData
from rome.train.replay import count_replayed
from rome.train.speed import count_work
from rome.train.state import TrainState
from rome.train.team import Team

# For the rollouts to start, to report their state, or to close their sandboxes.
CONTROL_SECONDS = 60.0
MAX_SOLUTIONS = 4096  # of tasks without a demonstrator; the oldest are forgotten


class Collector:
    """The rollouts of one run, and the batches made of them.

    In processes that do not lead, it only packs and scores.

    Args:
      config: of the experiment.
      workdir: of the run.
      players: play the episodes and the demonstrations.
      old_logprobs: scores pi_old.
      model_config: of the model that is trained.
      own_rows: of a micro-batch, in this process.
      prefix_tree: lines that begin alike share a row (`rome.data.prefix_tree`).
      team: the processes of this job.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        *,
        players: Players,
        old_logprobs: OldLogprobs,
        model_config: ModelConfig,
        own_rows: OwnRows,
        prefix_tree: bool = False,
        team: Team,
    ) -> None:
        self.config = config
        self.files = workdir / "trajectories"
        self.accounting = Accounting()
        self._solutions: dict[str, str] = {}  # by task without a demonstrator: file of a success
        self.planner = Planner(config, players, self.files)
        self._journal = workdir / "steps.jsonl"
        self._players = players
        self._old_logprobs = old_logprobs
        self._model_config = model_config
        self._own_rows = own_rows
        self._prefix_tree = prefix_tree
        self._with_routes: dict[int, pathlib.Path] = {}  # files of the step's trajectories, by id
        self._team = team
        # The step that was collected last and the state before it: a step that fails between
        # collecting and training is repeated from there.
        self._state_before: tuple[int, dict[str, Any]] | None = None
        self._evaluations = 0
        self._is_evaluating = False
        self._evaluations_at_take = 0
        self._pruner = Pruner(self.files, config.experiment, config.keep_trajectories)
        self._advantage = own_advantage(config)
        self._reward = own_reward(config)
        self._filter = own_filter(config)
        self._untimed: set[str] = set()  # names of episodes whose sampling speed is not this step's

    @functools.cached_property
    def rollouts(self) -> RolloutScheduler:
        """The scheduler, made when the first episode may start; it uses the accounting of then."""
        config = self.config
        rollout = config.rollout
        # Without whole groups every episode is a group of its own, and its siblings follow it.
        siblings = 1 if rollout.whole_groups else config.group_size
        rules = Rules(
            groups_per_step=config.groups * siblings,
            group_size=config.group_size if rollout.whole_groups else 1,
            siblings=siblings,
            concurrency=config.concurrency,
            steps=config.steps,
            async_ratio=rollout.async_ratio,
            redundancy=rollout.redundancy,
            replace_equal=rollout.replace_equal,
            stale_samples=rollout.stale_samples,
            seed=config.seed,
            safety_cost=parse_costs(config.safety_cost),
        )
        return RolloutScheduler(
            rules,
            self._play,
            self.planner.plan_wave,
            self.planner.plan_replacement,
            accounting=self.accounting,
            should_stop=self._team.wants_to_stop,
            forget=self._forget,
            journal=self._journal,
            spoiled=self._players.spoiled,
            quiet_seconds=self._quiet_seconds(),
        )

    # -- what the stage calls
    # ---------------------------------------------------------------------------------------------

    def begin(self, state: TrainState) -> None:
        """Start the episodes that the published weights of `state` may play, in the background."""
        self._old_logprobs.remember(state)
        if self._team.leads:
            step = int(state.step)
            what = f"the start of episodes at step {step}"
            wait_for_episodes(self.rollouts.advance(step), CONTROL_SECONDS, what)

    def collect(self, step: int, state: TrainState) -> StepData:
        """Take the episodes of a step, pack them, and score pi_old.

        Raises:
          Stopped: where the user asked to stop.
          RolloutError: where an episode cannot be played, or the groups are not there in time.
          TrainingAlarm: where the engine samples from another distribution than the trainer's.
        """
        config = self.config
        self._state_before = step, self._current_state()
        trajectories, shared = self._team.share_part(
            f"episodes of step {step}", lambda: self._take(step)
        )
        paths = [self.files / name for name in (*shared["kept"], *shared["shown"])]
        wait_until_visible(self._team, f"files of step {step}", paths)
        if trajectories is None:
            trajectories = [load_trajectory(path, routes=False) for path in paths]
            self._with_routes = {
                id(one): path for one, path in zip(trajectories, paths, strict=True)
            }
        parts = [self._pack(step, part) for part in split_groups(trajectories, config.minibatches)]
        unscored = [batch for part in parts for batch in part]
        scored, lost_versions = self._old_logprobs.fill(unscored, state)
        check_mismatch(scored, config.alarm_kl, lost_versions)
        if self._team.leads:
            self.accounting.drop("equal_group", shared["equal"])
            self.accounting.drop("filtered", shared["filtered"])
            self.accounting.train(len(shared["kept"]))
            wait_for_episodes(self.rollouts.check(), CONTROL_SECONDS, "the check of the accounts")
        batches = iter(scored)
        minibatches = []
        for part in parts:
            filled = list(itertools.islice(batches, len(part)))
            if filled:
                minibatches.append(self._minibatch(step, filled))
        return StepData(minibatches, shared["metrics"])

    def _pack(self, step: int, trajectories: list[Trajectory]) -> list[Batch]:
        """Return the micro-batches of one update; none where nothing is trainable."""
        config = self.config
        safety_cost = parse_costs(config.safety_cost)
        weighed = (
            worth_imitating(
                trajectory,
                gamma=config.gamma,
                failure_reward=config.failure_reward,
                safety_cost=safety_cost,
            )
            for trajectory in trajectories
        )
        rows = pack(
            [trajectory for trajectory in weighed if trajectory is not None],
            row_length=config.row_length,
            chunks_per_row=config.chunks_per_row,
            gamma=config.gamma,
            failure_reward=config.failure_reward,
            routes_for=self._model_config if config.routing_replay == "rollout" else None,
            advantage=self._advantage,
            anchor=config.gigpo_state,
            safety_cost=safety_cost,
            negative_weight=config.negative_weight,
            negative_tokens=config.negative_tokens,
            edge_credit=parse_credit(config.edge_credit),
            is_own_row=lambda row: row % config.rows_per_microbatch in self._own_rows.fed,
            load_routes=self._load_routes,
            prefix_tree=self._prefix_tree,
            # replayed routes are those of the version that sampled
            versions_apart=config.routing_replay != "off",
        )
        self._team.require_same_rows(step, rows)
        return microbatches(rows, config.rows_per_microbatch)

    def _load_routes(self, trajectory: Trajectory) -> Trajectory:
        """Return a trajectory with its routes, which only the leader has in memory."""
        path = self._with_routes.get(id(trajectory))
        return trajectory if path is None else load_trajectory(path)

    def _minibatch(self, step: int, batches: list[Batch]) -> Minibatch:
        """Return the data of an update, with counts of the rows of all processes."""
        denominators = count_denominators(batches)
        if self.config.routing_replay != "rollout":
            return Minibatch(batches, denominators)
        replayed = 0
        for batch in batches:
            assert batch.routes_BTLk is not None, "rollout routes are packed"
            own = batch._replace(routes_BTLk=batch.routes_BTLk[self._own_rows.counted])
            replayed += count_replayed(own, self._model_config)
        (total,) = self._team.total(f"replayed routes of step {step}", [replayed])
        return Minibatch(batches, denominators, count_work(batches)._replace(replayed=int(total)))

    def prune(self, step: int, oldest_checkpoint: int) -> None:
        """Delete what neither training nor a run resumed from any checkpoint reads again.

        Args:
          step: the step that is about to be collected.
          oldest_checkpoint: the earliest step at which the run can resume.
        """
        if self._team.leads:
            sources = sources_of(self._current_state())
            self._pruner.prune(step, oldest_checkpoint, sources, self.rollouts.first_wave_left)

    @contextlib.contextmanager
    def beside_evaluation(self) -> Iterator[None]:
        """Mark the episodes that run meanwhile: an evaluation shares the engines with them.

        The speed of a step (tokens_per_s) is left out of its metrics where an evaluation ran beside
        its episodes or since the last step took its own: neither their tokens nor that time say how
        fast the rollouts are.
        """
        self._evaluations += 1
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False

    def get_state(self, step: int) -> dict[str, Any]:
        """Return the state with which training can resume at `step`.

        Where `step` was collected but not trained, it is the state before that: the groups that the
        step took count as not taken, so a resumed run takes them again.
        """
        if self._state_before is not None and self._state_before[0] == step:
            return self._state_before[1]
        return self._current_state()

    def set_state(self, document: dict[str, Any]) -> None:
        """Continue from a state that `get_state` returned; call it before `begin`."""
        self.accounting = Accounting.from_json(document["accounting"])
        self.planner.set_state(document["success_rates"], document["anchors"])
        self._solutions = dict(document.get("solutions", {}))
        self._pruner.set_state(document.get("sources", {}))
        if self._team.leads:
            self.rollouts.set_state(document["rollouts"], self.planner.plan_of_entry)

    def close(self) -> None:
        """Cancel the running episodes and wait until their sandboxes are gone."""
        has_started = "rollouts" in self.__dict__  # a cached property: reading it would start them
        if self._team.leads and has_started:
            wait_for_episodes(self.rollouts.close(), CONTROL_SECONDS, "the end of open episodes")

    def _current_state(self) -> dict[str, Any]:
        if self._team.leads:
            reading = self.rollouts.get_state()
            rollouts = wait_for_episodes(reading, CONTROL_SECONDS, "the state of the rollouts")
        else:
            rollouts = {"accounting": self.accounting.to_json()}
        return {
            "accounting": rollouts.pop("accounting"),
            "success_rates": dict(self.planner.curriculum.rates),
            "anchors": self.planner.anchors.to_json(),
            "solutions": dict(self._solutions),
            "sources": self._pruner.get_state(),
            "rollouts": rollouts,
        }

    # -- what the scheduler calls
    # ---------------------------------------------------------------------------------------------

    def _path(self, episode: Episode) -> pathlib.Path:
        return self.files / f"{self.config.experiment}_{episode.name}.json"

    def _forget(self, episode: Episode) -> None:
        self._path(episode).unlink(missing_ok=True)

    async def _play(self, episode: Episode) -> Trajectory:
        path = self._path(episode)
        is_kept = path.exists()
        evaluations = self._evaluations
        was_evaluating = self._is_evaluating
        trajectory = await self._players.play_one(
            episode,
            temperature=self.config.temperature,
            accounting=self.accounting,
            path=path,
            routes=self.config.routing_replay == "rollout",
            reward=self._reward,
        )
        if is_kept or was_evaluating or evaluations != self._evaluations:
            self._untimed.add(episode.name)
        return trajectory

    # -- one step, in the leader
    # ---------------------------------------------------------------------------------------------

    def _take(self, step: int) -> tuple[list[Trajectory], dict[str, Any]]:
        """Take the groups of a step, and show solutions of what they did not solve.

        Returns:
          The trajectories that are trained on, and a document that names their files for the other
          processes.
        """
        config = self.config
        taken = self._wait_for_groups(step)
        sampled = [trajectory for group in taken.groups for trajectory in group]
        names = [name for group in taken.names for name in group]
        files = {
            id(trajectory): f"{config.experiment}_{name}.json"
            for trajectory, name in zip(sampled, names, strict=True)
        }
        from_start = [one for one in taken.replaced + sampled if anchor_of(one) == 0]
        self.planner.curriculum.observe(from_start)
        groups = by_task_group(taken)
        shown: dict[int, Shown] = {}
        if imitation_weight(config):
            shown = show_solutions(
                step,
                groups,
                config=config,
                players=self._players,
                files=self.files,
                solutions=self._solutions,
            )
        self._note_solutions(groups, files)
        demonstrated = len(shown)
        shown = {
            number: one
            for number, one in shown.items()
            if fits_row(one.trajectory, config.row_length, config.chunks_per_row)
        }
        self._observe_anchors(groups, shown, files)
        mixed = sampled
        if config.rollout.filter_groups:
            mixed = mixed_groups(sampled, parse_costs(config.safety_cost))
        kept = mixed if self._filter is None else chosen_episodes(mixed, self._filter)
        metrics = rollout_metrics(sampled, step, taken.seconds, taken.replaced)
        metrics |= self._step_metrics(step, taken, sampled, len(shown))
        if imitation_weight(config):
            metrics["demonstrations_too_long"] = demonstrated - len(shown)
        if not self._is_timed([*names, *taken.replaced_names]):
            metrics.pop("tokens_per_s", None)
        document = {
            "equal": len(sampled) - len(mixed),
            "filtered": len(mixed) - len(kept),
            "kept": [files[id(trajectory)] for trajectory in kept],
            "shown": [one.file for one in shown.values()],
            "metrics": metrics,
        }
        return [*kept, *(one.trajectory for one in shown.values())], document

    def _wait_for_groups(self, step: int) -> Taken:
        # The scheduler ends a wait in which nothing moves.
        return run_async(self.rollouts.take(step), threading.TIMEOUT_MAX)

    def _quiet_seconds(self) -> float:
        """Return how long a step may wait at worst until one of its episodes ends."""
        seconds = CONTROL_SECONDS + self._players.worst_seconds
        if self.config.rollout.resampling != "off":
            seconds += REPLAY_SECONDS  # of the source that a group waits for
        return seconds

    def _observe_anchors(
        self, groups: Sequence[TaskGroup], shown: dict[int, Shown], files: dict[int, str]
    ) -> None:
        """Tell the anchors how the groups ended, and which tasks have a demonstration now."""
        for group in groups:
            self.planner.anchors.observe(
                group.members, group.source, lambda trajectory: files[id(trajectory)]
            )
            demonstration = shown.get(group.number)
            if self.config.rollout.resampling == "off" or demonstration is None or group.source:
                continue
            trajectory = demonstration.trajectory
            self.planner.anchors.enter(trajectory.task, demonstration.file, len(trajectory.chunks))

    def _note_solutions(self, groups: Sequence[TaskGroup], files: dict[int, str]) -> None:
        """Remember a success of each solved task that no demonstrator can show."""
        if not imitation_weight(self.config):
            return
        for group in groups:
            solved = [one for one in group.members if one.succeeded and anchor_of(one) == 0]
            task = group.members[0].task
            if not solved or self._players.can_show(task):
                continue
            shortest = min(solved, key=lambda one: len(one.chunks))
            self._solutions.pop(task, None)
            self._solutions[task] = files[id(shortest)]
        while len(self._solutions) > MAX_SOLUTIONS:
            del self._solutions[next(iter(self._solutions))]

    def _step_metrics(
        self, step: int, taken: Taken, sampled: list[Trajectory], shown: int
    ) -> dict[str, float]:
        """Return metrics of how the step's episodes were scheduled."""
        metrics: dict[str, float] = {
            "demonstrations": shown,
            "trainer_wait": taken.waited / max(taken.seconds, 1e-9),
            "open_episodes": taken.open_episodes,
            "spoiled_tasks": len(self._players.spoiled),
            "max_staleness": max(staleness(sampled, step), default=0),
        }
        if self.config.rollout.resampling == "off":
            return metrics
        resampled = [trajectory.succeeded for trajectory in sampled if anchor_of(trajectory)]
        metrics["resampled"] = len(resampled)
        metrics["hard_tasks"] = len(self.planner.anchors.tasks)
        metrics["crucial_chunks"] = self.planner.anchors.crucial()
        if resampled:
            metrics["success_resampled"] = sum(resampled) / len(resampled)
        return metrics

    def _is_timed(self, names: Sequence[str]) -> bool:
        """Return whether the time since the last take is the time that these episodes took."""
        has_evaluated = self._evaluations != self._evaluations_at_take
        has_untimed = not self._untimed.isdisjoint(names)
        self._evaluations_at_take = self._evaluations
        self._untimed.difference_update(names)
        return not has_evaluated and not has_untimed


def split_groups(trajectories: Sequence[Trajectory], parts: int) -> list[list[Trajectory]]:
    """Deal whole groups to so many parts, in turn; fewer where there are fewer groups.

    The groups of demonstrations stand at the end of a step: dealt, every part gets some.
    """
    dealt: list[list[Trajectory]] = [[] for _ in range(parts)]
    numbers: dict[int, int] = {}
    for trajectory in trajectories:
        place = numbers.setdefault(trajectory.group, len(numbers))
        dealt[place % parts].append(trajectory)
    return [part for part in dealt if part]


def by_task_group(taken: Taken) -> list[TaskGroup]:
    """Return the taken episodes by the number of their group, in the order taken.

    Without whole groups, several taken groups are episodes of one task and share a number.
    """
    groups: dict[int, TaskGroup] = {}
    for members, source in zip(taken.groups, taken.sources, strict=True):
        number = members[0].group
        group = groups.setdefault(number, TaskGroup(number, source, []))
        group.source = source
        group.members.extend(members)
    return list(groups.values())
