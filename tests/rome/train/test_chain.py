"""The table of stages: what each added, from evaluations alone."""

import io

import pytest
from rich.console import Console

from rome.train.chain import join_stages, stage_entry, table_of_stages
from rome.train.intervals import difference
from rome.train.report import EvalResult, TextEval, TrajectoryEval


def policy_eval(stage, step, successes, n=100, bits=None):
    tasks = [
        {
            "task": f"find/{number}",
            "family": "find",
            "success": int(number < successes),
            "unseen_family": False,
        }
        for number in range(n)
    ]
    return EvalResult.from_tasks(stage, step, tasks, bits)


def chain():
    table = []
    stages = (
        ("cpt", "cpt", [TextEval("cpt", 0, 8.0, 999), TextEval("cpt", 20, 3.0, 999)]),
        ("one", "sft", [policy_eval("one", 0, 2), policy_eval("one", 30, 30)]),
        ("two", "sft", [policy_eval("two", 0, 30), policy_eval("two", 10, 28)]),
        ("rome", "ipa", [policy_eval("rome", 0, 28), policy_eval("rome", 4, 60)]),
    )
    for stage, loss, evals in stages:
        table = join_stages(table, stage_entry(stage, loss, evals[-1].step, 60.0, evals))
    return table


def test_each_stage_says_what_it_added_and_cpt_is_measured_by_the_stage_after_it():
    table = chain()
    assert [entry["stage"] for entry in table] == ["cpt", "one", "two", "rome"]
    assert table[0]["before"] is None and table[0]["after"]["success"] == 0.02
    assert (table[0]["bits_before"], table[0]["bits_after"], table[0]["bits_of"]) == (8, 3, "byte")
    assert [entry["added"] and round(entry["added"]["points"], 2) for entry in table] == [
        None,
        0.28,
        -0.02,
        0.32,
    ]
    gains = [entry["added"]["low"] > 0 for entry in table[1:]]
    assert gains == [True, False, True]  # two of a hundred is nothing
    assert [entry["steps"] for entry in table] == [20, 30, 10, 4]


def test_the_table_prints_every_stage_and_no_figure_that_was_not_measured():
    console = Console(width=80, record=True, highlight=False, file=io.StringIO())
    console.print(table_of_stages(chain()))
    text = console.export_text()
    assert all(
        name in text for name in ("cpt", "one", "two", "rome", "8.00 → 3.00", "+32 (18 to 44)")
    )
    assert "None" not in text and "nan" not in text


def test_a_stage_in_its_first_minute_has_an_entry():
    entry = stage_entry("one", "sft", 0, 0.0, [])
    assert entry["after"] is None and entry["added"] is None
    assert join_stages([], entry) == [entry]
    scored = stage_entry("own", "sft", 5, 1.0, [TrajectoryEval("own", 0, 2.0, 10)])
    assert scored["bits_of"] == "token" and scored["bits_after"] == 2.0


@pytest.mark.parametrize(
    "before, after", [((0, 0), (5, 10)), ((0, 10), (10, 10)), ((3, 9), (3, 9))]
)
def test_an_interval_of_a_difference_holds_the_difference(before, after):
    low, high = difference(before, after)
    change = after[0] / after[1] - (before[0] / before[1] if before[1] else 0.5)
    assert -1 <= low <= change <= high <= 1
    reverse = difference(after, before)
    assert reverse == pytest.approx((-high, -low))


def test_newcombes_interval_is_his_published_one():
    # Newcombe 1998, method 10, his example (a): 56/70 against 48/80
    low, high = difference((48, 80), (56, 70))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)
