"""Supervised fine-tuning on demonstrations: the start of reinforcement learning."""

from __future__ import annotations

import pathlib
import random
from typing import Any

from envs.tasks.terminal import FAMILIES, train_seed
from rome.data.sources import sft_batches
from rome.data.trajectory import Trajectory
from rome.stages.base import StageContext, TrainingStage
from rome.stages.engines import Engines
from rome.stages.evaluate import play_held_out
from rome.stages.players import Players, load_when_visible, make_chat
from rome.train.loop import StepData
from rome.train.report import EvalResult, Evaluation
from rome.train.state import TrainState


class SFTStage(TrainingStage):
    """A stage that learns the turns of scripted demonstrators, and is evaluated as a policy.

    Demonstrations are played before the first step; those whose files are there are not repeated.
    """

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        chat = make_chat(self.config, self.tokenizer)
        self.engines = Engines(
            self.config,
            self.workdir,
            self.model_config,
            self.learner,
            chat,
            self.team,
            self.display,
        )
        self.players = Players(self.config, chat, self.engines, self.team)
        self._stream: Any = None  # of batches, with a position

    def start(self, state: TrainState) -> None:
        self.engines.start(state)

    def collect(self, step: int, state: TrainState) -> StepData:
        if self._stream is None:
            self._stream = self._open_stream()
        return self.data_of_rows(step, next(self._stream))

    def write_evaluation(self, step: int, state: TrainState) -> None:
        self.engines.publish(state)

        def play() -> None:
            outcomes = play_held_out(
                self.players,
                seed=self.config.seed,
                tasks_of_family=self.config.eval_tasks,
                temperature=self.config.eval_temperature,
            )
            self.write_outcomes(step, outcomes)

        self.team.share(f"evaluation at {step}", play)

    def should_end_early(self, result: Evaluation) -> bool:
        if not isinstance(result, EvalResult):
            return False
        return 0 < self.config.until_success <= result.success

    def host_state(self, step: int) -> dict[str, Any]:
        return {"stream": None if self._stream is None else self._stream.get_state()}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        if host["stream"] is not None:
            self._stream = self._open_stream()
            self._stream.set_state(host["stream"])

    def close(self) -> None:
        self.engines.close()

    def _open_stream(self) -> Any:
        """Return an endless stream of batches of the demonstrations."""
        batches = sft_batches(
            self._load_demonstrations(),
            rows=self.config.rows,
            row_length=self.config.row_length,
            chunks_per_row=self.config.chunks_per_row,
            seed=self.config.seed,
        )
        return iter(batches)

    def _load_demonstrations(self) -> list[Trajectory]:
        """Return the demonstrations; the leader plays those that are not in the workdir yet."""
        played, numbers = self.team.share_part("experts", self._play_demonstrations)
        if played is not None:
            return played
        return [load_when_visible(self._path(number)) for number in numbers]

    def _play_demonstrations(self) -> tuple[list[Trajectory], list[int]]:
        """Return the demonstrations and their numbers; tasks that cannot be shown have none."""
        rng = random.Random(f"experts/{self.config.seed}")
        tasks = []
        for number in range(self.config.demonstrations):
            family = FAMILIES[number % len(FAMILIES)]
            tasks.append(f"{family}/{train_seed(rng.randrange(1_000_000))}")
        self.display.note(
            f"demonstrators play {len(tasks)} tasks of {len(FAMILIES)} families in the sandbox"
        )
        played = self.players.demonstrate(
            tasks, error_rate=self.config.demonstration_error_rate, record=self._path
        )
        numbered = [
            (number, trajectory)
            for number, trajectory in enumerate(played)
            if trajectory is not None
        ]
        if len(numbered) < len(tasks):
            left_out = len(tasks) - len(numbered)
            self.display.note(f"{left_out} tasks cannot be shown; they are named in spoiled.jsonl")
        return [trajectory for _, trajectory in numbered], [number for number, _ in numbered]

    def _path(self, number: int) -> pathlib.Path:
        return self.workdir / "trajectories" / f"expert_{number:06d}.json"
