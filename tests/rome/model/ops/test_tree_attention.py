"""Attention over rows of prefix trees: each form equals a softmax over every token's ancestors,
gradients included, and refuses by name what it does not take.
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.model.ops import attention_tree_cpu, attention_tree_tpu
from rome.model.ops.attention import attention
from rome.model.ops.attention_kernels import splash, tokamax
from rome.model.sharding import make_mesh

N, K = 4, 2


def random_tree(rng, T, padding=9, longest=60):
    """Segments, ends and ancestors of a row of trees: a run hangs from some token before it."""
    segments = np.zeros(T, np.int32)
    parents = np.full(T, -1)
    real = T - padding
    place = 0
    while place < real:
        length = min(int(rng.integers(1, longest)), real - place)
        path = []
        above = place - 1
        while place and above >= 0:
            path.append(above)
            above = parents[above]
        parent = int(rng.choice(path)) if path and rng.random() < 0.8 else -1
        segments[place : place + length] = segments[parent] if parent >= 0 else segments.max() + 1
        parents[place : place + length] = [parent, *range(place, place + length - 1)]
        place += length
    sees = np.zeros((T, T), bool)
    for token in range(real):
        above = token
        while above >= 0:
            sees[token, above] = True
            above = parents[above]
    ends = np.array([sees[:, j].nonzero()[0].max(initial=-1) + 1 for j in range(T)], np.int32)
    return segments, ends, sees


def inputs(seed, T, H, rows=2, longest=60, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, T, longest=longest) for _ in range(rows)]
    segments_BT, ends_BT, sees_BTT = (
        jnp.asarray(np.stack(one)) for one in zip(*trees, strict=True)
    )
    qkv = [
        jnp.asarray(rng.standard_normal((rows, T, heads, H)), jnp.float32).astype(dtype)
        for heads in (N, K, K)
    ]
    return qkv, segments_BT, ends_BT, sees_BTT


def oracle(q, k, v, sees_BTT):
    k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
    weights = jnp.where(sees_BTT[:, None], jnp.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bnqk,bknh->bqnh", weights / jnp.where(total == 0, 1, total), v)


def generic(name, q, k, v, segments_BT, ends_BT):
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
        implementation=name,
        ends_BT=ends_BT,
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(form, qkv, *rest):
    def objective(*qkv):
        out = form(*qkv, *rest)
        return jnp.sum(out * jnp.sin(qkv[0])), out

    return jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)(*qkv)


def assert_is_over_ancestors(form, seed, T, H, longest=60):
    qkv, segments_BT, ends_BT, sees_BTT = inputs(seed, T, H, longest=longest)
    got = value_and_gradients(form, qkv, segments_BT, ends_BT)
    expected = value_and_gradients(oracle, qkv, sees_BTT)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=3e-4)
    assert not np.any(got[0][1][:, -9:])  # padding


def tiled(q, k, v, segments_BT, ends_BT):
    return attention_tree_cpu.attention_tree(q, k, v, ends_BT)


FORMS = {name: functools.partial(generic, name) for name in ("reference", "blocked")}
FORMS["tiled"] = tiled


@pytest.mark.long
@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_a_token_attends_to_its_ancestors_only(name, seed):
    with mock.patch.object(attention_tree_cpu, "TILE", 16):
        T = 160 if name == "tiled" else 150
        assert_is_over_ancestors(FORMS[name], seed, T=T, H=8, longest=30)


def test_tiles_without_an_ancestor_are_left_out():
    with mock.patch.object(attention_tree_cpu, "TILE", 4):
        # a run of 4 that all see, then two branches of 8: tiles 1 and 2, tiles 3 and 4
        ends_BT = jnp.array([[20] * 4 + [12] * 8 + [20] * 8])
        order_nn, count_n = attention_tree_cpu._needed(ends_BT)
    needed = [row[:count].tolist() for row, count in zip(order_nn, count_n, strict=True)]
    assert needed == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4]]


@pytest.mark.slow
def test_long_rows_of_trees_on_a_cpu_leave_tiles_out_by_themselves():
    assert attention_tree_cpu.takes(1024)
    assert_is_over_ancestors(FORMS["blocked"], seed=6, T=1024, H=8, longest=300)


@pytest.mark.long
def test_splash_attends_to_ancestors_only(monkeypatch):
    monkeypatch.setattr(attention_tree_tpu, "TILE", 128)
    form = functools.partial(splash, interpret=True)
    assert_is_over_ancestors(form, seed=3, T=512, H=128)


@pytest.mark.slow
def test_splash_on_a_mesh_attends_to_ancestors_only(monkeypatch):
    monkeypatch.setattr(attention_tree_tpu, "TILE", 128)
    form = functools.partial(splash, interpret=True)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2})):
        assert_is_over_ancestors(form, seed=4, T=256, H=128)


def test_a_tile_of_splash_visits_only_tiles_that_hold_an_ancestor(monkeypatch):
    monkeypatch.setattr(attention_tree_tpu, "TILE", 4)
    # row 0: a run of 4 that all see, then two branches of 4; row 1: three runs apart
    ends_BT = jnp.array([[12] * 4 + [8] * 4 + [12] * 4, [4] * 4 + [8] * 4 + [12] * 4])
    for by_keys, visited in (
        (False, [[0], [0, 1], [0, 2], [0], [1], [2]]),
        (True, [[0, 1, 2], [1], [2], [0], [1], [2]]),
    ):
        order, count = attention_tree_tpu._visits(ends_BT, by_keys)
        rows = zip(order.reshape(6, 3).tolist(), count.tolist(), strict=True)
        assert [row[:number] for row, number in rows] == visited
        # what is not visited is not fetched either: it names the tile that is there
        rows = zip(order.reshape(6, 3).tolist(), count.tolist(), strict=True)
        assert all(set(row[number:]) <= {row[number - 1]} for row, number in rows)


def test_memory_of_splash_over_trees_is_linear_in_the_row():
    T, H = 4096, 128
    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (N, K))
    row = jax.ShapeDtypeStruct((1, T), jnp.int32)
    form = functools.partial(splash, interpret=True)
    program = jax.make_jaxpr(functools.partial(value_and_gradients, form))((q, k, k), row, row)
    shapes = re.findall(r"\w+\[([\d,]+)\]", str(program))
    sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert max(sizes) == N * T * H < T * T


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing")
def test_trees_compile_for_a_tpu_in_memory_that_is_linear_in_the_row():
    command = "tests.rome.model.ops.compile_tree_for_tpu", "v5p:2x2x1", "8192", "32768"
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        cwd=pathlib.Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    short, long = json.loads(done.stdout.splitlines()[-1]).values()
    # 139 and 601 MiB; a mask of the longer row would take 4 GiB
    assert short < 160 * 2**20 and long < 5 * short


def test_splash_refuses_rows_of_trees_that_it_does_not_take():
    (q, k, v), segments_BT, ends_BT, _ = inputs(0, 256, 128)
    with pytest.raises(ValueError, match=r"multiple of 128 tokens, not 200"):
        splash(q[:, :200], k[:, :200], v[:, :200], segments_BT[:, :200], ends_BT[:, :200])
    for form, dtype in ((splash, jnp.float32), (tokamax, jnp.bfloat16)):
        qkv = (a.astype(dtype) for a in (q, k, v))
        with (
            jax.set_mesh(make_mesh({"sequence": 2})),
            pytest.raises(ValueError, match=r"mesh.sequence is 2.*prefix_tree=off"),
        ):
            form(*qkv, segments_BT, ends_BT)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is missing")
def test_tokamax_attends_to_ancestors_only():
    qkv, segments_BT, ends_BT, sees_BTT = inputs(5, 256, 64, dtype=jnp.bfloat16)
    form = functools.partial(tokamax, kernels=("xla",))
    (_, got), gradients = value_and_gradients(form, qkv, segments_BT, ends_BT)
    in_float32 = [a.astype(jnp.float32) for a in qkv]
    (_, wanted), wanted_gradients = value_and_gradients(oracle, in_float32, sees_BTT)
    for one, other in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=0.03, atol=0.03 * np.abs(other).max())
