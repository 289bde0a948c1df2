"""Which matrices get adapters, and what new ones change: nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rome.model.config import PRESETS
from rome.model.lora import (
    MATRICES,
    Lora,
    adapter_shapes,
    adapter_shardings,
    find_targets,
    init_adapters,
    with_adapters,
)
from rome.model.params import parameter_shapes
from rome.model.qwen3 import Qwen3
from rome.model.sharding import make_mesh
from tests.rome.model import small

ATTENTION = tuple(("attention", name) for name in "qkvo")
EXPERTS = tuple(("moe", name) for name in ("gate", "up", "down"))


def test_words_name_matrices_of_the_model_and_the_router_is_none_of_them():
    assert find_targets("all", small.CONFIG) == ATTENTION + EXPERTS
    assert find_targets(" attention,experts", small.CONFIG) == ATTENTION + EXPERTS
    assert find_targets("v_proj,q_proj", small.CONFIG) == (ATTENTION[0], ATTENTION[2])
    assert find_targets("mlp", small.MIXED) == tuple(("mlp", n) for n in ("gate", "up", "down"))
    assert find_targets("gate_proj", small.MIXED) == (("moe", "gate"), ("mlp", "gate"))
    assert not any("router" in target for target in MATRICES)


@pytest.mark.parametrize(
    "text, message",
    [
        ("mlp", "'mlp' matches nothing in this model. Give one or more of all, attention, experts"),
        ("attention,router", "'router' is unknown. Give one or more of all"),
        ("lm_head", "'lm_head' is unknown"),
        (" , ", "it is empty"),
    ],
)
def test_targets_that_match_nothing_are_refused_with_those_that_would(text, message):
    with pytest.raises(ValueError, match=message):
        find_targets(text, small.CONFIG)


def test_adapters_are_small_next_to_what_they_adapt():
    config = PRESETS["qwen3_30b_a3b"]
    lora = Lora(16, 32.0, find_targets("all", config))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(adapter_shapes(config, lora)))
    whole = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
    assert 0.02 < count / whole < 0.03


@pytest.mark.long
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(small.CONFIG, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(small.CONFIG, dtype="bfloat16"), marks=pytest.mark.slow),
        pytest.param(small.MIXED, id="dense layers"),
    ],
)
def test_new_adapters_leave_the_base_bitwise_as_it_was(config):
    lora = Lora(2, 32.0, find_targets("all", config))
    base = jax.tree.map(lambda leaf: jnp.asarray(leaf, config.dtype), small.random_params(config))
    adapters = init_adapters(config, lora, jax.random.key(0))
    tokens_BT = jnp.arange(12).reshape(2, 6)
    rows = (tokens_BT, jnp.broadcast_to(jnp.arange(6), (2, 6)), jnp.ones_like(tokens_BT))

    def hidden(params):
        model = Qwen3(config, scan=config.scan_layers)
        return jax.jit(model.apply)({"params": params}, *rows).hidden_BTD

    before = hidden(base)
    np.testing.assert_array_equal(hidden(with_adapters(base, adapters, lora)), before)
    # A is there: with any B the model is another one
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    assert np.abs(hidden(with_adapters(base, moved, lora)) - before).max() > 0.01


def test_an_adapters_start_does_not_depend_on_the_other_targets():
    def made(targets):
        lora = Lora(2, 32.0, find_targets(targets, small.CONFIG))
        return init_adapters(small.CONFIG, lora, jax.random.key(3))["layers"]["attention"]

    alone = made("v_proj")
    assert alone.keys() == {"v_lora"}
    small.assert_trees_equal(alone["v_lora"], made("all")["v_lora"])
    a = np.asarray(alone["v_lora"]["a"])
    bound = 1 / np.sqrt(small.CONFIG.hidden_size)
    assert 0.8 * bound < np.abs(a).max() <= bound and not np.asarray(alone["v_lora"]["b"]).any()


def test_an_adapter_lies_as_its_matrix_does_with_the_rank_whole():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, small.CONFIG)
    lora = Lora(3, 32.0, find_targets("all", small.CONFIG))
    placed = adapter_shardings(mesh, small.CONFIG, lora)["layers"]
    wide = ("fsdp", "expert", "sequence")
    assert placed["attention"]["q_lora"]["a"].spec == P(None, wide, None)
    assert placed["attention"]["q_lora"]["b"].spec == P(None, None, ("tensor",), None)
    assert placed["attention"]["o_lora"]["b"].spec == P(None, None, wide)
    within = ("fsdp", "sequence")
    assert placed["moe"]["down_lora"]["a"].spec == P(None, ("expert",), ("tensor",), None)
    assert placed["moe"]["down_lora"]["b"].spec == P(None, ("expert",), None, within)
