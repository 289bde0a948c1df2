"""Qwen3 in functional Flax: embedding, blocks of attention and experts or an MLP, final norm.

The head is not applied: training computes logprobs in blocks (`rome.model.ops.logprobs`), an engine
logits of the last token.

B rows, T time, D model, N query heads, K key heads, H head dim, h = H / 2, L layers,
k experts a token (0 in a dense model), V vocabulary.

Parameters are an explicit pytree of float32 arrays; layers are stacked on a leading L axis:

    {"embed": {"embedding" [V, D]}, "layers": {"attention_norm", "attention", "moe_norm", "moe"},
    "norm": {"scale"}, "head": {"kernel" [D, V]}}

Layers of a dense model have "mlp" instead of "moe"; tied embeddings have no "head". A matrix of the
layers may have an adapter beside it (`rome.model.lora`).

`Qwen3(config)` scans over the stack, which compiles once for any depth. `Qwen3(config, scan=False)`
runs the same parameters, stacked or as a tuple of layers (`unstack_layers`), one after the other:
several times faster for decoding on a CPU. Both give the same numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from rome.model import sharding
from rome.model.config import ModelConfig
from rome.model.mlp import MLP
from rome.model.moe import LayerRouter, MoE, RouterStats
from rome.model.ops.attention import attention
from rome.model.ops.attention_kernels import SAVED_OUTPUT
from rome.model.ops.embedding import embed
from rome.model.ops.gathered import from_heads, to_heads
from rome.model.ops.low_rank import adapted, with_served
from rome.model.ops.native import norm_native, products_native
from rome.model.ops.paged import NO_POSITION, LayerPages, Pages, paged_attention
from rome.model.ops.rotary import rotary_angles, rotate
from rome.model.ops.rounding import round_straight_through
from rome.model.ops.row_sums import sum_of_rows
from rome.model.sharding import is_on_engine_mesh
from rome.model.stacking import Params, unstack_layers

BLOCK_INPUT = "block_input"  # name of a block's input for remat policies

# What as_published casts, and what it rounds but leaves in float32.
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_FLOAT32 = ("router", "scale")


class Output(NamedTuple):
    """What the model returns.

    Attributes:
      hidden_BTD: after the final norm: logits are hidden_BTD @ head_kernel(params, config).
      pages: with the keys and values of these tokens, a layer each; None without pages.
      routes_LBTK: the expert ids that each router chooses by itself. Where others were replayed,
        comparing the two shows how far it is from them.
      router: sums of the routers of all layers.
    """

    hidden_BTD: Array
    pages: tuple[Array, ...] | None
    routes_LBTK: Array
    router: RouterStats


class Places(NamedTuple):
    """Position and segment of each token, its rotary angles, and in a prefix tree who sees it."""

    cos_BT1h: Array
    sin_BT1h: Array
    positions_BT: Array
    segments_BT: Array
    ends_BT: Array | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32.

    Attributes:
      epsilon: added to the mean square.
      by_row: sum each row in an order of its own, as an engine must (`rome.model.ops.row_sums`).
      is_native: whether C++ does so, without a gradient.
    """

    epsilon: float
    by_row: bool = False
    is_native: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise x; the result has x's dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.is_native:
            return norm_native(x, scale, self.epsilon)
        x32 = x.astype(jnp.float32)
        squares = jnp.square(x32)
        if self.by_row:
            mean_square = sum_of_rows(squares)[..., None] / x.shape[-1]
        else:
            mean_square = jnp.mean(squares, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        return (x32 * scale).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys.

    Over the row itself, or over the pages of a cache that it extends.
    """

    config: ModelConfig
    form: str = "auto"

    @nn.compact
    def __call__(
        self, x_BTD: Array, places: Places, pages: LayerPages | None
    ) -> tuple[Array, Array | None]:
        """Return the output [B, T, D] and this layer's pages with these tokens in them."""
        config = self.config
        D = config.hidden_size
        N = config.num_heads
        K = config.num_kv_heads
        H = config.head_dim
        dtype = x_BTD.dtype
        q_DNH = self._matrix("q", (D, N, H), dtype)
        k_DKH = self._matrix("k", (D, K, H), dtype)
        v_DKH = self._matrix("v", (D, K, H), dtype)
        o_NHD = self._matrix("o", (N, H, D), dtype)
        q_NH = self._bias("q_bias", (N, H), dtype)
        k_KH = self._bias("k_bias", (K, H), dtype)
        v_KH = self._bias("v_bias", (K, H), dtype)
        o_D = self._bias("o_bias", (D,), dtype)

        norm = _norm_of(config, self.form, pages)
        q_BTNH, k_BTKH, v_BTKH = self._to_heads(x_BTD, q=q_DNH, k=k_DKH, v=v_DKH)
        q_BTNH = norm(name="q_norm")(q_BTNH + q_NH)
        k_BTKH = norm(name="k_norm")(k_BTKH + k_KH)
        v_BTKH = v_BTKH + v_KH
        q_BTNH = rotate(q_BTNH, places.cos_BT1h, places.sin_BT1h)
        k_BTKH = rotate(k_BTKH, places.cos_BT1h, places.sin_BT1h)
        new_pages = None
        if pages is None:
            out_BTNH = _attend_row(q_BTNH, k_BTKH, v_BTKH, places, self.form)
        else:
            position_T = jnp.where(places.segments_BT[0] != 0, places.positions_BT[0], NO_POSITION)
            out_TNH, new_pages = paged_attention(
                q_BTNH[0], k_BTKH[0], v_BTKH[0], position_T, pages, self.form
            )
            out_BTNH = out_TNH[None]
        out_BTNH = checkpoint_name(out_BTNH, SAVED_OUTPUT)
        return self._from_heads(out_BTNH, o_NHD) + o_D, new_pages

    def _to_heads(self, x_BTD: Array, **matrices: Array) -> list[Array]:
        is_native = _is_native(self.form)
        if is_native:
            flat = [w_DNH.reshape(len(w_DNH), -1) for w_DNH in matrices.values()]
            outs = products_native(x_BTD[0], *flat)
        else:
            outs = [to_heads(x_BTD, w_DNH) for w_DNH in matrices.values()]
        heads = []
        for (name, w_DNH), out in zip(matrices.items(), outs, strict=True):
            out_BTNH = out.reshape(*x_BTD.shape[:2], *w_DNH.shape[1:])
            heads.append(with_served(self, name, x_BTD, out_BTNH, is_native))
        return heads

    def _from_heads(self, x_BTNH: Array, o_NHD: Array) -> Array:
        is_native = _is_native(self.form)
        if is_native:
            T = x_BTNH.shape[1]
            o_ID = o_NHD.reshape(-1, o_NHD.shape[-1])
            out_BTD = products_native(x_BTNH.reshape(T, -1), o_ID)[0][None]
        else:
            out_BTD = from_heads(x_BTNH, o_NHD)
        return with_served(self, "o", x_BTNH, out_BTD, is_native)

    def _matrix(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        return adapted(self, name, self.param(name, init, shape), dtype)

    def _bias(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array | int:
        if not self.config.attention_bias:
            return 0
        return self.param(name, nn.initializers.zeros, shape).astype(dtype)


def _norm_of(
    config: ModelConfig, attention_form: str, pages: LayerPages | Pages | None
) -> Callable[..., RMSNorm]:
    """Return what makes the norms of a layer."""
    is_paged = pages is not None
    return functools.partial(RMSNorm, config.rms_norm_eps, is_paged, _is_native(attention_form))


def _is_native(attention_form: str) -> bool:
    """Return whether C++ computes an engine's layers; a mesh splits the products of XLA alone."""
    return attention_form == "native" and not is_on_engine_mesh()


def _attend_row(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array, places: Places, form: str) -> Array:
    order_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
    return attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_places_BT=order_BT,
        k_places_BS=order_BT,
        q_segments_BT=places.segments_BT,
        k_segments_BS=places.segments_BT,
        ordered=True,
        implementation=form,
        ends_BT=places.ends_BT,
    )


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + experts(norm(x)), or x + mlp(norm(x)).

    A layer with `dense` has an MLP instead of experts; its expert ids are -1 and its counts 0.
    """

    config: ModelConfig
    experts: str = "auto"
    attention_form: str = "auto"
    exchange: str = "ring"
    dense: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, places: Places, pages: LayerPages | None, forced_BTk: Array | None
    ) -> tuple[Array, tuple[Array | None, Array, LayerRouter]]:
        """Return scan's form: the carry x_BTD, then what is stacked over layers."""
        config = self.config
        norm = _norm_of(config, self.attention_form, pages)
        x_BTD = checkpoint_name(sharding.constrain(x_BTD, "batch", "time", None), BLOCK_INPUT)
        attention_layer = Attention(config, self.attention_form, name="attention")
        normed_BTD = norm(name="attention_norm")(x_BTD)
        attended_BTD, new_pages = attention_layer(normed_BTD, places, pages)
        x_BTD = x_BTD + attended_BTD
        normed_BTD = norm(name="moe_norm")(x_BTD)
        if self.dense:
            ids_BTk = jnp.full((*x_BTD.shape[:2], config.experts_per_token), -1, jnp.int32)
            out_BTD = MLP(config, _is_native(self.attention_form), name="mlp")(normed_BTD)
            return x_BTD + out_BTD, (new_pages, ids_BTk, LayerRouter.zeros(config.num_experts))
        moe = MoE(config, self.experts, self.exchange, name="moe")
        out_BTD, ids_BTk, router = moe(normed_BTD, places.segments_BT != 0, forced_BTk)
        return x_BTD + out_BTD, (new_pages, ids_BTk, router)


class Qwen3(nn.Module):
    """The model up to the final norm.

    Attributes:
      scan: loop over stacked layers (True) or unroll them (False); see the module's docstring.
      experts: form of the experts, as in `rome.model.ops.experts.experts`.
      attention_form: form of attention over whole rows, as in `rome.model.ops.attention.attention`,
        or over pages, as in `rome.model.ops.paged.paged_attention`.
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
        pages: Pages | None = None,
        routes_LBTK: Array | None = None,
        ends_BT: Array | None = None,
    ) -> Output:
        """Run the model.

        Args:
          tokens_BT: ids.
          positions_BT: rotary positions; with pages also the place in the token's sequence.
          segments_BT: 0 is padding; tokens of one number attend causally to each other. With pages
            only zero or not matters.
          pages: keys and values of earlier tokens, and which sequence each token belongs to; B is
            then 1, and scan False. None: each row is complete.
          routes_LBTK: expert ids to replay; gate weights still come from the router. Negative where
            a token chooses for itself.
          ends_BT: in rows of prefix trees, the place after the last token that sees each token;
            None: a token is seen by all that follow it in its segment.

        Raises:
          ValueError: shapes, parameters and form of the loop do not fit each other.
        """
        config = self.config
        self._check(tokens_BT, positions_BT, segments_BT, pages, routes_LBTK)
        embedding_VD = self._matrix("embed", "embedding", (config.vocab_size, config.hidden_size))
        if not config.tie_embeddings:
            # Made here, applied by users of the hidden states: training never builds [B, T, V].
            self._matrix("head", "kernel", (config.hidden_size, config.vocab_size))
        x_BTD = embed(embedding_VD, tokens_BT, config.dtype)
        angles = rotary_angles(positions_BT, config)
        if pages is not None:  # or each layer's rotations compute them again
            angles = jax.lax.optimization_barrier(angles)
        cos_BT1h, sin_BT1h = angles
        places = Places(cos_BT1h, sin_BT1h, positions_BT, segments_BT, ends_BT)
        run = self._scanned if self.scan else self._unrolled
        x_BTD, (new_pages, routes_LBTK, router_L) = run(x_BTD, places, pages, routes_LBTK)
        x_BTD = sharding.constrain(x_BTD, "batch", "time", None)
        hidden_BTD = _norm_of(config, self.attention_form, pages)(name="norm")(x_BTD)
        tokens = jnp.sum(segments_BT != 0).astype(jnp.float32)
        return Output(hidden_BTD, new_pages, routes_LBTK, RouterStats(*router_L, tokens))

    def _matrix(self, name: str, leaf: str, shape: tuple[int, int]) -> Array:
        return _Matrix(leaf, shape, self.config.initializer_range, name=name)()

    def _scanned(
        self, x_BTD: Array, places: Places, pages: Pages | None, forced_LBTk: Array | None
    ) -> tuple[Array, tuple[tuple[Array, ...] | None, Array, LayerRouter]]:
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=_remat_policy(self.config))
        scanned_block = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            length=self.config.num_layers,
        )
        layers = scanned_block(
            self.config,
            self.experts,
            self.attention_form,
            self.exchange,
            self.config.is_dense,
            name="layers",
        )
        return layers(x_BTD, places, None, forced_LBTk)

    def _unrolled(
        self, x_BTD: Array, places: Places, pages: Pages | None, forced_LBTk: Array | None
    ) -> tuple[Array, tuple[tuple[Array, ...] | None, Array, LayerRouter]]:
        layers: Any = self.get_variable("params", "layers")
        if not isinstance(layers, tuple):
            layers = unstack_layers({"layers": layers}, self.config)["layers"]
        outs = []
        for number, layer in enumerate(layers):
            run = self._layer_function(number)
            layer_pages = None if pages is None else pages.of_layer(number)
            forced_BTk = None if forced_LBTk is None else forced_LBTk[number]
            x_BTD, out = run(layer, x_BTD, places, layer_pages, forced_BTk)
            outs.append(out)
        new_pages, routes, routers = zip(*outs, strict=True)
        routes_LBTk = jnp.stack(routes)
        router_L = jax.tree.map(lambda *layers: jnp.stack(layers), *routers)
        return x_BTD, (None if pages is None else new_pages, routes_LBTk, router_L)

    def _layer_function(self, number: int) -> Any:
        """Return a function (params of the layer, *arguments of Block) -> Block's results."""
        dense = number in self.config.mlp_layers
        block = Block(
            self.config, self.experts, self.attention_form, self.exchange, dense, parent=None
        )

        def run(layer: Params, *args: Any) -> Any:
            return block.apply({"params": layer}, *args)

        if self.config.remat == "none":
            return run
        return jax.checkpoint(run, policy=_remat_policy(self.config))

    def _check(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        pages: Pages | None,
        routes_LBTK: Array | None,
    ) -> None:
        config = self.config
        shape = tuple(tokens_BT.shape)
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
        if pages is not None and (self.scan or shape[0] != 1):
            raise ValueError(
                f"pages take one row of tokens and Qwen3(config, scan=False), not {shape[0]} rows"
                f" and scan={self.scan}"
            )
        if self.scan and config.dense_layers:
            raise ValueError(
                f"dense_layers={config.dense_layers}: layers of two kinds are not scanned; use"
                " Qwen3(config, scan=False)"
            )
        if self.is_initializing() and not self.scan:
            raise ValueError("Qwen3(scan=False) makes no parameters; use init_params(config, key)")
        if self.is_initializing() or not self.scan:
            return
        if isinstance(self.get_variable("params", "layers"), tuple):
            raise ValueError(
                "layers are a tuple, but this model scans over a stack; use Qwen3(config,"
                " scan=False) or stack_layers(params)"
            )


def _remat_policy(config: ModelConfig) -> Any:
    """Return what jax.checkpoint keeps of a block, beside its inputs."""
    policies = jax.checkpoint_policies
    if config.remat == "attention":
        return policies.save_only_these_names(SAVED_OUTPUT)
    if config.remat == "offload":
        # The loop over layers then keeps the copy on the host, and not its own.
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
    """Return fresh float32 parameters, stacked over layers.

    Matrices are normal(initializer_range), norms 1, biases 0. Layers of two kinds are two stacks:
    "moe" over those with experts, "mlp" over the others; the rest is stacked over all.
    """
    one = jnp.ones((1, 1), jnp.int32)
    if not config.dense_layers:
        return Qwen3(config).init(key, one, one, one)["params"]
    uniform = dataclasses.replace(config, dense_layers=(), scan_layers=True)
    params = Qwen3(uniform).init(key, one, one, one)["params"]
    layers = params["layers"]
    sparse = np.array(config.sparse_layers)
    layers["moe"] = jax.tree.map(lambda weight: weight[sparse], layers["moe"])
    x_BTD = jnp.zeros((1, 1, config.hidden_size), config.dtype)

    def init_mlp(key: Array) -> Params:
        return MLP(config).init(key, x_BTD)["params"]

    keys = jax.random.split(jax.random.fold_in(key, 1), len(config.dense_layers))
    layers["mlp"] = jax.vmap(init_mlp)(keys)
    return params


def as_published(params: Params, config: ModelConfig) -> Params:
    """Return the float32 parameters as an engine has them that loaded them in the compute dtype.

    The layers' matrices are cast. They would be anyway; cast here, once, their gradients come out
    of the loop over layers in that type, half as large. Router and norms compute in float32 with
    numbers of the compute dtype; their gradients are those of the float32 parameters. Embedding
    and head are rounded where they are used.
    """

    def round_leaf(path: tuple[Any, ...], weight: Array) -> Array:
        name = path[-1].key
        if name in _MATRICES:
            return weight.astype(config.dtype)
        if name in _FLOAT32 or name.endswith("_bias"):
            return round_straight_through(weight, config.dtype)
        return weight

    return jax.tree_util.tree_map_with_path(round_leaf, params)


def head_kernel(params: Params, config: ModelConfig) -> Array:
    """Return the matrix [D, V] from hidden states to logits.

    Where embedding and head are tied it is the transposed embedding.
    """
    if config.tie_embeddings:
        return params["embed"]["embedding"].T
    return params["head"]["kernel"]
