"""The engine's forward pass: `rome.model`'s own layers, with a cache laid out for decoding.

B rows, T tokens of a row in this call, S context length, D model, N query heads, K key heads, G
query heads a key head, H head dim, k experts.

Keys lie as [B, K, H, S] and values as [B, K, S, H], so that both products of attention read the
cache as it lies; with the model's own [B, S, K, H] most of a decode step on a CPU went into
transposing it. Tests compare this pass with `Qwen3`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rome.model.config import ModelConfig
from rome.model.moe import MoE
from rome.model.ops.rotary import rotary_angles, rotate
from rome.model.qwen3 import DenseMLP, Params, RMSNorm


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    k_BKHS: Array
    v_BKSH: Array


Cache = tuple[LayerCache, ...]


def make_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    K, H = config.num_kv_heads, config.head_dim
    return tuple(
        LayerCache(
            jnp.zeros((rows, K, H, length), config.dtype),
            jnp.zeros((rows, K, length, H), config.dtype),
        )
        for _ in range(config.num_layers)
    )


def forward(
    params: Params,
    config: ModelConfig,
    token_BT: Array,
    position_BT: Array,
    real_BT: Array,
    cache: Cache,
    experts: str,
) -> tuple[Array, Cache, Array]:
    """Runs tokens that are not in the cache yet, and writes them there, each at its position.

    Args:
      params: layers unstacked.
      real_BT: False for padding, which is not written and whose results mean nothing.
      experts: form of the experts, "dense" or "sorted" (`rome.model.ops.experts.experts`): those
        whose rows do not depend on each other.
    Returns:
      hidden_BTD after the final norm, the cache, and the chosen experts [L, B, T, k].
    """
    x_BTD = jnp.take(params["embed"]["embedding"], token_BT, axis=0).astype(config.dtype)
    angles = rotary_angles(position_BT, config)
    caches, routes = [], []
    for layer, layer_cache in zip(params["layers"], cache):
        attended_BTD, layer_cache = _attend(
            layer["attention"],
            config,
            _norm(config, layer["attention_norm"], x_BTD),
            position_BT,
            real_BT,
            angles,
            layer_cache,
        )
        x_BTD = x_BTD + attended_BTD
        normed_BTD = _norm(config, layer["moe_norm"], x_BTD)
        if "mlp" in layer:
            out_BTD = DenseMLP(config).apply({"params": layer["mlp"]}, normed_BTD)
            ids_BTk = jnp.full((*real_BT.shape, config.experts_per_token), -1, jnp.int32)
        else:
            out_BTD, ids_BTk, _ = MoE(config, experts).apply(
                {"params": layer["moe"]}, normed_BTD, real_BT
            )
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
    """Attention over the cache, after this call's keys and values have been written to it.

    A token sees positions up to its own.
    """
    B, T, D = x_BTD.shape
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    S, G = cache.k_BKHS.shape[-1], N // K

    def project(name: str, heads: int) -> Array:
        out_BTnH = (x_BTD @ params[name].astype(x_BTD.dtype).reshape(D, heads * H)).reshape(
            B, T, heads, H
        )
        return (
            out_BTnH + params[f"{name}_bias"].astype(x_BTD.dtype)
            if config.attention_bias
            else out_BTnH
        )

    q_BTNH = rotate(_norm(config, params["q_norm"], project("q", N)), *angles)
    k_BTKH = rotate(_norm(config, params["k_norm"], project("k", K)), *angles)
    place_BT = jnp.where(real_BT, position_BT, S)  # S is past the end: padding is dropped
    row_B1 = jnp.arange(B)[:, None]
    cache = LayerCache(
        cache.k_BKHS.at[row_B1, :, :, place_BT].set(k_BTKH.astype(cache.k_BKHS.dtype), mode="drop"),
        cache.v_BKSH.at[row_B1, :, place_BT].set(
            project("v", K).astype(cache.v_BKSH.dtype), mode="drop"
        ),
    )
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    scores_BKQS = jnp.matmul(
        q_BKGTH.reshape(B, K, G * T, H), cache.k_BKHS, preferred_element_type=jnp.float32
    )
    sees_BTS = jnp.arange(S) <= position_BT[:, :, None]
    scores_BKGTS = jnp.where(sees_BTS[:, None, None], scores_BKQS.reshape(B, K, G, T, S), -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(x_BTD.dtype)
    out_BKQH = jnp.matmul(weights_BKGTS.reshape(B, K, G * T, S), cache.v_BKSH)
    out_BTX = out_BKQH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)
    out_BTD = out_BTX @ params["o"].astype(x_BTD.dtype).reshape(N * H, D)
    return (
        out_BTD + params["o_bias"].astype(x_BTD.dtype) if config.attention_bias else out_BTD
    ), cache


def _norm(config: ModelConfig, params: Params, x: Array) -> Array:
    return RMSNorm(config.rms_norm_eps).apply({"params": params}, x)
