"""The gated MLP of a layer without experts.

B rows, T time, D model, F hidden of the MLP; d and f are one device's part of D and F.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import PartitionSpec

from rome.model.config import ModelConfig
from rome.model.ops.gathered import BY_TOKEN, WIDE, gather
from rome.model.ops.low_rank import adapted, with_served
from rome.model.ops.native import products_native
from rome.model.sharding import is_split


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Attributes:
      config: the model.
      is_native: whether C++ computes the products, without a gradient (`rome.model.ops.native`).
    """

    config: ModelConfig
    is_native: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        """Return the output, [B, T, D]."""
        D = self.config.hidden_size
        F = self.config.intermediate_size
        gate_DF = self._matrix("gate", (D, F), x_BTD.dtype)
        up_DF = self._matrix("up", (D, F), x_BTD.dtype)
        down_FD = self._matrix("down", (F, D), x_BTD.dtype)
        if is_split() and not self.is_initializing():
            return _on_mesh(x_BTD, gate_DF, up_DF, down_FD)
        gate_BTF = self._multiply("gate", x_BTD, gate_DF)
        up_BTF = self._multiply("up", x_BTD, up_DF)
        hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
        return self._multiply("down", hidden_BTF, down_FD)

    def _multiply(self, name: str, x_BTI: Array, w_IO: Array) -> Array:
        by_row = self.is_native
        product_BTO = products_native(x_BTI[0], w_IO)[0][None] if by_row else x_BTI @ w_IO
        return with_served(self, name, x_BTI, product_BTO, by_row)

    def _matrix(self, name: str, shape: tuple[int, int], dtype: Any) -> Array:
        init = nn.initializers.normal(self.config.initializer_range)
        return adapted(self, name, self.param(name, init, shape), dtype)


def _on_mesh(x_BTD: Array, gate_DF: Array, up_DF: Array, down_FD: Array) -> Array:
    """Run the MLP with its hidden units over the tensor axis.

    The matrices are gathered for the product; their gradients are summed and split again.
    """

    def on_each_device(x_BTD: Array, gate_df: Array, up_df: Array, down_fd: Array) -> Array:
        gate_Df = gather(gate_df, axis=0)
        up_Df = gather(up_df, axis=0)
        down_fD = gather(down_fd, axis=1)
        hidden_BTf = jax.nn.silu(x_BTD @ gate_Df) * (x_BTD @ up_Df)
        return jax.lax.psum(hidden_BTf @ down_fD, "tensor")

    into_hidden = PartitionSpec(WIDE, "tensor")
    return jax.shard_map(
        on_each_device,
        in_specs=(BY_TOKEN, into_hidden, into_hidden, PartitionSpec("tensor", WIDE)),
        out_specs=BY_TOKEN,
        check_vma=False,
    )(x_BTD, gate_DF, up_DF, down_FD)
