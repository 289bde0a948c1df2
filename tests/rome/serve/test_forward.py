"""The engine's forward pass against the model's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.qwen3 import Qwen3
from rome.model.rope import RopeScaling
from rome.model.stacking import unstack_layers
from rome.serve.forward import forward, make_cache
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
DENSE = dataclasses.replace(small.DENSE, vocab_size=CONFIG.vocab_size)
T, S = 24, 40


@pytest.fixture(
    scope="module", params=[CONFIG, SWITCHES, DENSE], ids=["plain", "switches", "dense"]
)
def config(request):
    return request.param


@pytest.fixture(scope="module")
def params(config):
    return jax.tree.map(jnp.asarray, random_params(config, seed=3))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, T)).astype(np.int32)


def places(begin, end, rows=3):
    return np.tile(np.arange(begin, end, dtype=np.int32), (rows, 1))


@pytest.fixture(scope="module")
def expected(config, params, tokens):
    model = Qwen3(config, scan=config.scan_layers)
    return jax.jit(
        lambda p: model.apply({"params": p}, tokens, places(0, T), np.ones_like(tokens))
    )(params)


@pytest.mark.parametrize("experts", ["dense", "sorted"])
@pytest.mark.parametrize("step", [1, 8, T])
def test_a_sequence_fed_in_pieces_gives_the_models_own_hidden_states_and_routes(
    config, params, tokens, expected, step, experts
):
    run = jax.jit(
        lambda *args: forward(unstack_layers(params, config), config, *args, experts=experts)
    )
    cache, hidden, routes = make_cache(config, 3, S), [], []
    for begin in range(0, T, step):
        window = slice(begin, begin + step)
        out, cache, chosen = run(
            tokens[:, window], places(begin, begin + step), np.ones((3, step), bool), cache
        )
        hidden.append(out)
        routes.append(chosen)
    np.testing.assert_allclose(np.concatenate(hidden, 1), expected.hidden_BTD, atol=2e-5)
    assert np.array_equal(np.concatenate(routes, 2), expected.routes_LBTK)


def test_padding_writes_nothing_into_the_cache(config, params, tokens):
    cache = make_cache(config, 3, S)
    real = np.ones((3, 8), bool)
    real[1] = False
    real[2, 5:] = False
    run = jax.jit(
        lambda *args: forward(unstack_layers(params, config), config, *args, experts="dense")
    )
    _, cache, _ = run(tokens[:, :8], places(0, 8), real, cache)
    for layer in cache:
        written = np.abs(np.asarray(layer.v_BKSH)).sum((1, 3)) > 0
        assert np.array_equal(written, np.abs(np.asarray(layer.k_BKHS)).sum((1, 2)) > 0)
        assert np.array_equal(written[:, :8], real) and not written[:, 8:].any()
