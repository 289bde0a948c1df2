"""What every stage of training shares: its workdir, learner, checkpoints, evaluations and report.

rl.py, sft.py and cpt.py each add one kind of training. A stage leaves these files in WORKDIR:
report.json, metrics.jsonl, trajectories/, checkpoints/, evals/, final/ (a Hugging Face directory),
engine.log, and init/ (the run that this one started from).

In a job of several processes only the leader has engines and sandboxes, and only it writes. The
others learn its results by `Team.share`, and read the trajectories of a step from the workdir.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections

from rome.cost.flops import peak_flops, step_flops
from rome.data.batch import Batch
from rome.data.packing import microbatches
from rome.files import read_json, sync, write_atomically
from rome.losses import Denominators, count_denominators
from rome.model.config import ModelConfig
from rome.model.hf import peft
from rome.model.hf.checkpoint import save_hf
from rome.model.hf.companions import copy_companions
from rome.model.hf.digest import params_digest
from rome.model.hf.peft import save_peft
from rome.model.precision import use_full_precision
from rome.model.tokenizer import Tokenizer
from rome.rollout.player import Accounting
from rome.stages.learner import make_learner
from rome.stages.settings import profiled_steps, updates_of_step
from rome.stages.stream import BatchStream
from rome.stages.tasks import tasks_of
from rome.stages.weights import check_start, from_document, load_start, model_of, to_document
from rome.train.chain import Entry, join_stages, stage_entry
from rome.train.checkpoint import CheckpointError, Checkpoints
from rome.train.display import Display
from rome.train.feed import OwnRows
from rome.train.loop import Minibatch, Stage, StepData, run_stage
from rome.train.metrics import MetricsWriter
from rome.train.profile import Profile
from rome.train.report import (
    Evaluation,
    evaluation_of,
    outcomes_path,
    read_outcomes,
    write_outcomes,
    write_report,
)
from rome.train.speed import Work
from rome.train.state import TrainState
from rome.train.team import Team
from rome.train.workdir import MODEL, mark_complete, read_changes, tokenizer_directory
from rome.version import describe


@dataclasses.dataclass(frozen=True)
class StageContext:
    """What a stage is given by the run that it belongs to.

    Attributes:
      config: of the experiment, checked.
      workdir: of the run.
      isolation: tier of the sandboxes, for the report.
      team: the processes of this job.
      display: shows the progress.
      start: directory of the parameters to start from; None: random ones.
      earlier_evals: evaluations of the stages that this one started from.
      earlier_stages: what these stages added (rome/train/chain.py).
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    isolation: str
    team: Team
    display: Display
    start: pathlib.Path | None = None
    earlier_evals: Sequence[Evaluation] = ()
    earlier_stages: Sequence[Entry] = ()


class TrainingStage:
    """One stage of training in one workdir; it can be stopped, killed and resumed.

    The constructor builds the learner and raises what is wrong with the config before anything is
    started. `train` does the rest. A kind of training must define `collect` and `write_evaluation`;
    the other hooks do nothing unless they are overridden.

    Attributes:
      publishes: whether `publish` sends weights to engines at every step.
    """

    publishes = False

    def __init__(self, context: StageContext) -> None:
        self.config = context.config
        self.workdir = context.workdir
        self.team = context.team
        self.display = context.display
        self._tokenizer_folder = tokenizer_directory(self.config, self.workdir)
        self.tokenizer = Tokenizer.load(self._tokenizer_folder)
        self.model_config = self._open_model(context.start)
        use_full_precision(self.model_config.dtype)
        self.learner = make_learner(self.config, self.model_config)
        self.evals: list[Evaluation] = []
        self._isolation = context.isolation
        self._start = context.start
        self._earlier_evals = context.earlier_evals
        self._earlier_stages = context.earlier_stages
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of the run, before it was resumed
        self._base: dict[str, str] | None = None  # of the adapters, where these are trained
        self.checkpoints: Checkpoints  # opened by `train`
        (self.workdir / "trajectories").mkdir(parents=True, exist_ok=True)

    # -- what each kind of training defines
    # ---------------------------------------------------------------------------------------------

    def collect(self, step: int, state: TrainState) -> StepData:
        """Return the data of one step."""
        raise NotImplementedError

    def write_evaluation(self, step: int, state: TrainState) -> None:
        """Evaluate the weights of `state`; the leader writes the outcomes with `write_outcomes`."""
        raise NotImplementedError

    def start(self, state: TrainState) -> None:
        """Start what the stage needs around the learner, such as engines."""

    def publish(self, state: TrainState) -> None:
        """Send the weights to the engines, where the stage samples with them at every step."""

    def begin_rollouts(self, state: TrainState) -> None:
        """Start the episodes that the published weights may play."""

    def before_update(self) -> None:
        """Prepare for the update, between collecting and updating."""

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raise TrainingAlarm where further training would do harm."""

    def should_end_early(self, result: Evaluation) -> bool:
        """Return whether this result ends the stage before its last step."""
        return False

    def host_state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of `step` carries besides the training state: JSON documents."""
        return {}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        """Continue from what `host_state` returned."""

    def accounting(self) -> Accounting:
        """Return the counts of the stage's training episodes."""
        return Accounting()

    def report_more(self) -> dict[str, Any]:
        """Return what report.json says beyond what all stages report."""
        return {}

    def close(self) -> None:
        """Close what `start` has started."""

    # -- from start to end
    # ---------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Start or resume the stage and train to its end, or until the user asks to stop.

        Returns:
          Whether the stage is complete. Then WORKDIR/final/ holds its weights.
        """
        directory = self.workdir / "checkpoints"
        self.checkpoints = Checkpoints(directory, self.config.checkpoints_kept)
        resumed_step = self.team.share("checkpoint", self.checkpoints.latest)
        state = self._initial_state() if resumed_step is None else self._restore(resumed_step)
        # Some processes had to compile what made the state, others found it compiled; gloo gives
        # them only 30 s to reach a collective together.
        self.team.meet("state")
        try:
            self.start(state)
            self.team.meet("engines")  # only the leader has waited for them
            with MetricsWriter(
                self.workdir,
                self.config.experiment,
                resume_step=-1 if resumed_step is None else resumed_step,
                writes=self.team.leads,
            ) as metrics:
                state, is_complete = run_stage(
                    self._loop_stage(), self.learner, state, self.checkpoints, metrics, self.display
                )
            self.write_report(int(state.step))
            if is_complete:
                self.export(state)  # last: a workdir with final/ is complete
        except BaseException as error:
            self.team.part(error)
            raise
        finally:
            self.checkpoints.close()
            self.close()
        return is_complete

    def _loop_stage(self) -> Stage:
        config = self.config
        _, epochs = updates_of_step(config)
        return Stage(
            name=config.experiment,
            steps=config.steps,
            epochs=epochs,
            evaluate_every=config.eval_every,
            checkpoint_every=config.checkpoint_every,
            collect=self.collect,
            publish=self.publish,
            begin_rollouts=self.begin_rollouts,
            evaluate=self.evaluate,
            should_end_early=self.should_end_early,
            host_state=self._host_state,
            before_update=self.before_update,
            check=self.check,
            should_stop=self.team.should_stop,
            team=self.team,
            measure_speed=self.measure_speed,
            profile=Profile(self.workdir / "profile", profiled_steps(config), self.display.note),
            publishes=self.publishes,
        )

    def _initial_state(self) -> TrainState:
        if self.learner.lora is not None:
            self._freeze_base()
            return self.learner.start_adapters(self.config.seed)
        if self._start is None:
            return self.learner.init(self.config.seed)
        params = load_start(
            self._start, self.model_config, self.learner.mesh, self.team.wants_to_stop
        )
        return self.learner.start(params)

    def _freeze_base(self) -> dict[str, str]:
        """Give the learner the weights that its adapters are added to; return what they are."""
        learner = self.learner
        if self._start is None:
            params = learner.random_params(self.config.seed)
        else:
            dtype = jnp.dtype(self.model_config.dtype)
            params = load_start(
                self._start, self.model_config, learner.mesh, self.team.wants_to_stop, dtype
            )
        learner.freeze(params)
        digest = params_digest(learner.base, self.model_config)
        self._base = {
            "from": str(self._start or ""),
            "digest": digest,
            "dtype": self.model_config.dtype,
        }
        return self._base

    def _open_model(self, start: pathlib.Path | None) -> ModelConfig:
        """Return the model that the workdir has, or at the first start that of `start`.

        WORKDIR/model.json keeps it, in the form of a Hugging Face config.json: a resumed run and
        launch.convert need no `start`.
        """
        path = self.workdir / MODEL

        def find() -> dict[str, Any]:
            if path.exists():
                return read_json(path, "Bring it back from a copy, or give another --workdir.")
            model = model_of(self.config, start)
            if start is not None:
                check_start(start)
            document = to_document(with_tokenizer(model, self._tokenizer_folder, self.tokenizer))
            write_atomically(path, json.dumps(document, indent=1) + "\n")
            return document

        document = self.team.share("model", find)
        return from_document(document, self.config)

    def data_of_rows(self, step: int, rows: Batch) -> StepData:
        """Return the data of a step that trains on these packed rows.

        Each process has filled its own rows (`own_rows`); counts are of all of them.
        """
        counted = rows.map(lambda field: field[self.own_rows.counted])
        own = [*count_denominators([counted]), *self.learner.count_work([counted])]
        total = self.team.total(f"counts of step {step}", own)
        denominators = Denominators(*total[: len(Denominators._fields)])
        work = Work(*map(int, total[len(denominators) :]))
        batches = microbatches(rows, self.config.rows_per_microbatch)
        return StepData([Minibatch(batches, denominators, work)], {"tokens": work.tokens})

    @functools.cached_property
    def own_rows(self) -> OwnRows:
        """The rows of a step that this process reads, of a stage with `config.rows`."""
        return self.learner.own_rows(self.config.rows, self.config.rows_per_microbatch)

    def stream_position(self, step: int, stream: BatchStream) -> dict[str, Any] | None:
        """Return the position of a stream of batches, of all processes together.

        It is None at the beginning, and in processes that do not lead.
        """
        positions = self.team.gather(f"position at {step}", stream.position(step))
        if positions is None or None in positions:
            return None
        return {row: state for position in positions for row, state in position.items()}

    def measure_speed(self, work: Work, seconds: float) -> dict[str, float]:
        """Return metrics of the learner's speed in a step's updates.

        `learner_tokens_per_s` counts the tokens of all sequences, `mfu` the share of the devices'
        bfloat16 peak that the model's own operations are; it is left out on unknown devices.
        """
        seconds = max(seconds, 1e-9)
        metrics = {"learner_tokens_per_s": work.tokens / seconds}
        devices = self.learner.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind)
        if peak is not None:
            flops = step_flops(self.model_config, work.tokens, work.squares)
            metrics["mfu"] = flops / (seconds * peak * devices.size)
        return metrics

    # -- checkpoints
    # ---------------------------------------------------------------------------------------------

    def _restore(self, step: int) -> TrainState:
        state, host = self.checkpoints.restore(self.learner.state, step)
        if self.learner.lora is not None:
            base = self._freeze_base()
            check_base(host["base"], base, self.checkpoints.directory / str(step))
        self._seconds_before = host["seconds"]
        self.load_host_state(step, host)
        self.evals = self._kept_evaluations(step)
        self.display.note(f"resumed at step {step}")
        return state

    def _host_state(self, step: int) -> dict[str, Any]:
        every_kind = {
            "seconds": self.seconds(),
            "base": self._base,
            "stream": None,
            "text": None,
            "records": None,
            "rollouts": None,
        }
        return every_kind | self.host_state(step)

    # -- evaluations
    # ---------------------------------------------------------------------------------------------

    def evaluate(self, step: int, state: TrainState) -> Evaluation:
        """Return the evaluation of a step; one that is already in the workdir is not repeated."""
        stage = self.config.experiment
        path = outcomes_path(self.workdir, stage, step)
        if not self.team.share(f"evaluated at {step}", path.exists):
            with self.display.evaluating():
                self.write_evaluation(step, state)
        outcomes = self.team.share(
            f"outcomes at {step}", lambda: read_outcomes(self.workdir, stage, step)
        )
        result = evaluation_of(stage, step, outcomes)
        self.evals = [kept for kept in self.evals if kept.step != step]
        self.evals.append(result)
        self.write_report(step)
        return result

    def write_outcomes(self, step: int, outcomes: dict[str, Any]) -> None:
        """Write the outcomes of an evaluation into the workdir."""
        write_outcomes(self.workdir, self.config.experiment, step, outcomes)

    def evaluation_folder(self, step: int) -> pathlib.Path:
        """Return the folder of the attempts of an evaluation; one that was killed goes on there."""
        return outcomes_path(self.workdir, self.config.experiment, step).with_suffix("")

    def _note_faults(self) -> None:
        """Say which tasks of the config cannot be used."""
        faults = tasks_of(self.config).faults
        if faults:
            self.display.note(f"{len(faults)} tasks are left out; the first: {faults[0]}")

    def _kept_evaluations(self, last_step: int) -> list[Evaluation]:
        """Return this stage's evaluations up to a step, as the workdir has them."""
        stage = self.config.experiment
        directory = outcomes_path(self.workdir, stage, 0).parent
        numbers = (
            path.stem.removeprefix(f"{stage}_") for path in directory.glob(f"{stage}_*.json")
        )
        steps = sorted(int(number) for number in numbers if number.isdecimal())  # or not ours
        return [
            evaluation_of(stage, step, read_outcomes(self.workdir, stage, step))
            for step in steps
            if step <= last_step
        ]

    # -- results
    # ---------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Return the wall time of the run, over all its starts."""
        return self._seconds_before + time.monotonic() - self._started

    def write_report(self, step: int) -> None:
        """Write WORKDIR/report.json as of a step."""
        if not self.team.leads:
            return
        accounting = self.accounting()
        accounting.check()
        config = self.config
        own = stage_entry(config.experiment, config.loss, step, self.seconds(), self.evals)
        report = {
            "experiment": self.config.experiment,
            "preset": self.config.preset,
            "loss": self.config.loss,
            **self.report_more(),
            "seed": self.config.seed,
            "steps": step,
            "wall_seconds": round(self.seconds(), 1),
            "isolation": self._isolation,
            "version": describe(),
            "config_changes": read_changes(self.workdir),
            "evals": [*self._earlier_evals, *self.evals],
            "stages": join_stages(self._earlier_stages, own),
            "accounting": accounting.to_json(),
        }
        write_report(self.workdir, report)

    def export(self, state: TrainState) -> None:
        """Write WORKDIR/final/, the weights for launch.serve and for a stage that starts here.

        It is there whole, or not at all.
        """
        final = self.workdir / "final"
        partial = self.workdir / "final.tmp"
        params, adapters = self.learner.to_publish(state.params)
        # With adapters: the weights that were trained with and evaluated, which are rounded.
        dtype = jnp.float32 if adapters is None else jnp.dtype(self.model_config.dtype)
        save_hf(params, self.model_config, partial, dtype, adapters=adapters)

        def finish() -> None:
            if adapters is not None:
                save_peft(adapters, str(self._start or ""), partial / peft.DIRECTORY)
            copied = copy_companions(partial, self._tokenizer_folder, self._start)
            if "tokenizer.json" not in copied:  # other programs read no qwen.tiktoken
                self.tokenizer.save(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self.workdir)
            mark_complete(self.workdir, self.config)

        self.team.share("final", finish)


def check_base(noted: dict[str, str], found: dict[str, str], path: pathlib.Path) -> None:
    """Check that adapters of a checkpoint go on with the base that they were trained on.

    Raises:
      CheckpointError: it is another one.
    """
    if noted["digest"] != found["digest"]:
        raise CheckpointError(
            f"checkpoint {path} holds adapters of {noted['from'] or 'random weights'} with digest"
            f" {noted['digest']}, and what is there now has {found['digest']}. Bring the base back,"
            " or give another --workdir."
        )


def with_tokenizer(
    model_config: ModelConfig, folder: pathlib.Path, tokenizer: Tokenizer
) -> ModelConfig:
    """Return the model config with the end and padding tokens of the tokenizer.

    Raises:
      ValueError: where the tokenizer has more tokens than the model's vocabulary.
    """
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, and the model a"
            f" vocabulary of {model_config.vocab_size}. Set --config.tokenizer to the model's own."
        )
    return dataclasses.replace(
        model_config, eos_token_id=tokenizer.im_end, pad_token_id=tokenizer.pad
    )
