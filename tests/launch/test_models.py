"""launch.train from directories: a dense model with Qwen3-Coder's form of calls; SFT, then IPA."""

import dataclasses
import json
import shutil

import pytest

from rome.data.trajectory import load_trajectory
from rome.model.config import PRESETS
from rome.model.hf.checkpoint import read_config, save_hf
from rome.model.tokenizer import TINY
from tests.launch.runs import metrics, train
from tests.paths import ROOT
from tests.rome.model.small import random_params

DENSE = dataclasses.replace(
    PRESETS["qwen3_0_6b"],
    vocab_size=768,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    rope_theta=1e4,
    max_position=512,
)
SIZES = [
    "--config.max_context=320",
    "--config.row_length=320",
    "--config.max_new_tokens=96",
    "--config.eval_tasks=1",
]


def write_checkpoint(folder):
    save_hf(random_params(DENSE, scale=0.05), DENSE, folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    template = ROOT / "tests/rome/model/tokenizer/templates/coder.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dense_checkpoint_is_trained_by_sft_and_ipa(tmp_path):
    start = write_checkpoint(tmp_path / "Qwen3-tiny")
    sft = ["--config=experiments/sft.py:smoke", f"--config.model={start}", *SIZES]
    train([*sft, "--config.steps=6", "--config.demonstrations=48"], tmp_path / "sft")
    final = tmp_path / "sft" / "final"
    assert (final / "chat_template.jinja").read_text() == (
        start / "chat_template.jinja"
    ).read_text()
    assert json.loads((final / "config.json").read_text())["model_type"] == "qwen3"
    shown = [load_trajectory(path) for path in (tmp_path / "sft").glob("trajectories/**/*.json")]
    calls = [chunk.text for one in shown for chunk in one.chunks if chunk.tool_call]
    assert calls and all("<function=bash>" in text for text in calls)
    losses = [line["loss"] for line in metrics(tmp_path / "sft")]
    assert losses[-1] < losses[0] and len(losses) == 6

    ipa = ["--config=experiments/ipa.py:smoke", f"--config.init_from={final}", *SIZES]
    ipa += ["--config.steps=2", "--config.groups=2", "--config.group_size=2"]
    train([*ipa, "--config.eval_every=2"], tmp_path / "ipa")
    lines = metrics(tmp_path / "ipa")
    assert len(lines) == 2 and not [name for line in lines for name in line if "router" in name]
    assert all(line.get("mismatch", 0.0) < 1e-4 for line in lines)
    trained = read_config(tmp_path / "ipa" / "final")
    assert trained.is_dense and trained.tie_embeddings
