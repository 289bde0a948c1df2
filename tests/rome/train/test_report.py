"""Intervals against published values, the report both ways, the table and the curves."""

import io
import json
import math

import pytest
from rich.console import Console

from rome.train.intervals import wilson
from rome.train.metrics import MetricsWriter
from rome.train.plots import plot_curves
from rome.train.report import (
    EvalResult,
    before_and_after,
    print_table,
    read_outcomes,
    read_report,
    write_outcomes,
    write_report,
)


def outcomes(successes, unseen=(), n=10):
    """`successes`: family -> solved of n."""
    return [
        {
            "task": f"{family}/{seed}",
            "family": family,
            "success": int(seed < solved),
            "unseen_family": family in unseen,
        }
        for family, solved in successes.items()
        for seed in range(n)
    ]


def example_run(workdir, steps=12):
    evals = []
    with MetricsWriter(workdir / "init", "sft", -1, tensorboard=False) as metrics:
        for step in range(1, 30):
            metrics.write(step, {"loss": 2.0 / step})
    with MetricsWriter(workdir, "ipa", -1, tensorboard=False) as metrics:
        for step in range(1, steps + 1):
            metrics.write(
                step,
                {
                    "reward": step / 20,
                    "success": step / 20,
                    "turns": 3.0,
                    "tokens": 200.0 + step,
                    "staleness": 0.5,
                    "mismatch": 1e-5,
                    "loss": -0.1,
                },
            )
    for step, solved in ((0, 3), (steps // 2, 5), (steps, 8)):
        tasks = outcomes({"find": solved, "count": solved - 1, "archive": 2}, unseen=("archive",))
        write_outcomes(workdir, "ipa", step, {"tasks": tasks})
        evals.append(EvalResult.from_tasks("ipa", step, tasks))
    write_report(
        workdir,
        {
            "experiment": "ipa",
            "seed": 0,
            "steps": steps,
            "wall_seconds": 60.0,
            "isolation": "bubblewrap",
            "evals": evals,
        },
    )


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],  # Newcombe 1998, table I, method 3
)
def test_the_interval_is_wilsons(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_holds_the_rates_whose_score_test_does_not_reject():
    low, high = wilson(7, 25)
    for bound in (low, high):  # by definition of the interval
        assert abs(7 / 25 - bound) / math.sqrt(bound * (1 - bound) / 25) == pytest.approx(
            1.959964, rel=1e-5
        )


def test_the_interval_is_mirrored_and_stays_within_0_and_1():
    for n in (1, 7, 50, 1000):
        for successes in range(0, n + 1, max(1, n // 7)):
            low, high = wilson(successes, n)
            assert 0.0 <= low <= successes / n <= high <= 1.0
            assert (1 - high, 1 - low) == pytest.approx(wilson(n - successes, n), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 successes of 4"):
        wilson(5, 4)


def test_success_counts_trained_families_only_and_unseen_ones_apart():
    result = EvalResult.from_tasks(
        "ipa", 4, outcomes({"find": 6, "count": 2, "archive": 9}, unseen=("archive",))
    )
    assert (result.success, result.n) == (0.4, 20) and (result.low, result.high) == wilson(8, 20)
    assert result.by_family == {"count": (0.2, 10), "find": (0.6, 10)}
    assert result.unseen_families == 0.9 and result.unseen_by_family == {"archive": (0.9, 10)}


def test_where_all_families_are_unseen_success_is_theirs():
    result = EvalResult.from_tasks("ipa", 4, outcomes({"leak": 3}, unseen=("leak",)))
    assert (result.success, result.n) == (0.3, 10) and (result.low, result.high) == wilson(3, 10)
    assert result.unseen_families == 0.3 and result.by_family == {}
    assert result.summary().startswith("30 % (11 to 60) of 10 tasks")


def test_a_task_counted_twice_is_refused():
    tasks = outcomes({"find": 6})
    with pytest.raises(ValueError, match="'find/3' is counted twice"):
        EvalResult.from_tasks("ipa", 0, [*tasks, tasks[3]])


def test_the_report_comes_back_as_it_was_written(tmp_path):
    example_run(tmp_path)
    on_disk = json.loads((tmp_path / "report.json").read_text())
    entry = on_disk["evals"][0]
    assert {
        "stage",
        "step",
        "success",
        "n",
        "low",
        "high",
        "by_family",
        "unseen_families",
    } <= entry.keys()
    assert entry["by_family"] == {"count": [0.2, 10], "find": [0.3, 10]}
    report = read_report(tmp_path)
    assert [result.to_json() for result in report["evals"]] == on_disk["evals"]
    assert read_outcomes(tmp_path, "ipa", 12)["tasks"][0]["task"] == "find/0"


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_report(tmp_path, {"seed": 1, "evals": []})
    with pytest.raises(ValueError):
        write_report(tmp_path, {"seed": 2, "wall_seconds": float("nan"), "evals": []})
    assert read_report(tmp_path)["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_before_and_after_are_of_the_stage_trained_last():
    def result(stage, step):
        return EvalResult.from_tasks(stage, step, outcomes({"find": 1}))

    first, last = before_and_after(
        [
            result("sft", 0),
            result("sft", 300),
            result("ipa", 0),
            result("ipa", 10),
            result("ipa", 20),
        ]
    )
    assert (first.stage, first.step, last.stage, last.step) == ("ipa", 0, "ipa", 20)
    with pytest.raises(ValueError, match="no evaluation yet"):
        before_and_after([])


def test_the_table_gives_every_family_its_interval_and_keeps_unseen_ones_apart(tmp_path):
    example_run(tmp_path)
    text = io.StringIO()
    print_table(*before_and_after(read_report(tmp_path)["evals"]), Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)

    def row(name):
        (line,) = [line for line in lines if line.startswith(f"│ {name} ")]
        return [cell.strip() for cell in line.strip("│").split("│")]

    low, high = wilson(3, 10)
    assert row("find") == [
        "find",
        "10",
        f"30 ({100 * low:.0f} to  {100 * high:.0f})",
        "80 (49 to  94)",
        "+50",
    ]
    assert row("all trained families")[1:] == ["20", "25 (11 to  47)", "75 (53 to  89)", "+50"]
    assert row("all unseen families")[-1] == "+0"
    assert [line[2:9] for line in lines].index("archive") > [line[2:13] for line in lines].index(
        "all trained"
    )


@pytest.mark.long
def test_the_curves_are_drawn_as_png_files(tmp_path):
    example_run(tmp_path)
    paths = plot_curves(tmp_path)
    assert [path.name for path in paths] == [
        "ipa_reward.png",
        "families.png",
        "sft_loss.png",
        "ipa_episodes.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("evals", [0, 1])
def test_a_run_that_has_only_begun_can_be_drawn(tmp_path, evals):
    with MetricsWriter(tmp_path, "ipa", -1, tensorboard=False) as metrics:
        metrics.write(1, {"reward": -1.0, "mismatch": 0.0})
    write_report(
        tmp_path,
        {"seed": 0, "evals": [EvalResult.from_tasks("ipa", 0, outcomes({"find": 0}))] * evals},
    )
    assert {path.name for path in plot_curves(tmp_path)} == {
        "ipa_reward.png",
        "ipa_episodes.png",
    } | ({"families.png"} if evals else set())
