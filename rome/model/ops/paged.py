"""Attention over a cache of pages: one function, forms behind it that are equal in value.

A call has T tokens of several sequences, in any mixture: one token of a sequence that is decoded, a
piece of a prompt. A sequence's keys and values lie in pages that its row of a table names; several
sequences may name the same page. This call's keys and values are written first, then each token
attends to the positions of its sequence up to its own.

T tokens, N query heads, K key heads, G query heads per key head (N = K * G), H head dim, R rows of
the table, M pages of a row, P positions of a page. Key and value heads take turns in a page, which
is what the TPU's kernel reads.

On an engine's mesh the heads, and the pages with them, are split over the tensor axis: each device
has its heads' part of every page.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from rome.model.config import ModelConfig
from rome.model.ops.native import attention_native
from rome.model.ops.row_sums import sum_of_rows
from rome.model.sharding import ENGINE_RULES, is_on_engine_mesh, partition_spec

IMPLEMENTATIONS = ("auto", "gather", "native", "ragged_paged")
# Of the TPU's kernel: what most entries of its table of tuned sizes come to.
POSITIONS_A_BLOCK = 1024
QUERIES_A_BLOCK = 32
_HEADS = partition_spec((None, "heads", None), ENGINE_RULES)
_KV_HEADS = partition_spec((None, "kv_heads", None), ENGINE_RULES)
_PAGES = partition_spec((None, None, "kv_heads", None), ENGINE_RULES)
HIDDEN_SCORE = -1e30  # finite: (-inf) - (-inf) would be NaN
NO_POSITION = -1  # of padding: it is not written and sees nothing


class LayerPages(NamedTuple):
    """The pages of one layer.

    Attributes:
      kv: [pages, P, 2 * K, H].
      table_RM: pages of each row's sequence, in order; arbitrary beyond its length.
      row_T: row of each token's sequence.
      lengths_R: positions of each sequence, this call's included; 0 for a row without one.
      starts_R: the first of each row's tokens; a row's tokens lie together, in order, and rows
        follow each other. [R + 1]: the last entry is the number of tokens.
    """

    kv: Array
    table_RM: Array
    row_T: Array
    lengths_R: Array
    starts_R: Array


class Pages(NamedTuple):
    """The pages of all layers; fields as in LayerPages."""

    kv: tuple[Array, ...]
    table_RM: Array
    row_T: Array
    lengths_R: Array
    starts_R: Array

    def of_layer(self, number: int) -> LayerPages:
        """Return the pages of one layer."""
        return LayerPages(self.kv[number], *self[1:])


def page_sharding(place: Mesh | jax.Device) -> Sharding:
    """Return how the pages of a layer lie on an engine's mesh, or on its one device."""
    if isinstance(place, Mesh):
        return NamedSharding(place, _PAGES)
    return SingleDeviceSharding(place)


def whole_sharding(place: Mesh | jax.Device) -> Sharding:
    """Return how an array lies that every device of an engine's mesh has, or on its one device."""
    if isinstance(place, Mesh):
        return NamedSharding(place, PartitionSpec())
    return SingleDeviceSharding(place)


def page_shapes(
    config: ModelConfig, count: int, positions: int, sharding: Sharding | None = None
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return the shape of `count` pages of `positions` positions for each layer."""
    shape = (count, positions, 2 * config.num_kv_heads, config.head_dim)
    layer = jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype), sharding=sharding)
    return (layer,) * config.num_layers


def make_pages(
    config: ModelConfig, count: int, positions: int, sharding: Sharding | None = None
) -> tuple[Array, ...]:
    """Return `count` empty pages of `positions` positions for each layer."""
    layers = page_shapes(config, count, positions, sharding)
    return tuple(jnp.zeros(one.shape, one.dtype, device=one.sharding) for one in layers)


def paged_attention(
    q_TNH: Array,
    k_TKH: Array,
    v_TKH: Array,
    position_T: Array,
    pages: LayerPages,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Write keys and values to their pages, and attend.

    Args:
      q_TNH: queries, not scaled.
      k_TKH: keys of the same tokens.
      v_TKH: values.
      position_T: place of each token in its sequence; NO_POSITION is padding.
      pages: of this layer.
      implementation: "gather" runs anywhere; "native" is C++ for CPUs, float32; "ragged_paged"
        is the kernel of TPUs. "auto" is "gather".

    Returns:
      [T, N, H] in q's dtype, zeros for padding; and the pages with the new keys and values.

    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"paged attention {implementation!r} is unknown; choose one of"
            f" {', '.join(IMPLEMENTATIONS)}"
        )
    run = functools.partial(_attend, implementation=implementation)
    if not is_on_engine_mesh():
        return run(q_TNH, k_TKH, v_TKH, position_T, pages)
    everywhere = PartitionSpec()
    of_pages = LayerPages(_PAGES, everywhere, everywhere, everywhere, everywhere)
    return jax.shard_map(
        run,
        in_specs=(_HEADS, _KV_HEADS, _KV_HEADS, everywhere, of_pages),
        out_specs=(_HEADS, _PAGES),
        check_vma=False,
    )(q_TNH, k_TKH, v_TKH, position_T, pages)


def _attend(
    q_TNH: Array,
    k_TKH: Array,
    v_TKH: Array,
    position_T: Array,
    pages: LayerPages,
    implementation: str,
) -> tuple[Array, Array]:
    """Do what `paged_attention` does, for the heads of one device."""
    T, K, H = k_TKH.shape
    kv_TKH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(T, 2 * K, H).astype(pages.kv.dtype)
    if implementation == "native":
        return attention_native(q_TNH, kv_TKH, pages.row_T, position_T, pages.table_RM, pages.kv)
    pages = pages._replace(kv=_write(kv_TKH, position_T, pages))
    if implementation == "ragged_paged":
        out_TNH = _ragged_paged(q_TNH, pages)
    else:
        out_TNH = _gather_blocks(q_TNH, position_T, pages)
    out_TNH = jnp.where((position_T >= 0)[:, None, None], out_TNH, 0).astype(q_TNH.dtype)
    return out_TNH, pages.kv


def _write(kv_TKH: Array, position_T: Array, pages: LayerPages) -> Array:
    """Return the pages with keys and values at their positions; those of padding are dropped."""
    count, P = pages.kv.shape[:2]
    page_T = pages.table_RM[pages.row_T, position_T // P]
    page_T = jnp.where(position_T >= 0, page_T, count)  # past the end: dropped
    return pages.kv.at[page_T, position_T % P].set(kv_TKH, mode="drop")


def _gather_blocks(q_TNH: Array, position_T: Array, pages: LayerPages) -> Array:
    """Attend to a page of every token's sequence at a time, up to the longest sequence's last.

    The sum over keys runs from page to page, so pages that lie behind a token add exact zeros:
    what others in the call are like changes nothing.
    """
    T, N, H = q_TNH.shape
    P, K2 = pages.kv.shape[1:3]
    K = K2 // 2
    q_TKGH = (q_TNH * H**-0.5).reshape(T, K, N // K, H)
    place_P = jnp.arange(P)

    def attend(number: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top_TKG1, total_TKG1, out_TKGH = sums
        kv_TPKH = pages.kv[pages.table_RM[pages.row_T, number]]
        k_TKPH = jnp.swapaxes(kv_TPKH[:, :, 0::2], 1, 2)
        v_TKPH = jnp.swapaxes(kv_TPKH[:, :, 1::2], 1, 2)
        scores_TKGP = jnp.einsum(
            "TKGH,TKPH->TKGP", q_TKGH, k_TKPH, preferred_element_type=jnp.float32
        )
        sees_TP = number * P + place_P <= position_T[:, None]
        scores_TKGP = jnp.where(sees_TP[:, None, None], scores_TKGP, HIDDEN_SCORE)
        new_top_TKG1 = jnp.maximum(top_TKG1, scores_TKGP.max(axis=-1, keepdims=True))
        # of a page that lies behind the token, every weight is exactly 0
        weights_TKGP = jnp.exp(scores_TKGP - new_top_TKG1)
        kept_TKG1 = jnp.exp(top_TKG1 - new_top_TKG1)
        total_TKG1 = total_TKG1 * kept_TKG1 + sum_of_rows(weights_TKGP)[..., None]
        new_TKGH = jnp.einsum(
            "TKGP,TKPH->TKGH",
            weights_TKGP.astype(v_TKPH.dtype),
            v_TKPH,
            preferred_element_type=jnp.float32,
        )
        return new_top_TKG1, total_TKG1, out_TKGH * kept_TKG1 + new_TKGH

    shape = (T, K, N // K, 1)
    nothing = (
        jnp.full(shape, HIDDEN_SCORE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape[:3], H), jnp.float32),
    )
    used = jnp.max(position_T) // P + 1
    _, total_TKG1, out_TKGH = jax.lax.fori_loop(0, used, attend, nothing)
    return (out_TKGH / jnp.maximum(total_TKG1, 1e-30)).reshape(T, N, H)


def _ragged_paged(q_TNH: Array, pages: LayerPages) -> Array:
    """Attend by the Pallas kernel of TPUs."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    num_rows = jnp.sum(pages.lengths_R > 0, keepdims=True).astype(jnp.int32)
    per_row = pages.table_RM.shape[1]
    # Given, not looked up by the kernel: it would ask which device this process runs on, which is
    # none where a program is compiled ahead of time.
    blocks = max(POSITIONS_A_BLOCK // pages.kv.shape[1], 1)
    return ragged_paged_attention(
        q_TNH,
        pages.kv,
        pages.lengths_R,
        pages.table_RM,
        pages.starts_R,
        num_rows,
        sm_scale=q_TNH.shape[-1] ** -0.5,
        num_kv_pages_per_block=min(per_row, blocks),
        num_queries_per_block=min(q_TNH.shape[0], QUERIES_A_BLOCK),
    )
