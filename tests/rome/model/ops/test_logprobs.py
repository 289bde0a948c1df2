"""chunked_logprobs against a plain log-softmax over all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.ops import logprobs
from rome.model.ops.logprobs import chunked_logprobs
from rome.model.sharding import make_mesh

B, T, D, V = 2, 13, 8, 31


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    segments_BT = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T))),
        jnp.asarray(segments_BT),
    )


def loop(hidden_BTD, kernel_DV, tokens_BT, segments_BT, temperature):
    """[B, T] of (logp, entropy), float64."""
    result = np.zeros((2, B, T))
    for b in range(B):
        for t in range(1, T):
            if segments_BT[b, t] and segments_BT[b, t] == segments_BT[b, t - 1]:
                logits = (
                    np.asarray(hidden_BTD[b, t - 1], np.float64)
                    @ np.asarray(kernel_DV, np.float64)
                    / temperature
                )
                logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
                result[:, b, t] = logp[tokens_BT[b, t]], -(np.exp(logp) * logp).sum()
    return result


@pytest.mark.parametrize("block", [1, 4, 13, 128, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_equal_the_float64_loop(inputs, block, temperature):
    logp_BT, entropy_BT = chunked_logprobs(*inputs, temperature, block=block, with_entropy=True)
    np.testing.assert_allclose(
        np.stack([logp_BT, entropy_BT]), loop(*inputs, temperature), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(logp_BT, chunked_logprobs(*inputs, temperature, block=block))


@pytest.mark.long
def test_gradients_do_not_depend_on_the_block(inputs):
    hidden_BTD, kernel_DV, tokens_BT, segments_BT = inputs
    weight_BT = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)

    def plain(hidden_BTD, kernel_DV):
        logp_BTV = jax.nn.log_softmax(hidden_BTD @ kernel_DV / 0.7)
        taken = jnp.take_along_axis(logp_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1)[..., 0]
        same = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
        return jnp.sum(jnp.where(same, taken * weight_BT[:, 1:], 0))

    expected = jax.grad(plain, argnums=(0, 1))(hidden_BTD, kernel_DV)
    for block in (3, 128, None):

        def chunked(h, k, block=block):
            logp_BT = chunked_logprobs(h, k, tokens_BT, segments_BT, 0.7, block=block)
            return jnp.sum(weight_BT * logp_BT)

        for got, want in zip(
            jax.grad(chunked, argnums=(0, 1))(hidden_BTD, kernel_DV), expected, strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_parts_of_the_vocabulary_give_the_gradients_of_the_whole(inputs, monkeypatch):
    weight_BT = jnp.asarray(np.random.default_rng(1).normal(size=(B, T)), jnp.float32)
    hidden_BTD, kernel_DV, *rest = inputs
    kernel_DV = jnp.concatenate(
        [kernel_DV, kernel_DV[:, :5] * 0.5], axis=1
    )  # 36 tokens: 12 parts of 3

    def gradients():
        return jax.grad(
            lambda h, k: jnp.sum(weight_BT * chunked_logprobs(h, k, *rest, block=4)), argnums=(0, 1)
        )(hidden_BTD, kernel_DV)

    whole = gradients()
    monkeypatch.setattr(logprobs, "MAX_PART", 3)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        gradients(),
        whole,
    )
    assert [logprobs._vocabulary_parts(v) for v in (2, 7, 36)] == [1, 7, 12]


def test_no_array_of_all_positions_times_vocabulary_exists_forward_or_backward():
    rows, length, width, vocabulary = 2, 64, 4, 128
    shapes = (jnp.zeros((rows, length, width)), jnp.zeros((width, vocabulary)))
    tokens_BT = jnp.zeros((rows, length), jnp.int32)

    def value(h, k):
        return chunked_logprobs(h, k, tokens_BT, tokens_BT + 1, block=8, with_entropy=True)[0].sum()

    def largest(jaxpr):
        sizes = [
            v.aval.size
            for equation in jaxpr.eqns
            for v in equation.outvars
            if hasattr(v.aval, "size")
        ]
        inner = [
            p
            for equation in jaxpr.eqns
            for p in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
        ]
        return max(
            sizes
            + [
                largest(getattr(p, "jaxpr", p))
                for p in inner
                if hasattr(getattr(p, "jaxpr", p), "eqns")
            ],
            default=0,
        )

    found = largest(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(*shapes).jaxpr)
    assert 8 * vocabulary <= found < rows * length * vocabulary


def test_the_entropy_is_a_constant_to_the_gradient(inputs):
    hidden_BTD, *rest = inputs
    gradient = jax.grad(
        lambda hidden_BTD: chunked_logprobs(hidden_BTD, *rest, with_entropy=True)[1].sum()
    )(hidden_BTD)
    assert not np.any(gradient)


def test_bfloat16_hidden_states_still_give_float32_logprobs(inputs):
    hidden_BTD, kernel_DV, tokens_BT, segments_BT = inputs
    logp_BT = chunked_logprobs(hidden_BTD.astype(jnp.bfloat16), kernel_DV, tokens_BT, segments_BT)
    assert logp_BT.dtype == jnp.float32
    np.testing.assert_allclose(logp_BT, loop(*inputs, 1.0)[0], atol=0.15)


@pytest.mark.long
@pytest.mark.parametrize(
    "shape",
    [
        {"fsdp": 4, "tensor": 2},
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"expert": 4, "sequence": 2},
    ],
)
def test_scores_and_gradients_on_a_mesh_equal_one_device(shape):
    rng = np.random.default_rng(2)
    rows, length, width, vocabulary = 8, 12, 8, 30
    hidden_BTD, kernel_DV = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((rows, length, width), (width, vocabulary))
    )
    tokens_BT, weight_BT = (
        jnp.asarray(rng.integers(0, vocabulary, (rows, length))),
        jnp.asarray(rng.normal(size=(rows, length)), jnp.float32),
    )
    segments_BT = jnp.where(jnp.arange(length) < 7, 1, 2) * jnp.ones((rows, 1), jnp.int32)

    def value(hidden_BTD, kernel_DV):
        logp_BT, entropy_BT = chunked_logprobs(
            hidden_BTD, kernel_DV, tokens_BT, segments_BT, 0.7, block=5, with_entropy=True
        )
        return jnp.sum(weight_BT * logp_BT), (logp_BT, entropy_BT)

    def step():
        return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(
            hidden_BTD, kernel_DV
        )

    expected = step()
    with jax.set_mesh(make_mesh(shape)):
        got = step()
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        got,
        expected,
    )
