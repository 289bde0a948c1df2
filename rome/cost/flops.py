"""Floating-point operations of the model by formula: the operations that MFU counts.

Recomputation and padding of kernels are not counted.
"""

from __future__ import annotations

from rome.model.config import ModelConfig


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
    in_layers += len(config.dense_layers) * dense_mlp
    return in_layers + head


def forward_flops(config: ModelConfig, length: int) -> float:
    """Return the operations of a token's forward pass, in rows of one sequence of `length`.

    Two a weight, and causal attention over half the row on average. A step (backward too) takes
    three times as many.
    """
    return 2.0 * active_matmul_params(config) + attention_flops(config, length)


def attention_flops(config: ModelConfig, length: int) -> float:
    """Return the part of a token's `forward_flops` that is q @ k and scores @ v."""
    return 2.0 * length * config.num_heads * config.head_dim * config.num_layers
