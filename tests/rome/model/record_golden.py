"""Records what Qwen3MoeForCausalLM and Qwen3ForCausalLM of transformers compute for a few small
random models, into golden_qwen3.npz beside this file.

    pip install torch transformers && python -m tests.rome.model.record_golden

`make test` compares with the record and needs neither. Weights are not recorded: `hf_weights` draws
them from a seed with NumPy's frozen RandomState, under Hugging Face's own names, so that the
comparison also covers rome/model/hf/checkpoint.py.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("golden_qwen3.npz")
AUX_COEFFICIENT = 0.1  # large, so that the gradient of the router loss shows
COMMON = dict(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    attention_bias=False,
    router_aux_loss_coef=AUX_COEFFICIENT,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    eos_token_id=1,
    pad_token_id=0,
)
DENSE = dict(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    attention_bias=False,
    use_sliding_window=False,
    sliding_window=None,
    max_window_layers=3,
    eos_token_id=1,
    pad_token_id=0,
    rope_theta=1e6,
)
CASES: dict[str, dict[str, Any]] = {
    "grouped": (
        COMMON
        | dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            rope_theta=1e4,
        )
    ),
    "one_key_head": (
        COMMON
        | dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=4,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=4,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            rope_theta=1e6,
            rope_scaling=dict(rope_type="linear", factor=3.0),
        )
    ),
    "all_heads": (
        COMMON
        | dict(
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=6,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=12,
            norm_topk_prob=False,
            tie_word_embeddings=False,
            rope_theta=1e7,
            max_position_embeddings=8,
            rope_scaling=dict(
                rope_type="yarn",
                factor=4.0,
                mscale=0.7,
                mscale_all_dim=0.9,
                beta_fast=2.0,
                beta_slow=0.1,
                truncate=False,
            ),
        )
    ),
    "switches": (
        COMMON
        | dict(
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            intermediate_size=12,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            rope_theta=1e4,
            attention_bias=True,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            max_position_embeddings=8,
            rope_scaling=dict(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=8,
                beta_fast=2.0,
                beta_slow=0.5,
            ),
        )
    ),
    "dense": DENSE | dict(tie_word_embeddings=False, attention_bias=True),
    "dense_tied": (
        DENSE
        | dict(
            tie_word_embeddings=True,
            max_position_embeddings=8,
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
        )
    ),
    "coder": (
        COMMON
        | dict(
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=8,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            rope_theta=1e7,
            use_qk_norm=True,
            qkv_bias=False,
            shared_expert_intermediate_size=0,
            max_position_embeddings=262144,
        )
    ),
}


def seed_of(case: str) -> int:
    return 100 + list(CASES).index(case)


def tokens_of(case: str) -> np.ndarray:
    return np.random.RandomState(seed_of(case) + 1000).randint(
        1, CASES[case]["vocab_size"], size=(2, 14)
    )  # torch gives the padding token no gradient


def hf_weights(hf: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by its Hugging Face name; large enough that attention and
    routing are far from uniform.
    """
    random = np.random.RandomState(seed)
    D, H, F = hf["hidden_size"], hf["head_dim"], hf.get("moe_intermediate_size", 0)
    q, kv = hf["num_attention_heads"] * H, hf["num_key_value_heads"] * H
    matrices, norms, biases = (
        {"model.embed_tokens.weight": (hf["vocab_size"], D)},
        {"model.norm.weight": D},
        {},
    )
    if not hf["tie_word_embeddings"]:
        matrices["lm_head.weight"] = (hf["vocab_size"], D)
    for i in range(hf["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        matrices |= {
            layer + f"self_attn.{name}_proj.weight": shape
            for name, shape in (("q", (q, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, q)))
        }
        is_dense = hf["model_type"] == "qwen3"
        if is_dense or i in hf["mlp_only_layers"] or (i + 1) % hf["decoder_sparse_step"]:
            dense = hf["intermediate_size"]
            matrices |= {
                layer + f"mlp.{name}_proj.weight": shape
                for name, shape in (("gate", (dense, D)), ("up", (dense, D)), ("down", (D, dense)))
            }
        else:
            matrices[layer + "mlp.gate.weight"] = (hf["num_experts"], D)
            for e in range(hf["num_experts"]):
                matrices |= {
                    layer + f"mlp.experts.{e}.{name}_proj.weight": shape
                    for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))
                }
        if hf["attention_bias"]:
            biases |= {
                layer + f"self_attn.{name}_proj.bias": size
                for name, size in (("q", q), ("k", kv), ("v", kv), ("o", D))
            }
        norms |= {
            layer + "input_layernorm.weight": D,
            layer + "post_attention_layernorm.weight": D,
            layer + "self_attn.q_norm.weight": H,
            layer + "self_attn.k_norm.weight": H,
        }
    tensors = {
        name: random.standard_normal(shape) * 1.5 / np.sqrt(shape[1])
        for name, shape in matrices.items()
    }
    tensors |= {name: 1 + 0.3 * random.standard_normal(size) for name, size in norms.items()}
    tensors |= {name: 0.3 * random.standard_normal(size) for name, size in biases.items()}
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_checkpoint(
    hf: dict[str, Any], tensors: dict[str, np.ndarray], directory: pathlib.Path
) -> None:
    import safetensors.numpy

    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf))


def run_transformers(directory: pathlib.Path, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, router loss (0 without a router), and gradients of (mean next-token cross entropy +
    AUX_COEFFICIENT * router loss) by checkpoint name.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor(tokens_BT)
    has_router = hasattr(model, "num_experts")
    out = model(tokens, output_router_logits=True) if has_router else model(tokens)
    aux_loss = out.aux_loss if has_router else torch.zeros(())
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    (loss + AUX_COEFFICIENT * aux_loss).backward()
    record = {
        "logits": out.logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "aux_loss": aux_loss.detach().numpy(),
    }
    for name, parameter in model.named_parameters():
        record |= {
            f"grad:{own}": part for own, part in _split_experts(name, parameter.grad.numpy())
        }
    return record


def _split_experts(name: str, gradient: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """transformers 5 holds all experts of a layer in one tensor in memory; checkpoints hold them
    one by one.
    """
    base, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        return [
            (f"{base}.{e}.{part}_proj.weight", half)
            for e, both in enumerate(gradient)
            for part, half in zip(("gate", "up"), np.split(both, 2), strict=True)
        ]
    if leaf == "down_proj":
        return [(f"{base}.{e}.down_proj.weight", down) for e, down in enumerate(gradient)]
    return [(name, gradient)]


def main() -> None:
    record = {}
    for case, hf in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(hf, hf_weights(hf, seed_of(case)), pathlib.Path(directory))
            outcome = run_transformers(pathlib.Path(directory), tokens_of(case))
        gradients = sorted(name for name in outcome if name.startswith("grad:"))
        record |= {
            f"{case}/{name}": value for name, value in outcome.items() if name not in gradients
        }
        record[f"{case}/gradient_names"] = np.array(
            [name.removeprefix("grad:") for name in gradients]
        )
        record[f"{case}/gradients"] = np.concatenate(
            [outcome[name].ravel() for name in gradients]
        )  # one array: zip headers cost more
        print(
            f"{case}: logits up to {np.abs(outcome['logits']).max():.2f}, loss"
            f" {outcome['loss']:.4f}, router loss {outcome['aux_loss']:.4f}"
        )
    np.savez_compressed(GOLDEN, **record)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
