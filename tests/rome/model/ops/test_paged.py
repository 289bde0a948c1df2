"""The model over pages: in any pieces, at any pages, equal to the model over whole rows."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.model.ops import native
from rome.model.ops.kernels import Kernels
from rome.model.ops.paged import Pages, make_pages
from rome.model.qwen3 import Qwen3
from rome.model.rope import RopeScaling
from rome.model.stacking import unstack_layers
from tests.rome.model import small
from tests.rome.model.small import random_params
from tests.rome.serve.tiny import make_config

CONFIG = make_config()
SWITCHES = dataclasses.replace(
    CONFIG,
    num_layers=3,
    dense_layers=(1,),
    intermediate_size=24,
    attention_bias=True,
    scan_layers=False,
    rope_scaling=RopeScaling("yarn", 4.0, 16, 1.1),
)
DENSE = dataclasses.replace(small.DENSE, vocab_size=CONFIG.vocab_size, head_dim=16)
LENGTH, ROWS, POSITIONS = 40, 4, 8
SIZES = {"tiled": (4, 16, 32), "native": (4, 16, 64, 256)}  # of calls, by form of the experts
PER_ROW = LENGTH // POSITIONS
COUNT = ROWS * PER_ROW + 3
XLA = Kernels("gather", "tiled", "ring")
needs_compiler = pytest.mark.skipif(native.reason_missing() is not None, reason="no compiler")
FORMS = [
    pytest.param(XLA, id="xla"),
    pytest.param(Kernels("native", "native", "ring"), id="native", marks=needs_compiler),
]


@pytest.fixture(
    scope="module", params=[CONFIG, SWITCHES, DENSE], ids=["plain", "switches", "dense"]
)
def config(request):
    return request.param


@functools.cache
def params_of(config):
    params = jax.tree.map(jnp.asarray, random_params(config, seed=3))
    return params, unstack_layers(params, config)


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH)).astype(np.int32)


@functools.cache
def expected(config):
    model = Qwen3(config, scan=config.scan_layers)
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    run = jax.jit(model.apply)
    out = run({"params": params_of(config)[0]}, tokens(), places, np.ones_like(places))
    return jax.device_get((out.hidden_BTD, out.routes_LBTK))


@functools.cache
def program(config, form):
    model = Qwen3(config, scan=False, experts=form.experts, attention_form=form.attention)

    @jax.jit
    def run(params, token_T, position_T, row_T, kv, table_RM, lengths_R, starts_R):
        pages = Pages(kv, table_RM, row_T, lengths_R, starts_R)
        real_T = (position_T >= 0).astype(jnp.int32)
        places = (jnp.maximum(position_T, 0)[None], real_T[None])
        out = model.apply({"params": params}, token_T[None], *places, pages)
        return out.hidden_BTD[0], out.pages, out.routes_LBTK[:, 0]

    return run


class Cache:
    """Some sequences whose pages lie in a random order."""

    def __init__(self, config, form=XLA, seed=0, fill=0.0):
        order = np.random.default_rng(seed).permutation(COUNT)[: ROWS * PER_ROW]
        self.config = config
        self.form = form
        self.table_RM = order.reshape(ROWS, PER_ROW).astype(np.int32)
        self.kv = jax.tree.map(lambda pages: pages + fill, make_pages(config, COUNT, POSITIONS))
        self.done = [0] * ROWS

    def feed(self, lengths, size):
        """Compute the next tokens of each sequence; return hidden states and routes by sequence."""
        token_T, position_T, row_T = np.zeros((3, size), np.int32)
        position_T[:] = -1
        starts_R = np.zeros(ROWS + 1, np.int32)
        at = 0
        for row, length in enumerate(lengths):
            own = slice(at, at + length)
            begin = self.done[row]
            token_T[own] = tokens()[row, begin : begin + length]
            position_T[own] = np.arange(begin, begin + length)
            row_T[own] = row
            starts_R[row] = at
            at += length
            self.done[row] += length
        starts_R[ROWS] = at
        lengths_R = np.array(self.done, np.int32)
        inputs = (token_T, position_T, row_T, self.kv, self.table_RM, lengths_R, starts_R)
        hidden_TD, self.kv, routes_LTk = program(self.config, self.form)(
            params_of(self.config)[1], *inputs
        )
        cuts = starts_R[1:ROWS]
        by_row = np.split(np.asarray(hidden_TD)[:at], cuts)
        return by_row, np.split(np.asarray(routes_LTk)[:, :at], cuts, axis=1)


def in_pieces(cache, pieces):
    """Hidden states [B, T, D] and routes [L, B, T, k] of pieces: a list of (lengths, size)."""
    hidden = [[] for _ in range(ROWS)]
    routes = [[] for _ in range(ROWS)]
    for lengths, size in pieces:
        for row, (hidden_tD, routes_Ltk) in enumerate(zip(*cache.feed(lengths, size), strict=True)):
            hidden[row].append(hidden_tD)
            routes[row].append(routes_Ltk)
    hidden = [np.concatenate(parts) for parts in hidden]
    return hidden, [np.concatenate(parts, axis=1) for parts in routes]


ONE_BY_ONE = [([1] * ROWS, 4)] * LENGTH
EIGHTS = [([8] * ROWS, 32)] * (LENGTH // 8)
WHOLE = [([LENGTH if row == own else 0 for row in range(ROWS)], 128) for own in range(ROWS)]
MOST = [([32] * ROWS, 128), ([8] * ROWS, 32)]


@pytest.mark.long
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(ONE_BY_ONE, id="1", marks=pytest.mark.slow),
        pytest.param(EIGHTS, id="8"),
        pytest.param(WHOLE, id="40", marks=pytest.mark.slow),
        pytest.param(MOST, id="32"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_sequences_fed_in_pieces_give_the_models_own_hidden_states_and_routes(config, pieces, form):
    hidden, routes = in_pieces(Cache(config, form), pieces)
    expected_BTD, expected_LBTk = expected(config)
    np.testing.assert_allclose(np.stack(hidden), expected_BTD, atol=2e-5)
    assert np.array_equal(np.stack(routes, axis=1), expected_LBTk)


@functools.cache
def one_by_one(form):
    return in_pieces(Cache(CONFIG, form), ONE_BY_ONE)[0]


def random_pieces(rng, form):
    """Pieces of all sequences in any mixture, until all are computed."""
    left = [LENGTH] * ROWS
    while any(left):
        size = rng.choice(SIZES[form.experts])
        lengths = [0] * ROWS
        for row in rng.sample(range(ROWS), ROWS):
            lengths[row] = rng.randint(0, min(left[row], size - sum(lengths)))
            left[row] -= lengths[row]
        if any(lengths):
            yield lengths, size


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), fill=st.floats(-9, 9))
def test_no_bit_depends_on_the_pieces_the_company_the_size_of_a_call_or_the_pages(seed, fill, form):
    rng = random.Random(seed)
    cache = Cache(CONFIG, form, seed=rng.randrange(99), fill=fill)
    hidden, _ = in_pieces(cache, list(random_pieces(rng, form)))
    for own, expected_TD in zip(hidden, one_by_one(form), strict=True):
        assert np.array_equal(own, expected_TD)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_padding_writes_nothing(config, form):
    cache = Cache(config, form)
    cache.feed([8, 0, 5, 1], 32)
    for pages in cache.kv:
        written = (np.asarray(pages)[cache.table_RM] != 0).any((3, 4)).reshape(ROWS, LENGTH)
        assert written.sum(axis=1).tolist() == [8, 0, 5, 1]
        unused = np.setdiff1d(np.arange(COUNT), cache.table_RM)
        assert not np.asarray(pages)[unused].any()


def attend_in_pieces(inputs, sizes, positions):
    """[B, L, N, H] of the native form, fed in pieces of these sizes to pages of `positions`."""
    q_BLNH, kv_BLKH = inputs
    batch, length = q_BLNH.shape[:2]
    per_row = -(-length // positions)
    table_RM = np.random.default_rng(1).permutation(batch * per_row).astype(np.int32)
    kv = jnp.full((batch * per_row, positions, *kv_BLKH.shape[2:]), np.nan, jnp.float32)
    parts = []
    begin = 0
    for size in sizes:
        own = slice(begin, begin + size)
        row_T = np.repeat(np.arange(batch, dtype=np.int32), size)
        position_T = np.tile(np.arange(begin, begin + size, dtype=np.int32), batch)
        q_TNH, kv_TKH = (np.concatenate(array[:, own]) for array in inputs)
        out_TNH, kv = jax.jit(native.attention_native)(
            q_TNH, kv_TKH, row_T, position_T, table_RM.reshape(batch, per_row), kv
        )
        parts.append(np.asarray(out_TNH).reshape(batch, size, *q_BLNH.shape[2:]))
        begin += size
    return np.concatenate(parts, axis=1)


@needs_compiler
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 64), (6, 2, 32)], ids=["1", "2", "3"])
def test_no_bit_of_native_attention_depends_on_pieces_or_the_size_of_a_page(heads):
    query_heads, key_heads, dim = heads
    rng = np.random.default_rng(0)
    q_BLNH = rng.standard_normal((2, LENGTH, query_heads, dim), dtype=np.float32)
    kv_BLKH = rng.standard_normal((2, LENGTH, 2 * key_heads, dim), dtype=np.float32)
    one_by_one = attend_in_pieces((q_BLNH, kv_BLKH), [1] * LENGTH, 16)
    for sizes, positions in ([LENGTH], 16), ([2, 3, 14, 1, 20], 8), ([1] * LENGTH, 32):
        out = attend_in_pieces((q_BLNH, kv_BLKH), sizes, positions)
        assert out.tobytes() == one_by_one.tobytes()
