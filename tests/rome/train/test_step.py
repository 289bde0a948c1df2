"""The train step: invariant to how a step is cut into micro-batches and to how many devices it runs
on; it learns.
"""

import dataclasses
import functools
import random
from typing import Any

import jax
import numpy as np
import pytest

from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import LOSSES, LossConfig, count_denominators
from rome.model.config import PRESETS
from rome.model.sharding import make_mesh
from rome.train.state import make_optimizer
from rome.train.step import Learner

MODEL = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    moe_intermediate_size=16,
    router_aux_loss_coef=0.0,
)


DENSE = {
    "num_experts": 0,
    "experts_per_token": 0,
    "moe_intermediate_size": 0,
    "intermediate_size": 48,
    "tie_embeddings": True,
    "scan_layers": True,
}
BALANCED = (("router_aux_loss_coef", 0.5),)


Axes = tuple[tuple[str, Any], ...]


def random_trajectories(count: int, seed: int = 0) -> list[Trajectory]:
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(64) for _ in range(count)]

    def chunk() -> Chunk:
        length = rng.randint(1, 6)
        return Chunk(
            ids(rng.randint(1, 6)),
            ids(length),
            [-rng.random() for _ in range(length)],
            versions=[(0, 0, length)],
        )

    return [
        Trajectory(
            f"count/{number}",
            "count",
            [chunk() for _ in range(rng.randint(1, 3))],
            float(number % 2),
            "success" if number % 2 else "failure",
            group=number // 4,
        )
        for number in range(count)
    ]


def make_learner(loss: str = "ipa", mesh: dict | None = None, **model) -> Learner:
    config = dataclasses.replace(MODEL, **model)
    optimizer = make_optimizer(
        learning_rate=1e-2, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
    )
    return Learner(config, LOSSES[loss], LossConfig(), optimizer, make_mesh(mesh or {}, config))


@functools.cache
def shared_learner(loss: str = "ipa", mesh: Axes = (), model: Axes = ()) -> Learner:
    """Return the learner of all tests that ask for the same, so that its programs compile once."""
    return make_learner(loss, dict(mesh), **dict(model))


@functools.cache
def skipping_learner() -> Learner:
    return dataclasses.replace(make_learner(), skip_nonfinite_updates=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "poison", [pytest.param(float("nan"), marks=pytest.mark.slow), float("inf")]
)
def test_an_update_that_is_not_finite_is_skipped_where_the_config_says_so(poison):
    batches = packed(8)
    denominators = count_denominators(batches)
    skipping = skipping_learner()
    before = jax.device_get(skipping.init(seed=0))
    spoiled = [
        batch._replace(return_BC=batch.return_BC * poison, logp_old_BT=batch.logp_rollout_BT)
        for batch in batches
    ]
    after, metrics = skipping.update(skipping.init(seed=0), spoiled, denominators)
    assert float(metrics["skipped_updates"]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(after))
    plain = shared_learner()
    broken, metrics = plain.update(plain.init(seed=0), spoiled, denominators)
    assert "skipped_updates" not in metrics and not plain.is_finite(broken.params)


@pytest.mark.long
def test_a_finite_update_is_bitwise_the_same_with_and_without_skipping():
    batches = packed(8)
    plain, _ = one_update(shared_learner(), batches)
    skipping, metrics = one_update(skipping_learner(), batches)
    assert metrics["skipped_updates"] == 0.0
    jax.tree.map(np.testing.assert_array_equal, plain, skipping)


def packed(rows_per_microbatch: int, purpose: str = "rl"):
    batch = pack(
        random_trajectories(24),
        row_length=64,
        chunks_per_row=16,
        gamma=0.95,
        failure_reward=-1.0,
        purpose=purpose,
    )
    return microbatches(batch, rows_per_microbatch)


def params_of(state) -> dict:
    return state.params


def gradient_of(state) -> dict:
    """The first gradient, to a factor: Adam's moments after one update."""
    return state.opt_state[1][0].mu


def one_update(learner: Learner, batches, kept=params_of) -> tuple[dict, dict]:
    state = learner.init(seed=0)

    # A little off the scores, so that no ratio lies on the edge of a clip, where rounding would
    # decide.
    def old(batch, logp_BT):
        angle_BT = 1.0 + 7.0 * batch.tokens_BT + batch.positions_BT
        return logp_BT + 0.05 * np.sin(angle_BT).astype(np.float32)

    batches = [
        batch._replace(logp_old_BT=old(batch, logp_BT))
        for batch, logp_BT in zip(batches, learner.score(state.params, batches), strict=True)
    ]
    state, metrics = learner.update(state, batches, count_denominators(batches))
    return jax.device_get(kept(state)), jax.device_get(metrics)


@pytest.mark.long
@pytest.mark.parametrize(
    "loss, router",
    [
        ("ipa", {}),
        pytest.param("token_level", {}, marks=pytest.mark.slow),
        pytest.param("grpo", {}, marks=pytest.mark.slow),
        pytest.param(
            "ipa",
            {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_micro_batch_split_does_not_change_gradient_or_metrics(loss, router):
    whole, split = (
        one_update(
            shared_learner(loss, model=tuple(router.items())), packed(rows), kept=gradient_of
        )
        for rows in (8, 2)
    )
    for one, other in zip(*map(jax.tree.leaves, (split[0], whole[0])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())
    assert whole[1].keys() == split[1].keys()
    for name in whole[1]:
        np.testing.assert_allclose(
            split[1][name], whole[1][name], rtol=2e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh, model",
    [
        pytest.param({"fsdp": 8}, {}, marks=pytest.mark.slow),
        pytest.param({"replica": 2, "fsdp": 2, "expert": 2}, {}, marks=pytest.mark.slow),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {}),
        pytest.param({"fsdp": 2, "sequence": 2, "tensor": 2}, DENSE, marks=pytest.mark.slow),
    ],
)
def test_the_mesh_does_not_change_gradient_or_metrics(mesh, model):
    single, sharded = (
        one_update(shared_learner("ipa", tuple(shape.items()), tuple(model.items())), packed(8))
        for shape in ({}, mesh)
    )
    for name in single[1]:
        np.testing.assert_allclose(
            sharded[1][name], single[1][name], rtol=2e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.long
def test_moments_lie_as_their_parameters_before_and_after_an_update():
    learner, batches = make_learner("ipa", {"fsdp": 4, "expert": 2}), packed(8)
    first = learner.init(seed=0)
    for state in (first, learner.update(first, batches, count_denominators(batches))[0]):
        places = [
            [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
            for tree in (
                state.params,
                *(getattr(state.opt_state[1][0], name) for name in ("mu", "nu")),
            )
        ]
        assert places[0] == places[1] == places[2]
        assert sum(spec != jax.sharding.PartitionSpec() for spec in places[0]) > len(places[0]) / 2


@pytest.mark.long
def test_the_step_reports_a_router_balance_near_k_at_the_start():
    _, metrics = one_update(shared_learner(model=BALANCED), packed(2))
    assert MODEL.experts_per_token <= metrics["router_balance"] < 1.5 * MODEL.experts_per_token


@pytest.mark.slow
def test_a_dense_model_reports_nothing_about_routers():
    _, metrics = one_update(shared_learner(model=tuple(DENSE.items())), packed(2))
    assert metrics["loss"] and not [name for name in metrics if name.startswith("router")]


@pytest.mark.long
def test_a_step_whose_scoring_counted_the_experts_makes_no_pass_to_count_them(monkeypatch):
    learner = shared_learner(model=BALANCED)
    passes = []
    count = learner._count_experts

    def count_experts(*inputs):
        passes.append(1)
        return count(*inputs)

    monkeypatch.setattr(learner, "_count_experts", count_experts)
    plain = packed(2)
    expected = one_update(learner, plain)
    assert len(passes) == len(plain) > 1
    scored = learner.score_and_count(learner.init(seed=0).params, plain)
    counted = [
        batch._replace(expert_counts_LE=counts_LE)
        for batch, (_, counts_LE) in zip(plain, scored, strict=True)
    ]
    got = one_update(learner, counted)
    assert len(passes) == len(plain)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    skewed = [batch._replace(expert_counts_LE=batch.expert_counts_LE * 2) for batch in counted]
    assert one_update(learner, skewed)[1]["router_balance"] == pytest.approx(
        2 * expected[1]["router_balance"]
    )  # they are what the loss reads
    partly = [counted[0], *plain[1:]]
    one_update(learner, partly)
    assert len(passes) == 2 * len(plain)


def test_sft_learns_a_batch_by_heart():
    learner = make_learner("sft")
    state = learner.init(seed=0)
    batches = packed(8, purpose="sft")
    denominators = count_denominators(batches)
    losses, entropies = [], []
    for _ in range(40):
        state, metrics = learner.update(state, batches, denominators)
        losses.append(float(metrics["loss"]))
        entropies.append(float(metrics["entropy"]))
    assert losses[0] > 3.5 and losses[-1] < 0.5 * losses[0], losses
    # At first all tokens are equally likely; then the model knows what it is trained on.
    assert 0.95 < entropies[0] / np.log(MODEL.vocab_size) < 1.0
    assert entropies[-1] < 0.7 * entropies[0], entropies


@pytest.mark.long
def test_two_runs_of_one_seed_are_bitwise_equal():
    one, two = (one_update(shared_learner(), packed(2)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


@pytest.mark.slow
def test_moments_in_the_hosts_memory_give_the_same_update():
    learner = make_learner("ipa", {"fsdp": 2, "expert": 2})
    away = dataclasses.replace(learner, offload_moments=True)
    kinds = {
        leaf.sharding.memory_kind
        for leaf in jax.tree.leaves(away.init(seed=0).opt_state)
        if leaf.ndim
    }
    assert kinds == {"pinned_host"}
    one, other = one_update(learner, packed(8)), one_update(away, packed(8))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_an_update_without_rows_is_refused_by_name():
    learner = shared_learner()
    with pytest.raises(ValueError, match="a step without rows makes no update"):
        learner.update(learner.state, [], count_denominators([]))
