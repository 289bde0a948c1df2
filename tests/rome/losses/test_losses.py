"""The losses against float64 loops, and what must not change them."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rome.losses import (
    LOSSES,
    PUBLISHED,
    SPECS,
    LossConfig,
    count_denominators,
    unbounded_weight,
)
from rome.losses.chunks import policy_entropy
from tests.rome.losses import loss_oracle
from tests.rome.losses.random_step import GAMMA, MAX_IDS, Step, evaluate, packed, random_step

NAMES = tuple(name for name in LOSSES if name != "cpt")  # which is sft's
POLICIES = tuple(name for name in NAMES if not SPECS[name].likelihood)
IPA_CONFIGS = [
    LossConfig(mismatch_limit=1.3),
    LossConfig(mismatch_limit=1.3, norm="chunks", mismatch_mask="token"),
    LossConfig(mismatch_limit=0.8, norm="trajectories", lambda_rl=0.5, lambda_il=2.0),
]
CASES = [("ipa", config) for config in IPA_CONFIGS] + [
    ("token_level", IPA_CONFIGS[0]),
    ("token_level", IPA_CONFIGS[2]),
    ("grpo", LossConfig()),
    ("grpo", LossConfig(clip_high=0.28, lambda_il=0.0)),
    ("sft", LossConfig()),
    ("dr_grpo", LossConfig(token_constant=7.0, lambda_rl=0.5)),
    ("rloo", LossConfig(lambda_il=2.0)),
    ("gspo", LossConfig(**PUBLISHED["gspo"])),
    ("gspo", LossConfig(dual_clip=1.3)),
    ("dapo", LossConfig(**PUBLISHED["dapo"])),
    ("dapo", LossConfig(dual_clip=1.5)),
    ("cispo", LossConfig(clip_low=1.0, clip_high=0.5)),
    ("cispo", LossConfig(**PUBLISHED["cispo"])),
    ("topr", LossConfig()),
    ("tis", LossConfig(mismatch_limit=1.2)),
    ("tis", LossConfig(mismatch_limit=1.2, dual_clip=1.3)),
    ("icepop", LossConfig(mismatch_low=0.7, mismatch_limit=1.5)),
    ("gigpo", LossConfig(clip_high=0.3)),
]
quickly = settings(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)


def assert_same(left, right, rtol=2e-5):
    for a, b in zip(left[:2], right[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=2e-6)
    assert left[2].keys() == right[2].keys()
    for name in left[2]:
        np.testing.assert_allclose(
            left[2][name], right[2][name], rtol=rtol, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize(("name", "config"), CASES)
@given(seed=seeds, failure_reward=st.sampled_from([0.0, -1.0]))
@quickly
def test_value_gradient_and_metrics_equal_the_float64_loop(name, config, seed, failure_reward):
    step = random_step(seed, failure_reward=failure_reward, meeting=name == "gigpo")
    value, gradient, metrics = evaluate(name, packed(step, name), step.logp, config)
    expected, expected_gradient, expected_metrics = getattr(loss_oracle, name)(
        step.trajectories,
        step.logp.astype(np.float64),
        step.old.astype(np.float64),
        config,
        GAMMA,
        failure_reward,
    )
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(
        gradient, [expected_gradient[i] for i in range(MAX_IDS)], rtol=2e-5, atol=2e-6
    )
    for key, figure in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], figure, rtol=1e-4, atol=1e-5, err_msg=key)


@given(seed=seeds)
@quickly
def test_denominators_equal_the_loop(seed):
    step = random_step(seed)
    rl = loss_oracle.counts(step.trajectories)
    trained = loss_oracle.trained_counts(step.trajectories)
    expected = {f"rl_{name}": count for name, count in rl.items()}
    expected |= {f"trained_{name}": count for name, count in trained.items()}
    assert count_denominators(packed(step))._asdict() == expected


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@given(seed=seeds, order=st.randoms(use_true_random=False))
@settings(quickly, max_examples=3)
def test_packing_order_micro_batches_and_padding_rows_change_nothing(name, seed, order):
    step = random_step(seed)
    config = LossConfig(mismatch_limit=1.3)
    once = evaluate(name, packed(step, name, row_length=40, rows=4), step.logp, config)
    shuffled = Step(order.sample(step.trajectories, len(step.trajectories)), step.logp, step.old)
    again = evaluate(name, packed(shuffled, name, row_length=80, rows=1), step.logp, config)
    assert_same(once, again)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["ipa", "grpo", "gspo", "gigpo"]
)  # sums over chunks and over trajectories, with and without a gradient through them
def test_the_number_of_devices_changes_nothing(name):
    step = random_step(5, trajectories=16)
    (batch,) = packed(step, name, rows=8)
    denominators = count_denominators([batch])
    logp_BT = np.where(batch.action_mask_BT, step.logp[batch.tokens_BT], 0)
    run = jax.jit(
        lambda logp_BT, batch: jax.value_and_grad(LOSSES[name], has_aux=True)(
            logp_BT, batch, LossConfig(), denominators
        )
    )
    assert jax.device_count() >= 8

    def on(devices):
        rows = NamedSharding(
            Mesh(np.array(jax.devices()[:devices]), ("row",)), PartitionSpec("row")
        )
        (value, metrics), gradient_BT = run(*jax.device_put((logp_BT, batch), rows))
        return float(value), np.asarray(gradient_BT), jax.tree.map(float, metrics)

    assert_same(on(1), on(8))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extreme", [1e4, 1e20])
def test_gradients_stay_finite_when_the_policies_disagree_wildly(name, extreme):
    step = random_step(3, trajectories=12)
    rng = np.random.default_rng(0)
    step.logp = np.float32(-extreme * rng.random(MAX_IDS) * rng.integers(0, 2, MAX_IDS))
    step.old = np.float32(-extreme * rng.random(MAX_IDS) * rng.integers(0, 2, MAX_IDS))
    value, gradient, metrics = evaluate(name, packed(step, name), step.logp, LossConfig())
    assert (
        np.isfinite(value)
        and np.isfinite(gradient).all()
        and np.isfinite(list(metrics.values())).all()
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_outside_action_tokens_is_never_read(name):
    step = random_step(4)
    batches = packed(step, name)
    denominators = count_denominators(batches)

    value_and_grad = jax.value_and_grad(LOSSES[name], has_aux=True)

    def run(rubbish):
        results = []
        for batch in batches:
            logp_BT, old_BT, rollout_BT = (
                np.where(batch.action_mask_BT, a, rubbish)
                for a in (step.logp[batch.tokens_BT], batch.logp_old_BT, batch.logp_rollout_BT)
            )
            dirty = batch._replace(logp_old_BT=old_BT, logp_rollout_BT=rollout_BT)
            results.append(value_and_grad(jnp.asarray(logp_BT), dirty, LossConfig(), denominators))
        return results

    for clean, dirty in zip(jax.tree.leaves(run(0.0)), jax.tree.leaves(run(np.nan)), strict=True):
        np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("name", ["ipa", "token_level", "topr"])
def test_failures_contribute_exactly_nothing_at_failure_reward_zero(name):
    step = random_step(11, trajectories=12, failure_reward=0.0)
    failed = [i for t in step.trajectories if t.reward <= 0 for c in t.chunks for i in c.action_ids]
    _, gradient, metrics = evaluate(name, packed(step, name), step.logp, LossConfig())
    assert failed and not gradient[failed].any() and gradient.any()
    without_term = evaluate(
        name,
        packed(step, name),
        np.where(np.isin(np.arange(MAX_IDS), failed), -7.0, step.logp),
        LossConfig(),
    )
    assert without_term[0] == evaluate(name, packed(step, name), step.logp, LossConfig())[0]
    assert metrics["clipped"] > 0  # failures were there


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "topr"])
def test_ratios_are_one_where_the_policy_has_not_moved(name):
    step = random_step(12)
    _, _, metrics = evaluate(name, packed(step, name), step.old, LossConfig())
    assert (
        metrics["ratio"] == pytest.approx(1, rel=1e-6)
        and metrics["clipped"] == 0
        and metrics["kl_old"] == pytest.approx(0, abs=1e-7)
    )


@given(seed=seeds)
@quickly
def test_the_tokens_of_a_chunk_share_one_weight_in_ipa(seed):
    step = random_step(seed, spread=1.0)
    _, gradient, _ = evaluate("ipa", packed(step), step.logp, IPA_CONFIGS[0])
    for trajectory in step.trajectories:
        for chunk in trajectory.chunks:
            assert len(set(gradient[chunk.action_ids])) == 1


def test_a_success_is_learned_at_full_weight_and_a_failure_fades_with_its_ratio():
    step = random_step(1, trajectories=2, kinds=("rl",), spread=0.0)
    for trajectory, reward in zip(step.trajectories, (1.0, 0.0), strict=True):
        trajectory.chunks, trajectory.reward, trajectory.ending = (
            trajectory.chunks[:1],
            reward,
            "failure",
        )
    win, loss = ([*t.chunks[0].action_ids] for t in step.trajectories)
    n = len(win) + len(loss)
    moved = step.old.copy()
    moved[win + loss] -= 2.0  # the policy left both behind
    _, gradient, _ = evaluate("ipa", packed(step), moved, LossConfig())
    np.testing.assert_allclose(gradient[win], -1 / n, rtol=1e-6)
    np.testing.assert_allclose(gradient[loss], np.exp(-2) / n, rtol=1e-5)


def test_the_mismatch_mask_is_one_sided_and_counts_in_the_denominator():
    step = random_step(1, trajectories=2, kinds=("rl",), spread=0.0)
    for trajectory in step.trajectories:
        trajectory.chunks, trajectory.reward, trajectory.ending = (
            trajectory.chunks[:1],
            1.0,
            "success",
        )
    above, below = ([*t.chunks[0].action_ids] for t in step.trajectories)
    n = len(above) + len(below)
    step.old[above] += np.log(5.1)
    step.old[below] -= np.log(500.0)
    _, gradient, metrics = evaluate("ipa", packed(step), step.old, LossConfig())
    assert not gradient[above].any()
    np.testing.assert_allclose(gradient[below], -1 / n, rtol=1e-6)
    assert metrics["masked"] == pytest.approx(len(above) / n)


@pytest.mark.parametrize("name", POLICIES)
def test_infrastructure_failures_change_nothing(name):
    step = random_step(21)
    lost = copy.deepcopy(step.trajectories[0])
    lost.ending, lost.reward, lost.group = "infra_sandbox", 0.0, step.trajectories[1].group
    with_lost = Step([*step.trajectories, lost], step.logp, step.old)
    assert_same(
        evaluate(name, packed(step, name), step.logp, LossConfig()),
        evaluate(name, packed(with_lost, name), step.logp, LossConfig()),
    )


def test_a_step_of_empty_rows_has_loss_and_gradient_zero():
    step = random_step(2)
    batch, *_ = packed(step)
    empty = batch.map(np.zeros_like)._replace(chunk_ids_BT=np.full_like(batch.chunk_ids_BT, -1))
    for name in NAMES:
        value, gradient, metrics = evaluate(name, [empty], step.logp, LossConfig())
        assert value == 0 and not gradient.any() and not any(metrics.values())


def one_step_of(rewards, group=0, drift=0.0, mismatch=0.0):
    """One RL chunk a trajectory; every token's log r and log rho are the same."""
    step = random_step(1, trajectories=len(rewards), kinds=("rl",), spread=0.0)
    for trajectory, reward in zip(step.trajectories, rewards, strict=True):
        trajectory.chunks, trajectory.reward, trajectory.ending, trajectory.group = (
            trajectory.chunks[:1],
            reward,
            "failure",
            group,
        )
    step.old = step.old + np.float32(mismatch)
    step.logp = step.old + np.float32(drift)
    return step, [list(t.chunks[0].action_ids) for t in step.trajectories]


def weight_per_token(name, config, rewards=(1.0, 0.0), **moved):
    """(of the success' tokens, of the failure's): minus the gradient, where every token has the
    same ratio.
    """
    step, (win, lose) = one_step_of(rewards, **moved)
    _, gradient, _ = evaluate(name, packed(step, name), step.logp, config)
    assert np.allclose(gradient[win], gradient[win[0]]) and np.allclose(
        gradient[lose], gradient[lose[0]]
    )
    return -gradient[win[0]], -gradient[lose[0]]


def test_the_step_of_a_stale_failure_is_bounded_by_a_dual_clip_and_by_it_alone():
    for name in (name for name in POLICIES if "dual_clip" in PUBLISHED[name]):
        open_, shut = (
            LossConfig(**PUBLISHED[name]),
            LossConfig(**PUBLISHED[name] | {"dual_clip": 3.0}),
        )
        fresh, stale, bounded = (
            weight_per_token(name, c, drift=d)[1]
            for c, d in ((open_, 0.0), (open_, 5.0), (shut, 5.0))
        )
        assert stale / fresh == pytest.approx(np.exp(5.0), rel=1e-4) and bounded == 0, name
        assert unbounded_weight(name, 0.0) and unbounded_weight(name, 3.0) is None


def test_losses_with_bounded_weights_have_them():
    for name in POLICIES:
        if unbounded_weight(name, 0.0) is None:
            fresh, stale = (
                np.abs(weight_per_token(name, LossConfig(**PUBLISHED[name]), drift=drift))
                for drift in (0.0, 12.0)
            )
            assert (stale <= 5.0001 * fresh).all(), name
    assert "older weights" in unbounded_weight("rloo", 3.0)


def test_an_engine_that_sampled_otherwise_is_corrected_by_tis_and_dropped_by_icepop():
    grpo, tis, icepop = (
        lambda m, n=name: weight_per_token(n, LossConfig(**PUBLISHED[n]), mismatch=np.log(m))[0]
        for name in ("grpo", "tis", "icepop")
    )
    assert (
        grpo(1.5) == pytest.approx(grpo(1.0))
        and tis(1.5) == pytest.approx(1.5 * grpo(1.0), rel=1e-5)
        and tis(4.0) == pytest.approx(2.0 * grpo(1.0), rel=1e-5)
    )
    assert icepop(4.0) == pytest.approx(4.0 * grpo(1.0), rel=1e-5) and icepop(0.6) == pytest.approx(
        0.6 * grpo(1.0), rel=1e-5
    )
    assert icepop(5.1) == 0 and icepop(0.49) == 0


def test_dr_grpo_weighs_the_tokens_of_long_and_short_trajectories_alike_and_grpo_does_not():
    step, (win, lose) = one_step_of((1.0, 0.0))
    assert len(win) != len(lose)
    for name, same in (("dr_grpo", True), ("dapo", True), ("grpo", False)):
        _, gradient, _ = evaluate(name, packed(step, name), step.logp, LossConfig())
        assert np.isclose(-gradient[win[0]], gradient[lose[0]], rtol=1e-5) == same, name


def test_every_loss_has_a_name_an_oracle_and_its_switches():
    assert (
        set(PUBLISHED) == set(POLICIES)
        and {name for name in NAMES if SPECS[name].advantage} < set(POLICIES)
        and all(hasattr(loss_oracle, name) for name in NAMES)
    )
    assert {name for name, _ in CASES} == set(NAMES)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"norm": "mean"}, "mean"),
        ({"mismatch_mask": "row"}, "row"),
        ({"mismatch_limit": 0.0}, "mismatch_limit"),
        ({"lambda_il": -1.0}, "lambda_il"),
        ({"dual_clip": 1.1}, "dual_clip 1.1"),
        ({"token_constant": 0.0}, "token_constant"),
    ],
)
def test_an_impossible_switch_is_refused_by_name(wrong, named):
    with pytest.raises(ValueError, match=named):
        LossConfig(**wrong)


def with_demonstrations(count, episodes=32):
    """A step of solved episodes and some demonstrations, all of one turn, and the ids of each."""
    step = random_step(6, trajectories=episodes + count, kinds=("rl",), spread=0.0)
    for place, trajectory in enumerate(step.trajectories):
        trajectory.chunks, trajectory.reward, trajectory.ending = (
            trajectory.chunks[:1],
            1.0,
            "success",
        )
        if place >= episodes:
            trajectory.chunks[0].kind = "imitation"
    ids = [i for t in step.trajectories for i in t.chunks[0].action_ids]
    shown = [i for t in step.trajectories[episodes:] for i in t.chunks[0].action_ids]
    return step, np.isin(np.arange(MAX_IDS), ids), np.isin(np.arange(MAX_IDS), shown)


@pytest.mark.parametrize("norm", ["tokens", "chunks", "trajectories"])
@pytest.mark.parametrize("name", ["ipa", "token_level"])
def test_a_demonstrated_token_weighs_as_much_as_a_sampled_one_however_few_there_are(name, norm):
    for demonstrations in (1, 16):
        step, trained, shown = with_demonstrations(demonstrations)
        config = LossConfig(norm=norm)
        _, gradient, _ = evaluate(name, packed(step, name), step.logp, config)
        weight = -gradient[trained]
        np.testing.assert_allclose(weight, weight[0], rtol=1e-5)
        share = -gradient[shown].sum() / weight.sum()
        assert share == pytest.approx(shown.sum() / trained.sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "topr"])
def test_a_baseline_of_the_literature_imitates_nothing(name):
    assert {name for name in POLICIES if SPECS[name].lambda_il} == {"ipa"}
    config = LossConfig(**PUBLISHED[name], lambda_il=SPECS[name].lambda_il)
    step, _, shown = with_demonstrations(4, episodes=8)
    _, gradient, _ = evaluate(name, packed(step, name), step.logp, config)
    assert not gradient[shown].any()


@given(
    seed=seeds, kinds=st.sampled_from([("rl", "imitation", "context"), ("imitation", "context")])
)
@quickly
def test_the_entropy_is_that_of_the_policys_own_tokens_or_else_of_all_that_are_trained(seed, kinds):
    step = random_step(seed, kinds=kinds)
    by_id = np.random.default_rng(seed).random(MAX_IDS)
    batches = packed(step, rows=2)
    denominators = count_denominators(batches)
    found = 0.0
    for batch in batches:
        rubbish_BT = np.where(batch.action_mask_BT, by_id[batch.tokens_BT], np.nan)
        found += float(policy_entropy(jnp.asarray(rubbish_BT), batch, denominators))
    counted = []
    for kind in ("rl", "imitation"):
        chunks = loss_oracle.of_kind(step.trajectories, kind)
        counted = counted or [i for _, _, chunk in chunks for i in chunk.action_ids]
    assert found == pytest.approx(np.mean(by_id[counted]) if counted else 0.0, rel=1e-5)
