"""Supervised fine-tuning on demonstrations, or on trajectories that the config names.

Of the demonstrations those are learned that `config.select` chooses (rome/stages/selection.py), and
of each trajectory the turns that `config.masks` leaves (rome/data/relevance.py).
"""

from __future__ import annotations

import functools
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from envs.sources import TRAIN_SEEDS, Share
from rome.data.formats.records import Library
from rome.data.lines import count_tokens, fits_row
from rome.data.relevance import mask_turns, parse_masks
from rome.data.sources import RandomAccess, endless_order, sft_batches
from rome.data.trajectory import Trajectory, load_trajectory
from rome.files import read_json, write_atomically
from rome.model.tokenizer import Chat
from rome.stages.base import StageContext, TrainingStage
from rome.stages.engines import Engines
from rome.stages.evaluate import play_held_out
from rome.stages.limits import check_episode_limits, check_text_limits
from rome.stages.players import Players, wait_until_visible
from rome.stages.records import open_records, score_held_out_records
from rome.stages.selection import select
from rome.stages.stream import BatchStream
from rome.synth.expert import choose_queue, read_decisions, write_queue
from rome.synth.filter_rules import heuristic
from rome.synth.verdicts import Item
from rome.train.loop import StepData
from rome.train.report import EvalResult, Evaluation
from rome.train.state import TrainState
from rome.train.workdir import ConfigError

SELECTION = "selection.json"  # in the workdir: what config.select removed


class Shown(NamedTuple):
    """A task that is demonstrated, and the place of its share in the mixture of tasks."""

    task: str
    share: int


class SFTStage(TrainingStage):
    """A stage that learns the turns of others, and is evaluated as a policy.

    They are those of `config.trajectories`, or of scripted demonstrators. Demonstrations are played
    before the first step; those whose files are there are not repeated.

    Attributes:
      library: the records of `config.trajectories`; None without.
      plays: whether there are tasks to evaluate the policy on, and so engines and sandboxes.
    """

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self.plays = self.config.eval_tasks > 0
        chat = Chat(self.tokenizer)
        if self.plays:
            check_episode_limits(self.config, self.model_config, chat)
        else:
            check_text_limits(self.config, self.model_config)
        self.engines = Engines(
            self.config,
            self.workdir,
            self.model_config,
            self.learner,
            chat,
            self.team,
            self.display,
        )
        self._note_faults()
        self.players = Players(self.config, chat, self.engines, self.team)
        self.library: Library | None = None
        if self.config.trajectories:
            self.library = open_records(
                self.config, self.tokenizer, self.workdir, self.display, self.team
            )
        self._stream = BatchStream(self._open_batches)

    def start(self, state: TrainState) -> None:
        if self.plays:
            self.engines.start(state)

    def collect(self, step: int, state: TrainState) -> StepData:
        return self.data_of_rows(step, self._stream.draw(step))

    def before_update(self) -> None:
        self.engines.make_room()

    def write_evaluation(self, step: int, state: TrainState) -> None:
        outcomes: dict[str, Any] = {}
        if self.library is not None:
            outcomes = score_held_out_records(self.learner, state, self.library, self.config)
        if self.plays:
            self.engines.publish(state)

        def play_and_write() -> None:
            if self.plays:
                played = play_held_out(
                    self.players,
                    self.evaluation_folder(step),
                    seed=self.config.seed,
                    tasks_of_family=self.config.eval_tasks,
                    temperature=self.config.eval_temperature,
                )
                outcomes.update(played)
            self.write_outcomes(step, outcomes)

        self.team.share(f"evaluation at {step}", play_and_write)

    def should_end_early(self, result: Evaluation) -> bool:
        if not isinstance(result, EvalResult):
            return False
        return 0 < self.config.until_success <= result.success

    def host_state(self, step: int) -> dict[str, Any]:
        return {
            "stream": self.stream_position(step, self._stream),
            "records": None if self.library is None else self.library.digest,
        }

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        if self.library is not None and host["records"] != self.library.digest:
            raise ConfigError(
                f"the records of {self.config.trajectories} are not what the checkpoint of step"
                f" {step} was trained on. Bring them back, or give another --workdir."
            )
        self._stream.go_to(host["stream"])

    def close(self) -> None:
        self.engines.close()

    def _open_batches(self) -> Any:
        """Return an endless stream of batches of what is learned."""
        parts: Sequence[tuple[RandomAccess[Trajectory], float]]
        if self.library is None:
            parts = self._by_share(self._load_demonstrations())
        else:
            parts = self.library.training
        mask = functools.partial(
            mask_turns,
            masks=parse_masks(self.config.masks),
            is_demonstration=self.library is None,
        )
        return sft_batches(
            endless_order(parts, self.config.seed),
            rows=self.config.rows,
            row_length=self.config.row_length,
            chunks_per_row=self.config.chunks_per_row,
            own=self.own_rows.fed,
            prepare=mask,
        )

    def _by_share(
        self, demonstrations: dict[int, Trajectory]
    ) -> list[tuple[RandomAccess[Trajectory], float]]:
        """Return the demonstrations of each share of the mixture, with its weight.

        What was left out of a share so changes no share.

        Raises:
          ConfigError: nothing is left of one.
        """
        shares = self.players.tasks.demonstrated.shares
        parts: list[list[Trajectory]] = [[] for _ in shares]
        for number, trajectory in demonstrations.items():
            parts[self._shown[number].share].append(trajectory)
        for share, members in zip(shares, parts, strict=True):
            if not members:
                raise ConfigError(
                    f"no demonstration of {share.families[0]} and the {len(share.families) - 1}"
                    " other families of its part of demonstration_task is left to learn. Raise"
                    " --config.demonstrations or --config.row_length, or name other tasks."
                )
        return [(members, share.weight) for share, members in zip(shares, parts, strict=True)]

    @functools.cached_property
    def _shown(self) -> list[Shown]:
        """The tasks to demonstrate; each comes `config.candidates` times in a row."""
        source = self.players.tasks.demonstrated
        evaluated = self.players.tasks.evaluation.instances(self.config.eval_tasks)
        rng = random.Random(f"experts/{self.config.seed}/{self.config.experiment}")
        shown = []
        for place, family in deal_families(source.shares, self.config.demonstrations):
            task = source.train(family, rng.randrange(TRAIN_SEEDS), evaluated).name
            shown += [Shown(task, place)] * self.config.candidates
        return shown

    def _load_demonstrations(self) -> dict[int, Trajectory]:
        """Return the demonstrations to learn by number.

        The leader plays those that are not in the workdir yet.
        """
        played, numbers = self.team.share_part("experts", self._play_demonstrations)
        paths = [self._path(number) for number in numbers]
        wait_until_visible(self.team, "files of the experts", paths)
        if played is None:
            played = [load_trajectory(path) for path in paths]
        return self._leave_out_long(dict(zip(numbers, played, strict=True)))

    def _leave_out_long(self, demonstrations: dict[int, Trajectory]) -> dict[int, Trajectory]:
        """Return the demonstrations that a row can hold, and say how many are left out.

        Raises:
          ConfigError: it can hold none of them.
        """
        config = self.config
        fitting = {
            number: trajectory
            for number, trajectory in demonstrations.items()
            if fits_row(trajectory, config.row_length, config.chunks_per_row)
        }
        left_out = len(demonstrations) - len(fitting)
        if not fitting:
            turns = min((one.turns for one in demonstrations.values()), key=count_tokens)
            raise ConfigError(
                f"a row of row_length={config.row_length} tokens and"
                f" chunks_per_row={config.chunks_per_row} turns holds none of the"
                f" {left_out} demonstrations; the shortest has {count_tokens(turns)} tokens in"
                f" {len(turns)} turns. Give another --workdir and a higher --config.row_length or"
                " --config.chunks_per_row."
            )
        if left_out:
            self.display.note(
                f"{left_out} of {len(demonstrations)} demonstrations are left out: they do not fit"
                f" row_length={config.row_length} and chunks_per_row={config.chunks_per_row}"
            )
        return fitting

    def _play_demonstrations(self) -> tuple[list[Trajectory], list[int]]:
        """Return the demonstrations and their numbers; tasks that cannot be shown have none."""
        tasks = [shown.task for shown in self._shown]
        kinds = len(self.players.tasks.demonstrated.families)
        self.display.note(f"demonstrators play {len(tasks)} tasks of {kinds} families")
        played = self.players.demonstrate(
            tasks, error_rate=self.config.demonstration_error_rate, record=self._path
        )
        numbered = {
            number: trajectory for number, trajectory in enumerate(played) if trajectory is not None
        }
        if not numbered:
            raise ConfigError(
                f"none of the {len(tasks)} demonstrations of task={self.config.task!r} succeeded;"
                f" {self.players.spoiled.path} says why. Choose another --config.task."
            )
        if len(numbered) < len(tasks):
            left_out = len(tasks) - len(numbered)
            self.display.note(f"{left_out} tasks cannot be shown; they are named in spoiled.jsonl")
        numbers = self._select(numbered)
        return [numbered[number] for number in numbers], numbers

    def _select(self, demonstrations: dict[int, Trajectory]) -> list[int]:
        """Return the numbers of those to learn, and write down what the selection removed.

        Raises:
          ConfigError: it removed all of them, or the file of decisions is damaged.
        """
        config = self.config
        if not config.select:
            return list(demonstrations)
        try:
            decisions = read_decisions(pathlib.Path(config.feedback)) if config.feedback else {}
        except ValueError as error:
            raise ConfigError(f"config.feedback: {error}") from error
        numbers, funnel = select(
            demonstrations,
            config.select,
            name_of=lambda number: self._path(number).name,
            decisions=decisions,
        )
        removed = ", ".join(f"{step} {count}" for step, count in funnel["removed"].items())
        self.display.note(
            f"{config.select}: {len(numbers)} of {len(demonstrations)} demonstrations are learned;"
            f" removed: {removed or 'none'}"
        )
        if not numbers:
            raise ConfigError(
                f"select={config.select!r} removed all {len(demonstrations)} demonstrations"
                f" ({removed}). Raise --config.demonstrations, or set select to ''."
            )
        write_atomically(self.workdir / SELECTION, json.dumps(funnel, indent=1) + "\n")
        if config.select == "preferred":
            items = [
                Item(self._path(number).name, demonstrations[number], "") for number in numbers
            ]
            for item in items:
                item.verdicts["heuristic"] = heuristic(item)
            write_queue(self.workdir / "review.html", choose_queue(items))
        return numbers

    def report_more(self) -> dict[str, Any]:
        path = self.workdir / SELECTION
        return {"selection": read_json(path, "Delete it.")} if path.exists() else {}

    def _path(self, number: int) -> pathlib.Path:
        return self.workdir / "trajectories" / f"expert_{number:06d}.json"


def deal_families(shares: Sequence[Share], number: int) -> list[tuple[int, str]]:
    """Return a share's place and a family of it for each of so many tasks.

    Families come in turn, and shares by the weights of a mixture.
    """
    counts = [0] * len(shares)
    dealt = []
    for total in range(1, number + 1):
        lacking = [
            share.weight * total - count for share, count in zip(shares, counts, strict=True)
        ]
        place = lacking.index(max(lacking))
        families = shares[place].families
        dealt.append((place, families[counts[place] % len(families)]))
        counts[place] += 1
    return dealt
