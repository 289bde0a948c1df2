"""ModelConfig: presets, Hugging Face spellings, refusals."""

import dataclasses
import math

import jax
import pytest

from rome.model.config import PRESETS, ModelConfig
from rome.model.qwen3 import init_params

TINY = PRESETS["tiny"]


@pytest.mark.parametrize(
    "preset, count",
    [
        ("qwen3_30b_a3b", 30_532_122_624),
        ("qwen3_coder_30b_a3b", 30_532_122_624),
        ("qwen3_235b_a22b", 235_093_634_560),
    ],
)
def test_presets_have_exactly_the_published_number_of_parameters(preset, count):
    shapes = jax.eval_shape(lambda key: init_params(PRESETS[preset], key), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_the_way_through_a_config_json(preset):
    config = PRESETS[preset]
    assert (
        ModelConfig.from_hf(
            config.to_hf(), dtype=config.dtype, remat=config.remat, scan_layers=config.scan_layers
        )
        == config
    )


def test_old_and_new_spellings_of_a_config_json_mean_the_same():
    new = TINY.to_hf()
    for key in ("num_experts", "rope_theta", "rope_scaling"):
        del new[key]
    old = TINY.to_hf()
    for key in ("num_local_experts", "rope_parameters"):
        del old[key]
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old) == ModelConfig.from_hf(TINY.to_hf())


def test_an_absent_norm_topk_prob_is_false_and_an_absent_head_dim_divides_the_hidden_size():
    hf = TINY.to_hf()
    del hf["norm_topk_prob"], hf["head_dim"]
    config = ModelConfig.from_hf(hf)
    assert config.norm_topk_prob is False and config.head_dim == TINY.hidden_size // TINY.num_heads


def test_the_first_of_several_end_tokens_is_taken():
    assert ModelConfig.from_hf(TINY.to_hf() | {"eos_token_id": [7, 9]}).eos_token_id == 7


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_sliding_window", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("model_type", "qwen2_moe"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("shared_expert_intermediate_size", 64),
        ("use_qk_norm", False),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("quantization_config", {"quant_method": "fp8"}),
    ],
)
def test_a_switch_that_the_model_does_not_have_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=key):
        ModelConfig.from_hf(TINY.to_hf() | {key: value})


@pytest.mark.parametrize(
    "switches, dense",
    [
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"mlp_only_layers": [1]}, (1,)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (0, 1, 2)),
    ],
)
def test_dense_layers_follow_transformers_rule_and_survive_a_config_json(switches, dense):
    config = ModelConfig.from_hf(TINY.to_hf() | switches | {"intermediate_size": 24})
    assert config.dense_layers == dense and not config.scan_layers
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_a_mixture_of_experts_without_any_experts_is_refused():
    with pytest.raises(ValueError, match="at least one layer needs experts"):
        ModelConfig.from_hf(TINY.to_hf() | {"mlp_only_layers": [0, 1, 2, 3]})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.9,
            "beta_fast": 16,
            "truncate": False,
        },
    ],
)
def test_stretched_rotary_angles_survive_a_config_json_in_either_spelling(rope):
    old = ModelConfig.from_hf(TINY.to_hf() | {"rope_scaling": rope, "rope_parameters": None})
    new = ModelConfig.from_hf(
        TINY.to_hf()
        | {
            "rope_scaling": None,
            "rope_parameters": rope | {"rope_theta": TINY.rope_theta},
        }
    )
    assert (
        old
        == new
        == ModelConfig.from_hf(old.to_hf() | {"rope_scaling": None})
        == ModelConfig.from_hf(old.to_hf() | {"rope_parameters": None})
    )
    assert (
        old.rope_scaling.kind == rope.get("rope_type", rope.get("type"))
        and old.rope_scaling.factor == rope["factor"]
    )


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta twice"),
        ({"rope_scaling": {"type": "yarn"}}, "without a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "two ways"),
        ({"num_local_experts": 4}, "num_local_experts"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_json_that_contradicts_itself_or_lacks_a_size_is_an_error_that_names_it(
    change, named
):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf(TINY.to_hf() | change)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"experts_per_token": 9}, "experts_per_token=9"),
        ({"head_dim": 33}, "head_dim=33"),
        ({"dtype": "float16"}, "float16"),
        ({"remat": "half"}, "half"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_experts": 0}, "all are positive, or all 0 for a dense model"),
        ({"num_experts": 0, "experts_per_token": 0, "moe_intermediate_size": 0}, "about experts"),
    ],
)
def test_impossible_sizes_are_refused_with_their_value(change, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(TINY, **change)
