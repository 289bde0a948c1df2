"""The loop: when it evaluates, saves and ends, seen with everything around it replaced by notes of
what was called.
"""

import dataclasses
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rome.train.alarms import Diverged, TrainingAlarm
from rome.train.loop import Minibatch, Stage, StepData, run_stage
from rome.train.profile import Profile
from rome.train.state import TrainState
from rome.train.team import Team


@dataclasses.dataclass
class Result:
    step: int
    success: float


def rows_of(lengths) -> types.SimpleNamespace:
    """A micro-batch of one row, of which only the lengths of its sequences are there."""
    segments_T = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions_T = [place for length in lengths for place in range(length)]
    return types.SimpleNamespace(
        segments_BT=np.append(segments_T, [0, 0])[None],
        positions_BT=np.append(positions_T, [0, 0])[None],
    )


MINIBATCH = Minibatch([rows_of([3, 4])], None)


class Around:
    """Learner, checkpoints, metrics and display at once."""

    directory = pathlib.Path("run/checkpoints")

    def __init__(self, success=lambda step: 0.0, kl=0.0):
        self.success = success
        self.kl = kl
        self.saved = []
        self.written = []
        self.shown = []
        self.notes = []
        self.called = []  # (what, step), in order
        self.updates = 0
        self.has_ended = None

    def update(self, state, microbatches, denominators, work=None):
        self.updates += 1
        self.called.append(("update", int(state.step)))
        return state, {"kl_old": jnp.float32(self.kl)}

    def is_finite(self, params):
        return jnp.bool_(True)

    def latest(self):
        return self.saved[-1] if self.saved else None

    def save(self, step, state, host):
        if step not in self.saved:
            self.saved.append(step)

    def wait(self):
        pass

    def write(self, step, metrics):
        self.written.append((step, metrics))

    def evaluated(self, result):
        self.shown.append(result.step)

    def note(self, text):
        self.notes.append(text)

    def run(self, step=0, **changes):
        stage = Stage(
            **{
                "name": "s",
                "steps": 9,
                "epochs": 2,
                "evaluate_every": 2,
                "checkpoint_every": 100,
                "collect": lambda step, state: StepData([MINIBATCH], {}),
                "publish": lambda state: self.called.append(("publish", int(state.step))),
                "begin_rollouts": lambda state: self.called.append(("begin", int(state.step))),
                "evaluate": lambda step, state: Result(step, self.success(step)),
                "should_end_early": lambda result: result.success >= 0.5,
                "host_state": lambda step: {},
                "should_stop": lambda: False,
                "before_update": lambda: None,
                "check": lambda step, metrics: None,
                "team": Team(),
                "measure_speed": lambda work, seconds: {"speed": work.tokens / seconds},
                "profile": Profile(pathlib.Path("nowhere")),
            }
            | changes
        )
        state, self.has_ended = run_stage(
            stage, self, TrainState(jnp.int32(step), {}, ()), self, _Metrics(self), _Display(self)
        )
        return state


@dataclasses.dataclass
class _Metrics:
    around: Around

    def write(self, step, metrics):
        self.around.write(step, metrics)


@dataclasses.dataclass
class _Display:
    around: Around

    def update(self, step, metrics):
        pass

    def evaluated(self, result):
        self.around.evaluated(result)

    def note(self, text):
        self.around.note(text)


def test_a_stage_evaluates_on_its_way_and_once_at_its_end_and_is_saved():
    around = Around()
    assert int(around.run().step) == 9
    assert around.shown == [0, 2, 4, 6, 8, 9] and around.saved == [9] and around.updates == 18
    assert [step for step, _ in around.written] == list(range(1, 10))


def test_a_stage_ends_where_it_has_come_far_enough_and_is_whole_there():
    around = Around(lambda step: 0.6 if step >= 4 else 0.1)
    assert int(around.run().step) == 4 and around.has_ended
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
    assert int(around.run(step=4).step) == 4 and around.has_ended and not around.updates
    around = Around(lambda step: 0.6 if step >= 4 else 0.1)
    assert int(around.run(step=3).step) == 4 and around.shown == [4]


def test_what_an_alarm_was_raised_about_is_not_saved():
    def alarm(step, metrics):
        if step == 3:
            raise TrainingAlarm("no")

    around = Around(kl=0.25)
    with pytest.raises(TrainingAlarm):
        around.run(check=alarm)
    assert not around.saved and around.written[0][1]["first_kl"] == 0.25


class Diverging(Around):
    """From a step on, the named metrics or the weights are not finite.

    Args:
      step: the first one that has diverged.
      what: "weights", or the name of a metric.
      skips: as a learner that skips such updates reports them.
    """

    def __init__(self, step, what, skips=False):
        super().__init__()
        self.first = step
        self.what = what
        self.skips = skips
        self.started = 0

    def update(self, state, microbatches, denominators, work=None):
        state, metrics = super().update(state, microbatches, denominators)
        self.started = int(state.step) + 1
        has_diverged = self.started >= self.first
        if has_diverged and self.what != "weights":
            metrics = metrics | {self.what: jnp.float32("nan")}
        if self.skips:
            metrics = metrics | {"skipped_updates": jnp.float32(has_diverged)}
        return state, metrics

    def is_finite(self, params):
        return jnp.bool_(self.what != "weights" or self.started < self.first)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("evaluate_every", [0, 2, 5])
@pytest.mark.parametrize("what", ["weights", "loss", "gradient_norm"])
@pytest.mark.parametrize("publishes", [True, False])
def test_a_step_that_is_not_finite_is_never_saved(every, evaluate_every, what, publishes):
    around = Diverging(6, what)
    last_good = 5 - 5 % every
    with pytest.raises(Diverged, match="step 6") as raised:
        around.run(
            checkpoint_every=every, evaluate_every=evaluate_every, steps=9, publishes=publishes
        )
    assert around.saved[-1] == last_good and all(step <= 5 for step in around.shown)
    assert f"run/checkpoints/{last_good} is good" in str(raised.value)
    assert "--config.learning_rate" in str(raised.value)
    assert ("publish", 6) not in around.called or what != "weights" or not publishes


@pytest.mark.parametrize("error", [RuntimeError("engines are gone"), KeyboardInterrupt()])
def test_no_other_failure_saves_a_step_that_is_not_finite(error):
    def publish(state):
        if int(state.step) == 3:
            raise error

    around = Diverging(3, "loss")
    with pytest.raises(Diverged, match="starts the stage anew"):
        around.run(publish=publish, evaluate_every=0)
    assert not around.saved
    healthy = Around()
    with pytest.raises(type(error)):
        healthy.run(publish=publish, evaluate_every=0)
    assert healthy.saved == [3] and [step for step, _ in healthy.written] == [1, 2, 3]


def test_skipped_updates_are_counted_and_end_the_run_where_nothing_else_comes():
    around = Diverging(3, "loss", skips=True)
    with pytest.raises(Diverged, match="10 steps in a row"):
        around.run(steps=30, evaluate_every=0, checkpoint_every=5)
    counts = [metrics["skipped_updates"] for _, metrics in around.written]
    assert counts == [0.0] * 2 + [2.0] * 10 and "loss" not in around.written[-1][1]


def test_rollouts_begin_after_the_weights_are_published_once_for_each_version():
    around = Around()
    around.run(steps=2, epochs=1, evaluate_every=1)
    assert around.called == [
        ("publish", 0),
        ("begin", 0),
        ("update", 0),
        ("publish", 1),
        ("begin", 1),
        ("update", 1),
        ("publish", 2),
        ("begin", 2),
    ]


def test_a_stage_that_is_stopped_has_not_ended():
    around = Around()
    answers = iter([False, False, True])
    assert int(around.run(should_stop=lambda: next(answers)).step) == 2
    assert around.has_ended is False and around.saved == [2]


def test_a_checkpoint_carries_the_host_state_of_its_own_step():
    asked = []
    around = Around()
    around.run(steps=2, evaluate_every=0, checkpoint_every=1, host_state=asked.append)
    assert asked == [1, 2, 2]  # the last one is asked for again on the way out, and not written


class Counting(Around):
    """Every update has metrics of its own: the n-th one n, from 0."""

    def update(self, state, microbatches, denominators, work=None):
        number = self.updates
        state, _ = super().update(state, microbatches, denominators)
        self.called[-1] = ("update", denominators)
        names = ("loss", "kl_old", "max_mismatch", "skipped_updates")
        return state, {name: jnp.float32(number) for name in names}


def test_each_minibatch_is_an_update_epoch_after_epoch_and_the_metrics_are_the_last_epochs():
    parts = [Minibatch([rows_of([2])], 10.0), Minibatch([rows_of([3]), rows_of([1])], 20.0)]
    around = Counting()
    around.run(
        steps=1, epochs=3, evaluate_every=0, collect=lambda *_: StepData(parts, {"reward": 0.5})
    )
    assert [what for what in around.called if what[0] == "update"] == [
        ("update", 10.0),
        ("update", 20.0),
    ] * 3
    ((step, values),) = around.written
    assert step == 1 and values["updates"] == 6 and values["reward"] == 0.5
    assert values["loss"] == 4.5 and values["max_mismatch"] == 5.0  # of the updates 4 and 5
    assert values["first_kl"] == 0.0 and values["skipped_updates"] == 15.0
    assert values["speed"] * values["seconds_update"] == pytest.approx(3 * 6)


def test_a_step_without_rows_is_said_makes_no_update_and_ends():
    around = Around()
    empty = iter([False, True, True])
    state = around.run(
        steps=3,
        evaluate_every=0,
        epochs=1,
        collect=lambda *_: StepData([] if next(empty) else [MINIBATCH], {"success": 0.0}),
    )
    assert int(state.step) == 3 and around.updates == 1 and around.saved == [3]
    assert [values["updates"] for _, values in around.written] == [1, 0, 0]
    assert "speed" not in around.written[1][1] and around.written[1][1]["success"] == 0.0
    assert [step for what, step in around.called if what == "publish"] == [0, 1, 2, 3]
    assert len(around.notes) == 2 and "step 2 has nothing to train on" in around.notes[0]


@pytest.mark.parametrize("publishes", [False, True])
def test_the_seconds_of_an_update_count_neither_collecting_nor_publishing(publishes, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    begun = []

    class Seconds:
        def __init__(self, started, result, before):
            begun.append(started)

        def value(self):
            return 1.0

    def pass_by(seconds):
        def act(*_):
            clock.now += seconds

        return act

    def collect(*_):
        clock.now += 10
        return StepData([MINIBATCH], {})

    monkeypatch.setattr("rome.train.loop.UpdateSeconds", Seconds)
    monkeypatch.setattr("rome.train.loop.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    around = Around()
    around.run(
        steps=2,
        evaluate_every=0,
        publishes=publishes,
        collect=collect,
        before_update=pass_by(100),
        publish=pass_by(1000),
    )
    assert begun == [1110, 2220]
    for _, values in around.written:
        assert values["seconds_update"] == 1.0 and values["seconds_collect"] == 10
        assert values["speed"] == 2 * 7
