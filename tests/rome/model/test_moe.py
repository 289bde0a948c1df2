"""Router and experts: every form against a plain NumPy loop, at any imbalance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.config import PRESETS
from rome.model.experts import IMPLEMENTATIONS, experts
from rome.model.experts_cpu import TILES
from rome.model.moe import MoE, RouterStats, route, router_loss

N, D, E, F, K = 150, 12, 5, 20, 2
CONFIG = dataclasses.replace(PRESETS["tiny"], hidden_size=D, num_experts=E, moe_intermediate_size=F, experts_per_token=K)
LOADS = {
    "random": lambda random: np.stack([random.permutation(E)[:K] for _ in range(N)]),
    "everyone_to_two": lambda random: np.tile([3, 1], (N, 1)),
    "one_expert_idle": lambda random: np.stack([1 + random.permutation(E - 1)[:K] for _ in range(N)]),
    "one_token_alone": lambda random: np.concatenate([[[4, 0]], np.tile([1, 2], (N - 1, 1))]),
}


def arrays(load, seed=0):
    random = np.random.RandomState(seed)
    shapes = ((N, D), (E, D, F), (E, D, F), (E, F, D), (N, K))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes] + [jnp.asarray(LOADS[load](random), jnp.int32)]


def experts_by_loop(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk):
    """Float64, one token and one expert at a time."""
    out_ND = np.zeros((N, D))
    for n in range(N):
        for weight, e in zip(weights_Nk[n].astype(np.float64), ids_Nk[n]):
            gate_F, up_F = x_ND[n].astype(np.float64) @ gate_EDF[e], x_ND[n].astype(np.float64) @ up_EDF[e]
            out_ND[n] += weight * (gate_F / (1 + np.exp(-gate_F)) * up_F) @ down_EFD[e]
    return out_ND


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_form_equals_a_loop_over_tokens_whatever_the_load(implementation, load):
    inputs = arrays(load)
    np.testing.assert_allclose(jax.jit(experts, static_argnums=6)(*inputs, implementation), experts_by_loop(*inputs), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("implementation", ["sorted", "ragged"])
def test_gradients_of_every_form_equal_those_of_the_dense_oracle(implementation, load):
    inputs = arrays(load)
    weights_ND = np.random.RandomState(9).standard_normal((N, D)).astype(np.float32)

    def gradients(implementation):
        objective = lambda *floats: jnp.sum(weights_ND * experts(*floats, inputs[5], implementation))
        return jax.jit(jax.grad(objective, argnums=(0, 1, 2, 3, 4)))(*inputs[:5])

    for one, other in zip(gradients(implementation), gradients("dense")):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", ["dense", "sorted", "ragged"])
def test_experts_compute_in_the_type_of_their_input(implementation):
    inputs = [jnp.asarray(a, jnp.bfloat16) for a in arrays("random")[:4]] + arrays("random")[4:]
    assert experts(*inputs, implementation).dtype == jnp.bfloat16


def test_a_dense_row_does_not_depend_on_its_neighbours():
    inputs = arrays("random")
    before = experts(*inputs, "dense")
    inputs[0][1:] += 1.0
    np.testing.assert_array_equal(experts(*inputs, "dense")[0], before[0])


@pytest.mark.parametrize("size", TILES)
def test_loads_at_the_edges_of_the_tiles_give_the_numbers_and_gradients_of_the_dense_oracle(size):
    for rows in (size - 1, size, size + 1):
        x, gate, up, down, weights, _ = arrays("random")
        ids = jnp.asarray(np.where(np.arange(N)[:, None] < rows, [[0, 4]], [[2, 3]]), jnp.int32)
        value = lambda form, *floats: jnp.sum(jnp.sin(experts(*floats, ids, form)))  # noqa: B023, E731
        both = [jax.jit(jax.value_and_grad(functools.partial(value, form), argnums=(0, 1, 2, 3, 4)))(x, gate, up, down, weights) for form in ("sorted", "dense")]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), *both)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sorted_row_does_not_depend_on_its_neighbours_nor_on_where_they_are_sent(dtype):
    x, gate, up, down, weights, ids = arrays("random")
    ids = np.array(ids)
    run = jax.jit(lambda x, ids: experts(*(jnp.asarray(a, dtype) for a in (x, gate, up, down)), weights, ids, "sorted"))
    before = run(x, ids)[7]
    x[:7], x[8:], ids[:7], ids[8:60] = 1.0, x[8:] * 3, [ids[7, 0], (ids[7, 0] + 1) % E], [ids[7, 1], (ids[7, 1] + 1) % E]
    np.testing.assert_array_equal(run(x, ids)[7], before)


def test_a_token_of_weight_nothing_and_gradient_nothing_leaves_the_weights_alone():
    x, gate, up, down, weights, ids = arrays("random")
    value = lambda x, *ws: jnp.sum(experts(x, *ws, weights, ids, "sorted")[1:])  # noqa: E731
    gradients = lambda x: jax.jit(jax.grad(value, argnums=(1, 2, 3)))(x, gate, up, down)  # noqa: E731
    before = gradients(jnp.asarray(x))
    jax.tree.map(np.testing.assert_array_equal, before, gradients(jnp.asarray(x).at[0].set(50.0)))


def test_fewer_choices_than_a_tile_and_more_experts_than_choices_work():
    x, gate, up, down, weights, ids = arrays("random")
    few = [x[:1], gate, up, down, weights[:1], ids[:1]]
    assert min(TILES) > K
    np.testing.assert_allclose(experts(*few, "sorted"), experts(*few, "dense"), rtol=1e-4, atol=1e-4)


def test_an_unknown_form_is_refused_by_name():
    with pytest.raises(ValueError, match="'gshard'.*dense"):
        experts(*arrays("random"), "gshard")


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_router_takes_the_most_probable_experts_and_weighs_them_by_softmax(renormalise):
    config = dataclasses.replace(CONFIG, norm_topk_prob=renormalise)
    logits_NE = np.random.RandomState(0).standard_normal((N, E)).astype(np.float32)
    ids_Nk, weights_Nk, probs_NE = route(jnp.asarray(logits_NE), config)
    probs = np.exp(logits_NE) / np.exp(logits_NE).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ids_Nk, np.argsort(-logits_NE, axis=1)[:, :K])
    expected = -np.sort(-probs, axis=1)[:, :K]
    np.testing.assert_allclose(weights_Nk, expected / expected.sum(axis=1, keepdims=True) if renormalise else expected, rtol=1e-5)
    np.testing.assert_allclose(probs_NE, probs, rtol=1e-5)


def test_replayed_experts_get_their_weights_from_the_dense_logits():
    logits_NE = jnp.asarray(np.random.RandomState(0).standard_normal((N, E)), jnp.float32)
    least_Nk = jnp.argsort(logits_NE, axis=1)[:, :K]
    ids_Nk, weights_Nk, probs_NE = route(logits_NE, CONFIG, least_Nk)
    np.testing.assert_array_equal(ids_Nk, least_Nk)
    chosen = np.take_along_axis(np.asarray(probs_NE), np.asarray(least_Nk), axis=1)
    np.testing.assert_allclose(weights_Nk, chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)


def test_an_expert_id_out_of_range_is_loud():
    logits_NE = jnp.zeros((2, E))
    assert np.isnan(route(logits_NE, CONFIG, jnp.array([[0, E], [0, 1]]))[1][0]).any()


def test_router_statistics_count_real_tokens_only():
    x_BTD = jax.random.normal(jax.random.key(0), (2, 7, D))
    real_BT = jnp.arange(7)[None] < jnp.array([[4], [6]])
    params = MoE(CONFIG).init(jax.random.key(1), x_BTD, real_BT)
    _, ids_BTk, counts_E, prob_sum_E = MoE(CONFIG).apply(params, x_BTD, real_BT)
    np.testing.assert_array_equal(counts_E, np.bincount(np.asarray(ids_BTk)[np.asarray(real_BT)].ravel(), minlength=E))
    assert counts_E.sum() == K * 10
    np.testing.assert_allclose(prob_sum_E.sum(), 10, rtol=1e-6)


def test_the_router_loss_is_k_when_balanced_and_more_otherwise():
    config = dataclasses.replace(CONFIG, num_layers=2)
    even = RouterStats(jnp.full((2, E), 10.0 * K / E), jnp.full((2, E), 10.0 / E), jnp.float32(10))
    np.testing.assert_allclose(router_loss(even, config), K, rtol=1e-6)
    skewed = RouterStats(jnp.tile(jnp.array([10.0, 10, 0, 0, 0]), (2, 1)), jnp.tile(jnp.array([5.0, 5, 0, 0, 0]), (2, 1)), jnp.float32(10))
    np.testing.assert_allclose(router_loss(skewed, config), E * 2 * 1.0 * 0.5, rtol=1e-6)


def test_the_router_loss_pushes_probability_away_from_the_busy_expert_and_is_finite_without_tokens():
    config = dataclasses.replace(CONFIG, num_layers=1)
    gradient_LE = jax.grad(lambda prob_LE: router_loss(RouterStats(jnp.array([[9.0, 1, 0, 0, 0]]), prob_LE, jnp.float32(5)), config))(jnp.ones((1, E)))
    assert gradient_LE[0, 0] > gradient_LE[0, 1] > gradient_LE[0, 2] == 0
    nothing = RouterStats(jnp.zeros((1, E)), jnp.zeros((1, E)), jnp.float32(0))
    assert router_loss(nothing, config) == 0
