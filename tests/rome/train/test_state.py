"""The optimizer: its learning rate by update, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rome.model.params import PARAM_AXES
from rome.train.state import is_decayed, make_optimizer
from tests.rome.model.small import MIXED, random_params

PEAK = 0.1


def rates(updates: int, **schedule: int) -> list[float]:
    """The learning rate of each update: how far a parameter with a constant gradient moves."""
    optimizer = make_optimizer(learning_rate=PEAK, weight_decay=0.0, clip=1.0, **schedule)
    params = {"kernel": jnp.zeros(1)}
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    moved = []
    for _ in range(updates):
        update, state = step({"kernel": jnp.ones(1)}, state, params)
        moved.append(-float(update["kernel"][0]))
    return moved


@pytest.mark.parametrize("decay_updates", [0, 12])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_warm_up_rises_in_equal_steps_from_the_first_update_to_the_peak(warmup, decay_updates):
    found = rates(warmup + 1, warmup_updates=warmup, decay_updates=decay_updates)
    expected = PEAK * np.arange(1, warmup + 2) / (warmup + 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_after_the_warm_up_the_rate_stays_or_falls_to_a_tenth():
    np.testing.assert_allclose(rates(6, warmup_updates=2, decay_updates=0)[2:], PEAK, rtol=1e-4)
    falling = rates(10, warmup_updates=2, decay_updates=9)
    assert (np.diff(falling[2:]) < 0).all()
    np.testing.assert_allclose(falling[-1], PEAK / 10, rtol=1e-4)


def test_matrices_decay_and_norms_and_biases_do_not_over_the_whole_tree():
    params = random_params(MIXED)
    optimizer = make_optimizer(
        learning_rate=0.1, warmup_updates=0, decay_updates=0, weight_decay=0.5, clip=1.0
    )
    no_gradient = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def update(params):
        updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    after = update(params)
    kept = set()
    for (path, leaf), now in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True
    ):
        if np.array_equal(now, leaf):
            kept.add("/".join(key.key for key in path))
        else:
            np.testing.assert_allclose(now, 0.95 * leaf, rtol=1e-5, atol=1e-7)
    attention = {f"{name}_bias" for name in "qkvo"} | {"q_norm/scale", "k_norm/scale"}
    in_layers = {f"attention/{name}" for name in attention} | {
        "attention_norm/scale",
        "moe_norm/scale",
    }
    assert kept == {"norm/scale"} | {f"layers/{name}" for name in in_layers}


def test_every_parameter_that_a_model_can_have_is_told_by_its_name():
    tree: dict = {}
    for name in PARAM_AXES:
        *blocks, leaf = name.split("/")
        node = tree
        for block in blocks:
            node = node.setdefault(block, {})
        node[leaf] = np.zeros(1)
    decayed = {
        path[-1].key
        for path, value in jax.tree_util.tree_leaves_with_path(is_decayed(tree))
        if value
    }
    assert decayed == {"embedding", "kernel", "q", "k", "v", "o", "router", "gate", "up", "down"}


def test_weight_decay_falls_linearly_to_its_final_value():
    params = {"kernel": np.full(2, 100.0, np.float32)}
    optimizer = make_optimizer(
        learning_rate=1e-4,
        warmup_updates=0,
        decay_updates=0,
        weight_decay=0.1,
        clip=1.0,
        final_weight_decay=0.01,
        updates=9,
    )
    state = optimizer.init(params)
    found = []
    for _ in range(11):
        updates, state = optimizer.update(jax.tree.map(np.zeros_like, params), state, params)
        found.append(float(-updates["kernel"][0]) / (1e-4 * 100))
    np.testing.assert_allclose(found, [*np.linspace(0.1, 0.01, 10), 0.01], rtol=1e-3)
