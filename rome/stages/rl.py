"""Reinforcement learning: engines sample episodes, and a policy loss trains on them.

The order of a step is the loop's (rome/train/loop.py): collect, update, publish, begin rollouts.
"""

from __future__ import annotations

import contextlib
from typing import Any

from rome.losses import find_loss
from rome.model.tokenizer import Chat
from rome.rollout.player import Accounting
from rome.stages.base import StageContext, TrainingStage
from rome.stages.collect import Collector
from rome.stages.engines import Engines, weights_directory
from rome.stages.evaluate import play_held_out
from rome.stages.learner import shares_prefixes
from rome.stages.limits import check_episode_limits
from rome.stages.old_logprobs import OldLogprobs
from rome.stages.players import Players
from rome.stages.settings import command_agent, imitation_weight
from rome.train.alarms import check_metrics
from rome.train.loop import StepData
from rome.train.state import TrainState
from rome.train.workdir import ConfigError


class RLStage(TrainingStage):
    """A stage that learns from episodes of its own policy, with any loss of rome.losses.policy."""

    publishes = True

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        config = self.config
        if config.routing_replay != "off" and self.model_config.is_dense:
            raise ConfigError(
                f"routing_replay={config.routing_replay} replays the choice of experts, and this"
                " model has none. Set --config.routing_replay=off."
            )
        if command_agent(config) is not None and context.isolation == "landlock":
            raise ConfigError(
                f"agent={config.agent!r} asks the policy at a door of its sandbox, and the landlock"
                " tier of this machine has none. Use agent=plain, or a machine with user namespaces"
                " (python -m launch.doctor)."
            )
        chat = Chat(self.tokenizer)
        check_episode_limits(config, self.model_config, chat)
        self.engines = Engines(
            config, self.workdir, self.model_config, self.learner, chat, self.team, self.display
        )
        self._note_faults()
        self.players = Players(config, chat, self.engines, self.team)
        old_logprobs = OldLogprobs(
            self.learner,
            self.model_config,
            weights_directory(self.workdir),
            async_ratio=config.rollout.async_ratio,
            from_trainer=config.logp_old_from == "trainer",
            records_routes=config.routing_replay == "recompute",
        )
        self.collector = Collector(
            config,
            self.workdir,
            players=self.players,
            old_logprobs=old_logprobs,
            model_config=self.model_config,
            own_rows=self.learner.own_rows(config.rows_per_microbatch, config.rows_per_microbatch),
            prefix_tree=shares_prefixes(config, self.learner),
            team=self.team,
        )
        self._publication: dict[str, float] = {}  # metrics of the last one

    def start(self, state: TrainState) -> None:
        weight = imitation_weight(self.config)
        if weight and not find_loss(self.config.loss).lambda_il:
            self.display.note(
                f"loss={self.config.loss} with lambda_il={weight:g} is a hybrid: the published loss"
                " learns from no demonstrations"
            )
        self.engines.start(state)

    def collect(self, step: int, state: TrainState) -> StepData:
        oldest = self.checkpoints.oldest_on_disk()
        if oldest is not None:
            self.collector.prune(step, oldest)
        data = self.collector.collect(step, state)
        data.metrics |= self._publication
        return data

    def publish(self, state: TrainState) -> None:
        self._publication = self.engines.publish(state, self._needed_versions(int(state.step)))

    def begin_rollouts(self, state: TrainState) -> None:
        self.collector.begin(state)

    def before_update(self) -> None:
        if self.config.rollout.lend_engines:
            self.engines.lend(self.config.rollout.lend_engines)
        self.engines.make_room()

    def check(self, step: int, metrics: dict[str, float]) -> None:
        check_metrics(step, metrics, self.config.alarm_kl)

    def write_evaluation(self, step: int, state: TrainState) -> None:
        self.publish(state)

        def play() -> None:
            with self.collector.beside_evaluation():
                outcomes = play_held_out(
                    self.players,
                    self.evaluation_folder(step),
                    seed=self.config.seed,
                    tasks_of_family=self.config.eval_tasks,
                    temperature=self.config.eval_temperature,
                )
            self.write_outcomes(step, outcomes)

        self.team.share(f"evaluation at {step}", play)

    def host_state(self, step: int) -> dict[str, Any]:
        return {"rollouts": self.collector.get_state(step)}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        self.collector.set_state(host["rollouts"])

    def report_more(self) -> dict[str, Any]:
        return {"lambda_il": imitation_weight(self.config)}

    def accounting(self) -> Accounting:
        return self.collector.accounting

    def close(self) -> None:
        with contextlib.ExitStack() as ends:  # the last one entered ends first
            ends.callback(self.engines.close)
            ends.callback(self.collector.close)

    def _needed_versions(self, version: int) -> set[int]:
        """Return the versions whose samples a run resumed from a checkpoint may score again."""
        async_ratio = self.config.rollout.async_ratio
        if not async_ratio:
            return set()
        return {
            step - age
            for step in (version, *self.checkpoints.steps())
            for age in range(async_ratio + 1)
        }
