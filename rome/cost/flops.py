"""Floating-point operations of the model by formula: the operations that MFU counts.

Recomputation and padding of kernels are not counted.
"""

from __future__ import annotations

from rome.cost.roofline import CHIPS
from rome.model.config import ModelConfig

# jax.Device.device_kind -> name in CHIPS
_TPU_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
# jax.Device.device_kind -> peak without sparsity, from the vendor's data sheets
_GPU_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def active_matmul_params(config: ModelConfig) -> int:
    """Return the number of weights that one token is multiplied with.

    With the head, without the embedding (a lookup): 3.04e9 for Qwen3-30B-A3B.
    """
    D = config.hidden_size
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    attention = D * config.head_dim * heads
    router = D * config.num_experts
    chosen_experts = config.experts_per_token * 3 * D * config.moe_intermediate_size
    dense_mlp = 3 * D * config.intermediate_size
    head = D * config.vocab_size
    in_layers = config.num_layers * attention
    in_layers += len(config.sparse_layers) * (router + chosen_experts)
    in_layers += len(config.mlp_layers) * dense_mlp
    return in_layers + head


def forward_flops(config: ModelConfig, length: int) -> float:
    """Return the operations of a token's forward pass, in rows of one sequence of `length`.

    Two a weight, and causal attention over half the row on average. A step (backward too) takes
    three times as many.
    """
    return 2.0 * active_matmul_params(config) + attention_flops(config, length)


def step_flops(config: ModelConfig, tokens: int, squares: int) -> float:
    """Return the operations of a step's updates, forward and backward.

    Args:
      config: the model.
      tokens: that pass through it.
      squares: sum of the squares of the lengths of their sequences.
    """
    forward = 2.0 * active_matmul_params(config) * tokens + attention_flops(config, 1) * squares
    return 3.0 * forward


def peak_flops(device_kind: str) -> float | None:
    """Return the bfloat16 peak of a JAX device, operations a second; None where it is unknown."""
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]].device_flops
    return _GPU_PEAKS.get(device_kind)


def attention_flops(config: ModelConfig, length: int) -> float:
    """Return the part of a token's `forward_flops` that is q @ k and scores @ v."""
    return 2.0 * length * config.num_heads * config.head_dim * config.num_layers
