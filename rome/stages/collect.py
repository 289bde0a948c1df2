"""What a training step of reinforcement learning trains on: wires rollouts, curriculum, anchors and
experts to the learner's batches.

Process 0 plays; the others learn from it which files of the workdir the step is made of, and pack
the same rows. WORKDIR/steps.jsonl says which groups each step took, WORKDIR/trajectories/ holds
them: NAME_WAVE_gGROUP_eEPISODE.json, and for what was shown NAME_STEP_expert_N.json,
NAME_STEP_fork_N.json.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import random
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.rock.sync import run as run_async
from envs.tasks.terminal import FAMILIES, train_seed
from rome.data.batch import RL, Batch
from rome.data.packing import microbatches, pack
from rome.data.trajectory import Trajectory, load_trajectory, save_trajectory
from rome.losses import ADVANTAGES, count_denominators
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import load_hf
from rome.model.params import param_shardings
from rome.rollout.anchors import Anchors, anchor_of, fork_imitation
from rome.rollout.curriculum import Curriculum
from rome.rollout.demonstrations import collect_demonstrations
from rome.rollout.forks import REPLAY_SECONDS, Forks
from rome.rollout.group import GroupPlan, Taken
from rome.rollout.outcomes import mixed_groups, rollout_metrics
from rome.rollout.player import Accounting, Episode, RolloutError
from rome.rollout.scheduler import MAX_REPLACEMENTS, RolloutScheduler, Rules
from rome.train.alarms import check_mismatch
from rome.train.loop import StepData
from rome.train.state import TrainState

if TYPE_CHECKING:
    from rome.stages.base import Run

# in which a file that one host wrote is seen by the others (NFS and buckets keep old listings for a
# while)
VISIBLE_SECONDS = 120.0
EXPERT_CONCURRENCY = 16
# for the rollouts to begin, to be asked for their state, to close their sandboxes
CONTROL_SECONDS = 60.0


class Collector:
    """The rollouts of one run. In processes that do not lead it only packs and scores."""

    def __init__(self, run: Run) -> None:
        self.run, self.config, self.files = run, run.config, run.workdir / "trajectories"
        self.accounting = Accounting()
        self.curriculum = Curriculum(FAMILIES)
        self.anchors = Anchors(run.config.resampling, run.config.group_size)
        self.past: dict[
            int, Any
        ] = {}  # version -> parameters, of the last async_ratio versions and this one
        # the state before the step that is being collected or trained; a step that fails is
        # repeated from there
        self.before: dict[str, Any] | None = None

    @functools.cached_property
    def rollouts(self) -> RolloutScheduler:
        config, apart = self.config, not self.config.whole_groups
        rules = Rules(
            groups_per_step=config.groups * (config.group_size if apart else 1),
            group_size=1 if apart else config.group_size,
            siblings=config.group_size if apart else 1,
            concurrency=config.concurrency,
            steps=config.steps,
            async_ratio=config.async_ratio,
            redundancy=config.redundancy,
            replace_equal=config.replace_equal,
            stale_samples=config.late,
            seed=config.seed,
        )
        return RolloutScheduler(
            rules,
            self.play,
            self.plan,
            self.replan,
            accounting=self.accounting,
            should_stop=self.run.team.wants_to_stop,
            forget=lambda episode: self.path(episode).unlink(missing_ok=True),
            journal=self.run.workdir / "steps.jsonl",
        )

    # -- what the run calls
    # ---------------------------------------------------------------------------------------------

    def advance(self, state: TrainState) -> None:
        """The weights of `state` are on the engines."""
        version, alpha = int(state.step), self.config.async_ratio
        if alpha and self.config.old == "trainer" and version not in self.past:
            self.past[version] = self.run.learner.keep(state.params)
            self.past = {
                kept: params for kept, params in self.past.items() if kept >= version - alpha
            }
        if self.run.team.leads:
            run_async(self.rollouts.advance(version), CONTROL_SECONDS)

    def collect(self, step: int, state: TrainState) -> StepData:
        """groups x group_size episodes, packed, with logp_old of the weights that sampled each
        token.
        """
        config, run, self.before = self.config, self.run, self.get_state()
        learnt: list[Trajectory] = []  # the leader's own; the others read theirs
        shared = run.team.share(f"episodes of step {step}", lambda: self._take(step, learnt))
        learnt = learnt or [
            load_when_visible(self.files / name) for name in (*shared["kept"], *shared["shown"])
        ]
        batch = pack(
            learnt,
            row_length=config.row_length,
            chunks_per_row=config.chunks_per_row,
            gamma=config.gamma,
            failure_reward=config.failure_reward,
            routes_for=run.model_config if config.routing_replay == "rollout" else None,
            advantage=ADVANTAGES.get(config.loss, "normalised"),
            anchor=config.anchor,
            denial_penalty=config.denial_penalty,
            negative_weight=config.negative_weight,
            negative_tokens=config.negative_tokens,
        )
        run.require_same_rows(step, batch)
        batches, unscored = self._with_old(microbatches(batch, config.rows_per_microbatch), state)
        check_mismatch(batches, config.alarm_kl, unscored)
        if run.team.leads:
            self.accounting.drop("equal_group", shared["taken"] - len(shared["kept"]))
            self.accounting.train(len(shared["kept"]))
            run_async(self.rollouts.check(), CONTROL_SECONDS)
        return StepData(batches, count_denominators(batches), shared["figures"] | run.publication)

    def get_state(self) -> dict[str, Any]:
        """As it is between two steps: groups that were taken by a step that was not trained are
        still to be taken.
        """
        if self.before is not None:
            return self.before
        rollouts = (
            run_async(self.rollouts.get_state(), CONTROL_SECONDS)
            if self.run.team.leads
            else {"accounting": self.accounting.to_json()}
        )
        return {
            "accounting": rollouts.pop("accounting"),
            "success_rates": dict(self.curriculum.rates),
            "anchors": self.anchors.to_json(),
            "rollouts": rollouts,
        }

    def set_state(self, document: dict[str, Any]) -> None:
        self.accounting = Accounting.from_json(document["accounting"])
        self.curriculum = Curriculum(FAMILIES, document["success_rates"])
        self.anchors.load(document["anchors"])
        if self.run.team.leads:
            self.rollouts.set_state(
                document["rollouts"],
                lambda entry: self._plan_from(entry["task"], entry["source"], entry["prefixes"]),
            )

    def close(self) -> None:
        if self.run.team.leads and "rollouts" in self.__dict__:
            run_async(self.rollouts.close(), CONTROL_SECONDS)

    # -- what the rollouts ask for
    # ---------------------------------------------------------------------------------------------

    def path(self, episode: Episode) -> pathlib.Path:
        return self.files / f"{self.config.experiment}_{episode.name}.json"

    def play(self, episode: Episode) -> Awaitable[Trajectory]:
        return self.run.scheduler.play_one(
            episode,
            temperature=self.config.temperature,
            accounting=self.accounting,
            path=self.path(episode),
            routes=self.config.routing_replay == "rollout",
        )

    def plan(self, wave: int) -> list[GroupPlan]:
        """Hard tasks from their anchors, as many as `resample_share` allows and there are; else
        what the curriculum draws.
        """
        config, rng = self.config, random.Random(f"tasks/{self.config.seed}/{wave}")
        groups = config.groups + config.redundant_groups
        hard = (
            self.anchors.choose(
                round(config.resample_share * groups),
                random.Random(f"anchors/{config.seed}/{wave}"),
            )
            if config.resampling != "off"
            else []
        )
        plans = [self._plan_from(*chosen) for chosen in hard]
        plans += [
            GroupPlan(f"{family}/{train_seed(rng.randrange(1_000_000))}")
            for family in self.curriculum.draw(groups - len(hard), rng)
        ]
        return (
            plans
            if config.whole_groups
            else [plan for plan in plans for _ in range(config.group_size)]
        )

    def replan(self, number: int, attempt: int) -> GroupPlan:
        rng = random.Random(f"tasks/{self.config.seed}/{number}/{attempt}")
        return GroupPlan(
            f"{self.curriculum.draw(1, rng)[0]}/{train_seed(rng.randrange(1_000_000))}"
        )

    def _plan_from(self, task: str, source: str, anchors: tuple[int, ...] | list[int]) -> GroupPlan:
        if not source:
            return GroupPlan(task)
        chunks = load_trajectory(self.files / source).chunks
        prefixes = tuple(tuple(chunks[:anchor]) for anchor in anchors)
        return GroupPlan(task, prefixes, source, Forks(lambda: self.run.make_env(task), prefixes))

    # -- one step
    # ---------------------------------------------------------------------------------------------

    def _take(self, step: int, learnt: list[Trajectory]) -> dict[str, Any]:
        """The leader's part of a step: puts into `learnt` what is trained on.

        Returns what the others need.
        """
        config = self.config
        try:
            taken = run_async(self.rollouts.take(step), seconds := self._take_seconds())
        except TimeoutError:
            raise RolloutError(
                f"step {step} had no {config.groups} complete groups within {seconds:.0f} s, more"
                f" than their episodes may take by episode_seconds={config.episode_seconds:g}: a"
                " sandbox or an engine hangs; see its log. Finished trajectories are kept; run the"
                " same command again."
            ) from None
        trajectories = [trajectory for group in taken.groups for trajectory in group]
        file_of = {
            id(trajectory): f"{config.experiment}_{name}.json"
            for group, names in zip(taken.groups, taken.names)
            for trajectory, name in zip(group, names)
        }
        self.curriculum.observe(
            trajectory for trajectory in taken.replaced + trajectories if anchor_of(trajectory) == 0
        )
        groups: dict[int, list[Trajectory]] = {}
        sources: dict[int, str] = {}
        for members, source in zip(taken.groups, taken.sources):
            groups.setdefault(members[0].group, []).extend(members)
            sources[members[0].group] = source
        shown = self._demonstrations(step, groups, sources) if config.lambda_il else {}
        for number, members in groups.items():
            self.anchors.observe(
                members, sources[number], lambda trajectory: file_of[id(trajectory)]
            )
            if config.resampling != "off" and (expert := shown.get(number)) and not sources[number]:
                self.anchors.enter(expert[1].task, expert[0], len(expert[1].chunks))
        kept = mixed_groups(trajectories) if config.filter_groups else trajectories
        learnt.extend([*kept, *(trajectory for _, trajectory in shown.values())])
        return {
            "taken": len(trajectories),
            "kept": [file_of[id(one)] for one in kept],
            "shown": [name for name, _ in shown.values()],
            "figures": (
                rollout_metrics(trajectories, step, taken.seconds)
                | self._figures(step, taken, trajectories, len(shown))
            ),
        }

    def _take_seconds(self) -> float:
        """What the groups of a step may take at worst: all that may be in flight, one wave after
        the other, each episode as often as it may be replaced.
        """
        config = self.config
        episodes = (
            (config.async_ratio + 1)
            * (config.groups + config.redundant_groups)
            * (config.group_size + config.redundancy)
        )
        times = self.run.scheduler.attempts * (1 + MAX_REPLACEMENTS if config.replace_equal else 1)
        replays = (
            REPLAY_SECONDS if config.resampling != "off" else 0.0
        )  # of a source; its group waits for it
        return CONTROL_SECONDS + -(-episodes // config.concurrency) * (
            times * config.episode_seconds + replays
        )

    def _figures(
        self, step: int, taken: Taken, trajectories: list[Trajectory], shown: int
    ) -> dict[str, float]:
        figures = {
            "demonstrations": shown,
            "trainer_wait": taken.waited / max(taken.seconds, 1e-9),
            "open_episodes": taken.open_episodes,
            "max_staleness": max(step - trajectory.oldest_version for trajectory in trajectories),
        }
        if self.config.resampling == "off":
            return figures
        resampled = [trajectory.reward > 0 for trajectory in trajectories if anchor_of(trajectory)]
        figures |= {
            "resampled": len(resampled),
            "hard_tasks": len(self.anchors.tasks),
            "crucial_chunks": self.anchors.crucial(),
        }
        return figures | (
            {"success_resampled": sum(resampled) / len(resampled)} if resampled else {}
        )

    def _demonstrations(
        self, step: int, groups: dict[int, list[Trajectory]], sources: dict[int, str]
    ) -> dict[int, tuple[str, Trajectory]]:
        """Eq. 10's imitation, (file, trajectory) by group: of forks without a success what their
        source did there, of other tasks without one what an expert does.

        Each is a group of its own, so that it stays out of the statistics of groups that were
        sampled.
        """
        config, first = (
            self.config,
            self.config.steps * (self.config.groups + self.config.redundant_groups),
        )
        path = lambda number, kind="expert": (
            self.files / f"{config.experiment}_{step:06d}_{kind}_{number:03d}.json"
        )
        unsolved = [
            number
            for number, members in groups.items()
            if not sources[number] and not any(t.reward > 0 for t in members)
        ]
        played = run_async(
            collect_demonstrations(
                [groups[number][0].task for number in unsolved],
                self.run.make_env,
                self.run.chat,
                error_rate=0.0,
                concurrency=EXPERT_CONCURRENCY,
                record=path,
                first_group=first,
            ),
            CONTROL_SECONDS + -(-len(unsolved) // EXPERT_CONCURRENCY) * config.episode_seconds,
        )
        shown = {
            number: (path(place).name, trajectory)
            for place, (number, trajectory) in enumerate(zip(unsolved, played))
        }
        for number, source in sources.items():
            if (
                source
                and (
                    imitated := fork_imitation(load_trajectory(self.files / source), groups[number])
                )
                is not None
            ):
                imitated = dataclasses.replace(imitated, group=first + len(shown))
                save_trajectory(imitated, path(len(shown), "fork"))
                shown[number] = path(len(shown), "fork").name, imitated
        return shown

    # -- pi_old
    # ---------------------------------------------------------------------------------------------

    def _with_old(self, batches: list[Batch], state: TrainState) -> tuple[list[Batch], set[int]]:
        """logp_old of every micro-batch, each token's at the weights that sampled it, and, where
        the trainer is to replay its own routes, the routes of the pass that scored it.

        What is not a sample of the policy is scored at the weights of `state`. And the versions
        that nobody can score.
        """
        config, version = self.config, int(state.step)
        if config.old == "rollout":
            return [batch._replace(logp_old_BT=batch.logp_rollout_BT) for batch in batches], set()
        scored, unscored = (
            [
                self._filled(batch, batch, *found)
                for batch, found in zip(batches, self._score(state.params, batches))
            ],
            set(),
        )
        stale = sorted(
            {
                int(found)
                for batch in batches
                for found in np.unique(batch.version_BT[_sampled(batch)])
            }
            - {version}
        )
        for older in stale:
            if (params := self._past_params(older)) is None:
                unscored.add(older)
            places = [
                place
                for place, batch in enumerate(batches)
                if (_sampled(batch) & (batch.version_BT == older)).any()
            ]
            found = (
                self._score(params, [batches[place] for place in places])
                if params is not None
                else [
                    (batches[place].logp_rollout_BT, batches[place].routes_BTLk) for place in places
                ]
            )
            for place, one in zip(places, found):
                scored[place] = self._filled(
                    batches[place],
                    scored[place],
                    *one,
                    where_BT=_sampled(batches[place]) & (batches[place].version_BT == older),
                )
        return scored, unscored

    def _score(
        self, params: dict, batches: list[Batch]
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        if self.config.routing_replay == "recompute":
            return self.run.learner.score_and_record(params, batches)
        return [
            (logp_BT, batch.routes_BTLk)
            for batch, logp_BT in zip(batches, self.run.learner.score(params, batches))
        ]

    def _filled(
        self,
        batch: Batch,
        filled: Batch,
        logp_BT: np.ndarray,
        routes_BTLk: np.ndarray | None,
        where_BT: np.ndarray | None = None,
    ) -> Batch:
        """`filled` with what one pass over `batch` found at `where_BT`; everywhere, where that is
        None.
        """
        if where_BT is None:
            return filled._replace(
                logp_old_BT=np.where(batch.action_mask_BT, logp_BT, 0.0), routes_BTLk=routes_BTLk
            )
        routes = (
            filled.routes_BTLk
            if routes_BTLk is None or filled.routes_BTLk is None
            else np.where(where_BT[..., None, None], routes_BTLk, filled.routes_BTLk)
        )
        return filled._replace(
            logp_old_BT=np.where(where_BT, logp_BT, filled.logp_old_BT), routes_BTLk=routes
        )

    def _past_params(self, version: int) -> dict | None:
        """Of an earlier version; a resumed run reads them from what engines were given.

        None where nobody has them any more (a sample beyond the bound, with late=keep): then the
        engine's own logprobs stand for pi_old.
        """
        if version in self.past:
            return self.run.learner.recall(self.past[version])
        directory = self.run.weights / f"step_{version:06d}"
        if not directory.is_dir():
            return None
        shardings = param_shardings(self.run.learner.mesh, self.run.model_config)
        return load_hf(directory, shardings=shardings, **own_settings(self.run.model_config))[0]


def own_settings(model_config: ModelConfig) -> dict[str, Any]:
    """What of a model's config is ours to choose, whatever a checkpoint of it says."""
    return {
        name: getattr(model_config, name)
        for name in ("dtype", "remat", "scan_layers", "capacity_factor", "router_z_loss_coef")
    }


def _sampled(batch: Batch) -> np.ndarray:
    """[B, T] bool: tokens of RL chunks, whose version counts."""
    return batch.kind_BT() == RL


def load_when_visible(path: pathlib.Path) -> Trajectory:
    """A trajectory that the leader says it has written."""
    ends = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.2)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}, written by process 0, is not seen here within {VISIBLE_SECONDS:.0f} s; is"
            " --workdir on a file system that all hosts share?"
        )
    return load_trajectory(path)
