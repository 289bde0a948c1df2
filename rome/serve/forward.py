"""The engine's forward pass: the layers of `rome.model`, with a cache laid out for decoding.

B rows, T tokens of a row in this call, S context length, D model, N query heads, K key heads, G
query heads per key head, H head dim, k experts.

Keys are stored as [B, K, H, S] and values as [B, K, S, H], so that both products of attention read
the cache without a transpose; with the model's own [B, S, K, H] most of a decode step on a CPU was
spent on transposing it. Tests compare this pass with `Qwen3`'s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rome.model.config import ModelConfig
from rome.model.mlp import MLP
from rome.model.moe import MoE
from rome.model.ops.rotary import rotary_angles, rotate
from rome.model.qwen3 import Params, RMSNorm


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k_BKHS: Array
    v_BKSH: Array


Cache = tuple[LayerCache, ...]


def make_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    """Return an empty cache of `rows` sequences with `length` positions."""
    K = config.num_kv_heads
    H = config.head_dim
    layers = []
    for _ in range(config.num_layers):
        k_BKHS = jnp.zeros((rows, K, H, length), config.dtype)
        v_BKSH = jnp.zeros((rows, K, length, H), config.dtype)
        layers.append(LayerCache(k_BKHS, v_BKSH))
    return tuple(layers)


def forward(
    params: Params,
    config: ModelConfig,
    token_BT: Array,
    position_BT: Array,
    real_BT: Array,
    cache: Cache,
    experts: str,
) -> tuple[Array, Cache, Array]:
    """Compute tokens that are not in the cache yet, and write them there at their positions.

    Args:
      params: layers unstacked.
      config: of the model.
      token_BT: token ids.
      position_BT: position of each token in its sequence.
      real_BT: False for padding, which is not written and whose results mean nothing.
      cache: keys and values of earlier positions.
      experts: form of the experts, "dense" or "sorted" (`rome.model.ops.experts.experts`): those
        whose rows do not depend on each other.

    Returns:
      hidden_BTD after the final norm, the cache, and the chosen experts [L, B, T, k].
    """
    x_BTD = jnp.take(params["embed"]["embedding"], token_BT, axis=0).astype(config.dtype)
    angles = rotary_angles(position_BT, config)
    caches = []
    routes = []
    for layer, layer_cache in zip(params["layers"], cache, strict=True):
        normed_BTD = _norm(config, layer["attention_norm"], x_BTD)
        attended_BTD, layer_cache = _attend(
            layer["attention"], config, normed_BTD, position_BT, real_BT, angles, layer_cache
        )
        x_BTD = x_BTD + attended_BTD
        normed_BTD = _norm(config, layer["moe_norm"], x_BTD)
        if "mlp" in layer:
            out_BTD = _apply(MLP(config), layer["mlp"], normed_BTD)
            ids_BTk = jnp.full((*real_BT.shape, config.experts_per_token), -1, jnp.int32)
        else:
            out_BTD, ids_BTk, _ = _apply(MoE(config, experts), layer["moe"], normed_BTD, real_BT)
        x_BTD = x_BTD + out_BTD
        caches.append(layer_cache)
        routes.append(ids_BTk)
    return _norm(config, params["norm"], x_BTD), tuple(caches), jnp.stack(routes)


def _attend(
    params: Params,
    config: ModelConfig,
    x_BTD: Array,
    position_BT: Array,
    real_BT: Array,
    angles: tuple[Array, Array],
    cache: LayerCache,
) -> tuple[Array, LayerCache]:
    """Write this call's keys and values to the cache, and attend over it.

    A token sees positions up to its own.
    """
    B, T, _ = x_BTD.shape
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    S, G = cache.k_BKHS.shape[-1], N // K
    q_BTNH = _project(params, config, "q", x_BTD, N)
    k_BTKH = _project(params, config, "k", x_BTD, K)
    v_BTKH = _project(params, config, "v", x_BTD, K)
    q_BTNH = rotate(_norm(config, params["q_norm"], q_BTNH), *angles)
    k_BTKH = rotate(_norm(config, params["k_norm"], k_BTKH), *angles)
    cache = _write(cache, k_BTKH, v_BTKH, position_BT, real_BT)

    # The T tokens of the G query heads of one key head are the rows Q of one matrix product.
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    q_BKQH = q_BKGTH.reshape(B, K, G * T, H)
    scores_BKQS = jnp.matmul(q_BKQH, cache.k_BKHS, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKQS.reshape(B, K, G, T, S)
    sees_BTS = jnp.arange(S) <= position_BT[:, :, None]
    scores_BKGTS = jnp.where(sees_BTS[:, None, None], scores_BKGTS, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(x_BTD.dtype)
    out_BKQH = jnp.matmul(weights_BKGTS.reshape(B, K, G * T, S), cache.v_BKSH)
    out_BTX = out_BKQH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)

    kernel_XD = params["o"].astype(x_BTD.dtype).reshape(N * H, -1)
    out_BTD = out_BTX @ kernel_XD
    if config.attention_bias:
        out_BTD = out_BTD + params["o_bias"].astype(x_BTD.dtype)
    return out_BTD, cache


def _project(params: Params, config: ModelConfig, name: str, x_BTD: Array, heads: int) -> Array:
    """Return queries, keys or values, [B, T, heads, H]."""
    B, T, D = x_BTD.shape
    H = config.head_dim
    kernel_DX = params[name].astype(x_BTD.dtype).reshape(D, heads * H)
    out_BTnH = (x_BTD @ kernel_DX).reshape(B, T, heads, H)
    if config.attention_bias:
        out_BTnH = out_BTnH + params[f"{name}_bias"].astype(x_BTD.dtype)
    return out_BTnH


def _write(
    cache: LayerCache, k_BTKH: Array, v_BTKH: Array, position_BT: Array, real_BT: Array
) -> LayerCache:
    """Write keys and values at their positions; those of padding are dropped."""
    B = k_BTKH.shape[0]
    S = cache.k_BKHS.shape[-1]
    place_BT = jnp.where(real_BT, position_BT, S)  # S is past the end
    row_B1 = jnp.arange(B)[:, None]
    k_BTKH = k_BTKH.astype(cache.k_BKHS.dtype)
    v_BTKH = v_BTKH.astype(cache.v_BKSH.dtype)
    return LayerCache(
        cache.k_BKHS.at[row_B1, :, :, place_BT].set(k_BTKH, mode="drop"),
        cache.v_BKSH.at[row_B1, :, place_BT].set(v_BTKH, mode="drop"),
    )


def _norm(config: ModelConfig, params: Params, x: Array) -> Array:
    return _apply(RMSNorm(config.rms_norm_eps), params, x)


def _apply(module: nn.Module, params: Params, *inputs: Array) -> Any:
    return module.apply({"params": params}, *inputs)
