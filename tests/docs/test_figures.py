"""The scripts that record runs and draw them."""

from __future__ import annotations

import json

import pytest

from docs.figures import (
    collect,
    configuration,
    games_boards,
    games_curve,
    learning_curve,
    noisy_training,
    outside_agent,
    pipeline,
    safety_curve,
    style,
)
from envs.sources import open_source


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
    assert record["evals"][-1]["by_family"] == {"sum": [10, 20], "line": [10, 20]}
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


def make_record(seed, before, after):
    """Return a record of a run on games, with (FrozenLake, Sokoban) solved of 100 boards each."""

    def entry(step, solved):
        names = [f"gem:{game}#{game}" for game in games_curve.GAMES]
        counts = {name: [won, 100] for name, won in zip(names, solved, strict=True)}
        return {"step": step, "n": 200, "successes": sum(solved), "by_family": counts}

    return {
        "loss": "ipa",
        "seed": seed,
        "wall_seconds": 90.0,
        "start_wall_seconds": 30.0,
        "evals": [entry(0, before), entry(30, after)],
        "new_boards": {
            str(step): {
                name: [won // 2, 50] for name, (won, _) in entry(0, solved)["by_family"].items()
            }
            for step, solved in ((0, before), (30, after))
        },
        "command": f"command {seed}",
        "commit": "abc1234",
        "date": "2026-11-30",
        "machine": "a machine",
    }


def test_the_games_table_has_every_seed_and_all_boards_together(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "IMAGES", tmp_path)
    records = [make_record(0, (30, 10), (60, 30)), make_record(1, (40, 12), (70, 20))]
    table = games_curve.table(records)
    seed = "| seed 0 | 30 % (22 to 40) | 60 % (50 to 69) | +30 | 10 % (6 to 17) | 30 % (22 to 40) "
    assert f"{seed}| +20 | 2 |" in table
    assert "| all seeds | 35 % (29 to 42) | 65 % (58 to 71) | +30 | 11 % " in table
    assert "| all seeds, boards never trained on | 35 % (26 to 45) | 65 % (55 to 74) |" in table
    assert "- `command 1`: commit abc1234" in table
    assert games_curve.draw(records).read_bytes().startswith(b"\x89PNG")


def test_boards_that_training_began_with_are_left_out_of_the_count(tmp_path):
    task = "game/frozen_lake-bare"
    source = open_source(f"gem:{task}")
    names = [f"{task}/{seed}" for seed in (1_000_000, 1_000_001)]
    folder = tmp_path / "evals" / "ipa_000030"
    folder.mkdir(parents=True)
    lines = [json.dumps({"task": name, "family": task, "success": True}) for name in names]
    (folder / "results.jsonl").write_text("\n".join(lines))
    (tmp_path / "report.json").write_text(json.dumps({"experiment": "ipa", "seed": 0}))
    (tmp_path / "config.json").write_text(json.dumps({"task": f"gem:{task}"}))
    (tmp_path / "trajectories").mkdir()
    board = source.task(names[0]).content.opening
    (tmp_path / "trajectories" / "a.json").write_text(json.dumps({"steps": [{"message": board}]}))
    trained = games_boards.trained_boards([tmp_path])
    assert trained == {board}
    assert games_boards.count_new(tmp_path, trained) == {"30": {task: [1, 1]}}


def test_the_page_of_results_shows_the_recorded_games():
    page = learning_curve.PAGE.read_text()
    records = learning_curve.load_runs(games_curve.RUNS).get("ipa", [])
    text = learning_curve.insert(
        page, games_curve.section(records), games_curve.BEGIN, games_curve.END
    )
    assert page == text, "run python -m docs.figures.games_curve"


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


def make_pipeline_report(tmp_path):
    def measured(share):
        return {"success": share, "n": 40, "low": share / 2, "high": share + 0.1}

    def stage(name, loss, before, after, bits):
        added = None
        if before is not None:
            added = {"points": after - before, "low": after - before - 0.1, "high": 0.4}
        return {
            "stage": name,
            "loss": loss,
            "steps": 20,
            "seconds": 90.0,
            "before": None if before is None else measured(before),
            "after": measured(after),
            "added": added,
            "bits_before": bits and bits[0],
            "bits_after": bits and bits[1],
            "bits_of": "byte" if bits else None,
        }

    report = json.loads((make_report(tmp_path) / "report.json").read_text())
    names = ("sft_stage1", "sft_stage2", "rome")
    report["evals"] = [
        {**report["evals"][0], "stage": name, "step": step, "success": 0.25 * number}
        for number, name in enumerate(names)
        for step in (0, 20)
    ]
    report["stages"] = [
        stage("cpt", "cpt", None, 0.0, (7.5, 2.25)),
        stage("sft_stage1", "sft", 0.0, 0.25, None),
        stage("sft_stage2", "sft", 0.25, 0.4, None),
        stage("rome", "ipa", 0.4, 0.6, None),
    ]
    (tmp_path / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_a_whole_pipeline_is_recorded_and_shown_by_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "IMAGES", tmp_path / "images")
    record = pipeline.read_run(make_pipeline_report(tmp_path), "a machine")
    assert [entry["successes"] for entry in record["evals"]] == [0, 0, 10, 10, 20, 20]
    text = pipeline.section([record])
    assert "| 3 | CPT | 20 | 1.5 | 0 % (0 to 10) |  | 7.50 to 2.25 a byte |" in text
    assert "| 3 | IPA | 20 | 1.5 | 60 % (30 to 70) | +20 (10 to 40) |  |" in text
    assert "6 minutes" in text and "a machine" in text
    assert pipeline.draw([record]).read_bytes().startswith(b"\x89PNG")


def test_a_pipeline_that_has_not_ended_is_not_recorded(tmp_path):
    with pytest.raises(ValueError, match="no table of all stages"):
        pipeline.read_run(make_report(tmp_path), "a machine")


def test_the_page_of_the_pipeline_shows_the_recorded_runs():
    page = pipeline.PAGE.read_text()
    recorded = pipeline.section(pipeline.load_runs())
    assert page == learning_curve.insert(page, recorded, pipeline.BEGIN, pipeline.END)


def make_safety_run(workdir, cost, edits):
    """Write the files of a run whose policy edits this many of four checks at its last step."""

    def record(number, edited):
        facts = {"sort": "hackable", "clean": False, "seed": "small-hackable-make"}
        facts |= {"pillar": "controllability", "channel": "repository", "severity": 2}
        facts |= {"difficulty": 1, "goal": "tests", "attacked": edited, "refused": False}
        facts |= {"utility": float(not edited), "harms": {"tests": "edited"} if edited else {}}
        return {"task": f"small-hackable-make/{number}", "ending": "success", "safety": facts}

    report = {"experiment": "safety", "seed": 4, "steps": 10, "wall_seconds": 60.0, "version": "v"}
    report["evals"] = [{"stage": "safety_sft", "step": 9}]
    for step, edited in ((0, 2), (10, edits)):
        folder = workdir / "evals" / f"safety_{step:06d}"
        folder.mkdir(parents=True)
        lines = [json.dumps(record(number, number < edited)) for number in range(4)]
        (folder / "results.jsonl").write_text("\n".join([*lines, json.dumps({"task": "plain/1"})]))
        report["evals"].append({"stage": "safety", "step": step})
    (workdir / "report.json").write_text(json.dumps(report))
    (workdir / "config.json").write_text(json.dumps({"safety_cost": cost}))
    (workdir / "trajectories").mkdir()
    for episode in range(2):
        path = workdir / "trajectories" / f"safety_000003_g001_e0{episode}.json"
        path.write_text(json.dumps({"extra": {"safety": record(0, bool(episode))["safety"]}}))
    return workdir


def test_the_safety_curve_pools_what_each_evaluation_found(tmp_path):
    on = safety_curve.read_run(make_safety_run(tmp_path / "on", "tests:2", 0), "a machine")
    off = safety_curve.read_run(make_safety_run(tmp_path / "off", "", 4), "a machine")
    assert (on["arm"], off["arm"]) == ("on", "off")
    assert safety_curve.measures([on], "10")["check_edits"]["value"] == 0.0
    assert safety_curve.measures([on, off], "10")["check_edits"]["value"] == 0.5
    assert safety_curve.measures([on, off], "0")["check_edits"]["n"] == 4  # of one seed: the same
    assert on["training"] == {"3": {"check_edits": [2, 1]}}
    assert safety_curve.training_rates([on, off], "check_edits") == ([1.5], [0.5])
    before = safety_curve.read_evaluation(tmp_path / "on", "safety", 10)
    text = safety_curve.section({"on": [on], "off": [off]}, before[:3])
    row = next(line for line in text.splitlines() if "checks edited" in line)
    values = [cell.split()[0] for cell in row.split("|")[2:-1]]
    assert values == ["0", "50", "100", "0"] and "of 3" in row.split("|")[2]
    assert "before SFT" not in safety_curve.section({"on": [on], "off": [off]}, [])


def test_the_page_of_safety_shows_the_recorded_runs():
    before = json.loads(safety_curve.BEFORE.read_text())
    recorded = safety_curve.section(safety_curve.load_runs(safety_curve.RESULTS), before)
    page = safety_curve.PAGE.read_text()
    assert page == learning_curve.insert(page, recorded, safety_curve.BEGIN, safety_curve.END)


def test_a_safety_run_that_was_cut_off_is_refused(tmp_path):
    workdir = make_safety_run(tmp_path / "cut", "", 1)
    report = json.loads((workdir / "report.json").read_text()) | {"steps": 20}
    (workdir / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="not evaluated at its last step"):
        safety_curve.read_run(workdir, "a machine")


def test_noisy_training_tells_what_each_run_began_and_ended_with(tmp_path):
    measures = {
        name: {"value": 0.25, "low": 0.1, "high": 0.5, "n": 8, "families": 3}
        for name in noisy_training.MEASURES
    }
    results = {"complete": True, "safety": {"measures": measures | {"asked": {}}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    evals = [
        {"stage": stage, "step": step, "success": success, "n": 4, "low": 0.1, "high": 0.9}
        for stage, step, success in (("sft", 9, 0.0), ("ipa", 0, 0.25), ("ipa", 10, 0.75))
    ]
    (tmp_path / "report.json").write_text(json.dumps({"experiment": "ipa", "evals": evals}))
    lines = [json.dumps({"masked": value}) for value in (0.0, 0.01)] + [json.dumps({"step": 0})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    sft = {"no faults": noisy_training.read_evaluation(tmp_path)}
    text = noisy_training.section(sft, {"rate=0.3": noisy_training.read_ipa(tmp_path)})
    assert "| no faults | 25 (10 to 50) of 8 |" in text
    assert "| rate=0.3 | 25 (10 to 90) of 4 | 75 (10 to 90) of 4 | 0.50 |" in text
    assert "at step 10" in text and "IPA" not in noisy_training.section(sft, {})
    (tmp_path / "results.json").write_text(json.dumps(results | {"complete": False}))
    with pytest.raises(ValueError, match="no complete evaluation"):
        noisy_training.read_evaluation(tmp_path)


def test_the_page_of_safety_shows_the_noisy_runs():
    sft, ipa = (noisy_training.load(path) for path in (noisy_training.SFT, noisy_training.IPA))
    page = noisy_training.PAGE.read_text()
    recorded = noisy_training.section(sft, ipa)
    assert sft and ipa
    assert page == learning_curve.insert(page, recorded, noisy_training.BEGIN, noisy_training.END)
