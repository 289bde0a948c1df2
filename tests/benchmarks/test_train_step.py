"""The benchmark of the train step at a toy size, against a rival that answers from our own model,
and its counting against numbers by hand.
"""

import dataclasses
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import train_step
from benchmarks.train_step_floor import count_flops
from rome.model.config import PRESETS

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
ECHO = """
import json, sys
settings = json.loads(sys.argv[1])
losses = {losses}
print(json.dumps({{"rival": "an echo at " + settings["precision"]}}), flush=True)
for number, line in enumerate(sys.stdin):
    if line.strip() == "end":
        break
    print(json.dumps({{"seconds": 1.0, "loss": losses[min(number, len(losses) - 1)]}}), flush=True)
"""


@pytest.fixture
def rival_with_losses(monkeypatch, tmp_path):
    """Makes the rival a script that answers with these losses, and is otherwise as talkative as the
    real one.
    """

    def install(losses):
        script = tmp_path / "train_step_rival.py"
        script.write_text(ECHO.format(losses=losses))
        monkeypatch.setattr(train_step, "__file__", str(tmp_path / "train_step.py"))

    return install


def own_losses():
    config, rows, length = train_step.SIZES["toy"]
    ours = train_step.Ours(config, train_step.random_batch(config, rows, length))
    return [ours.step()["loss"] for _ in range(train_step.PROVING_STEPS)]


@pytest.mark.slow
def test_a_row_has_the_promised_keys_and_its_ratio_is_the_rival_over_ours(
    rival_with_losses, tmp_path
):
    rival_with_losses(own_losses())
    arguments = [
        "--sizes",
        "toy",
        "--precisions",
        "float32",
        "--pairs",
        "3",
        "--rival_python",
        sys.executable,
        "--json",
        str(tmp_path / "out.json"),
    ]
    train_step.main(arguments)
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["sizes"]
    assert (row["name"], row["precision"], row["rival"]) == ("toy", "float32", "an echo at float32")
    own = np.array(row["pairs"])[:, 0]
    assert row["rival_tokens_per_s"] == 64 and row["tokens_per_s"] == pytest.approx(
        64 / np.median(own)
    )
    assert row["ratio"] == pytest.approx(np.median(1 / own))
    assert row["share_of_peak"] == pytest.approx(
        row["floor"]["flops"] / np.median(own) / result["peak_flops"]["float32"]
    )
    assert set(row["alone"]) <= set(row["floor"]["seconds"]) and row["floor"][
        "total_seconds"
    ] == pytest.approx(sum(row["floor"]["seconds"].values()))


@pytest.mark.long
def test_a_rival_that_computes_something_else_is_not_timed(rival_with_losses):
    rival_with_losses([loss * 1.01 for loss in own_losses()])
    with pytest.raises(RuntimeError, match="losses of the first steps differ"):
        train_step.compare("toy", "float32", sys.executable, pairs=1, peak=1e9)


def test_a_rival_that_ends_early_is_an_error_with_its_status(rival_with_losses, tmp_path):
    rival_with_losses([1.0])
    (tmp_path / "train_step_rival.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="status 3"):
        train_step.compare("toy", "float32", sys.executable, pairs=1, peak=1e9)


def test_flops_are_six_per_active_weight_and_token_and_causal_attention():
    config = dataclasses.replace(PRESETS["qwen3_30b_a3b"], num_layers=48)
    flops = count_flops(config, rows=1, length=4096)
    assert (flops["head"] + flops["projections"] + flops["experts"]) / (6 * 4096) == pytest.approx(
        3.042e9, rel=1e-3
    )  # the published active size
    assert flops["attention"] == 6 * 4096**2 * 32 * 128 * 48


def test_the_sizes_are_those_that_the_figures_are_promised_for():
    small, medium = (train_step.SIZES[name][0] for name in ("small", "medium"))

    def shape(c):
        return (
            c.num_layers,
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.num_experts,
            c.experts_per_token,
            c.moe_intermediate_size,
            c.vocab_size,
        )

    assert shape(small) == (4, 256, 8, 4, 32, 16, 2, 128, 4096) and shape(medium) == (
        8,
        512,
        8,
        4,
        64,
        32,
        2,
        256,
        8192,
    )
    assert all(train_step.SIZES[name][1:] == (8, 512) for name in ("small", "medium"))
    assert {c.remat for c in (small, medium)} == {"none"}


def test_without_torch_the_error_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        train_step.main(["--sizes", "toy"])
    assert (
        stopped.value.code == 2
        and "pip install -r tests/requirements-live.txt" in capsys.readouterr().err
    )


def test_an_unknown_size_is_named(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--sizes", "huge", "--rival_python", sys.executable])
    assert "'huge' is no size or precision; choose from toy" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.skipif(not HAS_TORCH, reason="needs tests/requirements-live.txt")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_real_rival_has_our_losses_over_the_first_updates(precision):
    row = train_step.compare(
        "toy", precision, sys.executable, pairs=1, peak=1e9
    )  # raises where they differ
    assert (
        len(row["losses"]) == train_step.PROVING_STEPS
        and "transformers" in row["rival"]
        and jax.default_backend() == "cpu"
    )
