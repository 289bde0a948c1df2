"""Attention by kernels that only an accelerator has: splash on TPUs, cuDNN on NVIDIA GPUs.

Each equals the reference of `rome.model.ops.attention` over packed rows.

B rows, T query time, S key time, N query heads, K key heads, G query heads per key head (N = K *
G), H head dim, t = T / devices of the sequence axis.

Both take rows whose places are 0, 1, 2, ...: causality is order. Queries come scaled.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from rome.model.ops.balanced_time import query_places, swap_late_halves
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
MAX_CUDNN_TOKENS = 16384  # cuDNN takes packed rows only by a [T, T] mask
SAVED_OUTPUT = "attention_output"  # name of the kernel's output for remat policies


def splash(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array, *, interpret: bool = False
) -> Array:
    """Compute attention by the splash kernel of TPUs.

    On a mesh each device takes its rows and heads; where time is split, its queries see the keys of
    the whole row, gathered over the sequence axis: a few key heads are small beside the queries, so
    the transfer hides behind the matmuls. Half of the queries change places over that axis
    meanwhile, so that every device computes as many scores (`rome.model.ops.balanced_time`).

    Args:
      q_BTNH: queries, scaled.
      k_BSKH: keys.
      v_BSKH: values.
      segments_BT: 0 is padding.
      interpret: run the kernel's program on any device, slowly, for tests.

    Raises:
      ValueError: a device's part of the row is no multiple of MIN_BLOCK.
    """
    mesh = jax.sharding.get_abstract_mesh()
    time_shards = mesh.shape["sequence"] if is_split() else 1
    T = q_BTNH.shape[1]
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


def _splash_kernel(T: int, G: int, time_shards: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from rome.model.ops.splash_mask import PlacedCausalMask

    block = _splash_block(T // time_shards, time_shards)
    if block < MIN_BLOCK:
        raise ValueError(
            f"attention 'splash' takes rows of a multiple of {MIN_BLOCK} tokens a device, not {T}"
            f" over {time_shards}; choose row_length so, or 'blocked'"
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


def cudnn(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array) -> Array:
    """Compute attention by cuDNN's fused kernel, in bfloat16.

    Segments become a mask of one byte for each pair of tokens.

    Raises:
      ValueError: the inputs are not bfloat16, or the row is too long for its mask.
    """
    T = q_BTNH.shape[1]
    if q_BTNH.dtype != jnp.bfloat16:
        raise ValueError(
            f"attention 'cudnn' computes in bfloat16, not {q_BTNH.dtype}; set the model's dtype, or"
            " choose 'blocked'"
        )
    if T > MAX_CUDNN_TOKENS:
        raise ValueError(
            f"attention 'cudnn' needs a [T, T] mask for packed rows, too large at T={T} (limit"
            f" {MAX_CUDNN_TOKENS}); split time over mesh.sequence or choose 'blocked'"
        )
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    same_BTT = same_BTT | (segments_BT[:, :, None] == 0)  # a row of a mask must allow something
    attend = functools.partial(
        jax.nn.dot_product_attention, scale=1.0, is_causal=True, implementation="cudnn"
    )
    out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask=same_BTT[:, None])
    return jnp.where(segments_BT[:, :, None, None] != 0, out_BTNH, 0)
