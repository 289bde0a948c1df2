"""Attention by kernels that only an accelerator has: splash on TPUs, tokamax's on NVIDIA GPUs.

Each equals the reference of `rome.model.ops.attention` over packed rows.

B rows, T query time, S key time, N query heads, K key heads, G query heads per key head (N = K *
G), H head dim, t = T / devices of the sequence axis.

Both take rows whose places are 0, 1, 2, ...: causality is order. Memory grows with T, and blocks of
keys that no query of a tile sees are left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from rome.model.ops.attention_tree_tpu import attention_tree
from rome.model.ops.balanced_time import query_places, swap_late_halves
from rome.model.ops.tokamax_library import load_tokamax
from rome.model.sharding import RULES, is_split

# tokens of a tile; the largest that fits into a TPU core's memory beside its double buffer
SPLASH_BLOCK = 512
MIN_BLOCK = 128  # the lanes of a TPU
# keys that the backward pass takes at a time, in tiles; the fused one holds a whole dq for each
# such part
SPLASH_KEYS = 2048
# beyond (T > 8192), dq is computed by a kernel of its own: seven matmuls instead of five, but
# memory does not grow with T * T
MAX_PARTS = 4
# of tokamax, in order of preference: Hopper and Blackwell, then every GPU from Ampere on
GPU_KERNELS = ("mosaic_gpu", "triton")
SAVED_OUTPUT = "attention_output"  # name of the kernel's output for remat policies


def splash(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segments_BT: Array,
    ends_BT: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Compute attention by the splash kernel of TPUs.

    On a mesh each device takes its rows and heads; where time is split, its queries see the keys of
    the whole row, gathered over the sequence axis: a few key heads are small beside the queries, so
    the transfer hides behind the matmuls. Half of the queries change places over that axis
    meanwhile, so that every device computes as many scores (`rome.model.ops.balanced_time`).

    Args:
      q_BTNH: queries, not scaled.
      k_BSKH: keys.
      v_BSKH: values.
      segments_BT: 0 is padding.
      ends_BT: of rows of prefix trees (`rome.model.ops.attention_tree_tpu`); None: rows
        have none.
      interpret: run the kernel's program on any device, slowly, for tests.

    Raises:
      ValueError: a device's part of the row is no multiple of MIN_BLOCK, or a row of prefix trees
        is split over the sequence axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    time_shards = mesh.shape["sequence"] if is_split() else 1
    T = q_BTNH.shape[1]
    q_BTNH = q_BTNH * q_BTNH.shape[-1] ** -0.5
    if ends_BT is not None:
        check_time_is_whole(time_shards)
        attend = functools.partial(attention_tree, saved_output=SAVED_OUTPUT, interpret=interpret)
        return _by_rows_and_heads(attend)(q_BTNH, k_BSKH, v_BSKH, segments_BT, ends_BT)
    G = q_BTNH.shape[2] // k_BSKH.shape[2]
    kernel = _splash_kernel(T, G, time_shards, interpret)
    if not is_split():
        return _splash_rows(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT)
    heads = PartitionSpec(RULES["batch"], RULES["time"], "tensor", None)
    by_token = PartitionSpec(RULES["batch"], RULES["time"])

    def on_each_device(
        kernel: Any, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array
    ) -> Array:
        k_BSKH = jax.lax.all_gather(k_BSKH, "sequence", axis=1, tiled=True)
        v_BSKH = jax.lax.all_gather(v_BSKH, "sequence", axis=1, tiled=True)
        key_segments_BS = jax.lax.all_gather(segments_BT, "sequence", axis=1, tiled=True)
        q_BTNH = swap_late_halves(q_BTNH)
        q_segments_BT = swap_late_halves(segments_BT)
        out_BTNH = _splash_rows(kernel, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, key_segments_BS)
        return swap_late_halves(out_BTNH)

    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "sequence")))
    return jax.shard_map(
        on_each_device,
        in_specs=(kernel_spec, heads, heads, heads, by_token),
        out_specs=heads,
        check_vma=False,
    )(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def check_time_is_whole(time_shards: int) -> None:
    """Raise ValueError where rows of prefix trees would be split over the sequence axis."""
    if time_shards > 1:
        raise ValueError(
            f"rows of prefix trees are not split over time, and mesh.sequence is {time_shards}; set"
            " --config.mesh.sequence=1 or --config.learner.prefix_tree=off"
        )


def _by_rows_and_heads(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Return attention that gives each device its rows and heads, where there is a mesh."""
    if not is_split():
        return attend
    heads = PartitionSpec(RULES["batch"], RULES["time"], "tensor", None)
    by_token = PartitionSpec(RULES["batch"], RULES["time"])
    in_specs = (heads, heads, heads, by_token, by_token)
    return jax.shard_map(attend, in_specs=in_specs, out_specs=heads, check_vma=False)


def _splash_kernel(T: int, G: int, time_shards: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from rome.model.ops.splash_mask import PlacedCausalMask

    block = _splash_block(T // time_shards, time_shards)
    if block < MIN_BLOCK:
        raise ValueError(
            f"attention 'splash' takes rows of a multiple of {MIN_BLOCK} tokens a device, not {T}"
            f" over {time_shards}; set --config.row_length to such a multiple, or"
            " --config.learner.attention=blocked"
        )
    keys = math.gcd(SPLASH_KEYS, T)
    fused = T // keys <= MAX_PARTS
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=math.gcd(block, keys),
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    one_head = PlacedCausalMask(query_places(T, time_shards))
    return kernels.make_splash_mqa(
        masks.MultiHeadMask([one_head] * G),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=time_shards,
        residual_checkpoint_name=SAVED_OUTPUT,
        interpret=interpret,
    )


def _splash_block(t: int, time_shards: int) -> int:
    """Return the number of queries of a tile on a device with t of them.

    Where time is split, all queries of a tile come from the same half of the device's time, else
    the tile would see all keys that the later half sees. Halves too short for that (t < 256) are
    not kept apart, and devices then have unequal work.
    """
    if time_shards == 1:
        return math.gcd(SPLASH_BLOCK, t)
    return max(math.gcd(SPLASH_BLOCK, t // 2), math.gcd(MIN_BLOCK, t))


def _splash_rows(
    kernel: Any,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH = jnp.swapaxes(k_BSKH, 1, 2)
    v_BKSH = jnp.swapaxes(v_BSKH, 1, 2)
    one_key_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    segment_ids = SegmentIds(q_segments_BT, k_segments_BS)
    out_BKGTH = jax.vmap(one_key_head)(q_BKGTH, k_BKSH, v_BKSH, segment_ids)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    # to the kernel, padding is a segment like others
    return jnp.where(q_segments_BT[:, :, None, None] != 0, out_BTNH, 0)


def tokamax(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segments_BT: Array,
    ends_BT: Array | None = None,
    *,
    kernels: Sequence[str] = GPU_KERNELS,
) -> Array:
    """Compute attention by tokamax's flash kernels for NVIDIA GPUs.

    A query sees a range of keys: from the first of its segment to its own. So packed rows need no
    [T, T] mask. On a mesh each device takes its rows and heads, and where time is split its
    queries, as in `splash`.

    Args:
      q_BTNH: queries, not scaled; bfloat16, as keys and values.
      k_BSKH: keys.
      v_BSKH: values.
      segments_BT: 0 is padding. A segment is one run of tokens.
      ends_BT: of rows of prefix trees: key j is seen by the queries at places j to ends[j] - 1, of
        which tokamax makes a mask of T^2 bytes a row. None: rows have none.
      kernels: names of tokamax's implementations; the first that the device has is used. "xla"
        runs anywhere, with a [T, T] mask, for tests.

    Raises:
      ValueError: the inputs are not bfloat16, a device's part of the row is no multiple of
        MIN_BLOCK, a row of prefix trees is split over the sequence axis, or the device has no such
        kernel.
    """
    mesh = jax.sharding.get_abstract_mesh()
    time_shards = mesh.shape["sequence"] if is_split() else 1
    T = q_BTNH.shape[1]
    if q_BTNH.dtype != jnp.bfloat16:
        raise ValueError(
            f"attention 'tokamax' computes in bfloat16, not {q_BTNH.dtype}; set the"
            " model's dtype, or --config.learner.attention=blocked"
        )
    if T % (MIN_BLOCK * time_shards):
        raise ValueError(
            f"attention 'tokamax' takes rows of a multiple of {MIN_BLOCK} tokens a device, not {T}"
            f" over {time_shards}; set --config.row_length to such a multiple, or"
            " --config.learner.attention=blocked"
        )
    first_BT = first_seen(segments_BT)
    if ends_BT is not None:
        check_time_is_whole(time_shards)
    attend = functools.partial(_tokamax_rows if time_shards == 1 else _tokamax_part, kernels)
    out_BTNH = _by_rows_and_heads(attend)(q_BTNH, k_BSKH, v_BSKH, first_BT, ends_BT)
    # to the kernel, padding is a segment like others
    return jnp.where(segments_BT[:, :, None, None] != 0, out_BTNH, 0)


def first_seen(segments_BT: Array) -> Array:
    """Return the place of the first token of each token's segment, [B, T] int32."""
    places_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins_BT = jnp.pad(begins_BT, ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(begins_BT, places_T, 0), axis=1)


def _tokamax_part(
    kernels: Sequence[str],
    q_BtNH: Array,
    k_BtKH: Array,
    v_BtKH: Array,
    first_Bt: Array,
    ends_Bt: Array | None,
) -> Array:
    """Return the attention of this device's queries to the keys of the whole row."""
    k_BSKH = jax.lax.all_gather(k_BtKH, "sequence", axis=1, tiled=True)
    v_BSKH = jax.lax.all_gather(v_BtKH, "sequence", axis=1, tiled=True)
    t = first_Bt.shape[1]
    places_t = jax.lax.axis_index("sequence") * t + jnp.arange(t, dtype=jnp.int32)
    end_Bt = jnp.broadcast_to(places_t + 1, first_Bt.shape)
    q_BtNH, first_Bt, end_Bt = (swap_late_halves(a) for a in (q_BtNH, first_Bt, end_Bt))
    out_BtNH = _tokamax_rows(kernels, q_BtNH, k_BSKH, v_BSKH, first_Bt, ends_Bt, end_Bt)
    return swap_late_halves(out_BtNH)


def _tokamax_rows(
    kernels: Sequence[str],
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    first_BT: Array,
    ends_BT: Array | None,
    end_BT: Array | None = None,
) -> Array:
    """Return the attention to the keys from first_BT up to end_BT, or to a query's own place.

    With ends_BT, to those of them that the query comes before the end of.
    """
    load_tokamax()
    # The public function takes a [T, T] mask only.
    from tokamax._src.ops.attention import api
    from tokamax._src.ops.attention.base import Mask

    end_B1T = None if end_BT is None else end_BT[:, None]
    ends_B1S = None if ends_BT is None else ends_BT[:, None]
    first_B1T = first_BT[:, None]
    mask = Mask(k_start=first_B1T, k_end=end_B1T, q_end=ends_B1S, is_causal=end_BT is None)
    reasons = []
    for name in kernels:
        if name not in api.IMPLEMENTATIONS:
            continue
        try:
            scale = q_BTNH.shape[-1] ** -0.5
            attend = api.IMPLEMENTATIONS[name]
            return attend(q_BTNH, k_BSKH, v_BSKH, mask=mask, logits_scale=scale)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(
        f"tokamax has no attention kernel for this device ({'; '.join(reasons)}); set"
        " --config.learner.attention=blocked"
    )
