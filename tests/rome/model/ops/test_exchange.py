"""Experts by exchange on 8 devices: all of it but the one operation that only TPUs have, which
gathers everything here.
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.model.config import PRESETS
from rome.model.ops import expert_exchange
from rome.model.ops.expert_exchange import chunks_of
from rome.model.ops.experts import NO_EXPERT, experts
from rome.model.ops.experts_on_mesh import experts_on_mesh
from rome.model.ops.kernels import Kernels, choose_kernels
from rome.model.qwen3 import Qwen3
from rome.model.sharding import make_mesh
from tests.rome.model import small

B, T, D, E, F, K = 8, 16, 8, 8, 6, 2
LOADS = {
    "random": lambda random: np.stack([random.permutation(E)[:K] for _ in range(B * T)]),
    "all_to_one_device": lambda random: np.tile([6, 7], (B * T, 1)),
    "some_padding": lambda random: np.where(
        random.rand(B * T, 1) < 0.4,
        NO_EXPERT,
        np.stack([random.permutation(E)[:K] for _ in range(B * T)]),
    ),
    "nothing": lambda random: np.full((B * T, K), NO_EXPERT),
}


def send_rows(rows, into, at_sender, sent, at_receiver, received):
    """As the documentation of jax.lax.ragged_all_to_all has it; NaN everywhere where sender and
    receiver do not agree or a row leaves its array.
    """
    everyone = [jax.lax.all_gather(a, "expert") for a in (rows, at_sender, sent, at_receiver)]
    place, e = jnp.arange(into.shape[0]), sent.size // jax.lax.axis_size("expert")
    wrong = jnp.any((at_sender < 0) | (at_sender + sent > rows.shape[0]))
    for s, (theirs, *blocks) in enumerate(zip(*everyone, strict=True)):
        for j in range(e):
            begin, size, at = (a[jax.lax.axis_index("expert") * e + j] for a in blocks)
            here = (place >= at) & (place < at + size)
            into = jnp.where(
                here[:, None], jnp.take(theirs, begin + place - at, axis=0, mode="clip"), into
            )
            wrong |= (size != received[s * e + j]) | (at < 0) | (at + size > into.shape[0])
    return jnp.where(wrong, jnp.nan, into)


@pytest.fixture(autouse=True)
def exchange_on_cpu(monkeypatch):
    monkeypatch.setattr(expert_exchange, "send_rows", send_rows)


def arrays(load, seed=0):
    random = np.random.RandomState(seed)
    shapes = ((B, T, D), (E, D, F), (E, D, F), (E, F, D), (B, T, K))
    return *(
        jnp.asarray(0.5 * random.standard_normal(shape), jnp.float32) for shape in shapes
    ), jnp.asarray(LOADS[load](random).reshape(B, T, K), jnp.int32)


def by_exchange(x, gate, up, down, weights, ids, capacity_factor=0.0):
    return experts_on_mesh(x, gate, up, down, weights, ids, "ragged", capacity_factor, "all_to_all")


def oracle(x, gate, up, down, weights, ids):
    def flat(a):
        return a.reshape(-1, a.shape[-1])

    return experts(flat(x), gate, up, down, flat(weights), flat(ids), "dense").reshape(x.shape)


def value_and_gradients(form, *floats, ids):
    def objective(*floats):
        out = form(*floats, ids)
        return jnp.sum(jnp.sin(out) * jnp.cos(floats[0])), out

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3, 4), has_aux=True))(*floats)


@pytest.mark.long
@pytest.mark.parametrize(
    "shape, load, rows, chunk",
    [  # rows that a device makes room for: of 32 choices on average
        pytest.param({"expert": 8}, "random", 64, 2048, marks=pytest.mark.slow),
        ({"fsdp": 2, "expert": 4}, "random", 24, 2048),
        ({"fsdp": 2, "expert": 4}, "all_to_one_device", 24, 8),
        pytest.param({"expert": 4, "tensor": 2}, "some_padding", 24, 16, marks=pytest.mark.slow),
        pytest.param(
            {"expert": 2, "sequence": 2, "tensor": 2}, "random", 64, 8, marks=pytest.mark.slow
        ),
        ({"expert": 8}, "nothing", 16, 2048),
    ],
)
def test_exchanged_choices_give_the_numbers_and_gradients_of_the_dense_oracle(
    shape, load, rows, chunk, monkeypatch
):
    monkeypatch.setattr(expert_exchange, "room", lambda share: rows)
    monkeypatch.setattr(expert_exchange, "CHUNK", chunk)
    *floats, ids = arrays(load)
    expected = value_and_gradients(oracle, *floats, ids=ids)
    with jax.set_mesh(make_mesh(shape)):
        got = value_and_gradients(lambda *inputs: by_exchange(*inputs)[0], *floats, ids=ids)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.long
def test_a_capacity_drops_what_the_ring_drops_and_the_rest_is_right():
    *floats, ids = arrays("all_to_one_device")
    with jax.set_mesh(make_mesh({"fsdp": 2, "expert": 4})):
        out, ran = jax.jit(functools.partial(by_exchange, capacity_factor=1.5))(*floats, ids)
        _, ran_on_ring = jax.jit(lambda *inputs: experts_on_mesh(*inputs, "ragged", 1.5, "ring"))(
            *floats, ids
        )
    assert 0 < np.sum(ran == NO_EXPERT) < ran.size
    np.testing.assert_array_equal(ran, ran_on_ring)
    np.testing.assert_allclose(out, oracle(*floats, ran), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_in_bfloat16_choices_are_added_up_in_float32():
    *floats, ids = arrays("random")
    low = [jnp.asarray(a, jnp.bfloat16) for a in floats[:4]] + [floats[4]]
    exact = oracle(*(a.astype(jnp.float32) for a in low), ids)
    with jax.set_mesh(make_mesh({"expert": 8})):
        got = jax.jit(by_exchange)(*low, ids)[0]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), exact, rtol=0.03, atol=0.03 * np.abs(exact).max()
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing")
@pytest.mark.parametrize(
    ("form", "transfer", "least"),
    [("all_to_all", "ragged-all-to-all expert", 0.5), ("ring", "collective-permute expert", 0.6)],
)
def test_a_tpus_compiler_hides_most_of_the_transfer_behind_matmuls(form, transfer, least):
    command = "tests.rome.model.ops.compile_experts_for_tpu", "v5p:2x2x1", "1", "4", form
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        cwd=pathlib.Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seconds, hidden = json.loads(done.stdout.splitlines()[-1])["transfers"][transfer]
    assert seconds > 0 and hidden > least


def test_tokens_go_in_the_fewest_equal_chunks():
    assert [chunks_of(tokens) for tokens in (1, 2048, 2049, 8192, 6000)] == [1, 1, 3, 4, 3]


@pytest.mark.long
def test_the_model_hands_the_form_down_to_its_experts(monkeypatch):
    sent = []
    monkeypatch.setattr(
        expert_exchange, "send_rows", lambda rows, into, *_: sent.append(rows.shape) or into
    )
    tokens_BT, params = jnp.ones((8, 16), jnp.int32), small.random_params(small.CONFIG)
    with jax.set_mesh(make_mesh({"fsdp": 2, "expert": 2})):
        for form in ("ring", "all_to_all"):
            model = Qwen3(small.CONFIG, experts="ragged", exchange=form)
            jax.eval_shape(model.apply, {"params": params}, tokens_BT, tokens_BT, tokens_BT)
            assert bool(sent) == (form == "all_to_all")


def test_tpus_exchange_where_a_group_is_large_and_compact_and_all_others_use_the_ring():
    config = PRESETS["qwen3_30b_a3b"]
    extents = ((), (4,), (8,), (2, 4), (16,), (4, 4), (2, 8), (4, 4, 4))
    exchanging = [
        extent
        for extent in extents
        if choose_kernels("tpu", config, group=math.prod(extent), extent=extent).exchange
        == "all_to_all"
    ]
    assert exchanging == [(2, 4), (4, 4), (2, 8), (4, 4, 4)]
    assert (
        choose_kernels("cpu", config, group=8, extent=(2, 4)).exchange
        == choose_kernels("gpu", config, group=8, extent=(2, 4)).exchange
        == "ring"
    )
    assert (
        choose_kernels("tpu", config, Kernels(experts="dense"), group=64, extent=(4, 4, 4)).exchange
        == "ring"
    )


def test_an_exchange_that_cannot_be_is_refused_with_the_reason():
    config = PRESETS["qwen3_30b_a3b"]
    with pytest.raises(
        ValueError,
        match=r"learner.exchange='all_to_all' runs on tpu only, and the mesh's devices are cpu",
    ):
        choose_kernels("cpu", config, Kernels(exchange="all_to_all"))
    with pytest.raises(
        ValueError,
        match=(
            r"'all_to_all' needs a grouped matmul, and learner.experts='sorted' has none. Set that"
            r" to one of ragged, megablox"
        ),
    ):
        choose_kernels("tpu", config, Kernels(experts="sorted", exchange="all_to_all"))
