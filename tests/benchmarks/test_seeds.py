"""McNemar and Holm against brute force, and the comparison of runs whose outcome is known."""

import itertools
import json
import random

import pytest

from benchmarks.seeds import compare, holm, main, mcnemar
from rome.train.report import EvalResult, write_outcomes, write_report


def make_run(directory, seed, families, unseen=()):
    """families: name -> (both, gained, lost, neither) counts of tasks."""
    before, after = [], []
    for family, counts in families.items():
        pattern = [
            pair
            for pair, count in zip(((1, 1), (0, 1), (1, 0), (0, 0)), counts, strict=True)
            for _ in range(count)
        ]
        for number, (first, last) in enumerate(pattern):
            task = {
                "task": f"{family}/{number}",
                "family": family,
                "unseen_family": family in unseen,
            }
            before.append({**task, "success": first})
            after.append({**task, "success": last})
    random.Random(seed).shuffle(after)  # pairs go by name, not by place
    for step, tasks in ((0, before), (40, after)):
        write_outcomes(directory, "ipa", step, {"tasks": tasks})
    evals = [EvalResult.from_tasks("ipa", 0, before), EvalResult.from_tasks("ipa", 40, after)]
    write_report(directory, {"experiment": "ipa", "seed": seed, "evals": evals})
    return directory


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (5, 0), (3, 3), (7, 2), (2, 9)])
def test_mcnemar_is_the_share_of_coin_flips_at_least_as_lopsided(better, worse):
    flips = list(itertools.product((0, 1), repeat=better + worse))
    extreme = sum(abs(2 * sum(flip) - len(flip)) >= abs(better - worse) for flip in flips)
    assert mcnemar(better, worse) == pytest.approx(extreme / len(flips))


def test_holm_is_the_worked_example_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_holm_rejects_just_what_the_stepwise_definition_rejects():
    generator = random.Random(1)
    for _ in range(200):
        p_values = [generator.random() ** 3 for _ in range(generator.randint(1, 8))]
        level, rejected = 0.05, set()
        for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
            if p_values[place] * (len(p_values) - rank) >= level:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(holm(p_values)) if p < level} == rejected


def test_gains_are_in_points_for_each_seed_over_trained_families(tmp_path):
    runs = [
        make_run(
            tmp_path / "a", 0, {"find": (4, 5, 1, 0), "archive": (0, 0, 10, 0)}, unseen=("archive",)
        ),
        make_run(
            tmp_path / "b", 1, {"find": (2, 3, 0, 5), "archive": (0, 0, 0, 10)}, unseen=("archive",)
        ),
    ]
    result = compare(runs)
    assert [
        (seed["seed"], seed["before"], seed["after"], seed["gain"]) for seed in result["seeds"]
    ] == [(0, 50, 90, 40), (1, 20, 50, 30)]
    assert result["smallest_gain"] == 30
    find, archive = result["families"]
    assert (find["pairs"], find["better"], find["worse"], find["unseen_family"]) == (
        20,
        8,
        1,
        False,
    )
    assert find["p"] == mcnemar(8, 1) and find["p_holm"] == max(2 * archive["p"], find["p"])


def test_a_family_is_worse_only_when_the_correction_still_says_so(tmp_path):
    steady = {f"steady{number}": (40, 10, 0, 0) for number in range(11)}
    # 9 lost, 1 gained: p = 0.021 alone, 0.021 x 1 after eleven clear gains before it; the same loss
    # among unclear families is not significant
    alone = compare([make_run(tmp_path / "a", 0, {**steady, "rename": (30, 1, 9, 10)})])
    assert alone["significantly_worse"] == ["rename"] and alone["too_few_pairs"] == []
    unclear = {f"unclear{number}": (40, 1, 1, 8) for number in range(11)}
    among = compare([make_run(tmp_path / "b", 0, {**unclear, "rename": (30, 1, 9, 10)})])
    assert among["significantly_worse"] == []


def test_a_gain_is_never_called_a_loss(tmp_path):
    assert (
        compare([make_run(tmp_path / "a", 0, {"find": (0, 60, 0, 0)})])["significantly_worse"] == []
    )


def test_the_command_prints_and_leaves_its_json(tmp_path, capsys):
    make_run(tmp_path / "a", 0, {"find": (20, 1, 30, 0)})
    main([str(tmp_path / "a"), "--json", str(tmp_path / "seeds.json")])
    assert "Significantly worse: find." in capsys.readouterr().out
    assert json.loads((tmp_path / "seeds.json").read_text())["significantly_worse"] == ["find"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("report", "report.json is not there"),
        ("evals", "ipa_000040.json is not there"),
        ("tasks", "only one of its two"),
    ],
)
def test_a_run_that_cannot_be_compared_gets_one_line(tmp_path, capsys, spoil, message):
    run = make_run(tmp_path / "a", 0, {"find": (5, 1, 1, 1)})
    if spoil == "report":
        (run / "report.json").unlink()
    elif spoil == "evals":
        (run / "evals" / "ipa_000040.json").unlink()
    else:
        write_outcomes(run, "ipa", 40, {"tasks": []})
    with pytest.raises(SystemExit) as exit_:
        main([str(run)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1


def test_the_same_seed_twice_is_refused(tmp_path):
    runs = [make_run(tmp_path / name, 0, {"find": (5, 1, 1, 1)}) for name in "ab"]
    with pytest.raises(ValueError, match="seeds \\[0, 0\\]"):
        compare(runs)
