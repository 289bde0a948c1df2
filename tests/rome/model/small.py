"""A model small enough to compare number by number, shared by this folder's tests."""

import dataclasses

import jax
import numpy as np

from rome.model.config import PRESETS
from rome.model.qwen3 import init_params

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_experts=4,
    moe_intermediate_size=8,
    head_dim=4,
    scan_layers=True,
    eos_token_id=1,
    pad_token_id=0,
)
DENSE = dataclasses.replace(
    PRESETS["qwen3_0_6b"],
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    rope_theta=1e4,
    dtype="float32",
    remat="none",
    eos_token_id=1,
    pad_token_id=0,
)
MIXED = dataclasses.replace(
    CONFIG,
    num_layers=4,
    dense_layers=(0, 2),
    intermediate_size=12,
    attention_bias=True,
    scan_layers=False,
)


def random_params(config, seed=0, scale=0.3):
    """Normal weights far enough from 0 that a wrong mask or route shows; norms near 1.

    Drawn by NumPy: init_params compiles for seconds.
    """
    random = np.random.RandomState(seed)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        return (center + scale * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)
