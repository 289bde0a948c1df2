"""Floating-point operations of the model by formula: what MFU counts.

Recomputation and padding of kernels do not.
"""

from __future__ import annotations

from rome.model.config import ModelConfig


def active_matmul_params(config: ModelConfig) -> int:
    """Weights that one token is multiplied with, head included, embedding not (a lookup): 3.04e9 of
    Qwen3-30B-A3B.
    """
    D, H = config.hidden_size, config.head_dim
    attention = D * H * (2 * config.num_heads + 2 * config.num_kv_heads)
    experts = (
        D * config.num_experts + config.experts_per_token * 3 * D * config.moe_intermediate_size
    )
    dense = 3 * D * config.intermediate_size
    sparse, plain = len(config.sparse_layers), len(config.dense_layers)
    return config.num_layers * attention + sparse * experts + plain * dense + D * config.vocab_size


def forward_flops(config: ModelConfig, length: int) -> float:
    """Of a token, in rows of one sequence of `length`: 2 a weight, and causal attention over half
    the row on average.

    A step (backward too) takes three times as many.
    """
    return 2.0 * active_matmul_params(config) + attention_flops(config, length)


def attention_flops(config: ModelConfig, length: int) -> float:
    """The part of a token's `forward_flops` that is q @ k and scores @ v."""
    return 2.0 * length * config.num_heads * config.head_dim * config.num_layers
