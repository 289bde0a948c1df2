"""The model that a run starts from: its parameters must be those of the preset, the rest is its."""

import dataclasses
import json
import types

import pytest

from rome.model.config import PRESETS, ModelConfig
from rome.model.hf.companions import GENERATION, TOKENIZER_FILES
from rome.model.hf.files import write_json
from rome.model.tokenizer import TINY
from rome.stages.base import StageContext, TrainingStage, model_of
from rome.stages.config import load_config
from rome.stages.limits import check_text_limits
from rome.stages.sft import SFTStage
from rome.stages.weights import (
    PARAMETER_FIELDS,
    RUN_SETTINGS,
    TOKENIZER_FIELDS,
    model_to_start,
)
from rome.train.convert import copy_companions, find_source
from rome.train.display import Display
from rome.train.team import Team
from rome.train.workdir import MODEL, ConfigError
from tests.rome.model.small import random_params

POD = PRESETS["qwen3_30b_a3b"]
# What the releases of Qwen3-30B-A3B say otherwise than the first one.
RELEASES = {
    "Base": {"max_position_embeddings": 32768, "eos_token_id": 151643},
    "Instruct-2507": {"rope_theta": 1e7, "max_position_embeddings": 262144},
    "Thinking-2507": {"rope_theta": 1e7, "max_position_embeddings": 262144, "pad_token_id": 9},
    "a pad token of its own": {"pad_token_id": 151654, "router_aux_loss_coef": 0.0},
    "several ends": {"eos_token_id": [151643, 151645]},
    "YaRN of its card": {
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
}


def write_config(directory, model, **changes):
    document = model.to_hf() | changes
    if "rope_theta" in changes or "rope_scaling" in changes:
        del document["rope_parameters"]  # as transformers 4 writes it
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", document)
    return directory


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_of_an_architecture_is_a_start_and_brings_its_own_settings(release, tmp_path):
    changes = RELEASES[release]
    model = model_to_start(write_config(tmp_path, POD, **changes), POD)
    kept = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert (model.rope_theta, model.max_position) == (kept.rope_theta, kept.max_position)
    assert model.rope_theta == changes.get("rope_theta", 1e6)
    assert (model.rope_scaling is not None) == ("rope_scaling" in changes)
    assert (model.dtype, model.remat, model.scan_layers) == ("bfloat16", "full", True)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_layers": 24}, ["num_layers (24 there, 48 wanted)"]),
        ({"head_dim": 64, "vocab_size": 9}, ["vocab_size (9 there", "head_dim (64 there"]),
        ({"tie_embeddings": True}, ["tie_embeddings (True there, False wanted)"]),
        ({"attention_bias": True}, ["attention_bias (True there"]),
        ({"dense_layers": (3,), "intermediate_size": 8, "scan_layers": False}, ["dense_layers"]),
    ],
    ids=range(5),
)
def test_other_parameters_are_refused_by_the_names_of_their_fields(changes, named, tmp_path):
    write_config(tmp_path, dataclasses.replace(POD, **changes))
    with pytest.raises(ConfigError) as error:
        model_to_start(tmp_path, POD)
    message = str(error.value)
    assert all(name in message for name in named) and "No preset fits it" in message
    assert len(message) < 400 and "rope_theta" not in message


def test_a_refusal_names_the_preset_that_fits(tmp_path):
    write_config(tmp_path, PRESETS["qwen3_235b_a22b"], rope_theta=5e6)
    with pytest.raises(ConfigError, match=r"Set --config.model=qwen3_235b_a22b, or name another"):
        model_to_start(tmp_path, POD)


def test_every_field_of_a_model_has_an_owner():
    of_the_checkpoint = {
        "rope_theta",
        "rope_scaling",
        "rms_norm_eps",
        "max_position",
        "norm_topk_prob",
        "initializer_range",
        "router_aux_loss_coef",
    }
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == of_the_checkpoint.union(PARAMETER_FIELDS, RUN_SETTINGS, TOKENIZER_FIELDS)


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
    (folder / "notes.txt").write_text("nobody needs them")
    return folder


def open_stage(kind, workdir, tokenizer, start, **changes):
    config = load_config("experiments/sft.py", "smoke")
    config.update({"tokenizer": str(tokenizer), "init_from": str(start or ""), **changes})
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
