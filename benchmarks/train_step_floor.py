"""Explain the time of an update: floating-point operations, the floor they set, pieces alone.

B rows, T time, D model, E experts, F expert hidden, k experts a token, N = B * T.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rome.model.config import ModelConfig
from rome.model.ops.attention import attention
from rome.model.ops.experts import experts
from rome.model.ops.logprobs import chunked_logprobs
from rome.train.state import init_state, make_optimizer

_NO_OPTIMIZER = make_optimizer(
    learning_rate=0.0, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0
)


def count_flops(config: ModelConfig, rows: int, length: int) -> dict[str, float]:
    """Return the useful operations of forward and backward, by piece.

    Recomputation does not count.
    """
    D = config.hidden_size
    L = config.num_layers
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    chosen_experts = 3 * config.experts_per_token * config.moe_intermediate_size
    weights = {
        "head": D * config.vocab_size,
        "projections": L * (2 * D * heads + 2 * D * kv_heads),
        "experts": L * D * (chosen_experts + config.num_experts),
    }
    flops = {piece: 6.0 * rows * length * count for piece, count in weights.items()}
    flops["attention"] = 6.0 * rows * length**2 * heads * L
    return flops


def floor_seconds(config: ModelConfig, rows: int, length: int, peak: float) -> dict[str, Any]:
    """Return the time of a step if every product ran at the measured peak.

    And the optimizer at the measured memory speed.

    Args:
      config: the model.
      rows: B.
      length: T.
      peak: operations a second, as of `measured_peak`.
    """
    flops = count_flops(config, rows, length)
    shapes = jax.eval_shape(lambda: init_state(config, optimizer=_NO_OPTIMIZER, seed=0).params)
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    optimizer_bytes = 7 * 4 * num_weights  # weight, gradient, two moments read; three written
    seconds = {piece: count / peak for piece, count in flops.items()}
    seconds["optimizer"] = optimizer_bytes / memory_speed()
    return {
        "flops": sum(flops.values()),
        "optimizer_bytes": optimizer_bytes,
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
    }


def measured_peak(precision: str) -> float:
    """Return the operations a second of the best of several large products, summed in float32."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), precision)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best_seconds(product, a, a, repeats=8)


def memory_speed() -> float:
    """Return the bytes a second, read and written, of x + 1 over an array beyond the caches."""
    x = jnp.ones(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best_seconds(add, x, repeats=4)


def pieces_alone(config: ModelConfig, rows: int, length: int) -> dict[str, float]:
    """Return the seconds a step of attention, experts (all layers) and head by themselves.

    Forward and backward.
    """
    D = config.hidden_size
    E = config.num_experts
    F = config.moe_intermediate_size
    N = rows * length
    tokens_BT = jax.random.randint(jax.random.key(0), (rows, length), 0, config.vocab_size)
    ones_BT = jnp.ones_like(tokens_BT)
    places_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
    _, ids_Nk = jax.lax.top_k(_normal(N, E), config.experts_per_token)

    def low(*shape: int) -> jax.Array:
        return _normal(*shape).astype(config.dtype)

    def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        return attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_places_BT=places_BT,
            k_places_BS=places_BT,
            q_segments_BT=ones_BT,
            k_segments_BS=ones_BT,
            ordered=True,
        )

    def score(hidden_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
        return chunked_logprobs(hidden_BTD, kernel_DV, tokens_BT, ones_BT)

    q_BTNH = low(rows, length, config.num_heads, config.head_dim)
    k_BTKH = low(rows, length, config.num_kv_heads, config.head_dim)
    v_BTKH = low(rows, length, config.num_kv_heads, config.head_dim)
    matrices = (low(E, D, F), low(E, D, F), low(E, F, D))
    weights_Nk = _normal(N, config.experts_per_token)
    attention_seconds = _backward_seconds(attend, q_BTNH, k_BTKH, v_BTKH)
    experts_seconds = _backward_seconds(experts, low(N, D), *matrices, weights_Nk, fixed=(ids_Nk,))
    head_seconds = _backward_seconds(score, low(rows, length, D), _normal(D, config.vocab_size))
    return {
        "attention": config.num_layers * attention_seconds,
        "experts": config.num_layers * experts_seconds,
        "head": head_seconds,
    }


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.float32)


def _backward_seconds(function: Callable, *floats: jax.Array, fixed: tuple = ()) -> float:
    """Return the seconds of forward and backward of the sum of a function's results."""

    def total(floats: tuple, fixed: tuple) -> jax.Array:
        return jnp.sum(function(*floats, *fixed).astype(jnp.float32))

    return _best_seconds(jax.jit(jax.grad(total)), floats, fixed, repeats=4)


def _best_seconds(function: Callable, *arguments: Any, repeats: int) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)
