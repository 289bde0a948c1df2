"""An experiment: the one that it starts from runs first, a complete run is left alone."""

import os

import pytest

from rome.stages import experiment
from rome.stages.config import load_config
from rome.stopping import Stopped
from rome.train.ownership import Ownership
from rome.train.report import EvalResult, write_report
from rome.train.team import Team
from rome.train.workdir import ConfigError


@pytest.fixture
def trained(monkeypatch):
    """The stages that were trained, each at once, as (name, where it started, earlier evaluations).

    A stage whose name is in `trained.stops` is stopped by the user instead.
    """

    class Trained(list):
        stops = ()

    done = Trained()

    class Stage:
        def __init__(self, context):
            self.context = context

        def train(self):
            name = self.context.config.experiment
            if name in done.stops:
                raise Stopped
            earlier = [result.stage for result in self.context.earlier_evals]
            done.append((name, self.context.start, earlier))
            evals = [*self.context.earlier_evals, EvalResult.from_tasks(name, 0, [])]
            workdir = self.context.workdir
            write_report(workdir, {"evals": evals})
            (workdir / "final").mkdir()
            return True

    monkeypatch.setattr(experiment, "STAGES", {"sft": Stage, "rl": Stage})
    return done


def run(workdir):
    config = load_config("experiments/ipa.py", "smoke")
    return experiment.run_stages(config, workdir, "none", Team())


def test_the_experiment_that_it_starts_from_runs_first_and_is_reported(tmp_path, trained):
    workdir = tmp_path / "run"
    assert run(workdir)
    start = workdir / "init" / "final"
    assert trained == [("sft", None, []), ("ipa", start, ["sft"])]
    assert run(workdir) and len(trained) == 2  # complete: nothing is trained again


def test_what_the_user_stopped_is_not_complete_and_goes_on_where_it_was(tmp_path, trained):
    trained.stops = ("sft",)
    assert not run(tmp_path / "run") and trained == []
    trained.stops = ("ipa",)
    assert not run(tmp_path / "run") and [name for name, *_ in trained] == ["sft"]
    trained.stops = ()
    assert run(tmp_path / "run") and [name for name, *_ in trained] == ["sft", "ipa"]


@pytest.mark.parametrize(
    "name, preset, may_end_early",
    [("sft", "tiny", True), ("sft", "smoke", False), ("ipa", "tiny", False)],
)
def test_the_display_knows_whether_a_stage_may_end_early(name, preset, may_end_early):
    config = load_config(f"experiments/{name}.py", preset)
    display = experiment.make_display(config, Team())
    assert display.may_end_early is may_end_early
    assert (display.total_steps, display.evaluate_every) == (config.steps, config.eval_every)


def test_a_run_whose_curves_cannot_be_drawn_has_its_result(tmp_path, monkeypatch, capsys):
    def fail(workdir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(experiment, "plot_curves", fail)
    evals = [EvalResult.from_tasks("ipa", step, []) for step in (0, 3)]
    write_report(tmp_path, {"evals": evals, "steps": 3, "wall_seconds": 6.0, "isolation": "none"})
    experiment.show_result(tmp_path)
    assert "curves: none (OSError: [Errno 28] No space left" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["run", "run/init"])
def test_a_workdir_that_another_run_owns_is_refused_its_start_included(tmp_path, trained, place):
    with Ownership(tmp_path / place), pytest.raises(ConfigError, match=f"{os.getpid()} on"):
        run(tmp_path / "run")
    assert trained == []
    run(tmp_path / "run")
    assert [name for name, *_ in trained] == ["sft", "ipa"]
    run(tmp_path / "run")  # the first one has given it free
