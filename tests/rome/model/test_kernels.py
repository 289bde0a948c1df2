"""Kernels of accelerators: run by their interpreter they equal the reference; where they cannot run they say so by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.attention import attention
from rome.model.attention_kernels import splash
from rome.model.config import PRESETS
from rome.model.embed import embed
from rome.model.kernels import Kernels, choose_kernels
from rome.model.sharding import make_mesh

B, T, N, K, H = 2, 256, 4, 2, 128


def packed_row(seed=0, rows=B):
    random = np.random.RandomState(seed)
    q, k, v = (jnp.asarray(random.standard_normal((rows, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments_BT = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], [100, 90, 50, 16]), np.repeat([1, 0], [250, 6])] * (rows // 2)), jnp.int32)
    return q, k, v, segments_BT


def reference(q, k, v, segments_BT):
    places_BT = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
    return attention(q, k, v, q_places_BT=places_BT, k_places_BS=places_BT, q_segments_BT=segments_BT, k_segments_BS=segments_BT, ordered=True,
                     implementation="reference")


def value_and_gradients(form, q, k, v, segments_BT):
    objective = lambda *qkv: (jnp.sum(form(*qkv, segments_BT) * jnp.sin(qkv[0])), form(*qkv, segments_BT))  # noqa: E731
    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def interpreted(q, k, v, segments_BT):
    return splash(q * H**-0.5, k, v, segments_BT, interpret=True)


def assert_same(got, expected):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4), got, expected)


def test_splash_equals_the_reference_over_packed_rows_forward_and_backward():
    inputs = packed_row()
    got = value_and_gradients(interpreted, *inputs)
    assert_same(got, value_and_gradients(reference, *inputs))
    assert not np.any(got[0][1][0, -16:])  # padding


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"fsdp": 2, "tensor": 2}, {"fsdp": 2, "sequence": 2}])
def test_splash_on_a_mesh_equals_the_reference(shape):
    inputs = packed_row()
    expected = value_and_gradients(reference, *inputs)
    with jax.set_mesh(make_mesh(shape)):
        assert_same(value_and_gradients(interpreted, *inputs), expected)


def test_splash_refuses_rows_that_its_tiles_do_not_divide():
    q, k, v, segments_BT = packed_row()
    with pytest.raises(ValueError, match="multiple of 128 tokens.*not 200"):
        splash(q[:, :200], k[:, :200], v[:, :200], segments_BT[:, :200])


@pytest.mark.parametrize("shape", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "sequence": 2}])
def test_the_embedding_on_a_mesh_equals_one_device_forward_and_backward(shape):
    table_VD = jax.random.normal(jax.random.key(0), (12, 8))
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 6), 0, 12)
    step = lambda: jax.jit(jax.value_and_grad(lambda table: (jnp.sum(jnp.sin(embed(table, tokens_BT, "float32"))), embed(table, tokens_BT, "float32")), has_aux=True))(table_VD)  # noqa: E731
    expected = step()
    with jax.set_mesh(make_mesh(shape)):
        got = step()
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), got, expected)


def test_each_platform_gets_its_kernels_and_a_name_wins():
    config = PRESETS["qwen3_30b_a3b"]
    assert choose_kernels("tpu", config) == ("splash", "megablox")
    assert choose_kernels("tpu", PRESETS["tiny"]).attention == "blocked"  # its heads are narrower than a TPU's lanes
    assert choose_kernels("gpu", config).attention == "cudnn"
    assert choose_kernels("gpu", dataclasses.replace(config, dtype="float32")).attention == "blocked"
    assert choose_kernels("tpu", config, Kernels(experts="ragged")) == ("splash", "ragged")


@pytest.mark.parametrize("platform, wanted, complaint", [
    ("cpu", Kernels(attention="splash"), "kernels.attention='splash' runs on tpu only.*devices are cpu"),
    ("tpu", Kernels(experts="tokamax"), "kernels.experts='tokamax' runs on gpu only"),
    ("gpu", Kernels(experts="gshard"), "kernels.experts='gshard' is unknown.*megablox"),
])
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(platform, wanted, complaint):
    with pytest.raises(ValueError, match=complaint):
        choose_kernels(platform, PRESETS["qwen3_30b_a3b"], wanted)
