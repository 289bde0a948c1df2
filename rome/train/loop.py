"""The training loop, top to bottom: evaluate, then steps of collect, update, publish, write,
evaluate, save.

Everything outside the learner is handed in as a function, so that this file knows neither engines
nor environments; SFT and IPA run through the same lines. So do the processes of a team: each calls
the same functions in the same order, and only the leader's have effects outside.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from rome.data.batch import Batch
from rome.losses import Denominators
from rome.train.alarms import TrainingAlarm
from rome.train.checkpoint import Checkpoints
from rome.train.display import Display
from rome.train.metrics import MetricsWriter
from rome.train.report import Evaluation
from rome.train.state import TrainState
from rome.train.step import Learner
from rome.train.team import Team


@dataclasses.dataclass
class StepData:
    """What one step trains on: its micro-batches, the denominators over all of them, and what
    collecting them showed.
    """

    microbatches: list[Batch]
    denominators: Denominators
    figures: dict[str, float]


@dataclasses.dataclass
class Stage:
    """One stage of training and what it needs from outside.

    Args:
      collect: (step, state) -> the step's data; may raise the caller's own exception to stop.
      publish: (state) brings the weights to whoever samples with them; called after every step.
      evaluate: (step, state) -> result; called at step 0, every `evaluate_every` steps (0: never)
        and at the end. Done before: returns the kept result.
      enough: whether a result after the first step ends the stage before its last step; `steps`
        then becomes the step that was reached.
      host_state: what else a checkpoint carries, asked at the moment of saving.
      before_update: called between collecting and updating.
      check: (step, figures) raises TrainingAlarm where training on would do harm.
      should_stop: the same answer in every process of the team.
    """

    name: str
    steps: int
    updates_per_step: int
    evaluate_every: int
    checkpoint_every: int
    collect: Callable[[int, TrainState], StepData]
    publish: Callable[[TrainState], None]
    evaluate: Callable[[int, TrainState], Evaluation]
    enough: Callable[[Evaluation], bool]
    host_state: Callable[[], dict[str, Any]]
    before_update: Callable[[], None]
    check: Callable[[int, dict[str, float]], None]
    should_stop: Callable[[], bool]
    team: Team


def run_stage(
    stage: Stage,
    learner: Learner,
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    display: Display,
) -> TrainState:
    """Runs the stage from `state.step` to its end, or to the step at which the user asked to stop.

    Returns the state reached; it is saved.
    """
    step, evaluated, harmed = int(state.step), -1, False
    # figures of step k are fetched and written while step k + 1 runs
    unwritten: tuple[int, dict[str, Any]] | None = None

    def write_figures() -> None:
        nonlocal unwritten
        if unwritten is not None:
            (number, figures), unwritten = (
                unwritten,
                None,
            )  # first: a figure that is refused is not tried again on the way out
            figures = {name: float(value) for name, value in jax.device_get(figures).items()}
            if figures.get(
                "mismatch_weight2"
            ):  # share of the samples that is left after weighing them: 1 where engine and trainer agree
                figures["effective_samples"] = (
                    figures["mismatch_weight"] ** 2 / figures["mismatch_weight2"]
                )
            metrics.write(number, figures)
            display.update(number, figures)
            stage.check(number, figures)

    def save() -> None:
        write_figures()  # a step that a checkpoint holds is also in the metrics
        checkpoints.save(step, state, stage.host_state())

    def evaluate() -> None:
        nonlocal evaluated
        write_figures()
        result, evaluated = stage.evaluate(step, state), step
        display.evaluated(result)
        if step and stage.enough(result):
            stage.steps = step

    try:
        stage.publish(state)
        if step == 0 or (
            stage.evaluate_every and step % stage.evaluate_every == 0
        ):  # of a run that was killed meanwhile: it may have been the last
            evaluate()
        while step < stage.steps and not stage.should_stop():
            started = time.monotonic()
            data = stage.collect(step, state)
            collected = time.monotonic()
            stage.before_update()
            updated = state
            first: dict[str, jax.Array] = {}
            for _ in range(stage.updates_per_step):
                updated, figures = learner.update(updated, data.microbatches, data.denominators)
                first = first or {"first_kl": figures[name] for name in figures if name == "kl_old"}
            write_figures()
            step, state = step + 1, updated._replace(step=updated.step + 1)
            stage.publish(state)
            unwritten = (
                step,
                data.figures
                | figures
                | first
                | {
                    "seconds_collect": collected - started,
                    "seconds_update": time.monotonic() - collected,
                },
            )
            if step % stage.checkpoint_every == 0 or step == stage.steps:
                save()
            if stage.evaluate_every and step % stage.evaluate_every == 0:
                evaluate()
        if step == stage.steps and evaluated != step:
            evaluate()
        write_figures()
    except TrainingAlarm as error:
        harmed = True
        stage.team.part(error)
        raise
    except BaseException as error:
        stage.team.part(
            error
        )  # saving takes all processes: where the others know nothing of the error, this is the end
        raise
    finally:
        # Whatever the reason to leave, the last whole step is kept, but what an alarm was raised
        # about. An update that failed half-way has consumed its state: then, too, the newest
        # checkpoint is the one before.
        if step and not harmed and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            save()
        checkpoints.wait()
    return state
