"""Arrays handed to an engine in the trainer's process: what they hold, and that they hold it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.engine.handover import checksums, hand_over
from rome.model.params import param_shardings
from rome.model.qwen3 import init_params
from rome.model.sharding import make_mesh
from rome.model.stacking import stack_layers, unstack_layers
from tests.rome.serve.tiny import make_config, make_params

pytestmark = pytest.mark.long

DEVICE = jax.devices()[0]
DTYPES = ["float32", "bfloat16"]


def model(dtype):
    return dataclasses.replace(make_config(), dtype=dtype)


def buffers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_arrays_are_the_trainers_weights_in_the_compute_type(dtype):
    params = make_params(1)
    handed = hand_over(params, model(dtype), DEVICE)
    assert handed.config.remat == "none" and handed.config.dtype == dtype
    expected = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype), params)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(handed.params), expected)
    assert all(leaf.devices() == {DEVICE} for leaf in jax.tree.leaves(handed.params))
    assert checksums(handed.params) == handed.checksums


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_array_is_shared_and_a_donation_takes_nothing_from_the_engine(dtype):
    """Also where nothing is cast: a jitted function may return an argument as it came."""
    params = jax.device_put(make_params(2), DEVICE)
    handed = hand_over(params, model(dtype), DEVICE)
    assert not buffers(params) & buffers(handed.params)
    before = jax.tree.map(np.array, handed.params)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(params):
        return jax.tree.map(lambda leaf: leaf * 3 + 1, params)

    updated = jax.block_until_ready(update(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert not buffers(updated) & buffers(handed.params)
    jax.tree.map(np.testing.assert_array_equal, handed.params, before)
    assert checksums(handed.params) == handed.checksums


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_weights_of_a_whole_mesh_come_to_one_device():
    config = make_config()
    mesh = make_mesh(
        {"replica": 1, "fsdp": 2, "expert": 2, "sequence": 1, "tensor": 1},
        config,
        jax.devices()[:4],
    )
    params = jax.device_put(make_params(3), param_shardings(mesh, config))
    handed = hand_over(params, config, DEVICE)
    assert all(leaf.devices() == {DEVICE} for leaf in jax.tree.leaves(handed.params))
    assert handed.checksums == hand_over(make_params(3), config, DEVICE).checksums
    assert checksums(handed.params) == handed.checksums


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_change_of_one_value_shows_in_the_checksum_of_its_tensor_alone(data, dtype):
    handed = first(dtype)
    leaves, structure = jax.tree.flatten(handed.params)
    number = data.draw(st.integers(0, len(leaves) - 1))
    flat = np.array(leaves[number]).reshape(-1)
    place = data.draw(st.integers(0, flat.size - 1))
    other = data.draw(st.integers(0, flat.size - 1))
    if place != other and flat[place] != flat[other] and data.draw(st.booleans()):
        flat[[place, other]] = flat[[other, place]]
    else:
        flat[place] = np.nextafter(np.float32(flat[place]), 9) if dtype == "float32" else 7
    leaves[number] = jnp.asarray(flat.reshape(leaves[number].shape))
    changed = checksums(jax.tree.unflatten(structure, leaves))
    different = {name for name, sum in changed.items() if handed.checksums[name] != sum}
    assert different == {list(changed)[number]}


@functools.cache
def first(dtype):
    return hand_over(make_params(4), model(dtype), DEVICE)


def test_two_versions_are_told_apart_tensor_by_tensor():
    config = make_config()
    params = jax.tree.map(np.copy, make_params(5))
    one = hand_over(params, config, DEVICE)
    assert one.changed_since(hand_over(params, config, DEVICE)) == frozenset()
    params["norm"]["scale"] = params["norm"]["scale"] + 1
    params["layers"]["moe"]["up"][1, 2, 3, 4] += 1
    other = hand_over(params, config, DEVICE)
    assert other.changed_since(one) == {"norm/scale", "layers/1/moe/up"}


def test_an_engine_keeps_no_link_to_the_trainers_stack():
    """Layers cut from a stack are arrays of their own: the stack can be freed."""
    config = make_config()
    params = jax.device_put(init_params(config, jax.random.key(6)), DEVICE)
    handed = hand_over(params, config, DEVICE)
    expected = jax.tree.map(np.array, unstack_layers(params, config))
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, handed.params, expected)
