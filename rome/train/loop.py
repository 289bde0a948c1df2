"""The training loop, from top to bottom: evaluate, then collect, update, publish, write and save.

Everything outside the learner is handed in as a function, so this file knows neither engines nor
environments, and CPT, SFT and IPA run through the same lines. In a job of several processes each
calls the same functions in the same order; only process 0 has effects outside.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from rome.data.batch import Batch
from rome.losses import Denominators
from rome.train.alarms import TrainingAlarm, check_finite, diverged
from rome.train.checkpoint import Checkpoints
from rome.train.display import Display
from rome.train.metrics import MetricsWriter, metrics_of_updates
from rome.train.profile import Profile
from rome.train.report import Evaluation
from rome.train.speed import UpdateSeconds, Work, count_work
from rome.train.state import TrainState
from rome.train.team import Team

MAX_SKIPPED_STEPS = 10  # in a row, before a run that skips its updates ends as diverged


class Updates(Protocol):
    """The part of a learner that the loop calls (rome.train.step.Learner)."""

    def update(
        self,
        state: TrainState,
        microbatches: list[Batch],
        denominators: Denominators,
        work: Work | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Apply one optimizer update over all micro-batches; return the new state and metrics."""

    def is_finite(self, params: dict) -> jax.Array:
        """Return whether no parameter is inf or NaN, as a scalar that need not be waited for."""


class Minibatch(NamedTuple):
    """The data of one optimizer update.

    Attributes:
      microbatches: in fixed shapes; one or more.
      denominators: of the loss, over all of them together.
      work: in all of them together; None: the micro-batches hold all rows, and tell it.
    """

    microbatches: list[Batch]
    denominators: Denominators
    work: Work | None = None


@dataclasses.dataclass
class StepData:
    """The data of one step.

    Attributes:
      minibatches: an update each, in this order; none where there is nothing to train on.
      metrics: what collecting the data showed, by name.
    """

    minibatches: list[Minibatch]
    metrics: dict[str, float]


@dataclasses.dataclass
class Stage:
    """One stage of training, and the functions that it needs from outside.

    Attributes:
      name: of the experiment; it marks the stage's lines in metrics.jsonl.
      steps: number of steps, at most where `should_end_early` may say so.
      epochs: passes over each step's data.
      evaluate_every: steps between evaluations; 0: only at step 0 and at the end.
      checkpoint_every: steps between checkpoints.
      collect: (step, state) -> the step's data; may raise the caller's own exception to stop.
      publish: (state) sends the weights to the engines; called at the start and after every step.
      begin_rollouts: (state) starts the episodes that these weights may play, in the background.
      evaluate: (step, state) -> the result; one that was kept is returned without evaluating again.
      should_end_early: (result) whether a result after step 0 ends the stage.
      host_state: (step) -> what else a checkpoint of that step carries, asked when it is saved.
      before_update: called between collecting and updating.
      check: (step, metrics) raises TrainingAlarm where further training would do harm.
      should_stop: whether the user asked to stop; the same answer in every process.
      team: the processes of this job.
      measure_speed: (work, seconds of the updates) -> metrics of the learner's speed.
      profile: traces a window of steps.
      publishes: `publish` sends weights at every step, so they are proven finite before it.
    """

    name: str
    steps: int
    epochs: int
    evaluate_every: int
    checkpoint_every: int
    collect: Callable[[int, TrainState], StepData]
    publish: Callable[[TrainState], None]
    begin_rollouts: Callable[[TrainState], None]
    evaluate: Callable[[int, TrainState], Evaluation]
    should_end_early: Callable[[Evaluation], bool]
    host_state: Callable[[int], dict[str, Any]]
    before_update: Callable[[], None]
    check: Callable[[int, dict[str, float]], None]
    should_stop: Callable[[], bool]
    team: Team
    measure_speed: Callable[[Work, float], dict[str, float]]
    profile: Profile
    publishes: bool = True

    def evaluates_at(self, step: int) -> bool:
        """Return whether `step` is one of the regular evaluations."""
        return self.evaluate_every > 0 and step % self.evaluate_every == 0


class Trained(NamedTuple):
    """A step that was handed to the devices.

    Attributes:
      step: its number.
      data: metrics of its data, and of the time that was spent on it.
      updates: metrics of each update, on the devices.
      per_epoch: number of updates in an epoch.
      work: that the updates did.
      seconds: that they take.
    """

    step: int
    data: dict[str, float]
    updates: list[dict[str, jax.Array]]
    per_epoch: int
    work: Work
    seconds: UpdateSeconds


def run_stage(
    stage: Stage,
    learner: Updates,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    display: Display,
) -> tuple[TrainState, bool]:
    """Run the stage from `state.step` to its end, or until the user asks to stop.

    Returns:
      The state that was reached, which is saved, and whether the stage has ended.
    """
    step = int(state.step)
    last_step = stage.steps
    evaluated_step: int | None = None
    is_harmed = False
    is_finite: Any = learner.is_finite(state.params)  # on the device, of `state`
    skipped_steps = 0  # in a row
    # The metrics of step k are fetched and written while step k + 1 runs.
    unwritten: Trained | None = None
    seconds: UpdateSeconds | None = None  # of the newest step

    def write_metrics() -> None:
        nonlocal unwritten, skipped_steps
        if unwritten is None:
            return
        trained = unwritten
        unwritten = None  # first: metrics that are refused are not tried again on the way out
        number = trained.step
        values = metrics_of_updates(jax.device_get(trained.updates), trained.per_epoch)
        if values.get("skipped_updates"):
            values = {name: value for name, value in values.items() if math.isfinite(value)}
        values = trained.data | values | {"seconds_update": trained.seconds.value()}
        if trained.updates:
            values |= stage.measure_speed(trained.work, values["seconds_update"])
        add_effective_samples(values)
        check_finite(number, values, where_to_resume(checkpoints))
        metrics.write(number, values)
        display.update(number, values)
        stage.check(number, values)
        if not trained.updates:
            return
        is_skipped = values.get("skipped_updates") == values["updates"]
        skipped_steps = skipped_steps + 1 if is_skipped else 0
        if skipped_steps == MAX_SKIPPED_STEPS:
            what = f"the gradients of {skipped_steps} steps in a row were not finite"
            raise diverged(number, what, where_to_resume(checkpoints))

    def require_finite_weights() -> None:
        if not is_finite:
            raise diverged(step, "its weights are not finite", where_to_resume(checkpoints))

    def save() -> None:
        write_metrics()  # a step that a checkpoint holds is also in the metrics
        require_finite_weights()
        checkpoints.save(step, state, stage.host_state(step))

    def evaluate() -> Evaluation:
        nonlocal evaluated_step
        write_metrics()
        require_finite_weights()
        result = stage.evaluate(step, state)
        evaluated_step = step
        display.evaluated(result)
        return result

    try:
        if stage.publishes:
            require_finite_weights()
        stage.publish(state)
        stage.begin_rollouts(state)
        if step == 0:
            evaluate()
        elif stage.evaluates_at(step):  # a resumed run: the evaluation may have ended the stage
            result = evaluate()
            if stage.should_end_early(result):
                last_step = step
        while step < last_step and not stage.should_stop():
            stage.profile.before(step + 1)
            started = time.monotonic()
            data = stage.collect(step, state)
            collected = time.monotonic()
            if not data.minibatches:
                display.note(f"step {step + 1} has nothing to train on: it makes no update")
            stage.before_update()
            began_update = time.monotonic()
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                updated, updates = train_on(learner, state, data, stage.epochs)
            write_metrics()
            step += 1
            state = updated._replace(step=updated.step + 1)
            is_finite = learner.is_finite(state.params)
            seconds = UpdateSeconds(began_update, is_finite, seconds)
            # Before publishing: a step that cannot be published is saved with its metrics.
            unwritten = Trained(
                step,
                data.metrics | {"seconds_collect": collected - started},
                updates,
                len(data.minibatches),
                work_of_step(data, stage.epochs),
                seconds,
            )
            stage.profile.after(step, is_finite)
            if stage.publishes:
                require_finite_weights()
            stage.publish(state)
            stage.begin_rollouts(state)
            if step % stage.checkpoint_every == 0 or step == last_step:
                save()
            if stage.evaluates_at(step):
                result = evaluate()
                if stage.should_end_early(result):
                    last_step = step
        if step >= last_step and evaluated_step != step:
            evaluate()
        write_metrics()
    except TrainingAlarm as error:
        is_harmed = True
        stage.team.part(error)
        raise
    except BaseException as error:
        # Saving takes all processes. Where the others do not know of the error, this is the end.
        stage.team.part(error)
        raise
    finally:
        # Whatever the reason to leave, the last whole step is saved, unless an alarm was raised
        # about it or it is found not to be finite. An update that failed half-way has consumed
        # its state: then, too, the newest checkpoint is the one before.
        stage.profile.close()
        is_whole = not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        if step > 0 and not is_harmed and is_whole:
            save()
        checkpoints.wait()
    return state, step >= last_step  # beyond it where a resumed run was given fewer steps


def train_on(
    learner: Updates, state: TrainState, data: StepData, epochs: int
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
    """Make the updates of a step: one for each minibatch, epoch after epoch.

    Returns:
      The new state, the old one where there is nothing to train on; and the metrics of each update.
    """
    updates = []
    for _ in range(epochs):
        for minibatch in data.minibatches:
            state, metrics = learner.update(state, *minibatch)
            updates.append(metrics)
    return state, updates


def work_of_step(data: StepData, epochs: int) -> Work:
    """Return the work of a step's updates."""
    works = [part.work or count_work(part.microbatches) for part in data.minibatches]
    return Work(*(epochs * sum(column) for column in zip(Work(0, 0), *works, strict=True)))


def where_to_resume(checkpoints: Checkpoints) -> str:
    """Say from where the next start of the run goes on."""
    good_step = checkpoints.latest()
    if good_step is None:
        return "no checkpoint was saved before it, so the same command starts the stage anew"
    path = checkpoints.directory / str(good_step)
    return (
        f"checkpoint {path} is good, and the same command goes on from it (where its next step"
        " fails again, delete it to go on from the one before)"
    )


def add_effective_samples(metrics: dict[str, float]) -> None:
    """Add the share of the samples that is left after weighing them, where weights were measured.

    It is 1 where the engine and the trainer agree.
    """
    if metrics.get("mismatch_weight2"):
        share = metrics["mismatch_weight"] ** 2 / metrics["mismatch_weight2"]
        metrics["effective_samples"] = share
