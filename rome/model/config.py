"""ModelConfig: the sizes and numerics of a Qwen3, its presets, and config.json both ways.

Values of the Qwen3 presets are those of the published checkpoints. `rope_theta` belongs to a
checkpoint (the 2507 releases raised it): a model that is loaded takes it from its own config.json
through `from_hf`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rome.model import rope
from rome.model.rope import RopeScaling

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "attention", "offload")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position",
)
EXPERT_SIZES = ("num_experts", "experts_per_token", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and numerics of one model.

    Attributes:
      capacity_factor: an expert takes at most this many times its even share of a device's choices,
        and the rest are dropped and reported; 0 drops nothing.
      num_experts: 0 in a dense model, whose layers have one gated MLP of `intermediate_size` each;
        all that is about experts and routers is 0 too.
      dense_layers: layers of a model with experts that have such an MLP instead; a model that has
        some is never scanned.
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
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
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
        self._check_layers()
        if self.capacity_factor < 0 or self.router_z_loss_coef < 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor},"
                f" router_z_loss_coef={self.router_z_loss_coef}; both are 0 or more"
            )
        if self.dtype not in DTYPES or self.remat not in REMATS:
            raise ValueError(
                f"dtype={self.dtype!r}, remat={self.remat!r}; choose from {DTYPES} and {REMATS}"
            )

    def _check_layers(self) -> None:
        """Check the sizes of what follows attention in a layer: experts or an MLP."""
        sizes = [getattr(self, name) for name in EXPERT_SIZES]
        if any(sizes) and min(sizes) < 1:
            named = ", ".join(f"{name}={getattr(self, name)}" for name in EXPERT_SIZES)
            raise ValueError(f"{named}; all are positive, or all 0 for a dense model")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds"
                f" num_experts={self.num_experts}; lower it"
            )
        if self.is_dense:
            self._check_dense()
        outside = [i for i in self.dense_layers if not 0 <= i < self.num_layers]
        if outside or len(self.dense_layers) >= self.num_layers:
            raise ValueError(
                f"dense_layers={self.dense_layers} of {self.num_layers} layers; at least one layer"
                " needs experts"
            )
        if self.dense_layers and self.scan_layers:
            raise ValueError(f"dense_layers={self.dense_layers} need scan_layers=False")
        if self.mlp_layers and self.intermediate_size < 1:
            raise ValueError(
                f"intermediate_size={self.intermediate_size}; layers with an MLP need its size"
            )

    def _check_dense(self) -> None:
        names = ("dense_layers", "capacity_factor", "router_z_loss_coef", "router_aux_loss_coef")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        if given:
            raise ValueError(
                f"{', '.join(given)} is about experts, and this model has none; set it to 0"
            )

    @property
    def is_dense(self) -> bool:
        """Return whether no layer has experts."""
        return not self.num_experts

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers that have experts."""
        return tuple(i for i in range(self.num_layers) if i not in self.mlp_layers)

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers that have an MLP instead of experts."""
        return tuple(range(self.num_layers)) if self.is_dense else self.dense_layers

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
        architecture = _architecture(hf)
        _refuse_unsupported(hf)
        fields: dict[str, Any] = {}
        for ours, names in _SIZE_NAMES.items():
            fields[ours] = _required(hf, names)
        for ours, name in _OPTIONAL_NAMES.items():
            if hf.get(name) is not None:
                fields[ours] = hf[name]
        fields["head_dim"] = hf.get("head_dim") or fields["hidden_size"] // fields["num_heads"]
        fields["rope_theta"] = rope.theta_of(hf)
        max_position = fields.get("max_position", cls.max_position)
        fields["rope_scaling"] = rope.scaling_of(hf, max_position)
        fields["attention_bias"] = bool(hf.get("attention_bias"))
        fields |= _expert_fields(hf) if architecture == "qwen3_moe" else _dense_fields(hf)
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
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size or self.moe_intermediate_size,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": rope_parameters,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "hidden_act": "silu",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        } | (_DENSE_HEAD if self.is_dense else self._experts_to_hf())

    def _experts_to_hf(self) -> dict[str, Any]:
        """Return the keys of a config.json that only a model with experts has."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": self.num_experts,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.moe_intermediate_size,
            "norm_topk_prob": self.norm_topk_prob,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "output_router_logits": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(self.dense_layers),
        }


_DENSE_HEAD = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_SIZE_NAMES = {  # our field -> the keys of config.json that may hold it
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
}
_EXPERT_NAMES = {
    "num_experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "moe_intermediate_size": ("moe_intermediate_size",),
}
_OPTIONAL_NAMES = {
    "rms_norm_eps": "rms_norm_eps",
    "max_position": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# key of config.json -> the values that this model supports; an absent key is fine
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "qkv_bias": (False, None),
    "shared_expert_intermediate_size": (0, None),
    "use_qk_norm": (True, None),
}
_ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def _architecture(hf: dict[str, Any]) -> str:
    """Return the model_type of a config.json; one that has none is known by its architecture.

    Raises:
      ValueError: it is none of this model's, or its weights are quantised.
    """
    named = hf.get("architectures") or ["no architecture"]
    of_class = {name: kind for kind, name in _ARCHITECTURES.items()}
    kind = hf.get("model_type") or of_class.get(named[0], named[0])
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"config.json is of model_type={kind!r}; rome.model has"
            f" {' and '.join(_ARCHITECTURES)}. Choose a checkpoint of {' or '.join(of_class)}."
        )
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "an unknown method")
        raise ValueError(
            f"config.json has a quantization_config ({method}): its weights are quantised, and"
            " training needs whole ones. Take the checkpoint's bfloat16 release."
        )
    return kind


def _expert_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json of qwen3_moe that a dense model does not have."""
    fields: dict[str, Any] = {}
    for ours, names in _EXPERT_NAMES.items():
        fields[ours] = _required(hf, names)
    # an absent key means transformers' default, not ours
    fields["norm_topk_prob"] = bool(hf.get("norm_topk_prob", False))
    if hf.get("router_aux_loss_coef") is not None:
        fields["router_aux_loss_coef"] = hf["router_aux_loss_coef"]
    fields["dense_layers"] = _dense_layers(hf, hf["num_hidden_layers"])
    if fields["dense_layers"]:
        fields["intermediate_size"] = _required(hf, ("intermediate_size",))
        fields["scan_layers"] = False
    return fields


def _dense_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json of qwen3 that a model with experts does not have."""
    return {
        "intermediate_size": _required(hf, ("intermediate_size",)),
        "router_aux_loss_coef": 0.0,
    }


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    refused = [
        f"{key}={hf[key]!r} (supported: {' or '.join(map(repr, values))})"
        for key, values in _SUPPORTED.items()
        if key in hf and hf[key] not in values
    ]
    for key in ("rope_scaling", "rope_parameters"):
        turns = hf.get(key) or {}
        kind = turns.get("rope_type", turns.get("type", "default"))
        if kind not in rope.KINDS:
            refused.append(f"{key}.rope_type={kind!r} (supported: {', '.join(rope.KINDS)})")
        if turns.get("partial_rotary_factor", 1.0) != 1.0:
            refused.append(
                f"{key}.partial_rotary_factor={turns['partial_rotary_factor']!r} (supported: 1.0)"
            )
    windowed = set(hf.get("layer_types") or ()) - {"full_attention"}
    if windowed:
        refused.append(f"layer_types={sorted(windowed)} (supported: full_attention)")
    if refused:
        raise ValueError(
            f"config.json asks for what rome.model does not do: {'; '.join(refused)}. Choose"
            " another checkpoint."
        )


def _required(hf: dict[str, Any], names: tuple[str, ...]) -> int:
    found = {name: hf[name] for name in names if hf.get(name) is not None}
    if not found:
        raise ValueError(f"config.json has no {' or '.join(names)}; is it a Qwen3 checkpoint?")
    if len(set(found.values())) > 1:
        raise ValueError(f"config.json contradicts itself: {found}; keep one value")
    return next(iter(found.values()))


def _dense_layers(hf: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Return the layers without experts, by transformers' rule.

    Layer i has experts if it is not in mlp_only_layers and decoder_sparse_step divides i + 1.
    """
    only = hf.get("mlp_only_layers") or []
    step = hf.get("decoder_sparse_step") or 1
    return tuple(i for i in range(num_layers) if i in only or (i + 1) % step)


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


def _dense(hidden: int, layers: int, heads: int, mlp: int, *, tied: bool = False) -> ModelConfig:
    """Return a dense Qwen3 of the first release."""
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=mlp,
        tie_embeddings=tied,
        router_aux_loss_coef=0.0,
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
    # 9.8 M active parameters of 31 M, for experiments on a CPU that outgrow tiny; ids are tiny's
    "small_10m": ModelConfig(
        vocab_size=768,
        hidden_size=384,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=512,
        rope_theta=1e4,
        max_position=2048,
        initializer_range=0.05,
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
    "qwen3_0_6b": _dense(1024, 28, 16, 3072, tied=True),
    "qwen3_1_7b": _dense(2048, 28, 16, 6144, tied=True),
    "qwen3_4b": _dense(2560, 36, 32, 9728, tied=True),
    "qwen3_8b": _dense(4096, 36, 32, 12288),
    "qwen3_14b": _dense(5120, 40, 40, 17408),
    "qwen3_32b": _dense(5120, 64, 64, 25600),
}
