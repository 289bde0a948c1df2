"""pass@k against counting, intervals against their definitions; what the infrastructure spoiled is
in no figure.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.evals.statistics import (
    clustered_error,
    clustered_interval,
    grouped,
    interval,
    is_counted,
    pass_at_k,
    summarise,
)
from rome.train.intervals import wilson


def record(task, attempt, reward, ending=None, **more):
    return {
        "task": task,
        "attempt": attempt,
        "reward": reward,
        "ending": ending or ("success" if reward == 1.0 else "failure"),
        **more,
    }


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_subsets_with_a_success(case):
    n, successes, k = case
    outcomes = [1] * successes + [0] * (n - successes)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(n, successes, k) == pytest.approx(
        sum(map(any, subsets)) / len(subsets), abs=1e-12
    )


@pytest.mark.parametrize("n, successes, k", [(2, 1, 3), (2, 3, 1), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_that_is_not_defined_is_refused(n, successes, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, successes, k)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdefghijkl"),
        st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=3, max_size=3),
        min_size=1,
    )
)
def test_the_figures_are_means_over_tasks_of_what_counts(rewards):
    records = [
        record(task, attempt, reward, "infra_sandbox" if reward is None else None)
        for task, values in rewards.items()
        for attempt, reward in enumerate(values)
    ]
    found = summarise(records, 3)
    left = {
        task: [reward for reward in values if reward is not None]
        for task, values in rewards.items()
    }
    tried, whole = (
        [values for values in left.values() if values],
        [values for values in left.values() if len(values) == 3],
    )
    expected = {
        "mean_reward": np.mean([np.mean(values) for values in tried]) if tried else None,
        "avg_at_k": np.mean(whole) if whole else None,
        "pass_at_1": (
            np.mean([np.mean(np.asarray(values) == 1.0) for values in tried]) if tried else None
        ),
        "pass_at_k": np.mean([1.0 in values for values in whole]) if whole else None,
    }
    for name, value in expected.items():
        assert found[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name
        if value is not None:
            bounds = found["intervals"][name]
            assert (
                -1e-12 <= bounds["low"] <= value + 1e-12
                and value - 1e-12 <= bounds["high"] <= 1 + 1e-12
            )
    assert found["attempts"] - found["attempts_counted"] == sum(
        values.count(None) for values in rewards.values()
    )


def test_a_reward_short_of_1_is_no_success():
    assert summarise([record("a", 0, 0.999)], 1)["pass_at_1"] == 0.0


@pytest.mark.parametrize(
    "ending, counts",
    [
        ("success", True),
        ("timeout", True),
        ("malformed", True),
        ("infra_engine", False),
        ("infra_verifier", False),
        ("cancelled", False),
    ],
)
def test_which_endings_count(ending, counts):
    assert is_counted(record("a", 0, 0.0, ending)) is counts


def test_one_value_a_task_of_0_or_1_has_wilsons_interval():
    found = interval([1.0] * 30 + [0.0] * 10)
    assert (found["low"], found["high"]) == wilson(30, 40) and found[
        "method"
    ] == "wilson over tasks"


def test_more_attempts_at_the_same_tasks_do_not_pretend_to_be_more_tasks():
    """20 tasks, each always solved or never: with 1 or with 50 attempts the interval is that of 20
    outcomes, not of 1,000.
    """
    once = [record(f"t{task}", 0, float(task % 2)) for task in range(20)]
    often = [
        record(f"t{task}", attempt, float(task % 2)) for task in range(20) for attempt in range(50)
    ]
    assert (
        summarise(once, 1)["intervals"]["pass_at_1"]
        == summarise(often, 50)["intervals"]["pass_at_1"]
    )


def test_the_bootstrap_is_as_wide_as_the_normal_theory_of_the_tasks_means():
    values = np.random.default_rng(1).choice([0.0, 0.25, 0.5, 0.75, 1.0], size=400)
    found = interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert found["method"] == "bootstrap over tasks"
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.15 * half) and found[
        "high"
    ] == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_equal_values_are_not_taken_for_certainty():
    assert interval([0.5] * 40)["high"] - interval([0.5] * 40)["low"] > 0.2
    assert interval([1.0] * 40)["low"] < 0.95


def test_groups_keep_their_spoiled_attempts_apart():
    found = grouped(
        [
            record("a", 0, 1.0, domain="x"),
            record("b", 0, None, "infra_engine", domain="x"),
            record("c", 0, None, "infra_engine", domain="y"),
        ],
        "domain",
    )
    assert (
        found["x"]["pass_at_1"] == 1.0
        and found["x"]["attempts"] == 2
        and found["x"]["attempts_counted"] == 1
    )
    assert found["y"]["pass_at_1"] is None and found["y"]["interval"] is None


# -- Families
# -------------------------------------------------------------------------------------------------

# success of the tasks of four families, unequally many
FAMILIES = {"a": [1, 1, 1, 0], "b": [0, 0], "c": [1, 0, 0], "d": [1]}


def flattened(families):
    values = [float(value) for family in families.values() for value in family]
    return values, [name for name, family in families.items() for _ in family]


def test_rewards_outside_0_to_1_have_intervals_of_their_own():
    """Wilson's are of shares: they ended the report, or did not hold the mean that they are of."""

    def bounds_of(rewards, families=()):
        records = [record(str(n), 0, reward) for n, reward in enumerate(rewards)]
        for one, family in zip(records, families, strict=False):
            one["cluster"] = family
        return summarise(records, 1)["intervals"]["mean_reward"]

    rewards = [-1.0, 0.5, 2.0, -0.5]
    scipy_stats = pytest.importorskip("scipy.stats")
    low, high = scipy_stats.t.interval(0.95, 3, np.mean(rewards), scipy_stats.sem(rewards))
    found = bounds_of(rewards)
    assert (found["low"], found["high"]) == pytest.approx((low, high)) and found["method"][0] == "t"
    clustered = bounds_of([3.0, 3.0, -2.0, -2.0], "aabb")  # two families: as two values
    low, high = scipy_stats.t.interval(0.95, 1, 0.5, scipy_stats.sem([3.0, -2.0]))
    assert (clustered["low"], clustered["high"]) == pytest.approx((low, high))
    assert bounds_of([-1.0]) is None and bounds_of([3.0] * 12) is None
    assert bounds_of([-1.0, 0.5] * 6)["method"] == "bootstrap over tasks"
    assert bounds_of([0.0, 1.0])["method"] == "wilson over tasks"


def test_the_clustered_error_is_the_sandwich_of_a_regression_on_a_constant():
    values, clusters = flattened(FAMILIES)
    ones = np.ones((len(values), 1))
    bread = np.linalg.inv(ones.T @ ones)
    residuals = np.asarray(values) - np.mean(values)
    meat = np.zeros((1, 1))
    for name in FAMILIES:
        chosen = np.asarray(clusters) == name
        score = ones[chosen].T @ residuals[chosen]
        meat += np.outer(score, score)
    variance = (4 / 3) * bread @ meat @ bread
    assert clustered_error(values, clusters) == pytest.approx(np.sqrt(variance[0, 0]), rel=1e-12)


def test_the_clustered_interval_in_numbers():
    """By hand: the mean is 0.5, the clusters' sums of deviations are 1, -1, -0.5 and 0.5."""
    values, clusters = flattened(FAMILIES)
    error = np.sqrt(4 / 3 * 2.5) / 10
    effective = 0.25 / error**2 * (1.959964 / 3.182446) ** 2  # t of 3 degrees of freedom
    found = clustered_interval(values, clusters)
    expected = wilson(0.5 * effective, effective)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1e-6)
    assert found["method"] == "wilson over 4 families of tasks"


def test_repeating_every_task_of_each_family_tells_no_more_of_families():
    values, clusters = flattened({name: [sum(map(ord, name)) % 2] for name in "abcdefgh"})
    often = clustered_interval(values * 20, clusters * 20)
    once = clustered_interval(values, clusters)
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]))
    assert interval(values * 20)["high"] - interval(values * 20)["low"] < 0.5 * (
        often["high"] - often["low"]
    )


def test_clustered_intervals_hold_the_truth_as_often_as_they_say_and_others_do_not():
    """16 families of 25 seeds: families differ in how hard they are, on average by half."""
    generator = np.random.default_rng(0)
    clusters = [f"f{family}" for family in range(16) for _ in range(25)]
    held = {"clustered": 0, "tasks": 0}
    for _ in range(300):
        rates = generator.beta(1.0, 1.0, size=16)  # of mean 0.5
        values = (generator.random((16, 25)) < rates[:, None]).astype(float).ravel().tolist()
        for name, found in (
            ("clustered", interval(values, clusters)),
            ("tasks", interval(values)),
        ):
            held[name] += found["low"] <= 0.5 <= found["high"]
    assert 0.92 <= held["clustered"] / 300 <= 0.985
    assert held["tasks"] / 300 < 0.65


def test_tasks_of_one_family_or_each_of_its_own_are_not_clustered():
    values = [1.0, 0.0, 1.0]
    assert interval(values, ["a", "b", "c"]) == interval(values) == interval(values, ["a"] * 3)


def test_equal_families_are_not_taken_for_certainty():
    values, clusters = flattened({"a": [1] * 50, "b": [1] * 50, "c": [1] * 50})
    found = clustered_interval(values, clusters)
    assert (found["low"], found["high"]) == wilson(3, 3)


def test_the_summary_is_clustered_by_what_the_records_say():
    records = [
        record(f"{name}/{seed}", 0, float(value), cluster=name)
        for name, family in FAMILIES.items()
        for seed, value in enumerate(family)
    ]
    values, clusters = flattened(FAMILIES)
    summary = summarise(records, 1)
    assert summary["intervals"]["pass_at_1"] == clustered_interval(values, clusters)
    assert summary["pass_at_1"] == 0.5
