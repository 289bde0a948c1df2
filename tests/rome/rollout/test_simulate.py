"""The simulator against values worked out by hand and laws that hold for every queue."""

import dataclasses
import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import simulate as command
from rome.rollout.simulator.distributions import Constant, Lognormal, Recorded
from rome.rollout.simulator.pod import PodModel, agentic_pod, step_seconds_bound
from rome.rollout.simulator.simulate import simulate, speedup, with_train_share

quickly = settings(max_examples=20, deadline=None, derandomize=True)
STEADY = PodModel(
    token_s=0.1,
    token_s_a_request=0.0,
    concurrency=8,
    latency=Constant(2.0),
    turns=Constant(3),
    tokens=Constant(10),
    group_size=4,
    groups_per_step=2,
    async_ratio=0,
    train_s=5.0,
)
# No engine in the way: an episode takes as long as its environment does.
FREE = dataclasses.replace(STEADY, token_s=0.0, latency=Lognormal(1.0, 1.0))


class InTurn:
    """Hands out its values one episode after the other: the n-th episode to begin gets the n-th."""

    def __init__(self, *values):
        self.values, self.mean = iter(values), float(np.mean(values))

    def draw(self, rng, size):
        return np.full(size, float(next(self.values)))


def unhindered(model, number, seed=0):
    """Seconds of the environment of the n-th episode to begin."""
    return model.latency.draw(np.random.default_rng((seed, number)), model.turns.value).sum()


def test_one_synchronous_step_is_the_sum_of_its_parts():
    found = simulate(dataclasses.replace(STEADY, publish_s=0.5), steps=4, warm_up=0)
    assert found.step_seconds == pytest.approx(3 * (10 * 0.1 + 2.0) + 5.0 + 0.5)
    assert found.trainer_wait == pytest.approx(9.0 / 14.5)
    assert found.engine_idle == pytest.approx((14.5 - 3 * 1.0) / 14.5)
    assert found.slot_use == pytest.approx(8 * 3 * 1.0 / 14.5 / 64)
    assert found.open_episodes == pytest.approx(8 * 9.0 / 14.5)
    assert (
        found.staleness == {0: 32} and found.started == found.trained == 32 and found.in_flight == 0
    )


def test_requests_that_run_together_slow_each_other_and_a_prompt_is_read_first():
    together = dataclasses.replace(
        STEADY,
        token_s_a_request=0.05,
        prompt_tokens=Constant(40),
        prefill_tokens_per_s=20.0,
        train_s=0.0,
    )
    assert simulate(together, steps=2, warm_up=0).step_seconds == pytest.approx(
        3 * (40 / 20 + 10 * (0.1 + 8 * 0.05) + 2.0)
    )
    halved = dataclasses.replace(together, engines=2)
    assert simulate(halved, steps=2, warm_up=0).step_seconds == pytest.approx(
        3 * (40 / 20 + 10 * (0.1 + 4 * 0.05) + 2.0)
    )


def test_two_requests_share_an_engine_exactly():
    model = PodModel(
        token_s=0.0,
        token_s_a_request=1.0,
        concurrency=2,
        latency=Constant(0.0),
        turns=Constant(1),
        tokens=InTurn(10, 20),
        group_size=2,
        groups_per_step=1,
        async_ratio=0,
        train_s=0.0,
    )
    assert simulate(model, steps=1).seconds == pytest.approx(
        10 * 2 + 10 * 1
    )  # ten tokens each at half speed, the other ten alone


def test_without_a_free_slot_a_request_waits():
    model = dataclasses.replace(
        STEADY, slots=1, turns=Constant(1), group_size=3, groups_per_step=1, train_s=0.0
    )
    assert simulate(model, steps=2, warm_up=0).step_seconds == pytest.approx(3 * 1.0 + 2.0)


def test_engines_stand_still_while_weights_are_published_and_environments_do_not():
    model = PodModel(
        token_s=1.0,
        concurrency=2,
        latency=Constant(0.0),
        turns=Constant(1),
        tokens=InTurn(4, 10, 10),
        group_size=1,
        groups_per_step=1,
        async_ratio=1,
        train_s=1.0,
        publish_s=7.0,
        stale_samples="keep",
    )
    # Ends at 4, trained on until 5, published until 12. The second was 5 tokens far when everything
    # stopped.
    assert simulate(model, steps=2, warm_up=0).seconds == pytest.approx(12 + 5 + 1 + 7)


def test_a_prompt_read_while_weights_are_published_does_not_move_the_others():
    model = PodModel(
        token_s=1.0,
        concurrency=3,
        latency=Constant(0.0),
        turns=Constant(1),
        tokens=InTurn(2, 10, 10, 90),
        prompt_tokens=InTurn(0, 0, 6, 0),
        prefill_tokens_per_s=1.0,
        group_size=1,
        groups_per_step=1,
        async_ratio=2,
        train_s=2.0,
        publish_s=4.0,
        stale_samples="keep",
    )
    # Ends at 2, trained on until 4, published until 8; the third's prompt is read at 6. At 4 the
    # second was 4 tokens far.
    assert simulate(model, steps=2, warm_up=0).seconds == pytest.approx(8 + 6 + 2 + 4)


def test_a_cancelled_episode_leaves_its_slot_at_once_or_where_it_reads_its_prompt():
    model = PodModel(
        slots=2,
        token_s=1.0,
        concurrency=2,
        latency=Constant(0.0),
        turns=Constant(1),
        tokens=InTurn(2, 100, 1000, 2),
        group_size=1,
        redundancy=1,
        groups_per_step=1,
        async_ratio=0,
        train_s=0.0,
    )
    found = simulate(model, steps=2)
    assert found.seconds == 2 + 2 and found.dropped == {"redundant": 2}
    reading = dataclasses.replace(
        model,
        tokens=InTurn(2, 100, 1000, 2),
        prompt_tokens=InTurn(0, 50, 0, 0),
        prefill_tokens_per_s=1.0,
    )
    assert simulate(reading, steps=2).seconds == 50 + 2


@pytest.mark.parametrize("stale_samples", ["wait", "keep", "drop"])
def test_async_ratio_zero_is_synchronous_training_whatever_happens_to_late_samples(stale_samples):
    model = dataclasses.replace(FREE, stale_samples=stale_samples)
    expected = sum(
        max(unhindered(model, step * 8 + place) for place in range(8)) + model.train_s
        for step in range(6)
    )
    found = simulate(model, steps=6)
    assert (
        found.seconds == pytest.approx(expected)
        and found.staleness == {0: 48}
        and not found.dropped
    )


@given(
    seed=st.integers(0, 1000),
    concurrency=st.integers(1, 12),
    async_ratio=st.integers(0, 3),
    train_s=st.sampled_from([0.0, 0.5, 4.0]),
)
@quickly
def test_without_contention_it_equals_a_queue_of_several_servers(
    seed, concurrency, async_ratio, train_s
):
    """Groups of one: batch b of episodes begins where places get free, after step b - async_ratio -
    1; step k, when k + 1 batches have ended.
    """
    model = dataclasses.replace(
        FREE,
        group_size=1,
        groups_per_step=4,
        concurrency=concurrency,
        async_ratio=async_ratio,
        train_s=train_s,
        stale_samples="keep",
    )
    steps, batch = 5, 4
    places, ends, trained = [0.0] * concurrency, [], []
    for begun in range(steps + async_ratio):
        allowed = trained[begun - async_ratio - 1] if begun > async_ratio else 0.0
        for number in range(begun * batch, (begun + 1) * batch):
            ends.append(max(heapq.heappop(places), allowed) + unhindered(model, number, seed))
            heapq.heappush(places, ends[-1])
        step = begun - async_ratio  # all that may have begun before it is trained has begun
        if step >= 0:
            trained.append(
                max(trained[-1] if trained else 0.0, sorted(ends)[(step + 1) * batch - 1]) + train_s
            )
    assert simulate(model, steps=steps, seed=seed).seconds == pytest.approx(trained[-1])


@pytest.mark.long
@given(
    seed=st.integers(0, 1000),
    latency=st.sampled_from([Lognormal(1.0, 1.0), Lognormal(1.0, 0.3), Recorded((0.1, 0.2, 9.0))]),
)
@quickly
def test_more_asynchrony_never_takes_longer_and_never_beats_the_bound(seed, latency):
    model = dataclasses.replace(FREE, latency=latency, stale_samples="keep", train_s=3.0)
    seconds = [
        simulate(dataclasses.replace(model, async_ratio=ratio), steps=12, seed=seed).seconds
        for ratio in (0, 1, 2, 4, 8)
    ]
    assert all(later <= sooner + 1e-9 for sooner, later in itertools.pairwise(seconds))
    assert seconds[-1] >= 12 * model.train_s


def random_model(draw_int, stale_samples):
    def pick(*values):
        return values[draw_int(len(values))]

    return PodModel(
        engines=pick(1, 3),
        slots=pick(1, 4, 64),
        token_s=pick(0.0, 0.05),
        token_s_a_request=pick(0.0, 0.01),
        prefill_tokens_per_s=pick(50.0, float("inf")),
        concurrency=pick(1, 5, 30),
        latency=pick(Constant(0.0), Lognormal(1.0, 1.5)),
        turns=pick(Constant(1), Recorded((1, 2, 9))),
        tokens=pick(Constant(0), Recorded((1, 30))),
        prompt_tokens=pick(Constant(0), Constant(20)),
        group_size=pick(1, 4),
        redundancy=pick(0, 2),
        groups_per_step=pick(1, 3),
        async_ratio=pick(0, 1, 3),
        stale_samples=stale_samples,
        train_s=pick(0.0, 2.0),
        publish_s=pick(0.0, 1.0),
    )


@pytest.mark.long
@given(seed=st.integers(0, 10_000), stale_samples=st.sampled_from(["wait", "keep", "drop"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_started_episode_is_trained_on_dropped_or_in_flight_and_none_is_too_old(
    seed, stale_samples
):
    rng = np.random.default_rng(seed)
    model = random_model(lambda n: int(rng.integers(n)), stale_samples)
    found = simulate(model, steps=6, seed=seed)
    assert found.trained == 6 * model.batch == sum(found.staleness.values())
    assert found.started == found.trained + sum(found.dropped.values()) + found.in_flight
    assert set(found.dropped) <= {"redundant"} | ({"stale"} if stale_samples == "drop" else set())
    assert (
        0
        <= found.in_flight
        <= (model.async_ratio + 1) * model.groups_per_step * (model.group_size + model.redundancy)
    )
    if stale_samples != "keep":
        assert max(found.staleness) <= model.async_ratio
    for share in (
        found.trainer_wait,
        found.engine_idle,
        found.slot_use,
        found.open_episodes / model.concurrency,
    ):
        assert -1e-9 <= share <= 1 + 1e-9
    assert found == simulate(model, steps=6, seed=seed)


@pytest.mark.long
def test_littles_law_holds():
    model = dataclasses.replace(
        agentic_pod(async_ratio=2, stale_samples="keep"), token_s=0.01, slots=8
    )
    found = simulate(model, steps=60, warm_up=10)
    assert found.open_episodes == pytest.approx(
        found.trajectories_per_s * found.episode_seconds, rel=0.05
    )


def test_boundless_asynchrony_reaches_the_bound_of_whatever_is_busiest():
    far = dict(async_ratio=20, stale_samples="keep")
    steady = dataclasses.replace(STEADY, **far)
    cases = {
        "trainer": dataclasses.replace(steady, train_s=50.0),
        "environments": dataclasses.replace(steady, train_s=1.0),
        "engines": dataclasses.replace(steady, train_s=1.0, slots=1, concurrency=32),
    }
    limits = {"trainer": 50.0, "environments": 8 * 9.0 / 8, "engines": 8 * 3 * 1.0}
    for name, model in cases.items():
        assert step_seconds_bound(model) == pytest.approx(limits[name]), name
        found = simulate(model, steps=60, warm_up=30)
        assert (
            found.seconds / 60 >= limits[name] * (1 - 1e-9)
            and found.step_seconds <= limits[name] * 1.03
        ), name


@pytest.mark.long
def test_dropping_late_samples_and_taking_the_first_of_many_teaches_short_episodes():
    model = dataclasses.replace(agentic_pod(), train_s=1.0)
    bias = {
        name: simulate(dataclasses.replace(model, **changes), steps=16).short_bias
        for name, changes in {
            "none": {"stale_samples": "keep"},
            "wait": {},
            "drop": {"stale_samples": "drop", "group_size": 1, "groups_per_step": 64},
            "first": {"redundancy": 4},
        }.items()
    }
    assert bias["none"] == bias["wait"] == 0 and bias["drop"] < -0.02 and bias["first"] < -0.1


@pytest.mark.long
def test_the_agentic_setting_is_the_one_that_was_asked_for():
    model = agentic_pod()
    assert (model.batch, model.concurrency, model.group_size, model.turns.mean, model.latency) == (
        64,
        64,
        8,
        8,
        Lognormal(1.0, 1.0),
    )
    assert with_train_share(model, 0.25, seed=7, steps=60).train_s == pytest.approx(
        model.train_s, rel=0.1
    )
    found = speedup(model, steps=20)
    assert 1.0 < found.predicted < found.bound


def test_distributions_have_the_means_they_say():
    rng = np.random.default_rng(0)
    for distribution in (Lognormal(3.0, 0.8), Recorded((1.0, 2.0, 9.0)), Constant(4.0)):
        assert distribution.draw(rng, 200_000).mean() == pytest.approx(distribution.mean, rel=0.01)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"slots": 0}, "slots is 0"),
        ({"train_s": -1.0}, "train_s is -1"),
        ({"train_s": float("nan")}, "train_s is nan"),
        ({"stale_samples": "lose"}, "stale_samples is 'lose'"),
        ({"prefill_tokens_per_s": 0.0}, "prefill_tokens_per_s is 0"),
        ({"async_ratio": -1}, "async_ratio is -1"),
    ],
)
def test_a_model_that_cannot_be_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(STEADY, **change)


@pytest.mark.long
def test_the_command_prints_a_row_for_each_ratio_and_takes_recorded_latencies(tmp_path, capsys):
    recorded = tmp_path / "latencies"
    recorded.write_text("0.5\n0.5\n4\n")
    flags = [
        "--steps=8",
        "--async_ratio=0,3",
        f"--latencies={recorded}",
        "--set",
        "turns=2",
        "--set",
        "tokens=20:0.5",
        "--set",
        "engines=2",
    ]
    assert command.main([*flags, f"--json={tmp_path / 'out.json'}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[2].split()[0] == "0" and out[2].split()[3] == "1.00"
    assert '"speedup"' in (tmp_path / "out.json").read_text()
    for wrong, named in (
        (["--set", "motors=1"], "'motors'"),
        (["--set", "slots=x"], "'x'"),
        (["--latencies=/nowhere"], "/nowhere"),
        (["--steps=0", "--set", "train_s=1"], "steps=0"),
    ):
        assert command.main(wrong) == 1 and named in capsys.readouterr().err


@pytest.mark.long
def test_engines_that_are_lent_while_the_trainer_trains_beat_a_fixed_split_and_lose_nothing():
    """Time division: all devices sample, some of them stop to train; against devices that only
    train and wait otherwise.
    """
    busy = PodModel(
        engines=4,
        slots=32,
        token_s=0.01,
        token_s_a_request=0.001,
        concurrency=128,
        latency=Constant(0.2),
        turns=Constant(4),
        tokens=Lognormal(100.0, 0.5),
        group_size=8,
        groups_per_step=16,
        async_ratio=1,
        train_s=4.0,
    )
    split = simulate(dataclasses.replace(busy, engines=2), steps=16)
    lent = simulate(dataclasses.replace(busy, lent_engines=2), steps=16)
    both = simulate(busy, steps=16)
    assert both.step_seconds < lent.step_seconds < split.step_seconds
    assert lent.trained == split.trained and not lent.dropped and max(lent.staleness) <= 1


def test_lending_every_engine_is_refused():
    with pytest.raises(ValueError, match="lent_engines is 2 of 2"):
        PodModel(engines=2, lent_engines=2)
