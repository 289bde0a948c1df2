"""Kernels of accelerators: run by their interpreter they equal the reference; where they cannot run
they say so by name.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.config import PRESETS
from rome.model.ops import attention_kernels, kernels
from rome.model.ops.attention import attention
from rome.model.ops.attention_kernels import first_seen, splash, tokamax
from rome.model.ops.balanced_time import busiest_share, query_places, swap_late_halves
from rome.model.ops.embedding import embed
from rome.model.ops.kernels import Kernels, choose_kernels
from rome.model.ops.splash_mask import PlacedCausalMask
from rome.model.sharding import make_mesh

B, T, N, K, H = 2, 256, 4, 2, 128


def packed_row(seed=0, rows=B, T=T):
    random = np.random.RandomState(seed)
    q, k, v = (
        jnp.asarray(random.standard_normal((rows, T, heads, H)), jnp.float32) for heads in (N, K, K)
    )
    segments_BT = jnp.asarray(
        np.stack(
            [np.repeat([1, 2, 3, 0], [T - 156, 90, 50, 16]), np.repeat([1, 0], [T - 6, 6])]
            * (rows // 2)
        ),
        jnp.int32,
    )
    return q, k, v, segments_BT


def reference(q, k, v, segments_BT):
    places_BT = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return attention(
        q,
        k,
        v,
        q_places_BT=places_BT,
        k_places_BS=places_BT,
        q_segments_BT=segments_BT,
        k_segments_BS=segments_BT,
        ordered=True,
        implementation="reference",
    )


def value_and_gradients(form, q, k, v, segments_BT):
    def objective(*qkv):
        return (
            jnp.sum(form(*qkv, segments_BT) * jnp.sin(qkv[0])),
            form(*qkv, segments_BT),
        )

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True))(q, k, v)


def interpreted(q, k, v, segments_BT):
    return splash(q, k, v, segments_BT, interpret=True)


def assert_same(got, expected):
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4),
        got,
        expected,
    )


@pytest.mark.long
def test_splash_equals_the_reference_over_packed_rows_forward_and_backward():
    inputs = packed_row()
    got = value_and_gradients(interpreted, *inputs)
    assert_same(got, value_and_gradients(reference, *inputs))
    assert not np.any(got[0][1][0, -16:])  # padding


@pytest.mark.long
@pytest.mark.parametrize(
    "shape, T, one_backward_kernel",
    [
        ({"fsdp": 2, "tensor": 2}, 256, True),
        ({"sequence": 2, "tensor": 2}, 512, False),
        pytest.param({"fsdp": 2, "sequence": 4}, 1024, True, marks=pytest.mark.slow),
        pytest.param({"sequence": 4, "tensor": 2}, 1024, False, marks=pytest.mark.slow),
        pytest.param(
            {"fsdp": 2, "sequence": 4}, 512, True, marks=pytest.mark.slow
        ),  # a tile has queries of both halves
    ],
)
def test_splash_on_a_mesh_equals_the_reference(shape, T, one_backward_kernel, monkeypatch):
    monkeypatch.setattr(attention_kernels, "MAX_PARTS", 4 if one_backward_kernel else 0)
    inputs = packed_row(T=T)
    expected = value_and_gradients(reference, *inputs)
    with jax.set_mesh(make_mesh(shape)):
        assert_same(value_and_gradients(interpreted, *inputs), expected)


@pytest.mark.parametrize("time_shards", [2, 4, 8])
def test_devices_that_share_a_row_compute_as_many_blocks_of_scores(time_shards):
    T, tile = 512 * time_shards, 256
    kernel = attention_kernels._splash_kernel(T, 2, time_shards, interpret=True)
    blocks = (kernel.fwd_mask_info.block_mask[0].reshape(time_shards, -1) > 0).sum(axis=1)
    assert set(blocks.tolist()) == {sum(range(1, T // tile + 1)) // time_shards}


def test_a_long_rows_mask_is_the_causal_one_of_its_places_block_by_block():
    places_T = query_places(512, 4)
    mask = PlacedCausalMask(places_T)
    whole_TT = places_T[:, None] >= np.arange(512)[None, :]
    for start in range(0, 512, 64):
        for keys in (slice(0, 64), slice(64, 192), slice(448, 512)):
            np.testing.assert_array_equal(
                mask[slice(start, start + 64), keys], whole_TT[start : start + 64, keys]
            )


def test_splash_refuses_rows_that_its_tiles_do_not_divide():
    q, k, v, segments_BT = packed_row()
    with pytest.raises(ValueError, match=r"multiple of 128 tokens.*not 200"):
        splash(q[:, :200], k[:, :200], v[:, :200], segments_BT[:, :200])


needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed"
)


@pytest.mark.parametrize(
    "row, first",
    [
        ([1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 0, 3, 3, 5, 6, 6]),
        ([1] * 8, [0] * 8),
        ([0] * 8, [0] * 8),
        ([5, 1, 1, 5, 5, 5, 5, 0], [0, 1, 1, 3, 3, 3, 3, 7]),
    ],
)
def test_a_query_sees_from_the_first_token_of_its_segment_on(row, first):
    rows = jnp.array([row, row[::-1]], jnp.int32)
    assert first_seen(rows)[0].tolist() == first
    starts_BT = np.asarray(first_seen(rows))
    for segments_T, starts_T in zip(np.asarray(rows), starts_BT, strict=True):
        for place, start in enumerate(starts_T):
            assert (segments_T[start : place + 1] == segments_T[place]).all()
            assert start == 0 or segments_T[start - 1] != segments_T[place]


@pytest.mark.slow
@needs_tokamax
@pytest.mark.parametrize(
    "shape, T", [({}, 256), ({"fsdp": 2, "tensor": 2}, 256), ({"fsdp": 2, "sequence": 4}, 1024)]
)
def test_tokamax_equals_the_reference_over_packed_rows_forward_and_backward(shape, T):
    q, k, v, segments_BT = packed_row(T=T)
    inputs = *(a.astype(jnp.bfloat16) for a in (q, k, v)), segments_BT
    form = functools.partial(tokamax, kernels=("xla",))
    expected = value_and_gradients(reference, *inputs)
    if shape:
        with jax.set_mesh(make_mesh(shape)):
            (_, got), gradients = value_and_gradients(form, *inputs)
    else:
        (_, got), gradients = value_and_gradients(form, *inputs)
    (_, wanted), wanted_gradients = expected
    assert not np.any(got[0, -16:])  # padding
    pairs = zip((got, *gradients), (wanted, *wanted_gradients), strict=True)
    for one, other in pairs:  # bfloat16 has 8 bits
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize(
    "shape, T, dtype, complaint",
    [
        ({}, 200, jnp.bfloat16, r"multiple of 128.*not 200 over 1; set --config.row_length"),
        ({"sequence": 4}, 256, jnp.bfloat16, r"not 256 over 4.*learner.attention=blocked"),
        ({}, 256, jnp.float32, r"computes in bfloat16, not float32"),
    ],
)
def test_tokamax_refuses_what_its_kernels_do_not_take_and_names_what_does(
    shape, T, dtype, complaint
):
    q, k, v, segments_BT = packed_row(T=256)
    inputs = *(a[:, :T].astype(dtype) for a in (q, k, v)), segments_BT[:, :T]
    with jax.set_mesh(make_mesh(shape)), pytest.raises(ValueError, match=complaint):
        tokamax(*inputs)


CUDA_PLUGIN = pathlib.Path(__file__).parents[4] / ".cache/cuda"


@pytest.mark.slow
@needs_tokamax
@pytest.mark.skipif(
    not (CUDA_PLUGIN / "jax_plugins").is_dir(),
    reason="JAX's CUDA plugin is not in .cache/cuda; `make test-all` puts it there",
)
@pytest.mark.parametrize("row_length, expert, sequence", [(8192, 8, 1), (32768, 4, 2)])
def test_a_step_compiles_for_h100s_with_memory_that_grows_with_the_row(
    row_length, expert, sequence
):
    paths = [str(CUDA_PLUGIN), *sys.path]
    arguments = [str(number) for number in (row_length, expert, sequence)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.rome.model.ops.compile_for_h100", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=pathlib.Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chosen"]["attention"] == found["chosen"]["experts"] == "tokamax"
    assert "mosaic_gpu_v2" in found["custom_calls"]
    # Both took 0.31 MB a token. A mask of every pair would add 0.03 MB a token to the longer row.
    assert found["temporary_bytes"] < 330_000 * row_length // sequence


@pytest.mark.parametrize("g", [2, 3, 8])
def test_swapped_halves_stand_where_their_places_say_and_come_home(g):
    T = 4 * g

    def there_and_back(x_BT):
        return (
            swap_late_halves(x_BT),
            swap_late_halves(swap_late_halves(x_BT)),
        )

    by_time = jax.sharding.PartitionSpec(None, "sequence")
    with jax.set_mesh(make_mesh({"sequence": g})):
        there, back = jax.jit(jax.shard_map(there_and_back, in_specs=by_time, out_specs=by_time))(
            jnp.arange(T)[None, :]
        )
    np.testing.assert_array_equal(there[0], query_places(T, g))
    np.testing.assert_array_equal(back[0], np.arange(T))


def test_even_work_is_half_of_the_scores_and_work_in_order_nearly_all_of_them_at_the_end():
    assert busiest_share(query_places(4096, 8), 8) == pytest.approx(0.5, abs=1e-3)
    assert busiest_share(np.arange(4096), 8) == pytest.approx(1 - 1 / 16, abs=1e-3)


@pytest.mark.parametrize(
    "shape", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "sequence": 2}]
)
def test_the_embedding_on_a_mesh_equals_one_device_forward_and_backward(shape):
    table_VD = jax.random.normal(jax.random.key(0), (12, 8))
    tokens_BT = jax.random.randint(jax.random.key(1), (8, 6), 0, 12)

    def step():
        return jax.jit(
            jax.value_and_grad(
                lambda table: (
                    jnp.sum(jnp.sin(embed(table, tokens_BT, "float32"))),
                    embed(table, tokens_BT, "float32"),
                ),
                has_aux=True,
            )
        )(table_VD)

    expected = step()
    with jax.set_mesh(make_mesh(shape)):
        got = step()
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        got,
        expected,
    )


def test_each_platform_gets_its_kernels_and_a_name_wins(monkeypatch):
    config = PRESETS["qwen3_30b_a3b"]
    assert choose_kernels("tpu", config) == ("splash", "megablox", "ring")
    assert (
        choose_kernels("tpu", PRESETS["tiny"]).attention == "blocked"
    )  # its heads are narrower than a TPU's lanes
    monkeypatch.setattr(kernels, "_has_tokamax", lambda: True)
    assert choose_kernels("gpu", config) == ("tokamax", "tokamax", "ring")
    assert (
        choose_kernels("gpu", dataclasses.replace(config, dtype="float32")).attention == "blocked"
    )
    monkeypatch.setattr(kernels, "_has_tokamax", lambda: False)
    assert choose_kernels("gpu", config) == ("blocked", "ragged", "ring")
    with pytest.raises(ValueError, match=r"learner.attention='tokamax' needs the package"):
        choose_kernels("gpu", config, Kernels(attention="tokamax"))
    assert choose_kernels("tpu", config, Kernels(experts="ragged")) == ("splash", "ragged", "ring")


@pytest.mark.parametrize(
    "platform, wanted, complaint",
    [
        (
            "cpu",
            Kernels(attention="splash"),
            "learner.attention='splash' runs on tpu only.*devices are cpu",
        ),
        ("tpu", Kernels(experts="tokamax"), "learner.experts='tokamax' runs on gpu only"),
        ("gpu", Kernels(experts="gshard"), "learner.experts='gshard' is unknown.*megablox"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_reason(platform, wanted, complaint):
    with pytest.raises(ValueError, match=complaint):
        choose_kernels(platform, PRESETS["qwen3_30b_a3b"], wanted)
