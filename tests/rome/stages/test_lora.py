"""Runs that train adapters: what a config says of them, and the base that they go on with."""

import json
import shutil

import pytest

from rome.model.config import PRESETS
from rome.model.lora import Lora
from rome.stages.base import check_base
from rome.stages.config import check_config, load_config
from rome.stages.engines import check_adapters
from rome.stages.settings import lora_of
from rome.train.checkpoint import CheckpointError
from rome.train.workdir import ConfigError
from tests.chaos.runs import IPA, SFT, check_whole, metrics, output, training, wait_for_steps


def config_with(file="ipa", **lora):
    config = load_config(f"experiments/{file}.py", "smoke")
    config.lora.update(lora)
    return config


def test_a_config_without_a_rank_trains_all_weights():
    assert lora_of(config_with(), PRESETS["tiny"]) is None
    found = lora_of(config_with(rank=8, alpha=16.0, targets="q_proj"), PRESETS["tiny"])
    assert found == Lora(8, 16.0, (("attention", "q"),)) and found.scale == 2.0


@pytest.mark.parametrize("file", ["sft", "ipa", "cpt"])
@pytest.mark.parametrize(
    "lora, message",
    [
        ({"rank": 8, "targets": "mlp"}, "lora.targets='mlp': 'mlp' matches nothing in this model"),
        ({"rank": 8, "targets": "router"}, "'router' is unknown"),
        ({"rank": -1}, "lora.rank=-1 must be at least 0"),
        ({"rank": 8, "alpha": 0.0}, "lora.alpha=0.0 must be above 0"),
        ({"rank": 8, "publish": "delta"}, "lora.publish='delta'"),
        ({"rank": 0, "publish": "adapter"}, "lora.publish=adapter sends adapters to the engines"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused_before_anything_starts(file, lora, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config_with(file, **lora))


@pytest.mark.parametrize(
    "is_inside, changes, message",
    [
        (True, {}, "engine.device='auto' runs the engine inside the trainer"),
        (False, {"engine.mirrors": "http://a"}, "engine.mirrors='http://a' copy whole checkpoints"),
        (False, {"rollout.lend_engines": 1}, "rollout.lend_engines=1 frees the weights"),
    ],
)
def test_engines_that_cannot_keep_the_base_are_refused_adapters_alone(is_inside, changes, message):
    config = config_with(rank=8, publish="adapter")
    check_adapters(config, False)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=f"^lora.publish=adapter: {message}.*lora.publish=merged"):
        check_adapters(config, is_inside)


def test_a_checkpoint_goes_on_with_its_own_base_alone(tmp_path):
    noted = {"from": "Qwen3-30B-A3B", "digest": "00ff", "dtype": "bfloat16"}
    check_base(noted, dict(noted), tmp_path)
    with pytest.raises(CheckpointError, match="adapters of Qwen3-30B-A3B with digest 00ff, and"):
        check_base(noted, noted | {"digest": "11ff"}, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_adapters_learn_from_demonstrations_and_then_from_episodes(tmp_path):
    """SFT of adapters on random weights, IPA of other ones on its result; killed and resumed."""
    sft = tmp_path / "sft"
    flags = [*SFT, "--config.steps=24", "--config.lora.rank=16"]
    with training(flags, sft) as process:
        assert process.wait(900) == 0, output(sft)[-2000:]
    losses = [line["loss"] for line in metrics(sft)]
    assert losses[-1] < losses[0] - 1.5

    ipa = tmp_path / "ipa"
    start = tmp_path / "start"
    shutil.copytree(sft / "final", start)
    flags = [*IPA, f"--config.init_from={start}", "--config.lora.rank=8"]
    with training(flags, ipa) as process:
        wait_for_steps(process, ipa, 3, seconds=900)
    aside = tmp_path / "aside"
    start.rename(aside)
    shutil.copytree(sft / "weights" / "start", start)  # a model alike, before it was trained
    with training(flags, ipa) as process:
        assert process.wait(900) == 1, output(ipa)[-2000:]
    assert "holds adapters of" in output(ipa) and "Bring the base back" in output(ipa)
    shutil.rmtree(start)
    aside.rename(start)
    with training(flags, ipa) as process:
        assert process.wait(900) == 0, output(ipa)[-2000:]
    check_whole(ipa)
    assert all(line["max_mismatch"] < 1e-3 for line in metrics(ipa))
    adapter = json.loads((ipa / "final/adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["base_model_name_or_path"]) == (8, str(start))
