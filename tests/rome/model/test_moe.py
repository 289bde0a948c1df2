"""Router and experts: every form against a plain NumPy loop, at any imbalance."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.config import PRESETS
from rome.model.moe import MoE, RouterStats, load_metrics, route, router_loss
from rome.model.ops import experts as ops
from rome.model.ops.experts import NO_EXPERT, capacity, drop_beyond, experts, experts_megablox
from rome.model.ops.experts_cpu import TILES

N, D, E, F, K = 150, 12, 5, 20, 2
CONFIG = dataclasses.replace(
    PRESETS["tiny"], hidden_size=D, num_experts=E, moe_intermediate_size=F, experts_per_token=K
)
LOADS = {
    "random": lambda random: np.stack([random.permutation(E)[:K] for _ in range(N)]),
    "everyone_to_two": lambda random: np.tile([3, 1], (N, 1)),
    "one_expert_idle": lambda random: np.stack(
        [1 + random.permutation(E - 1)[:K] for _ in range(N)]
    ),
    "one_token_alone": lambda random: np.concatenate([[[4, 0]], np.tile([1, 2], (N - 1, 1))]),
}


def arrays(load, seed=0):
    random = np.random.RandomState(seed)
    shapes = ((N, D), (E, D, F), (E, D, F), (E, F, D), (N, K))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes] + [
        jnp.asarray(LOADS[load](random), jnp.int32)
    ]


FORMS = {
    name: functools.partial(experts, implementation=name)
    for name in ("dense", "sorted", "ragged", "auto")
}
FORMS["megablox"] = functools.partial(
    experts_megablox, interpret=True
)  # the kernel's program, run by the CPU


def experts_by_loop(x_ND, gate_EDF, up_EDF, down_EFD, weights_Nk, ids_Nk):
    """Float64, one token and one expert at a time."""
    out_ND = np.zeros((N, D))
    for n in range(N):
        for weight, e in zip(weights_Nk[n].astype(np.float64), ids_Nk[n], strict=True):
            gate_F, up_F = (
                x_ND[n].astype(np.float64) @ gate_EDF[e],
                x_ND[n].astype(np.float64) @ up_EDF[e],
            )
            out_ND[n] += weight * (gate_F / (1 + np.exp(-gate_F)) * up_F) @ down_EFD[e]
    return out_ND


@pytest.mark.long
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_a_loop_over_tokens_whatever_the_load(form, load):
    inputs = arrays(load)
    np.testing.assert_allclose(
        jax.jit(FORMS[form])(*inputs), experts_by_loop(*inputs), rtol=1e-4, atol=2e-4
    )


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_is_not_here_adds_nothing(form):
    """What a device of an expert-parallel mesh computes: its own experts, on tokens that chose
    others too.
    """
    *floats, ids_Nk = arrays("random")
    x_ND, _gate_EDF, _up_EDF, _down_EFD, _weights_Nk = floats
    here_Nk = (ids_Nk >= 1) & (ids_Nk < 4)

    def some(*floats):
        return FORMS[form](floats[0], *(w[1:4] for w in floats[1:4]), floats[4], ids_Nk - 1)

    def oracle(*floats):
        return experts(*floats[:4], jnp.where(here_Nk, floats[4], 0.0), ids_Nk, "dense")

    np.testing.assert_allclose(jax.jit(some)(*floats), oracle(*floats), rtol=1e-4, atol=2e-4)

    def summed(function):
        return jax.jit(
            jax.grad(
                lambda *floats: jnp.sum(function(*floats) * jnp.cos(x_ND)), argnums=(0, 1, 2, 3, 4)
            )
        )(*floats)

    for one, other in zip(summed(some), summed(oracle), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@functools.cache
def value_and_gradients(form):
    """The compiled value of a weighed output and its gradients, shared by the tests.

    "FORM in passes" multiplies 40 of the 300 choices at a time.
    """
    name, _, in_passes = form.partition(" in ")
    run = functools.partial(FORMS[name], rows=40) if in_passes else FORMS[name]

    def value(*inputs):
        weights_ND = np.random.RandomState(9).standard_normal((N, D)).astype(np.float32)
        return jnp.sum(weights_ND * run(*inputs))

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3, 4)))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", ["sorted", "ragged", "megablox"])
def test_gradients_of_every_form_equal_those_of_the_dense_oracle(form, load):
    inputs = arrays(load)
    _, gradients = value_and_gradients(form)(*inputs)
    _, expected = value_and_gradients("dense")(*inputs)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("preset", ["qwen3_30b_a3b", "qwen3_235b_a22b"])
def test_tiles_of_a_published_model_are_full_in_each_of_its_three_matmuls(preset):
    config = PRESETS[preset]
    sizes = {"D": config.hidden_size, "F": config.moe_intermediate_size}
    for name, size in sizes.items():
        for most in (ops.MEGABLOX_DEPTH, ops.MEGABLOX_COLUMNS):
            side = ops._side(size, most)
            assert (size % side == 0 and most / 2 < side <= most) or side == size, (name, most)
    assert ops._side(200, 1024) == 200  # of no whole lanes


@pytest.mark.long
@pytest.mark.parametrize(
    ("rows", "here", "most"),
    [  # the pod's ring and exchange; few rows
        pytest.param(16384, 32, 1.5, marks=pytest.mark.slow),
        (16384, 8, 1.12),
        pytest.param(2048, 16, 2.0, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_visits_few_more_rows_than_its_experts_have(rows, here, most):
    tile = ops.row_tile(ops.room(rows), here)
    sizes = np.random.default_rng(0).multinomial(rows, np.full(here, 1 / here))
    kernel = ops._megablox_kernels()
    _, tiles = kernel.make_group_metadata(
        group_sizes=jnp.asarray(sizes, jnp.int32),
        m=ops.room(rows),
        tm=tile,
        start_group=jnp.asarray(0),
        num_nonzero_groups=here,
        visit_empty_groups=False,
    )
    visited = int(tiles) * tile
    assert visited / rows <= most
    assert visited <= rows + (here - 1) * tile + tile  # what the compile table counts


@pytest.mark.long
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

        both = [
            value_and_gradients(form)(x, gate, up, down, weights, ids)
            for form in ("sorted", "dense")
        ]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), *both)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sorted_row_does_not_depend_on_its_neighbours_nor_on_where_they_are_sent(dtype):
    x, gate, up, down, weights, ids = arrays("random")
    ids = np.array(ids)
    run = jax.jit(
        lambda x, ids: experts(
            *(jnp.asarray(a, dtype) for a in (x, gate, up, down)), weights, ids, "sorted"
        )
    )
    before = run(x, ids)[7]
    x[:7], x[8:], ids[:7], ids[8:60] = (
        1.0,
        x[8:] * 3,
        [ids[7, 0], (ids[7, 0] + 1) % E],
        [ids[7, 1], (ids[7, 1] + 1) % E],
    )
    np.testing.assert_array_equal(run(x, ids)[7], before)


@pytest.mark.long
def test_a_token_of_weight_nothing_and_gradient_nothing_leaves_the_weights_alone():
    x, gate, up, down, weights, ids = arrays("random")

    def value(x, *ws):
        return jnp.sum(experts(x, *ws, weights, ids, "sorted")[1:])

    def gradients(x):
        return jax.jit(jax.grad(value, argnums=(1, 2, 3)))(x, gate, up, down)

    before = gradients(jnp.asarray(x))
    jax.tree.map(np.testing.assert_array_equal, before, gradients(jnp.asarray(x).at[0].set(50.0)))


@pytest.mark.long
def test_fewer_choices_than_a_tile_and_more_experts_than_choices_work():
    x, gate, up, down, weights, ids = arrays("random")
    few = [x[:1], gate, up, down, weights[:1], ids[:1]]
    assert min(TILES) > K
    np.testing.assert_allclose(
        experts(*few, "sorted"), experts(*few, "dense"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.long
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", ["ragged", "megablox"])
def test_a_grouped_matmul_in_several_passes_gives_the_numbers_and_gradients_of_one(form, load):
    *floats, ids_Nk = arrays(load)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3),
        value_and_gradients(f"{form} in passes")(*floats, ids_Nk),
        value_and_gradients("dense")(*floats, ids_Nk),
    )


def test_an_unknown_form_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'gshard'.*dense"):
        experts(*arrays("random"), "gshard")


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_router_takes_the_most_probable_experts_and_weighs_them_by_softmax(renormalise):
    config = dataclasses.replace(CONFIG, norm_topk_prob=renormalise)
    logits_NE = np.random.RandomState(0).standard_normal((N, E)).astype(np.float32)
    ids_Nk, weights_Nk, probs_NE, own_Nk = route(jnp.asarray(logits_NE), config)
    np.testing.assert_array_equal(own_Nk, ids_Nk)
    probs = np.exp(logits_NE) / np.exp(logits_NE).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ids_Nk, np.argsort(-logits_NE, axis=1)[:, :K])
    expected = -np.sort(-probs, axis=1)[:, :K]
    np.testing.assert_allclose(
        weights_Nk,
        expected / expected.sum(axis=1, keepdims=True) if renormalise else expected,
        rtol=1e-5,
    )
    np.testing.assert_allclose(probs_NE, probs, rtol=1e-5)


def test_replayed_experts_get_their_weights_from_the_dense_logits():
    logits_NE = jnp.asarray(np.random.RandomState(0).standard_normal((N, E)), jnp.float32)
    least_Nk = jnp.argsort(logits_NE, axis=1)[:, :K]
    ids_Nk, weights_Nk, probs_NE, own_Nk = route(logits_NE, CONFIG, least_Nk)
    np.testing.assert_array_equal(ids_Nk, least_Nk)
    np.testing.assert_array_equal(own_Nk, route(logits_NE, CONFIG)[0])
    chosen = np.take_along_axis(np.asarray(probs_NE), np.asarray(least_Nk), axis=1)
    np.testing.assert_allclose(weights_Nk, chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)


def test_an_expert_id_out_of_range_is_loud():
    logits_NE = jnp.zeros((2, E))
    assert np.isnan(route(logits_NE, CONFIG, jnp.array([[0, E], [0, 1]]))[1][0]).any()


@pytest.mark.long
def test_router_statistics_count_real_tokens_only():
    x_BTD = jax.random.normal(jax.random.key(0), (2, 7, D))
    real_BT = jnp.arange(7)[None] < jnp.array([[4], [6]])
    params = MoE(CONFIG).init(jax.random.key(1), x_BTD, real_BT)
    out_BTD, ids_BTk, router = MoE(CONFIG).apply(params, x_BTD, real_BT)
    np.testing.assert_array_equal(
        router.counts_E, np.bincount(np.asarray(ids_BTk)[np.asarray(real_BT)].ravel(), minlength=E)
    )
    assert router.counts_E.sum() == K * 10 and router.dropped == 0
    np.testing.assert_allclose(router.prob_sum_E.sum(), 10, rtol=1e-6)
    assert not np.any(np.asarray(out_BTD)[~np.asarray(real_BT)])  # padding is given to no expert
    logits = np.asarray(x_BTD, np.float64)[np.asarray(real_BT)] @ np.asarray(
        params["params"]["router"], np.float64
    )
    log_sum = np.log(np.exp(logits).sum(axis=1))
    probs = np.exp(logits - log_sum[:, None])
    np.testing.assert_allclose(router.z, (log_sum**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(router.entropy, -(probs * np.log(probs)).sum(), rtol=1e-5)


def stats(counts_LE, prob_sum_LE, tokens):
    zeros_L = jnp.zeros(len(counts_LE))
    return RouterStats(
        jnp.asarray(counts_LE),
        jnp.asarray(prob_sum_LE),
        zeros_L,
        zeros_L,
        zeros_L,
        jnp.float32(tokens),
    )


def test_loads_of_a_layer_are_summed_up_by_maximum_and_gini():
    config = dataclasses.replace(CONFIG, num_layers=2)
    even = load_metrics(jnp.full((2, E), 4.0), config)
    np.testing.assert_allclose(
        [even["router_load_max"], even["router_gini"]], [1.0, 0.0], atol=1e-6
    )
    counts = np.array([[1.0, 2, 3, 4, 10], [20.0, 0, 0, 0, 0]])
    skewed = load_metrics(jnp.asarray(counts), config)
    pairs = [
        np.abs(row[:, None] - row[None]).sum() / (2 * E * row.sum()) for row in counts
    ]  # Gini's own definition
    np.testing.assert_allclose(skewed["router_gini"], np.mean(pairs), rtol=1e-6)
    np.testing.assert_allclose(skewed["router_load_max"], (2.5 + 5) / 2, rtol=1e-6)


@pytest.mark.long
def test_an_expert_takes_its_capacity_and_the_rest_is_dropped_and_reported():
    ids_Nk = jnp.array([[0, 1], [0, 2], [0, 1], [3, 0], [NO_EXPERT, 1]])
    np.testing.assert_array_equal(
        drop_beyond(ids_Nk, 2, E), [[0, 1], [0, 2], [-1, 1], [3, -1], [-1, -1]]
    )
    config = dataclasses.replace(CONFIG, capacity_factor=0.5)
    x_BTD, real_BT = jax.random.normal(jax.random.key(0), (1, 40, D)), jnp.arange(40)[None] < 30
    params = MoE(config).init(jax.random.key(1), x_BTD, real_BT)
    _, own_BTk, router = MoE(config).apply(params, x_BTD, real_BT)
    taken = np.minimum(
        np.bincount(np.asarray(own_BTk)[0, :30].ravel(), minlength=E), capacity(40 * K, E, 0.5)
    ).sum()
    assert 0 < router.dropped == 30 * K - taken


def test_the_router_loss_is_k_when_balanced_and_more_otherwise():
    config = dataclasses.replace(CONFIG, num_layers=2)
    even = stats(np.full((2, E), 10.0 * K / E), np.full((2, E), 10.0 / E), 10)
    np.testing.assert_allclose(router_loss(even, config), K, rtol=1e-6)
    skewed = stats(np.tile([10.0, 10, 0, 0, 0], (2, 1)), np.tile([5.0, 5, 0, 0, 0], (2, 1)), 10)
    np.testing.assert_allclose(router_loss(skewed, config), E * 2 * 1.0 * 0.5, rtol=1e-6)


def test_the_router_loss_moves_probability_off_the_busy_expert_and_is_finite_without_tokens():
    config = dataclasses.replace(CONFIG, num_layers=1)
    gradient_LE = jax.grad(
        lambda prob_LE: router_loss(stats(np.array([[9.0, 1, 0, 0, 0]]), prob_LE, 5), config)
    )(jnp.ones((1, E)))
    assert gradient_LE[0, 0] > gradient_LE[0, 1] > gradient_LE[0, 2] == 0
    nothing = stats(np.zeros((1, E)), np.zeros((1, E)), 0)
    assert router_loss(nothing, config) == 0
