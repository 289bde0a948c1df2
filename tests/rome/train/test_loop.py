"""The loop: when it evaluates, saves and ends, seen with everything around it replaced by notes of
what was called.
"""

import dataclasses

import jax.numpy as jnp
import pytest

from rome.train.alarms import TrainingAlarm
from rome.train.loop import Stage, StepData, run_stage
from rome.train.state import TrainState
from rome.train.team import Team


@dataclasses.dataclass
class Result:
    step: int
    success: float


class Around:
    """Learner, checkpoints, metrics and display at once."""

    def __init__(self, success=lambda step: 0.0, kl=0.0):
        self.success, self.kl, self.saved, self.written, self.shown, self.updates = (
            success,
            kl,
            [],
            [],
            [],
            0,
        )

    def update(self, state, microbatches, denominators):
        self.updates += 1
        return state, {"kl_old": jnp.float32(self.kl)}

    def save(self, step, state, host):
        if step not in self.saved:
            self.saved.append(step)

    def wait(self):
        pass

    def write(self, step, figures):
        self.written.append((step, figures))

    def evaluated(self, result):
        self.shown.append(result.step)

    def run(self, step=0, **changes):
        stage = Stage(
            **{
                "name": "s",
                "steps": 9,
                "updates_per_step": 2,
                "evaluate_every": 2,
                "checkpoint_every": 100,
                "collect": lambda step, state: StepData([], None, {}),
                "publish": lambda state: None,
                "evaluate": lambda step, state: Result(step, self.success(step)),
                "enough": lambda result: result.success >= 0.5,
                "host_state": dict,
                "should_stop": lambda: False,
                "before_update": lambda: None,
                "check": lambda step, figures: None,
                "team": Team(),
            }
            | changes
        )
        self.stage = stage
        return run_stage(
            stage, self, TrainState(jnp.int32(step), {}, ()), self, _Metrics(self), _Display(self)
        )


@dataclasses.dataclass
class _Metrics:
    around: Around

    def write(self, step, figures):
        self.around.write(step, figures)


@dataclasses.dataclass
class _Display:
    around: Around

    def update(self, step, figures):
        pass

    def evaluated(self, result):
        self.around.evaluated(result)


def test_a_stage_evaluates_on_its_way_and_once_at_its_end_and_is_saved():
    around = Around()
    assert int(around.run().step) == 9
    assert around.shown == [0, 2, 4, 6, 8, 9] and around.saved == [9] and around.updates == 18
    assert [step for step, _ in around.written] == list(range(1, 10))


def test_a_stage_ends_where_it_has_come_far_enough_and_is_whole_there():
    around = Around(lambda step: 0.6 if step >= 4 else 0.1)
    assert int(around.run().step) == around.stage.steps == 4
    assert (
        around.shown == [0, 2, 4]
        and around.saved == [4]
        and [step for step, _ in around.written] == [1, 2, 3, 4]
    )


def test_a_start_that_is_good_already_is_no_end():
    assert int(Around(lambda step: 1.0).run(evaluate_every=0).step) == 9
    assert int(Around(lambda step: 1.0).run().step) == 2


def test_a_run_that_was_killed_at_its_end_finds_that_it_is_over():
    around = Around(lambda step: 0.6 if step >= 4 else 0.1)
    assert int(around.run(step=4).step) == around.stage.steps == 4 and not around.updates
    around = Around(lambda step: 0.6 if step >= 4 else 0.1)
    assert int(around.run(step=3).step) == 4 and around.shown == [4]


def test_what_an_alarm_was_raised_about_is_not_saved():
    def alarm(step, figures):
        if step == 3:
            raise TrainingAlarm("no")

    around = Around(kl=0.25)
    with pytest.raises(TrainingAlarm):
        around.run(check=alarm)
    assert not around.saved and around.written[0][1]["first_kl"] == 0.25
