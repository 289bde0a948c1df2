"""The model that a run starts from: a directory's config.json, and what training says of it."""

import dataclasses
import json
import types

import pytest

from rome.model.config import PRESETS, ModelConfig
from rome.model.hf.checkpoint import save_hf
from rome.model.hf.companions import GENERATION, TOKENIZER_FILES
from rome.model.hf.files import write_json
from rome.model.tokenizer import TINY
from rome.model.tokenizer.template import DEFAULT
from rome.stages.base import StageContext, TrainingStage
from rome.stages.config import check_config, load_config
from rome.stages.limits import check_text_limits
from rome.stages.sft import SFTStage
from rome.stages.weights import check_start, from_document, model_of, to_document
from rome.train.convert import copy_companions, find_source
from rome.train.display import Display
from rome.train.team import Team
from rome.train.workdir import MODEL, ConfigError, start_directory, tokenizer_directory
from tests.rome.model.small import random_params

_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_BIG = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
_BIG |= {"moe_intermediate_size": 1536, "intermediate_size": 12288, "max_window_layers": 94}
_LONG = {"max_position_embeddings": 262144}
_CODER = {"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}
_CODER |= _LONG | {"rope_theta": 1e7, "router_aux_loss_coef": 0.0}
_480B = {"hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96}
_480B |= {"num_key_value_heads": 8, "num_experts": 160, "moe_intermediate_size": 2560}
_DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# The published releases: their config.json, and the preset of the same sizes.
RELEASES = {
    "30B-A3B": (_MOE, "qwen3_30b_a3b"),
    "30B-A3B-Base": (
        _MOE | {"max_position_embeddings": 32768, "eos_token_id": 151643},
        "qwen3_30b_a3b",
    ),
    "30B-A3B-Instruct-2507": (_MOE | _LONG | {"rope_theta": 10000000}, "qwen3_30b_a3b"),
    "30B-A3B-Thinking-2507": (_MOE | _LONG | {"rope_theta": 10000000}, "qwen3_30b_a3b"),
    "30B-A3B with its card's YaRN": (
        _MOE | {"max_position_embeddings": 131072, "rope_scaling": _YARN},
        "qwen3_30b_a3b",
    ),
    "30B-A3B with two ends": (_MOE | {"eos_token_id": [151645, 151643]}, "qwen3_30b_a3b"),
    "Coder-30B-A3B": (_MOE | _CODER, "qwen3_coder_30b_a3b"),
    "235B-A22B": (_MOE | _BIG, "qwen3_235b_a22b"),
    "235B-A22B-2507": (_MOE | _BIG | _LONG | {"rope_theta": 5000000}, "qwen3_235b_a22b"),
    "Coder-480B-A35B": (_MOE | _CODER | _480B, "qwen3_coder_480b_a35b"),
    "0.6B": (_DENSE, "qwen3_0_6b"),
    "0.6B-Base": (
        _DENSE | {"max_position_embeddings": 32768, "eos_token_id": 151643},
        "qwen3_0_6b",
    ),
    "4B-Thinking-2507": (
        _DENSE
        | _LONG
        | {
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 9728,
            "rope_theta": 5000000,
            "max_window_layers": 36,
        },
        "qwen3_4b",
    ),
    "8B as transformers 5 writes it": (
        {key: value for key, value in _DENSE.items() if not key.startswith("rope")}
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 12288,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * 36,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
            "dtype": "bfloat16",
        },
        "qwen3_8b",
    ),
}
OWN = ("rope_theta", "rope_scaling", "max_position", "eos_token_id", "pad_token_id")


def write_config(directory, document, **changes):
    if isinstance(document, ModelConfig):
        document = to_document(document)
    if "rope_theta" in changes:
        del document["rope_parameters"]  # as transformers 4 writes it
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", document | changes)
    return directory


def config_of(**changes):
    config = load_config("experiments/sft.py", "smoke")
    config.learner.remat = "full"
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("release", RELEASES)
def test_every_published_config_json_is_a_start_and_brings_its_own_settings(release, tmp_path):
    document, preset = RELEASES[release]
    directory = write_config(tmp_path, document)
    named = model_of(config_of(model=str(directory)))
    assert named == model_of(config_of(init_from=str(directory)), directory)
    own = {name: getattr(named, name) for name in OWN}
    assert named == dataclasses.replace(PRESETS[preset], **own)
    given = document.get("rope_theta") or document["rope_parameters"]["rope_theta"]
    assert named.rope_theta == given
    assert named.max_position == document["max_position_embeddings"]
    assert (named.rope_scaling is not None) == bool(document.get("rope_scaling"))
    assert (named.dtype, named.remat, named.scan_layers) == ("bfloat16", "full", True)


def test_config_learner_has_what_is_trainings_business(tmp_path):
    directory = write_config(tmp_path, _MOE)
    changes = {
        "learner.dtype": "float32",
        "learner.router_aux_loss_coef": 0.0,
        "learner.router_z_loss_coef": 0.5,
        "learner.capacity_factor": 2.0,
        "learner.yarn_factor": 4.0,
    }
    config = config_of(model=str(directory), **changes)
    model = model_of(config)
    assert (model.dtype, model.router_aux_loss_coef, model.router_z_loss_coef) == (
        "float32",
        0,
        0.5,
    )
    assert (model.capacity_factor, model.max_position) == (2.0, 4 * 40960)
    assert model.rope_scaling.factor == 4.0 and model.rope_scaling.original_max_position == 40960
    # a resumed run stretches nothing twice, and neither does the stage after it
    assert from_document(to_document(model), config) == model
    final = write_config(tmp_path / "final", model)
    assert (
        model_of(config_of(init_from="a.py", **changes), final).rope_scaling == model.rope_scaling
    )


@pytest.mark.parametrize(
    "document, changes, message",
    [
        (_MOE | {"model_type": "qwen3_next"}, {}, "model_type='qwen3_next'"),
        ({"architectures": ["LlamaForCausalLM"]}, {}, "LlamaForCausalLM"),
        (_MOE | {"rope_scaling": {"rope_type": "llama3"}}, {}, "rope_type='llama3'"),
        (_MOE | {"quantization_config": {"quant_method": "fp8"}}, {}, "fp8.*bfloat16 release"),
        (_DENSE | {"torch_dtype": "float16"}, {}, "Set --config.learner.dtype"),
        (_DENSE, {"learner.capacity_factor": 2.0}, "capacity_factor=2.0 is about experts"),
        (_DENSE, {"learner.router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 is about"),
        (_DENSE, {"learner.yarn_factor": 0.5}, "yarn_factor=0.5"),
        (_DENSE | {"layer_types": ["sliding_attention"]}, {}, "layer_types"),
        (_DENSE | {"intermediate_size": None}, {}, "intermediate_size"),
    ],
    ids=range(10),
)
def test_what_cannot_be_read_is_refused_in_one_line(document, changes, message, tmp_path):
    directory = write_config(tmp_path, document)
    with pytest.raises(ValueError, match=message) as error:
        model_of(config_of(model=str(directory), **changes))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_model_that_is_nowhere_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"config.model='Qwen3-1B' is neither a directory"):
        check_config(config_of(model="Qwen3-1B"))
    with pytest.raises(FileNotFoundError, match="nowhere a Hugging Face checkpoint"):
        model_of(config_of(), tmp_path / "nowhere")
    one, other = (str(write_config(tmp_path / name, _DENSE)) for name in ("one", "other"))
    with pytest.raises(ConfigError, match="are two directories"):
        check_config(config_of(model=one, init_from=other))
    check_config(config_of(model=one, init_from=one))
    check_config(config_of(model=one, init_from="random"))


def test_weights_and_tokenizer_are_the_directorys_unless_others_are_named(tmp_path):
    directory, workdir = write_config(tmp_path / "model", _DENSE), tmp_path / "run"
    shipped = config_of()
    assert start_directory(shipped, workdir) is None
    assert tokenizer_directory(shipped, workdir) == TINY
    named = config_of(model=str(directory))
    assert start_directory(named, workdir) == tokenizer_directory(named, workdir) == directory
    drawn = config_of(model=str(directory), init_from="random")
    assert start_directory(drawn, workdir) is None
    assert tokenizer_directory(drawn, workdir) == directory
    after = config_of(model=str(directory), init_from="experiments/sft.py")
    assert tokenizer_directory(after, workdir) == workdir / "init" / "final"
    other = config_of(model=str(directory), tokenizer=str(tmp_path))
    assert tokenizer_directory(other, workdir) == tmp_path


def test_a_missing_shard_or_tensor_is_named_before_training(tmp_path):
    model = dataclasses.replace(PRESETS["tiny"], num_layers=1)
    save_hf(random_params(model), model, tmp_path, max_shard_bytes=500_000)
    check_start(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} is named by the index but"):
        check_start(tmp_path)
    write_json(tmp_path / "config.json", dataclasses.replace(model, tie_embeddings=True).to_hf())
    with pytest.raises(FileNotFoundError):
        check_start(tmp_path)


# -- in a stage
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with every file that a tokenizer may have."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in (*TOKENIZER_FILES, GENERATION):
        (folder / name).write_text(f"{name} of the tokenizer")
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(DEFAULT)
    (folder / "notes.txt").write_text("nobody needs them")
    return folder


def open_stage(kind, workdir, tokenizer, start, **changes):
    config = load_config("experiments/sft.py", "smoke")
    config.update({"tokenizer": str(tokenizer), "init_from": str(start or ""), **changes})
    if start is not None and not (start / "model.safetensors").exists():
        model = ModelConfig.from_hf(json.loads((start / "config.json").read_text()))
        document = (start / "config.json").read_bytes()
        save_hf(random_params(model), model, start)
        (start / "config.json").write_bytes(document)
    workdir.mkdir(exist_ok=True)
    write_json(workdir / "config.json", config.to_dict())
    display = Display("sft", 1, quiet=True, evaluate_every=0)
    return kind(StageContext(config, workdir, "none", Team(), display, start))


def test_a_stage_keeps_the_model_of_its_start_and_convert_writes_it(tmp_path, tokenizer):
    start = write_config(tmp_path / "start", PRESETS["tiny"], rope_theta=5e5, pad_token_id=3)
    workdir = tmp_path / "run"
    stage = open_stage(TrainingStage, workdir, tokenizer, start)
    assert stage.model_config.rope_theta == 5e5
    assert stage.model_config.pad_token_id == stage.tokenizer.pad
    (start / "config.json").unlink()  # a resumed run needs it no more
    again = open_stage(TrainingStage, workdir, tokenizer, start)
    assert again.model_config == stage.model_config
    stage.checkpoints = None
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    source = find_source(workdir, None)
    assert source.model == dataclasses.replace(stage.model_config, remat="full", scan_layers=True)
    (workdir / MODEL).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=rf"{MODEL} is not JSON .it is nested too deeply"):
        open_stage(TrainingStage, workdir, tokenizer, start)


@pytest.mark.parametrize("has_own", [True, False])
def test_final_has_the_files_that_convert_brings_byte_for_byte(tmp_path, tokenizer, has_own):
    start = write_config(tmp_path / "start", PRESETS["tiny"])
    (start / "merges.txt").write_text("of another tokenizer")
    if has_own:
        (start / GENERATION).write_text('{"eos_token_id": [743, 741]}')
    stage = open_stage(TrainingStage, tmp_path / "run", tokenizer, start)
    stage.export(types.SimpleNamespace(params=random_params(PRESETS["tiny"])))
    final = tmp_path / "run" / "final"
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    source = find_source(tmp_path / "run", None)
    (tmp_path / "converted").mkdir()
    copy_companions(tmp_path / "converted", source.tokenizer, source.start)
    names = {path.name for path in final.iterdir()} - {"config.json", "model.safetensors"}
    assert names == {*TOKENIZER_FILES, GENERATION}
    for name in names:
        folder = start if name == GENERATION and has_own else tokenizer
        assert (final / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "converted" / name).read_bytes() == (final / name).read_bytes()


@pytest.mark.parametrize("folder", ["tiny", "relative"])
def test_convert_finds_the_shipped_tokenizer_from_any_folder(
    tmp_path, tokenizer, folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    place = "rome/model/tokenizer/tiny" if folder == "tiny" else tokenizer.name
    stage = open_stage(TrainingStage, tmp_path / "run", place, None)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    source = find_source(tmp_path / "run", None)
    assert (source.tokenizer / "tokenizer.json").is_file() and stage.tokenizer.pad > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_context": 16, "max_new_tokens": 4}, "max_context=16 is too short for"),
        ({"max_context": 513, "row_length": 600}, "longer than the 512 positions"),
    ],
    ids=range(2),
)
def test_limits_that_let_no_episode_begin_are_refused_before_anything_starts(
    tmp_path, tokenizer, changes, message
):
    with pytest.raises(ConfigError, match=message) as error:
        open_stage(SFTStage, tmp_path / "run", tokenizer, None, **changes)
    assert "--config.max_context" in str(error.value)


def test_the_advised_context_is_accepted(tmp_path, tokenizer):
    with pytest.raises(ConfigError) as error:
        open_stage(SFTStage, tmp_path / "run", tokenizer, None, max_context=30, max_new_tokens=9)
    advised = int(str(error.value).partition("--config.max_context to ")[2].split()[0])
    changes = {"max_context": advised, "max_new_tokens": 9}
    open_stage(SFTStage, tmp_path / "run", tokenizer, None, **changes)


def test_rows_of_text_fit_the_models_positions(tmp_path):
    config = load_config("experiments/cpt.py", "smoke")
    check_text_limits(config, model_of(config))
    config.row_length = 513
    with pytest.raises(ConfigError, match=r"512 positions.*Lower --config.row_length"):
        check_text_limits(config, model_of(config))
