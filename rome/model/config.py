"""ModelConfig: the sizes and numerics of a Qwen3-MoE, its presets, and config.json both ways.

Values of the Qwen3 presets are those of the published checkpoints. `rope_theta` belongs to a
checkpoint (the 2507 releases raised it): a model that is loaded takes it from its own config.json
through `from_hf`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "attention", "offload")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "experts_per_token",
    "moe_intermediate_size",
    "max_position",
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    Attributes:
      kind: "linear", or "yarn" (arXiv 2309.00071).
      factor: slow frequencies are divided by it.
      original_max_position: length that the model was trained on.
      attention_factor: multiplies cos and sin.
      beta_fast: rotations over original_max_position; faster frequencies stay as they are.
      beta_slow: slower frequencies than this are divided by `factor`; those between are mixed.
      truncate: round the borders of that range outwards.
    """

    kind: str
    factor: float
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, rope: dict[str, Any], max_position: int) -> RopeScaling | None:
        """Read `rope_scaling` or `rope_parameters` of a config.json; None: not stretched.

        Absent keys have transformers' defaults.

        Args:
          rope: the dictionary under that key.
          max_position: of the model; stands for an absent original_max_position_embeddings.

        Raises:
          ValueError: a stretched rope has no factor of at least 1.
        """
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(rope.get("factor"), (int, float)) or rope["factor"] < 1:
            raise ValueError(
                f"config.json has a {kind} rope without a factor of at least 1"
                f" ({rope.get('factor')!r}); take it from the model card"
            )
        factor = float(rope["factor"])
        if kind == "linear":
            return cls(kind, factor)
        return cls(
            kind,
            factor,
            original_max_position=rope.get("original_max_position_embeddings") or max_position,
            attention_factor=_attention_factor(rope, factor),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the dictionary that config.json holds under `rope_scaling`."""
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_position,
            "attention_factor": self.attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        }


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics of one model.

    Attributes:
      capacity_factor: an expert takes at most this many times its even share of a device's choices,
        and the rest are dropped and reported; 0 drops nothing.
      dense_layers: layers that have one gated MLP of `intermediate_size` instead of experts; a
        model that has some is never scanned.
      dtype: the type that layers compute in and that weights are published in. Parameters are
        float32 in training, and rounded to it where they are used. Router, norms, softmax and
        rotary angles compute in float32 whatever it says.
      remat: what the forward pass keeps for the backward pass: "none" everything, "full" only the
        input of each block (the rest is computed again), "attention" also the output of attention,
        "offload" the inputs, in the host's memory.
      scan_layers: training loops over the stacked layers, which compiles once for any depth; False
        unrolls them, which is a fifth faster for a shallow model on a CPU.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    moe_intermediate_size: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position: int = 40960
    norm_topk_prob: bool = True
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    capacity_factor: float = 0.0
    attention_bias: bool = False
    rope_scaling: RopeScaling | None = None
    dense_layers: tuple[int, ...] = ()
    intermediate_size: int = 0
    dtype: str = "float32"
    remat: str = "full"
    scan_layers: bool = True
    eos_token_id: int = 151645
    pad_token_id: int = 151643

    def __post_init__(self) -> None:
        for name in SIZES:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}; it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads};"
                " choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embedding turns pairs, choose an even one"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds"
                f" num_experts={self.num_experts}; lower it"
            )
        outside = [i for i in self.dense_layers if not 0 <= i < self.num_layers]
        if outside or len(self.dense_layers) >= self.num_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} of {self.num_layers} layers; at least one layer"
                " needs experts"
            )
        if self.dense_layers and (self.scan_layers or self.intermediate_size < 1):
            raise ValueError(
                f"dense_layers={self.dense_layers} need intermediate_size={self.intermediate_size}"
                " above 0 and scan_layers=False"
            )
        if self.capacity_factor < 0 or self.router_z_loss_coef < 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor},"
                f" router_z_loss_coef={self.router_z_loss_coef}; both are 0 or more"
            )
        if self.dtype not in DTYPES or self.remat not in REMATS:
            raise ValueError(
                f"dtype={self.dtype!r}, remat={self.remat!r}; choose from {DTYPES} and {REMATS}"
            )

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers that have experts."""
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **overrides: Any) -> ModelConfig:
        """Read the dictionary of a config.json in the spelling of transformers 4 or 5.

        Args:
          hf: the dictionary.
          overrides: fields that config.json does not hold, such as dtype="bfloat16".

        Raises:
          ValueError: a size is missing, keys contradict each other, or the model has a switch that
            this one does not.
        """
        _refuse_unsupported(hf)
        fields: dict[str, Any] = {}
        for ours, names in _SIZE_NAMES.items():
            fields[ours] = _required(hf, names)
        for ours, name in _OPTIONAL_NAMES.items():
            if hf.get(name) is not None:
                fields[ours] = hf[name]
        fields["head_dim"] = hf.get("head_dim") or fields["hidden_size"] // fields["num_heads"]
        # an absent key means transformers' default, not ours
        fields["norm_topk_prob"] = bool(hf.get("norm_topk_prob", False))
        fields["rope_theta"] = _rope_theta(hf)
        fields["rope_scaling"] = _rope_scaling(hf, fields.get("max_position", cls.max_position))
        fields["attention_bias"] = bool(hf.get("attention_bias"))
        fields["dense_layers"] = _dense_layers(hf, fields["num_layers"])
        if fields["dense_layers"]:
            fields["intermediate_size"] = _required(hf, ("intermediate_size",))
            fields["scan_layers"] = False
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = fields["eos_token_id"][0]
        return cls(**(fields | overrides))

    def to_hf(self) -> dict[str, Any]:
        """Return the dictionary of a config.json.

        Renamed keys are there in both spellings, so that transformers 4 and 5 and SGLang read it.
        """
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else None
        rope_parameters = {"rope_theta": self.rope_theta} | (scaling or {"rope_type": "default"})
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.moe_intermediate_size,
            "intermediate_size": self.intermediate_size or self.moe_intermediate_size,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope_parameters,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position,
            "norm_topk_prob": self.norm_topk_prob,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "output_router_logits": False,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(self.dense_layers),
            "use_sliding_window": False,
            "sliding_window": None,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }


_SIZE_NAMES = {  # our field -> the keys of config.json that may hold it
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "num_experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "moe_intermediate_size": ("moe_intermediate_size",),
}
_OPTIONAL_NAMES = {
    "rms_norm_eps": "rms_norm_eps",
    "max_position": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "router_aux_loss_coef": "router_aux_loss_coef",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# key of config.json -> the values that this model supports; an absent key is fine
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3_moe",),
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "qkv_bias": (False, None),
    "shared_expert_intermediate_size": (0, None),
    "use_qk_norm": (True, None),
    "quantization_config": (None,),
}
_ROPE_KINDS = ("default", "linear", "yarn")


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    refused = [
        f"{key}={hf[key]!r} (supported: {' or '.join(map(repr, values))})"
        for key, values in _SUPPORTED.items()
        if key in hf and hf[key] not in values
    ]
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_KINDS:
            refused.append(f"{key}.rope_type={kind!r} (supported: {', '.join(_ROPE_KINDS)})")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            refused.append(
                f"{key}.partial_rotary_factor={rope['partial_rotary_factor']!r} (supported: 1.0)"
            )
    if refused:
        raise ValueError(
            f"config.json asks for what rome.model does not do: {'; '.join(refused)}. Choose"
            " another checkpoint."
        )


def _required(hf: dict[str, Any], names: tuple[str, ...]) -> int:
    found = {name: hf[name] for name in names if hf.get(name) is not None}
    if not found:
        raise ValueError(f"config.json has no {' or '.join(names)}; is it a Qwen3-MoE checkpoint?")
    if len(set(found.values())) > 1:
        raise ValueError(f"config.json contradicts itself: {found}; keep one value")
    return next(iter(found.values()))


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """Return YaRN's factor of cos and sin: given, or computed as transformers does."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return float(magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"]))
    return magnitude(1.0)


def _dense_layers(hf: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers without experts, by transformers' rule.

    Layer i has experts if it is not in mlp_only_layers and decoder_sparse_step divides i + 1.
    """
    only = hf.get("mlp_only_layers") or []
    step = hf.get("decoder_sparse_step") or 1
    return tuple(i for i in range(num_layers) if i in only or (i + 1) % step)


def _rope_scaling(hf: dict[str, Any], max_position: int) -> RopeScaling | None:
    places = [hf[key] for key in ("rope_scaling", "rope_parameters") if hf.get(key)]
    found = {
        RopeScaling.from_hf(place, max_position)
        for place in places
        if "rope_type" in place or "type" in place
    }
    if len(found) > 1:
        raise ValueError(
            f"config.json stretches its rope in two ways, {places}; keep the checkpoint's own"
        )
    return found.pop() if found else None


def _rope_theta(hf: dict[str, Any]) -> float:
    places = (hf, hf.get("rope_parameters") or {})
    found = {place["rope_theta"] for place in places if place.get("rope_theta") is not None}
    if not found:
        raise ValueError(
            "config.json has neither rope_theta nor rope_parameters.rope_theta; take it from the"
            " checkpoint's model card"
        )
    if len(found) > 1:
        raise ValueError(
            f"config.json gives rope_theta twice, as {sorted(found)}; keep the checkpoint's own"
            " value"
        )
    return float(found.pop())


_QWEN3 = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    experts_per_token=8,
    moe_intermediate_size=768,
    dtype="bfloat16",
)

PRESETS: dict[str, ModelConfig] = {
    # ids are those of rome/model/tokenizer/tiny; a model this narrow would spend its first hundred
    # steps growing weights drawn at 0.02
    "tiny": ModelConfig(
        vocab_size=768,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=256,
        rope_theta=1e4,
        max_position=512,
        initializer_range=0.08,
        remat="none",
        scan_layers=False,
        eos_token_id=743,
        pad_token_id=741,
    ),
    "small": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        num_experts=16,
        experts_per_token=2,
        moe_intermediate_size=128,
        rope_theta=1e4,
        max_position=2048,
        remat="none",
        scan_layers=False,
        eos_token_id=743,
        pad_token_id=741,
    ),
    "qwen3_30b_a3b": _QWEN3,
    "qwen3_coder_30b_a3b": dataclasses.replace(
        _QWEN3, rope_theta=1e7, max_position=262144, router_aux_loss_coef=0.0
    ),
    "qwen3_235b_a22b": dataclasses.replace(
        _QWEN3, hidden_size=4096, num_layers=94, num_heads=64, moe_intermediate_size=1536
    ),
    "qwen3_coder_480b_a35b": dataclasses.replace(
        _QWEN3,
        hidden_size=6144,
        num_layers=62,
        num_heads=96,
        num_kv_heads=8,
        num_experts=160,
        moe_intermediate_size=2560,
        rope_theta=1e7,
        max_position=262144,
        router_aux_loss_coef=0.0,
    ),
}
