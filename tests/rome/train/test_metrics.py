"""Every step stands once in metrics.jsonl, whatever happened to the run."""

import json

import numpy as np
import pytest

from rome.train.metrics import METRIC_FORMATS, MetricsWriter, read_metrics


def write_steps(workdir, stage, steps, resume_step=None, **figures):
    with MetricsWriter(workdir, stage, resume_step, tensorboard=False) as metrics:
        for step in steps:
            metrics.write(step, {"loss": step / 10, **figures})


def steps_of(workdir, stage):
    return [record["step"] for record in read_metrics(workdir) if record["stage"] == stage]


def test_a_line_is_flat_json_with_stage_step_and_plain_numbers(tmp_path):
    write_steps(
        tmp_path, "ipa", [1], reward=np.float32(0.5), count=np.int64(3), array=np.array(2.0)
    )
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "stage": "ipa",
        "step": 1,
        "loss": 0.1,
        "reward": 0.5,
        "count": 3,
        "array": 2.0,
    }


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    metrics = MetricsWriter(tmp_path, "sft", tensorboard=False)
    metrics.write(1, {"loss": 1.0})
    assert steps_of(tmp_path, "sft") == [1]
    metrics.close()


def test_resuming_leaves_each_step_once_and_other_stages_alone(tmp_path):
    write_steps(tmp_path, "sft", range(1, 8))
    write_steps(tmp_path, "ipa", range(1, 6))
    write_steps(tmp_path, "ipa", range(4, 7), resume_step=3)
    assert steps_of(tmp_path, "sft") == list(range(1, 8))
    assert steps_of(tmp_path, "ipa") == list(range(1, 7))


def test_starting_a_stage_anew_drops_all_its_lines(tmp_path):
    write_steps(tmp_path, "ipa", range(4))
    write_steps(tmp_path, "ipa", range(2), resume_step=-1)
    assert steps_of(tmp_path, "ipa") == [0, 1]


def test_a_line_cut_off_by_a_kill_is_ignored_and_then_replaced(tmp_path):
    write_steps(tmp_path, "ipa", [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ipa", "step": 3, "lo')
    assert steps_of(tmp_path, "ipa") == [1, 2]
    write_steps(tmp_path, "ipa", [3], resume_step=2)
    assert steps_of(tmp_path, "ipa") == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    write_steps(tmp_path, "ipa", [1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("rubbish\n")
    write = '{"stage": "ipa", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text() + write)
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_figure_that_is_not_finite_is_refused_by_name_and_nothing_is_written(tmp_path, value):
    with (
        MetricsWriter(tmp_path, "ipa", tensorboard=False) as metrics,
        pytest.raises(ValueError, match=r"'entropy'.*step 3"),
    ):
        metrics.write(3, {"loss": 1.0, "entropy": value})
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", ["high", None, True, [1.0]])
def test_what_is_no_number_is_refused(tmp_path, value):
    with (
        MetricsWriter(tmp_path, "ipa", tensorboard=False) as metrics,
        pytest.raises(TypeError, match="'entropy'"),
    ):
        metrics.write(1, {"entropy": value})


def test_no_figure_may_shadow_the_step(tmp_path):
    with (
        MetricsWriter(tmp_path, "ipa", tensorboard=False) as metrics,
        pytest.raises(ValueError, match="'step'"),
    ):
        metrics.write(1, {"step": 2})


def test_a_step_cannot_be_written_twice(tmp_path):
    write_steps(tmp_path, "ipa", [1, 2])
    with (
        MetricsWriter(tmp_path, "ipa", tensorboard=False) as metrics,
        pytest.raises(ValueError, match="step 2 of stage ipa"),
    ):
        metrics.write(2, {"loss": 1.0})


def test_tensorboard_gets_the_same_figures(tmp_path):
    from tensorboardX.proto import event_pb2

    with MetricsWriter(tmp_path, "ipa") as metrics:
        metrics.write(1, {"reward": 0.25})
    (events,) = (tmp_path / "tensorboard" / "ipa").iterdir()
    scalars = {}
    data = events.read_bytes()
    while data:  # length (8), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    assert scalars == {("reward", 1): 0.25}


def many_metrics(tmp_path) -> dict[str, float]:
    """Write steps of forty metrics each and return the last line of metrics.jsonl."""
    with MetricsWriter(tmp_path, "ipa") as metrics:
        for step in range(1, 4):
            metrics.write(step, {f"metric_{number}": 0.5 for number in range(40)})
            metrics.flush()
    return read_metrics(tmp_path)[-1]


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "flush", "close"])
def test_tensorboard_that_fails_is_said_once_and_ends_nothing(
    tmp_path, monkeypatch, capsys, method
):
    from tensorboardX import SummaryWriter

    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(SummaryWriter, method, fail)
    assert len(many_metrics(tmp_path)) == 42
    assert capsys.readouterr().err.count("no TensorBoard files from here on (OSError") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_of_tensorboard_that_died_is_not_waited_for(tmp_path, monkeypatch, capsys):
    from tensorboardX.event_file_writer import EventsWriter

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", fail)
    assert len(many_metrics(tmp_path)) == 42
    assert capsys.readouterr().err.count("no TensorBoard files") == 1


def test_a_figure_reads_as_a_person_writes_it():
    assert METRIC_FORMATS["success"].text(0.424) == "42 %"
    assert METRIC_FORMATS["tokens_per_s"].text(1830.4) == "1,830 tok/s"
    assert METRIC_FORMATS["reward"].text(0.5) == "+0.50"
