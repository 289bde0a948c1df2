"""Adapters against the full model: the same numbers, the projected gradients, on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rome.losses import LOSSES, LossConfig, count_denominators
from rome.model.lora import MATRICES, Lora, adapter_shapes, find_targets
from rome.model.ops.low_rank import SUFFIX
from rome.model.sharding import make_mesh
from rome.train.state import make_optimizer
from rome.train.step import Learner
from tests.rome.model import small
from tests.rome.train.test_step import MODEL, packed

DENSE_TOO = dataclasses.replace(
    MODEL, num_layers=3, dense_layers=(1,), intermediate_size=24, attention_bias=True
)
BALANCED = dataclasses.replace(MODEL, router_aux_loss_coef=0.01, scan_layers=True, remat="full")


def learner_of(config, lora, mesh=None, loss="ipa", rate=None):
    if rate is None:
        optimizer = optax.sgd(1.0)  # so that an update is the gradient
    else:
        optimizer = make_optimizer(
            learning_rate=rate, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
        )
    meshed = make_mesh(mesh or {}, config)
    return Learner(config, LOSSES[loss], LossConfig(), optimizer, meshed, lora=lora)


def lora_of(config, targets="all", rank=3):
    return Lora(rank, 4.0, find_targets(targets, config))


def random_adapters(config, lora, seed=1):
    random = np.random.RandomState(seed)

    def draw(leaf):
        return (0.2 * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, adapter_shapes(config, lora))


def merged(base, adapters, lora):
    """The full model: every product added to its matrix, by NumPy in float64."""
    params = jax.tree.map(np.copy, base)
    for group, pairs in adapters["layers"].items():
        for pair, value in pairs.items():
            weight = params["layers"][group][pair.removesuffix(SUFFIX)]
            a, b, _, _ = flat(group, pair, value, weight.shape)
            weight += (lora.scale * a @ b).reshape(weight.shape).astype(np.float32)
    return params


def flat(group, pair, value, shape):
    """A [stack, in, r] and B [stack, r, out] in float64, and the flat sizes in and out."""
    _, stacked, inputs = MATRICES[group, pair.removesuffix(SUFFIX)]
    stack = int(np.prod(shape[:stacked]))
    ins = int(np.prod(shape[stacked : stacked + inputs]))
    outs = int(np.prod(shape[stacked + inputs :]))
    a = np.asarray(value["a"], np.float64).reshape(stack, ins, -1)
    b = np.asarray(value["b"], np.float64).reshape(stack, -1, outs)
    return a, b, ins, outs


def step_of(learner, params, batches):
    """Scores before and the trained parameters after one update of plain gradient descent."""
    scores = learner.score(params, batches)
    batches = [
        batch._replace(logp_old_BT=score + 0.05 * np.sin(7.0 * batch.tokens_BT).astype(np.float32))
        for batch, score in zip(batches, scores, strict=True)
    ]
    state, metrics = learner.update(learner.start(params), batches, count_denominators(batches))
    return scores, jax.device_get(state.params), jax.device_get(metrics)


def adapted_step(config, mesh=None):
    """The base, the adapters, and scores, gradients and metrics of a step of them."""
    lora = lora_of(config)
    base = small.random_params(config, scale=0.1)
    adapters = random_adapters(config, lora)
    learner = learner_of(config, lora, mesh)
    learner.freeze(base)
    scores, trained, metrics = step_of(learner, jax.tree.map(np.copy, adapters), packed(24))
    return base, adapters, (scores, jax.tree.map(np.subtract, adapters, trained), metrics)


def full_step(config, params):
    """Scores, gradients and metrics of the same step of the full model."""
    learner = learner_of(config, None)
    scores, trained, metrics = step_of(learner, jax.tree.map(np.copy, params), packed(24))
    return scores, jax.tree.map(np.subtract, params, trained), metrics


def assert_projected(lora, adapters, gradients, full_gradients):
    """dA = s dW B^T and dB = s A^T dW."""
    for group, pairs in adapters["layers"].items():
        for pair, value in pairs.items():
            d_weight = full_gradients["layers"][group][pair.removesuffix(SUFFIX)]
            a, b, ins, outs = flat(group, pair, value, d_weight.shape)
            d_w = d_weight.astype(np.float64).reshape(-1, ins, outs)
            own = gradients["layers"][group][pair]
            for found, wanted in (
                (own["a"], lora.scale * d_w @ b.swapaxes(1, 2)),
                (own["b"], lora.scale * a.swapaxes(1, 2) @ d_w),
            ):
                assert np.abs(wanted).max() > 1e-6
                np.testing.assert_allclose(
                    found, wanted.reshape(found.shape), atol=1e-5, rtol=1e-3, err_msg=pair
                )


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MODEL, id="experts", marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(MODEL, scan_layers=True, remat="none"),
            id="scan",
            marks=pytest.mark.slow,
        ),
        pytest.param(BALANCED, id="scan, remat, balance", marks=pytest.mark.slow),
        pytest.param(DENSE_TOO, id="dense layers"),
    ],
)
def test_scores_are_those_of_the_merged_model_and_gradients_its_projections(config):
    lora = lora_of(config)
    base, adapters, (scores, gradients, metrics) = adapted_step(config)
    full_scores, full_gradients, full_metrics = full_step(config, merged(base, adapters, lora))
    for score, full_score in zip(scores, full_scores, strict=True):
        np.testing.assert_allclose(score, full_score, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], full_metrics["loss"], atol=1e-5)
    assert_projected(lora, adapters, gradients, full_gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2}, {"replica": 2}],
    ids=str,
)
def test_a_mesh_changes_neither_scores_nor_gradients(mesh):
    config = dataclasses.replace(MODEL, scan_layers=True, remat="full")
    _, _, (scores, gradients, _) = adapted_step(config, mesh)
    _, _, (alone, alone_gradients, _) = adapted_step(config)
    for one, other in zip(scores, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-3),
        gradients,
        alone_gradients,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_added_on_the_mesh_and_rounded_once(dtype):
    """What an engine inside the trainer is handed; the base stays as it was."""
    config = dataclasses.replace(DENSE_TOO, dtype=dtype)
    lora = lora_of(config, "attention,mlp")
    learner = learner_of(config, lora, {"fsdp": 2, "tensor": 2})
    learner.freeze(small.random_params(config, scale=0.1))
    base = jax.device_get(learner.base)
    adapters = random_adapters(config, lora)
    found = learner.merged(learner.start(adapters).params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    exact = merged(jax.tree.map(lambda leaf: leaf.astype(np.float32), base), adapters, lora)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            one.astype(np.float32), other, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-6
        ),
        jax.device_get(found),
        exact,
    )
    np.testing.assert_array_equal(found["layers"]["moe"]["up"], base["layers"]["moe"]["up"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(learner.base), base)


def bfloat16_learner():
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    lora = lora_of(config)
    learner = learner_of(config, lora, rate=1e-2)
    learner.freeze(small.random_params(config, scale=0.1))
    return learner, random_adapters(config, lora)


@pytest.mark.slow
def test_what_is_kept_of_a_version_is_its_adapters_alone_and_scores_it_bitwise():
    learner, adapters = bfloat16_learner()
    state = learner.start(adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(learner.base)} == {jnp.dtype("bfloat16")}
    batches = packed(24)
    before = learner.score(state.params, batches)
    kept = learner.keep(state.params)
    sizes = [leaf.size for leaf in jax.tree.leaves(kept)]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    denominators = count_denominators(batches)
    filled = [b._replace(logp_old_BT=s) for b, s in zip(batches, before, strict=True)]
    state, _ = learner.update(state, filled, denominators)
    assert any(
        (one != two).any()
        for one, two in zip(learner.score(state.params, batches), before, strict=True)
    )
    recalled = learner.score(learner.recall(kept), batches)
    for one, two in zip(recalled, before, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.long
def test_the_optimizer_knows_adapters_alone_and_the_base_stays_as_it_was():
    learner, adapters = bfloat16_learner()
    base = jax.device_get(learner.base)
    state = learner.start(adapters)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert sum(leaf.size for leaf in moments) == 2 * count
    batches = packed(8)  # several micro-batches
    scores = learner.score(state.params, batches)
    filled = [b._replace(logp_old_BT=s) for b, s in zip(batches, scores, strict=True)]
    state, metrics = learner.update(state, filled, count_denominators(batches))
    assert np.isfinite(metrics["gradient_norm"]) and metrics["gradient_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, base, jax.device_get(learner.base))


@pytest.mark.long
def test_replayed_routes_are_replayed_with_adapters_too():
    lora = lora_of(MODEL)
    learner = learner_of(MODEL, lora)
    learner.freeze(small.random_params(MODEL, scale=0.1))
    adapters = random_adapters(MODEL, lora)
    (batch,) = packed(24)
    ((logp_BT, counts_LE, routes_BTLk),) = learner.score_and_record(adapters, [batch])
    other = learner.start(random_adapters(MODEL, lora, seed=9)).params
    own = learner.score_and_count(other, [batch])[0]
    ((_, replayed_LE),) = learner.score_and_count(other, [batch._replace(routes_BTLk=routes_BTLk)])
    np.testing.assert_array_equal(replayed_LE, counts_LE)
    assert (own[1] != counts_LE).any() and np.isfinite(logp_BT).all()
