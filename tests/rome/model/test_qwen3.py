"""The model as a whole: who sees whom, the two loops, remat, replayed routes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.ops import attention_cpu
from rome.model.ops.attention import attention
from rome.model.ops.paged import Pages
from rome.model.qwen3 import (
    Qwen3,
    head_kernel,
    init_params,
)
from rome.model.stacking import stack_layers, unstack_layers
from tests.rome.model.small import CONFIG, random_params


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, random_params(CONFIG))


def random_tokens(rows, length, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, CONFIG.vocab_size)


@functools.cache
def jitted(config, scan):
    return jax.jit(Qwen3(config, scan=scan).apply)


def apply(
    params, tokens_BT, positions_BT=None, segments_BT=None, *, config=CONFIG, scan=True, **inputs
):
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    segments_BT = jnp.ones_like(tokens_BT) if segments_BT is None else jnp.asarray(segments_BT)
    return jitted(config, scan)(
        {"params": params}, tokens_BT, jnp.asarray(positions_BT), segments_BT, **inputs
    )


def weigh(hidden_BTD):
    """A scalar that depends on all outputs in different ways."""
    return jnp.sum(
        hidden_BTD
        * jnp.cos(jnp.arange(hidden_BTD.size, dtype=jnp.float32)).reshape(hidden_BTD.shape)
    )


def assert_close(one, other, tolerance=2e-5):
    one, other = jax.device_get((one, other))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), one, other
    )


@jax.jit
def influence_of_inputs(params, tokens_BT, segments_BT, positions_BT):
    """|d hidden[t] / d embedding of token s|, [T, S], for a row of distinct tokens: each row of the
    embedding is then one input place.
    """

    def hidden(embedding_VD):
        return (
            Qwen3(CONFIG)
            .apply(
                {"params": params | {"embed": {"embedding": embedding_VD}}},
                tokens_BT,
                positions_BT,
                segments_BT,
            )
            .hidden_BTD[0]
        )

    influence_TDVD = jax.jacobian(hidden)(params["embed"]["embedding"])
    return jnp.abs(influence_TDVD[:, :, tokens_BT[0]]).sum(axis=(1, 3))


@pytest.mark.long
@pytest.mark.parametrize(
    "segments, positions",
    [
        ([1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 1, 2, 0, 1, 2, 3, 0, 0]),
    ],
    ids=["one_segment", "two_segments_and_padding"],
)
def test_a_token_sees_exactly_the_tokens_of_its_segment_up_to_itself(params, segments, positions):
    segments_T, positions_T = np.array(segments), np.array(positions)
    influence_TS = influence_of_inputs(
        params, jnp.arange(9)[None], segments_T[None], positions_T[None]
    )
    expected_TS = np.tril(segments_T[:, None] == segments_T[None]) & (segments_T != 0)[:, None]
    expected_TS |= np.eye(
        9, dtype=bool
    )  # every place sees itself through the residual stream, padding too
    np.testing.assert_array_equal(np.asarray(influence_TS) > 0, expected_TS)


@pytest.mark.long
def test_a_packed_row_equals_its_segments_alone(params):
    tokens_BT = random_tokens(1, 14)
    lengths = (5, 2, 5)
    segments_BT = np.concatenate(
        [np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(2, int)]
    )[None]
    positions_BT = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(2, int)])[None]
    packed = apply(params, tokens_BT, positions_BT, segments_BT)
    start, counts = 0, 0
    for n in lengths:
        alone = apply(params, tokens_BT[:, start : start + n])
        assert_close(packed.hidden_BTD[:, start : start + n], alone.hidden_BTD)
        np.testing.assert_array_equal(
            packed.routes_LBTK[:, :, start : start + n], alone.routes_LBTK
        )
        counts, start = counts + alone.router.counts_LE, start + n
    np.testing.assert_array_equal(packed.router.counts_LE, counts)
    assert packed.router.tokens == sum(lengths)


@pytest.mark.long
@pytest.mark.parametrize("layers", ["stacked", "tuple"])
def test_the_unrolled_model_equals_the_scanned_one(params, layers):
    own = unstack_layers(params, CONFIG) if layers == "tuple" else params
    tokens_BT = random_tokens(2, 9)
    scanned, unrolled = apply(params, tokens_BT), apply(own, tokens_BT, scan=False)
    assert_close(scanned._replace(routes_LBTK=0), unrolled._replace(routes_LBTK=0))
    np.testing.assert_array_equal(scanned.routes_LBTK, unrolled.routes_LBTK)


def test_stacking_undoes_unstacking(params):
    jax.tree.map(
        np.testing.assert_array_equal, stack_layers(unstack_layers(params, CONFIG)), params
    )


def gradients(params, config, scan):
    tokens_BT = random_tokens(2, 9)
    return jax.jit(
        jax.grad(lambda p: weigh(apply(p, tokens_BT, config=config, scan=scan).hidden_BTD))
    )(params)


@pytest.mark.slow
def test_gradients_are_the_same_with_and_without_remat_scanned_or_unrolled(params):
    expected = gradients(params, dataclasses.replace(CONFIG, remat="none"), scan=True)
    for remat, scan in (
        ("full", True),
        ("full", False),
        ("attention", True),
        ("offload", True),
        ("offload", False),
    ):
        assert_close(
            gradients(params, dataclasses.replace(CONFIG, remat=remat), scan), expected, 1e-4
        )


@pytest.mark.long
def test_padding_has_finite_outputs_and_changes_no_gradient(params):
    tokens_BT = random_tokens(2, 9)
    segments_BT = np.array([[1] * 6 + [0] * 3, [0] * 9])  # the second row is padding only

    @jax.jit
    @jax.grad
    def gradient(params, tokens_BT):
        hidden_BTD = apply(params, tokens_BT, segments_BT=segments_BT).hidden_BTD
        return weigh(jnp.where(segments_BT[..., None] != 0, hidden_BTD, 0.0))

    assert np.isfinite(apply(params, tokens_BT, segments_BT=segments_BT).hidden_BTD).all()
    own = gradient(params, tokens_BT)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))
    other = jnp.where(segments_BT != 0, tokens_BT, (tokens_BT + 1) % CONFIG.vocab_size)
    assert_close(gradient(params, other)["layers"], own["layers"])


@pytest.mark.long
def test_attention_of_a_query_that_sees_nothing_is_zero_with_a_zero_gradient():
    q = k = v = jax.random.normal(jax.random.key(0), (1, 4, 2, 4))
    places, nobody = jnp.arange(4)[None], jnp.zeros((1, 4), jnp.int32)

    def run(q, k, v):
        return attention(
            q,
            k,
            v,
            q_places_BT=places,
            k_places_BS=places,
            q_segments_BT=nobody,
            k_segments_BS=nobody,
        )

    assert (run(q, k, v) == 0).all()
    assert all(
        (g == 0).all()
        for g in jax.jit(jax.grad(lambda *qkv: jnp.sum(run(*qkv)), argnums=(0, 1, 2)))(q, k, v)
    )


@pytest.mark.parametrize("kept", [0, attention_cpu.KEPT_WEIGHTS])
@pytest.mark.parametrize(
    "length",
    [7, 16, 69, *(pytest.param(length, marks=pytest.mark.slow) for length in (8, 21, 64))],
)
def test_blocked_attention_equals_the_reference_with_its_gradients(length, kept, monkeypatch):
    monkeypatch.setattr(attention_cpu, "KEPT_WEIGHTS", kept)
    monkeypatch.setattr(attention_cpu, "QUERIES", 8)
    assert 64 <= attention_cpu.MAX_RANGES * 8 < 69  # the longest has ranges of several blocks
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [
        jax.random.normal(key, (2, length, heads, 4))
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    ]
    places = jnp.broadcast_to(jnp.arange(length), (2, length))
    segments = jnp.asarray(
        np.stack([np.arange(length) // 30 + 1, np.where(np.arange(length) < length - 5, 1, 0)])
    )

    def run(qkv, implementation):
        out = attention(
            *qkv,
            q_places_BT=places,
            k_places_BS=places,
            q_segments_BT=segments,
            k_segments_BS=segments,
            implementation=implementation,
            ordered=True,
        )
        return weigh(out), out

    outcomes = [
        jax.jit(jax.grad(run, has_aux=True), static_argnums=1)(qkv, implementation)
        for implementation in ("blocked", "reference")
    ]
    assert_close(*outcomes, 1e-4)


def test_replayed_routes_give_the_same_output_and_other_routes_another(params):
    tokens_BT = random_tokens(2, 9)
    free = apply(params, tokens_BT)
    replayed = apply(params, tokens_BT, routes_LBTK=free.routes_LBTK)
    assert_close(replayed.hidden_BTD, free.hidden_BTD, 1e-6)
    other_LBTK = (free.routes_LBTK + 1) % CONFIG.num_experts
    forced = apply(params, tokens_BT, routes_LBTK=other_LBTK)
    np.testing.assert_array_equal(
        forced.routes_LBTK[0], free.routes_LBTK[0]
    )  # what the first router would choose does not depend on it
    np.testing.assert_array_equal(
        forced.router.counts_LE,
        [np.bincount(np.ravel(ids), minlength=CONFIG.num_experts) for ids in other_LBTK],
    )
    assert np.abs(forced.hidden_BTD - free.hidden_BTD).max() > 1e-2


def test_tokens_without_a_recorded_route_choose_for_themselves(params):
    tokens_BT = random_tokens(2, 9)
    free = apply(params, tokens_BT)
    assert_close(
        apply(params, tokens_BT, routes_LBTK=jnp.full_like(free.routes_LBTK, -1)).hidden_BTD,
        free.hidden_BTD,
        1e-6,
    )
    changed_LBTK = (
        jnp.full_like(free.routes_LBTK, -1)
        .at[:, :, -1]
        .set((free.routes_LBTK[:, :, -1] + 1) % CONFIG.num_experts)
    )
    partly = apply(params, tokens_BT, routes_LBTK=changed_LBTK)
    assert_close(partly.hidden_BTD[:, :-1], free.hidden_BTD[:, :-1], 1e-6)
    assert np.abs(partly.hidden_BTD[:, -1] - free.hidden_BTD[:, -1]).min(axis=-1).max() > 1e-4


def test_the_router_learns_from_replayed_routes(params):
    tokens_BT = random_tokens(2, 9)
    routes_LBTK = (apply(params, tokens_BT).routes_LBTK + 1) % CONFIG.num_experts
    gradient = jax.jit(
        jax.grad(lambda p: weigh(apply(p, tokens_BT, routes_LBTK=routes_LBTK).hidden_BTD))
    )(params)
    assert (np.abs(gradient["layers"]["moe"]["router"]).max(axis=(1, 2)) > 0).all()


def test_inputs_of_a_wrong_shape_are_refused_with_the_shape_that_fits(params):
    tokens_BT = random_tokens(2, 9)
    with pytest.raises(ValueError, match=r"need \[layers, B, T, k\] = \(2, 2, 9, 2\)"):
        apply(params, tokens_BT, routes_LBTK=jnp.zeros((2, 2, 8, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        apply(params, tokens_BT, segments_BT=np.ones((2, 8), int))
    with pytest.raises(ValueError, match="pages take one row"):
        apply(params, tokens_BT, pages=Pages((), *[np.zeros(1, int)] * 4), scan=False)
    with pytest.raises(ValueError, match="scan=False"):
        apply(unstack_layers(params, CONFIG), tokens_BT, scan=True)
    with pytest.raises(ValueError, match="init_params"):
        Qwen3(CONFIG, scan=False).init(jax.random.key(0), tokens_BT, tokens_BT, tokens_BT)


def test_bfloat16_computes_near_float32_from_float32_parameters(params):
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    own = random_params(half, scale=0.1)
    tokens_BT = random_tokens(2, 9)
    exact = apply(own, tokens_BT)
    out = apply(own, tokens_BT, config=half, routes_LBTK=exact.routes_LBTK)
    assert out.hidden_BTD.dtype == jnp.bfloat16 and out.router.prob_sum_LE.dtype == jnp.float32
    np.testing.assert_allclose(out.hidden_BTD.astype(np.float32), exact.hidden_BTD, atol=0.1)


def test_a_tied_head_is_the_transposed_embedding_and_has_no_parameter_of_its_own():
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    own = random_params(config)
    assert "head" not in own
    np.testing.assert_array_equal(head_kernel(own, config), own["embed"]["embedding"].T)


@pytest.mark.long
def test_fresh_parameters_are_float32_normal_with_the_given_deviation_and_norms_of_one():
    config = dataclasses.replace(CONFIG, initializer_range=0.05)
    own = init_params(config, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        assert leaf.dtype == jnp.float32
        if path[-1].key == "scale":
            assert (leaf == 1).all()
        else:
            assert abs(leaf.mean()) < 0.02 and 0.03 < leaf.std() < 0.07
    gate_LEDF = own["layers"]["moe"]["gate"]
    assert (gate_LEDF[0] != gate_LEDF[1]).all() and (gate_LEDF[:, 0] != gate_LEDF[:, 1]).all()
    jax.tree.map(np.testing.assert_array_equal, init_params(config, jax.random.key(0)), own)
