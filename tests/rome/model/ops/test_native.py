"""Products, norms and experts in C++ against NumPy, and each row by itself."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.model.ops import native

pytestmark = pytest.mark.skipif(native.reason_missing() is not None, reason="no compiler")

ROWS = (
    1,
    2,
    5,
    8,
    9,
    17,
    64,
    200,
)  # among, between and beyond the blocks that are computed together
SHAPES = [  # inputs, outputs of the matrices; whole vectors of columns and others
    (16, (64,)),
    (100, (748, 1, 33)),
    (256, (512, 16)),
    (70, (4600, 24)),
]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames="transposed")
def products(x_TI, *matrices, transposed=False):
    return native.products_native(x_TI, *matrices, transposed=transposed)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_products_are_numpys_and_each_row_has_the_bits_that_it_has_alone(
    inputs, outputs, transposed
):
    matrices = [normal(number, inputs, width) for number, width in enumerate(outputs)]
    given_as = [np.ascontiguousarray(one.T) for one in matrices] if transposed else matrices
    x_TI = normal(9, max(ROWS), inputs)
    whole = products(x_TI, *given_as, transposed=transposed)
    for out_TO, matrix in zip(whole, matrices, strict=True):
        np.testing.assert_allclose(out_TO, np.float64(x_TI) @ matrix, atol=1e-4)
    for rows in ROWS:
        # the last rows: other neighbours, and another place in their block
        parts = products(x_TI[-rows:], *given_as, transposed=transposed)
        for part_tO, out_TO in zip(parts, whole, strict=True):
            assert np.array_equal(part_tO, out_TO[-rows:])


def test_a_row_that_is_not_a_number_spoils_no_other():
    x_TI, matrix = normal(0, 7, 32), normal(1, 32, 80)
    clean = products(x_TI, matrix)[0]
    x_TI[3] = np.nan
    spoilt = np.asarray(products(x_TI, matrix)[0])
    assert np.isnan(spoilt[3]).all()
    assert np.array_equal(np.delete(spoilt, 3, 0), np.delete(clean, 3, 0))


@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([16, 32, 48, 256]),
    rows=st.integers(1, 9),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_norms_are_numpys(width, rows, size):
    x_ND, scale_D = size * normal(rows, rows, width), normal(width, width)
    wide = np.float64(x_ND)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale_D
    out_ND = native.norm_native(x_ND, scale_D, 1e-6)
    np.testing.assert_allclose(out_ND, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(native.norm_native(x_ND[-1:], scale_D, 1e-6)[0], out_ND[-1])


@pytest.mark.parametrize(("width", "hidden"), [(48, 1040), (1040, 48)])
def test_experts_are_numpys_and_a_token_has_the_bits_that_it_has_alone(width, hidden):
    """Experts of few and of many tokens, with more columns than are computed together."""
    E, T, k = 4, 40, 2
    gate, up = normal(1, E, width, hidden), normal(2, E, width, hidden)
    down, x_TD = normal(3, E, hidden, width), normal(4, T, width) / width**0.5
    weights_Tk = np.abs(normal(5, T, k))
    ids_Tk = np.zeros((T, k), np.int32)
    ids_Tk[:, 1] = np.repeat([1, 2, E], [30, 7, 3])  # E: no second expert
    compute = jax.jit(native.experts_native)
    out_TD = np.asarray(compute(x_TD, gate, up, down, weights_Tk, ids_Tk))
    expected = np.zeros((T, width))
    for t, chosen in enumerate(ids_Tk):
        for weight, e in zip(weights_Tk[t], chosen, strict=True):
            if e < E:
                own = np.float64(x_TD[t]) @ gate[e]
                inner = own / (1 + np.exp(-own)) * (np.float64(x_TD[t]) @ up[e])
                expected[t] += weight * inner @ down[e]
    np.testing.assert_allclose(out_TD, expected, rtol=1e-4, atol=1e-3)
    for t in (0, 29, 36, 39):
        here = slice(t, t + 1)
        alone = compute(x_TD[here], gate, up, down, weights_Tk[here], ids_Tk[here])
        assert np.array_equal(alone[0], out_TD[t])
