"""Qwen3-MoE in functional Flax: embedding, blocks of attention and experts, final norm.

The head is left to whoever needs logits.

B rows, T time, S cache slots, D model, N query heads, K key heads, H head dim, L layers, k experts
a token, V vocabulary.

Parameters are an explicit pytree of float32 arrays; layers are stacked on a leading L axis:

    {"embed": {"embedding" [V, D]}, "layers": {"attention_norm", "attention", "moe_norm", "moe"},
    "norm": {"scale"}, "head": {"kernel" [D, V]}}

`Qwen3(config)` scans over the stack, which compiles once for any depth. `Qwen3(config, scan=False)`
runs the same parameters, stacked or as a tuple of layers (`unstack_layers`), one after the other:
several times faster for decoding on a CPU. Both give the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rome.model import sharding
from rome.model.config import ModelConfig
from rome.model.moe import LayerRouter, MoE, RouterStats
from rome.model.ops.attention import attention
from rome.model.ops.attention_kernels import SAVED_OUTPUT
from rome.model.ops.embedding import embed
from rome.model.ops.gathered import from_heads, to_heads

Params = dict[str, Any]
BLOCK_INPUT = "block_input"  # the name under which a remat policy finds it


class Cache(NamedTuple):
    """Keys and values by position.

    Scanned: arrays [L, B, S, K, H]. Unrolled: tuples of L arrays [B, S, K, H].
    """

    k: Any
    v: Any


class Output(NamedTuple):
    """hidden_BTD is after the final norm: logits are hidden_BTD @ head_kernel(params, config).

    routes_LBTK: the expert ids that each router chooses by itself. Where others were replayed,
    comparing the two shows how far it is from them.
    """

    hidden_BTD: Array
    cache: Cache | None
    routes_LBTK: Array
    router: RouterStats


class Places(NamedTuple):
    """What every layer needs to know about where tokens stand. h is H / 2."""

    cos_BT1h: Array
    sin_BT1h: Array
    positions_BT: Array
    segments_BT: Array


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * scale).astype(x.dtype)


def rotary_angles(positions_BT: Array, config: ModelConfig) -> tuple[Array, Array]:
    """cos and sin, each [B, T, 1, H / 2] float32, stretched as the config's rope_scaling says."""
    angle_BT1h = positions_BT.astype(jnp.float32)[:, :, None, None] * rotary_frequencies(
        config
    ).astype(np.float32)
    size = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return jnp.cos(angle_BT1h) * size, jnp.sin(angle_BT1h) * size


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position, [H / 2] float64.

    YaRN as in arXiv 2309.00071, section 3.2, and transformers' reading of it.
    """
    H, scaling = config.head_dim, config.rope_scaling
    frequency_h = config.rope_theta ** (-np.arange(0, H, 2) / H)
    if scaling is None or scaling.kind == "linear":
        return frequency_h / (scaling.factor if scaling else 1.0)
    border = lambda turns: (
        H
        * math.log(scaling.original_max_position / (turns * 2 * math.pi))
        / (2 * math.log(config.rope_theta))
    )
    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    stretched_h = np.clip((np.arange(H // 2) - low) / ((high - low) or 0.001), 0, 1)
    return frequency_h * (1 - stretched_h) + frequency_h / scaling.factor * stretched_h


def rotate(x_BTNH: Array, cos_BT1h: Array, sin_BT1h: Array) -> Array:
    """Rotary embedding in the layout of the published weights: i is paired with i + H / 2."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [a * cos_BT1h - b * sin_BT1h, b * cos_BT1h + a * sin_BT1h], axis=-1
    ).astype(x_BTNH.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, over the row itself or over a cache
    that it extends.
    """

    config: ModelConfig
    form: str = "auto"

    @nn.compact
    def __call__(
        self, x_BTD: Array, places: Places, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        config = self.config
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        init = nn.initializers.normal(config.initializer_range)
        q_DNH, k_DKH, v_DKH, o_NHD = (
            self.param(name, init, shape).astype(x_BTD.dtype)
            for name, shape in (
                ("q", (D, N, H)),
                ("k", (D, K, H)),
                ("v", (D, K, H)),
                ("o", (N, H, D)),
            )
        )
        q_NH, k_KH, v_KH, o_D = (
            (
                self.param(name, nn.initializers.zeros, shape).astype(x_BTD.dtype)
                if config.attention_bias
                else 0
            )
            for name, shape in (
                ("q_bias", (N, H)),
                ("k_bias", (K, H)),
                ("v_bias", (K, H)),
                ("o_bias", (D,)),
            )
        )
        q_BTNH = RMSNorm(config.rms_norm_eps, name="q_norm")(to_heads(x_BTD, q_DNH) + q_NH)
        k_BTKH = RMSNorm(config.rms_norm_eps, name="k_norm")(to_heads(x_BTD, k_DKH) + k_KH)
        v_BTKH = to_heads(x_BTD, v_DKH) + v_KH
        q_BTNH = rotate(q_BTNH, places.cos_BT1h, places.sin_BT1h)
        k_BTKH = rotate(k_BTKH, places.cos_BT1h, places.sin_BT1h)
        attend = (
            functools.partial(_attend_row, form=self.form)
            if cache is None
            else functools.partial(_attend_cache, cache=cache)
        )
        out_BTNH, cache = attend(q_BTNH, k_BTKH, v_BTKH, places)
        return from_heads(checkpoint_name(out_BTNH, SAVED_OUTPUT), o_NHD) + o_D, cache


def _attend_row(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, places: Places, form: str
) -> tuple[Array, None]:
    order_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
    return (
        attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_places_BT=order_BT,
            k_places_BS=order_BT,
            q_segments_BT=places.segments_BT,
            k_segments_BS=places.segments_BT,
            ordered=True,
            implementation=form,
        ),
        None,
    )


def _attend_cache(
    q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, places: Places, cache: Cache
) -> tuple[Array, Cache]:
    B, S = cache.k.shape[:2]
    real_BT = places.segments_BT != 0
    slot_BT = jnp.where(
        real_BT, places.positions_BT, S
    )  # S is past the end: the scatter drops padding
    row_B1 = jnp.arange(B)[:, None]
    cache = Cache(
        cache.k.at[row_B1, slot_BT].set(k_BTKH.astype(cache.k.dtype), mode="drop"),
        cache.v.at[row_B1, slot_BT].set(v_BTKH.astype(cache.v.dtype), mode="drop"),
    )
    slots_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    out_BTNH = attention(
        q_BTNH,
        cache.k.astype(q_BTNH.dtype),
        cache.v.astype(q_BTNH.dtype),
        q_places_BT=places.positions_BT,
        k_places_BS=slots_BS,
        q_segments_BT=real_BT.astype(jnp.int32),
        k_segments_BS=jnp.ones_like(slots_BS),
    )
    return out_BTNH, cache


class DenseMLP(nn.Module):
    """The gated MLP of a layer without experts."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        D, F = self.config.hidden_size, self.config.intermediate_size
        init = nn.initializers.normal(self.config.initializer_range)
        gate_DF, up_DF, down_FD = (
            self.param(name, init, shape).astype(x_BTD.dtype)
            for name, shape in (("gate", (D, F)), ("up", (D, F)), ("down", (F, D)))
        )
        return (jax.nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)), or the one MLP of a dense layer.

    Returns scan's form: the carry, then what is stacked over layers. A dense layer's expert ids are
    -1 and its counts 0.
    """

    config: ModelConfig
    experts: str = "auto"
    attention_form: str = "auto"
    exchange: str = "ring"
    dense: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, places: Places, cache: Cache | None, forced_BTk: Array | None):
        epsilon = self.config.rms_norm_eps
        x_BTD = checkpoint_name(sharding.constrain(x_BTD, "batch", "time", None), BLOCK_INPUT)
        attended_BTD, cache = Attention(self.config, self.attention_form, name="attention")(
            RMSNorm(epsilon, name="attention_norm")(x_BTD), places, cache
        )
        x_BTD = x_BTD + attended_BTD
        normed_BTD = RMSNorm(epsilon, name="moe_norm")(x_BTD)
        if self.dense:
            ids_BTk = jnp.full((*x_BTD.shape[:2], self.config.experts_per_token), -1, jnp.int32)
            return x_BTD + DenseMLP(self.config, name="mlp")(normed_BTD), (
                cache,
                ids_BTk,
                LayerRouter.nothing(self.config.num_experts),
            )
        out_BTD, ids_BTk, router = MoE(self.config, self.experts, self.exchange, name="moe")(
            normed_BTD, places.segments_BT != 0, forced_BTk
        )
        return x_BTD + out_BTD, (cache, ids_BTk, router)


class Qwen3(nn.Module):
    """The model up to the final norm.

    Attributes:
      scan: loop over stacked layers (True) or unroll them (False); see the module's docstring.
      experts: form of the experts, as in `rome.model.ops.experts.experts`.
      attention_form: form of attention over whole rows, as in `rome.model.ops.attention.attention`.
      exchange: how tokens reach their experts on a mesh, as in
        `rome.model.ops.experts_on_mesh.experts_on_mesh`.
    """

    config: ModelConfig
    scan: bool = True
    experts: str = "auto"
    attention_form: str = "auto"
    exchange: str = "ring"

    @nn.compact
    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        cache: Cache | None = None,
        routes_LBTK: Array | None = None,
    ) -> Output:
        """Runs the model.

        Args:
          positions_BT: rotary positions; with a cache also the slot that a token is written to,
            below the cache's length.
          segments_BT: 0 is padding; tokens of one number attend causally to each other. With a
            cache a row is one sequence and only zero or not matters: padding is not written, and a
            query sees the slots up to its position.
          routes_LBTK: expert ids to replay; gate weights still come from the router. Negative where
            a token chooses for itself.
        """
        config = self.config
        self._check(tokens_BT, positions_BT, segments_BT, cache, routes_LBTK)
        embedding_VD = _Matrix(
            "embedding",
            (config.vocab_size, config.hidden_size),
            config.initializer_range,
            name="embed",
        )()
        if (
            not config.tie_embeddings
        ):  # made here, applied by whoever needs logits: training never builds [B, T, V]
            _Matrix(
                "kernel",
                (config.hidden_size, config.vocab_size),
                config.initializer_range,
                name="head",
            )()
        x_BTD = embed(embedding_VD, tokens_BT, config.dtype)
        places = Places(*rotary_angles(positions_BT, config), positions_BT, segments_BT)
        run = self._scanned if self.scan else self._unrolled
        x_BTD, (cache, routes_LBTK, router_L) = run(x_BTD, places, cache, routes_LBTK)
        hidden_BTD = RMSNorm(config.rms_norm_eps, name="norm")(
            sharding.constrain(x_BTD, "batch", "time", None)
        )
        tokens = jnp.sum(segments_BT != 0).astype(jnp.float32)
        return Output(hidden_BTD, cache, routes_LBTK, RouterStats(*router_L, tokens))

    def _scanned(
        self, x_BTD: Array, places: Places, cache: Cache | None, forced_LBTk: Array | None
    ):
        block = (
            Block
            if self.config.remat == "none"
            else nn.remat(Block, prevent_cse=False, policy=_remat_policy(self.config))
        )
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=self.config.num_layers,
        )
        return layers(self.config, self.experts, self.attention_form, self.exchange, name="layers")(
            x_BTD, places, cache, forced_LBTk
        )

    def _unrolled(
        self, x_BTD: Array, places: Places, cache: Cache | None, forced_LBTk: Array | None
    ):
        layers = self.get_variable("params", "layers")
        layers = (
            layers
            if isinstance(layers, tuple)
            else unstack_layers({"layers": layers}, self.config)["layers"]
        )
        outs = []
        for i in range(self.config.num_layers):
            block = Block(
                self.config,
                self.experts,
                self.attention_form,
                self.exchange,
                i in self.config.dense_layers,
                parent=None,
            )
            run = lambda layer, *args, block=block: block.apply({"params": layer}, *args)
            run = (
                run
                if self.config.remat == "none"
                else jax.checkpoint(run, policy=_remat_policy(self.config))
            )
            layer_cache = None if cache is None else Cache(cache.k[i], cache.v[i])
            x_BTD, out = run(
                layers[i],
                x_BTD,
                places,
                layer_cache,
                None if forced_LBTk is None else forced_LBTk[i],
            )
            outs.append(out)
        caches, routes, routers = zip(*outs)
        cache = (
            None if cache is None else Cache(tuple(c.k for c in caches), tuple(c.v for c in caches))
        )
        return x_BTD, (
            cache,
            jnp.stack(routes),
            jax.tree.map(lambda *layers: jnp.stack(layers), *routers),
        )

    def _check(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        cache: Cache | None,
        routes_LBTK: Array | None,
    ) -> None:
        config, shape = self.config, tuple(tokens_BT.shape)
        if len(shape) != 2 or positions_BT.shape != shape or segments_BT.shape != shape:
            raise ValueError(
                f"tokens {shape}, positions {positions_BT.shape} and segments {segments_BT.shape}"
                " must have one shape [B, T]"
            )
        routes_shape = (config.num_layers, *shape, config.experts_per_token)
        if routes_LBTK is not None and tuple(routes_LBTK.shape) != routes_shape:
            raise ValueError(
                f"routes have shape {tuple(routes_LBTK.shape)}; these tokens need [layers, B, T, k]"
                f" = {routes_shape}"
            )
        if cache is not None and isinstance(cache.k, tuple) == self.scan:
            raise ValueError(
                f"this cache is not for scan={self.scan}; make it with init_cache(config, batch,"
                f" length, scan={self.scan})"
            )
        if self.scan and config.dense_layers:
            raise ValueError(
                f"dense_layers={config.dense_layers}: layers of two kinds are not scanned; use"
                " Qwen3(config, scan=False)"
            )
        if self.is_initializing() and not self.scan:
            raise ValueError("Qwen3(scan=False) makes no parameters; use init_params(config, key)")
        if (
            not self.is_initializing()
            and self.scan
            and isinstance(self.get_variable("params", "layers"), tuple)
        ):
            raise ValueError(
                "layers are a tuple, but this model scans over a stack; use Qwen3(config,"
                " scan=False) or stack_layers(params)"
            )


def _remat_policy(config: ModelConfig) -> Any:
    """What jax.checkpoint keeps of a block, beside its inputs."""
    policies = jax.checkpoint_policies
    if config.remat == "attention":
        return policies.save_only_these_names(SAVED_OUTPUT)
    if (
        config.remat == "offload"
    ):  # the loop over layers then keeps the copy that went to the host, and not its own
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return policies.nothing_saveable


class _Matrix(nn.Module):
    """One matrix under its own name, so that the parameter tree reads well."""

    leaf: str
    shape: tuple[int, int]
    stddev: float

    @nn.compact
    def __call__(self) -> Array:
        return self.param(self.leaf, nn.initializers.normal(self.stddev), self.shape)


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters, stacked over layers: normal(initializer_range), norms at 1, biases
    at 0.

    Layers of two kinds are two stacks: "moe" over the sparse layers, "mlp" over the dense ones;
    what both have is stacked over all.
    """
    one = jnp.ones((1, 1), jnp.int32)
    if not config.dense_layers:
        return Qwen3(config).init(key, one, one, one)["params"]
    uniform = dataclasses.replace(config, dense_layers=(), scan_layers=True)
    params = Qwen3(uniform).init(key, one, one, one)["params"]
    params["layers"]["moe"] = jax.tree.map(
        lambda w: w[np.array(config.sparse_layers)], params["layers"]["moe"]
    )
    x_BTD = jnp.zeros((1, 1, config.hidden_size), config.dtype)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(config.dense_layers))
    params["layers"]["mlp"] = jax.vmap(lambda key: DenseMLP(config).init(key, x_BTD)["params"])(
        keys
    )
    return params


def init_cache(config: ModelConfig, batch: int, length: int, scan: bool = True) -> Cache:
    """An empty cache of `length` slots a row, in the compute dtype."""
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    if scan:
        return Cache(*(jnp.zeros((config.num_layers, *shape), config.dtype) for _ in range(2)))
    return Cache(
        *(tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2))
    )


def cast_layers(params: Params, config: ModelConfig) -> Params:
    """The layers' matrices in the compute type; norms, router, embedding and head stay float32.

    The layers would cast them anyway. Cast here, once, their gradients come out of the loop over
    layers in that type, half as large.
    """
    matrices = ("q", "k", "v", "o", "gate", "up", "down")
    cast = lambda path, w: w.astype(config.dtype) if path[-1].key in matrices else w
    return params | {"layers": jax.tree_util.tree_map_with_path(cast, params["layers"])}


def head_kernel(params: Params, config: ModelConfig) -> Array:
    """[D, V]: what maps hidden states to logits, the transposed embedding where the two are tied."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


def unstack_layers(params: Params, config: ModelConfig) -> Params:
    """The same parameters with layers as a tuple, for Qwen3(config, scan=False): no slicing at each
    step.
    """

    def split(w: Array) -> list[Array]:
        return (
            list(w)
            if isinstance(w, np.ndarray)
            else [part[0] for part in jax.lax.split(w, (1,) * w.shape[0])]
        )  # its gradient is one concatenation

    stacks = {name: jax.tree.map(split, stack) for name, stack in params["layers"].items()}
    is_parts = lambda node: isinstance(node, list)
    layers = []
    for i in range(config.num_layers):
        own, other, members = (
            ("mlp", "moe", config.dense_layers)
            if i in config.dense_layers
            else ("moe", "mlp", config.sparse_layers)
        )
        place = {own: members.index(i)}
        layers.append(
            {
                name: jax.tree.map(lambda parts: parts[place.get(name, i)], stack, is_leaf=is_parts)
                for name, stack in stacks.items()
                if name != other
            }
        )
    return params | {"layers": tuple(layers)}


def stack_layers(params: Params) -> Params:
    """The inverse of unstack_layers."""
    names = dict.fromkeys(name for layer in params["layers"] for name in layer)
    return params | {
        "layers": {
            name: jax.tree.map(
                lambda *w: (np if isinstance(w[0], np.ndarray) else jnp).stack(w),
                *(layer[name] for layer in params["layers"] if name in layer),
            )
            for name in names
        }
    }
