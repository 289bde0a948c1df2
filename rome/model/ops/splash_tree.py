"""Splash attention of TPUs over rows of prefix trees.

B rows, T time, N query heads, K key heads, G query heads per key head (N = K * G), H head dim.

Splash computes a mask from places, or compares segments; who sees a token of a tree is neither. So
the mask of one row at a time is written out, and splash is told which of its tiles are empty: tiles
without an ancestor are left out, as those of the future are. A mask takes 4 T^2 bytes, and as much
again in each kernel of the backward pass, whatever the number of heads.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

TILE = 512  # of queries and of keys: two tiles of a mask fit into a TPU core's memory beside theirs
MIN_TILE = 128  # the lanes of a TPU
MAX_ROW = 16_384  # tokens; the masks of longer rows take more than 1 GiB each


def splash_tree(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segments_BT: Array,
    ends_BT: Array,
    *,
    saved_output: str,
    interpret: bool = False,
) -> Array:
    """Compute the attention of rows of prefix trees to themselves, [B, T, N, H].

    Args:
      q_BTNH: queries, scaled.
      k_BTKH: keys.
      v_BTKH: values.
      segments_BT: 0 is padding, whose output is 0.
      ends_BT: key j is seen by the queries at places j to ends[j] - 1.
      saved_output: name of the output for remat policies.
      interpret: run the kernel's program on any device, slowly, for tests.

    Raises:
      ValueError: the row is too long, or no multiple of MIN_TILE.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if T > MAX_ROW or T % MIN_TILE:
        raise ValueError(
            f"attention 'splash' takes rows of prefix trees of a multiple of {MIN_TILE} tokens up"
            f" to {MAX_ROW}, not {T}: their mask is written out; set"
            " --config.learner.prefix_tree=off, or --config.learner.attention=blocked"
        )
    real_BT = segments_BT != 0
    places_T = jnp.arange(T, dtype=jnp.int32)
    # padding sees itself: a query without any key has no softmax
    ends_BT = jnp.where(real_BT, ends_BT, places_T + 1)
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH = jnp.swapaxes(k_BTKH, 1, 2)
    v_BKTH = jnp.swapaxes(v_BTKH, 1, 2)

    def one_row(row: tuple[Array, ...]) -> Array:
        q_KGTH, k_KTH, v_KTH, ends_T = row
        is_causal_TT = places_T[None, :] <= places_T[:, None]
        sees_TT = is_causal_TT & (places_T[:, None] < ends_T[None, :])
        attend = _kernel(sees_TT, saved_output, interpret)
        return jax.vmap(attend)(q_KGTH, k_KTH, v_KTH)

    out_BKGTH = jax.lax.map(one_row, (q_BKGTH, k_BKTH, v_BKTH, ends_BT))
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return jnp.where(real_BT[:, :, None, None], out_BTNH, 0)


def _kernel(sees_TT: Array, saved_output: str, interpret: bool) -> Any:
    """Return splash for one key head and its queries, under a mask that all heads share."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    tile = math.gcd(TILE, sees_TT.shape[0])
    sizes = kernels.BlockSizes(
        **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), tile),
        **dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), tile),
        **dict.fromkeys(("block_kv_compute", "block_kv_dkv_compute"), tile),
    )
    kernel = kernels.make_splash_mqa(
        sees_TT[None],
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=saved_output,
        interpret=interpret,
    )
    # A flag for the name of a scope: where splash makes a mask inside of a jit, the flag is traced,
    # and cannot be read as a bool.
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return kernels.SplashAttentionKernel(
        *(info._replace(is_dynamic_mask=None) for info in infos), **kernel.kwargs
    )
