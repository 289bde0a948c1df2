"""The scripts that record runs and draw them."""

from __future__ import annotations

import json

import pytest

from docs.figures import collect, configuration, learning_curve, outside_agent, style


def make_report(tmp_path, steps=60, last=60):
    def entry(stage, step, success):
        return {
            "stage": stage,
            "step": step,
            "success": success,
            "n": 40,
            "low": 0.0,
            "high": 1.0,
            "by_family": {"sum": [success, 20], "line": [success, 20]},
            "unseen_families": 0.1,
            "unseen_by_family": {"chain": [0.1, 10]},
        }

    report = {
        "experiment": "ipa",
        "preset": "tiny",
        "loss": "grpo",
        "seed": 3,
        "steps": steps,
        "wall_seconds": 90.0,
        "isolation": "namespaces",
        "evals": [
            entry("sft", 120, 0.25),
            entry("ipa", 0, 0.25),
            entry("ipa", 30, 0.4),
            entry("ipa", last, 0.5),
        ],
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_a_run_is_recorded_with_counts_command_and_origin(tmp_path):
    record = collect.read_run(make_report(tmp_path), "a machine", "abc1234")
    assert [(entry["step"], entry["successes"], entry["n"]) for entry in record["evals"]] == [
        (0, 10, 40),
        (30, 16, 40),
        (60, 20, 40),
    ]
    assert record["start"]["stage"] == "sft"
    assert record["start"]["unseen_successes"] == 1
    assert record["command"] == (
        "python -m launch.train --config=experiments/ipa.py --config.loss=grpo --config.seed=3"
    )
    assert (record["commit"], record["machine"]) == ("abc1234", "a machine")


def test_a_run_that_has_not_ended_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step 30 of 60"):
        collect.read_run(make_report(tmp_path, last=30), "a machine", "abc1234")


def test_the_curve_and_its_table_come_from_recorded_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "IMAGES", tmp_path / "images")
    out = tmp_path / "runs"
    workdir = str(make_report(tmp_path))
    assert collect.main([workdir, "--out", str(out), "--commit", "abc1234"]) == 0
    runs = learning_curve.load_runs(out)
    assert list(runs) == ["grpo"]
    table = learning_curve.table(runs)
    assert "| GRPO, seed 3 | 25 % (14 to 40) | 40 % (26 to 55) | 50 % (35 to 65) | 2 |" in table
    assert learning_curve.draw(runs).read_bytes().startswith(b"\x89PNG")


def test_a_run_behind_an_outside_agent_is_kept_with_its_steps_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(outside_agent, "RUN", tmp_path / "run.json")
    assert outside_agent.main([]) == 1  # nothing is kept yet
    workdir = make_report(tmp_path)
    steps = [
        {"step": step, "success": 0.25, "seconds_collect": 2.0, "seconds_update": 0.5}
        for step in range(1, 61)
    ]
    lines = [json.dumps(one) for one in [{"stage": "ipa", "step": 0, "success": 0.2}, *steps]]
    (workdir / "metrics.jsonl").write_text("\n".join(lines))
    assert outside_agent.main([str(workdir), "--machine", "a machine"]) == 0
    kept = json.loads(outside_agent.RUN.read_text())
    assert len(kept["training"]) == 60
    assert kept["training"][0] == {"step": 1, "success": 0.25, "seconds": 2.5}
    assert (tmp_path / "images/outside_agent.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_results_shows_the_recorded_runs():
    page = learning_curve.PAGE.read_text()
    recorded = learning_curve.section(learning_curve.load_runs(collect.RUNS))
    assert page == learning_curve.insert(page, recorded), (
        "run python -m docs.figures.learning_curve"
    )


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="no <!-- runs"):
        learning_curve.insert("# Results", "a table")


def test_without_runs_only_the_older_curve_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style, "IMAGES", tmp_path / "images")
    assert learning_curve.main(["--runs", str(tmp_path)]) == 1
    assert "docs.figures.collect" in capsys.readouterr().out
    assert [path.name for path in style.IMAGES.iterdir()] == ["older_learning_curve.png"]


@pytest.mark.slow
def test_the_scripts_draw_every_picture_that_the_pages_show(tmp_path, monkeypatch):
    from docs.figures import __main__ as all_figures

    pytest.importorskip("pyte", reason="pip install -r tests/requirements-live.txt")
    shown = {path.name for path in style.IMAGES.iterdir()}
    monkeypatch.setattr(style, "IMAGES", tmp_path)
    monkeypatch.setattr(configuration, "PAGE", tmp_path / "configuration.md")
    results = tmp_path / "results.md"
    results.write_text(learning_curve.PAGE.read_text())
    monkeypatch.setattr(learning_curve, "PAGE", results)
    all_figures.main()
    assert {path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".svg")} == shown
