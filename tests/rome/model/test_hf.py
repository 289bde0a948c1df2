"""Checkpoints: the same bytes both ways, and Hugging Face transformers as the judge of what the model computes."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rome.model.config import PRESETS, ModelConfig
from rome.model.hf import expected_tensors, load_hf, save_hf
from rome.model.moe import router_loss
from rome.model.qwen3 import Qwen3, head_kernel
from tests.rome.model import record_golden, small

SMALL = small.CONFIG
GOLDEN = np.load(record_golden.GOLDEN)


@pytest.fixture(scope="module")
def params():
    return small.random_params(SMALL)


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def run_ours(directory, tokens_BT):
    """Logits, loss, router loss and gradients by checkpoint name, through load_hf and save_hf."""
    params, config = load_hf(directory)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def objective(params):
        out = Qwen3(config, scan=config.scan_layers).apply({"params": params}, jnp.asarray(tokens_BT), positions_BT, jnp.ones_like(positions_BT))
        logits_BTV = out.hidden_BTD @ head_kernel(params, config)
        logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        loss = -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1))
        aux = router_loss(out.router, config)
        return loss + record_golden.AUX_COEFFICIENT * aux, (logits_BTV, loss, aux)

    (_, (logits_BTV, loss, aux)), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    save_hf(gradients, config, directory / "gradients")
    return {"logits": logits_BTV, "loss": loss, "aux_loss": aux}, safetensors.numpy.load_file(directory / "gradients" / "model.safetensors")


def compare(ours, our_gradients, theirs, their_gradients):
    assert np.abs(ours["logits"] - theirs["logits"]).max() < 1e-4
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    np.testing.assert_allclose(ours["aux_loss"], theirs["aux_loss"], rtol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        np.testing.assert_allclose(our_gradients[name], gradient, rtol=1e-3, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", record_golden.CASES)
def test_logits_and_gradients_equal_those_recorded_from_transformers(case, tmp_path):
    hf = record_golden.CASES[case]
    weights = record_golden.hf_weights(hf, record_golden.seed_of(case))
    record_golden.write_checkpoint(hf, weights, tmp_path)
    names = [str(name) for name in GOLDEN[f"{case}/gradient_names"]]
    parts = np.split(GOLDEN[f"{case}/gradients"], np.cumsum([weights[name].size for name in names])[:-1])
    their_gradients = {name: part.reshape(weights[name].shape) for name, part in zip(names, parts)}
    ours, our_gradients = run_ours(tmp_path, record_golden.tokens_of(case))
    compare(ours, our_gradients, {key: GOLDEN[f"{case}/{key}"] for key in ours}, their_gradients)


def needs_transformers():
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed; pip install -r tests/requirements-live.txt compares live")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_logits_and_gradients_equal_transformers_live_on_random_configs(seed, tmp_path):
    needs_transformers()
    random = np.random.RandomState(seed)
    key_heads, groups, experts = random.choice([1, 2, 3]), random.choice([1, 2, 4]), random.choice([4, 8, 16])
    hf = record_golden.COMMON | dict(
        num_attention_heads=int(key_heads * groups), num_key_value_heads=int(key_heads), head_dim=int(random.choice([4, 8])), num_experts=int(experts),
        num_experts_per_tok=int(random.choice([1, 2, 4])), moe_intermediate_size=int(random.choice([4, 8])), norm_topk_prob=bool(random.choice([0, 1])),
        tie_word_embeddings=bool(random.choice([0, 1])), rope_theta=float(random.choice([1e4, 1e6, 1e7])), hidden_size=int(random.choice([16, 24])))
    record_golden.write_checkpoint(hf, record_golden.hf_weights(hf, seed), tmp_path)
    tokens_BT = random.randint(1, hf["vocab_size"], size=(3, 20))
    theirs = record_golden.run_transformers(tmp_path, tokens_BT)
    their_gradients = {name.removeprefix("grad:"): value for name, value in theirs.items() if name.startswith("grad:")}
    compare(*run_ours(tmp_path, tokens_BT), theirs, their_gradients)


@pytest.mark.slow
def test_transformers_loads_what_we_write_and_we_load_what_transformers_writes(params, tmp_path):
    needs_transformers()
    import torch
    import transformers

    save_hf(params, SMALL, tmp_path / "ours", max_shard_bytes=8_000)
    model, report = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.save_pretrained(tmp_path / "theirs")
    loaded, config = load_hf(tmp_path / "theirs", remat=SMALL.remat)
    assert config == SMALL
    assert_trees_equal(loaded, params)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert_trees_equal(load_hf(tmp_path / "half")[0], jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(np.float32), params))


MIXED = dataclasses.replace(SMALL, num_layers=4, dense_layers=(0, 2), intermediate_size=12, attention_bias=True, scan_layers=False)


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, tie_embeddings=True), MIXED], ids=["untied", "tied", "mixed"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 8_000], ids=["one_file", "shards"])
def test_a_checkpoint_comes_back_bitwise(config, max_shard_bytes, tmp_path):
    params = small.random_params(config)
    save_hf(params, config, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes == 8_000)
    loaded, loaded_config = load_hf(tmp_path, remat=config.remat, scan_layers=config.scan_layers)
    assert loaded_config == config
    assert_trees_equal(loaded, params)


def test_shards_stay_below_their_limit_and_the_index_names_every_tensor(params, tmp_path):
    save_hf(params, SMALL, tmp_path, max_shard_bytes=8_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: safetensors.numpy.load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert {name for tensors in files.values() for name in tensors} == set(index["weight_map"]) == set(expected_tensors(SMALL))
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert all(sum(tensor.nbytes for tensor in tensors.values()) <= 8_000 for tensors in files.values())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_a_directory_written_twice_holds_only_the_later_checkpoint(params, tmp_path):
    save_hf(params, SMALL, tmp_path, max_shard_bytes=8_000)
    newer = jax.tree.map(lambda w: w + 1, params)
    save_hf(newer, SMALL, tmp_path)
    assert_trees_equal(load_hf(tmp_path)[0], newer)
    save_hf(params, SMALL, tmp_path, max_shard_bytes=8_000)
    assert_trees_equal(load_hf(tmp_path)[0], params)


def test_bfloat16_checkpoints_round_to_nearest_and_load_in_either_type(params, tmp_path):
    save_hf(params, SMALL, tmp_path, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    assert_trees_equal(load_hf(tmp_path, dtype=jnp.bfloat16)[0], rounded)
    assert_trees_equal(load_hf(tmp_path)[0], jax.tree.map(lambda w: w.astype(np.float32), rounded))


def test_other_float_types_are_refused(params, tmp_path):
    with pytest.raises(ValueError, match="float16"):
        save_hf(params, SMALL, tmp_path, dtype=jnp.float16)


def test_missing_extra_and_misshaped_tensors_are_one_error_that_lists_them(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_hf(tmp_path)
    message = str(error.value)
    assert "1 missing: model.layers.1.mlp.experts.3.up_proj.weight" in message
    assert "1 extra: model.layers.0.self_attn.q_proj.bias" in message
    assert "1 misshaped: model.norm.weight is (5,), not (16,)" in message and "\n" not in message


@pytest.mark.parametrize("broken, named", [("config.json", "config.json"), ("model.safetensors", "model.safetensors")])
def test_an_absent_or_cut_off_file_is_one_clear_line(params, tmp_path, broken, named):
    save_hf(params, SMALL, tmp_path)
    path = tmp_path / broken
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match=named) as error:
        load_hf(tmp_path)
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=named):
        load_hf(tmp_path)


def test_parameters_that_are_not_the_config_are_refused_by_name(params, tmp_path):
    with pytest.raises(ValueError, match="layers/attention/q"):
        save_hf(params, dataclasses.replace(SMALL, num_heads=8), tmp_path)


def test_the_tiny_preset_has_hugging_face_names_and_layouts():
    tensors = expected_tensors(PRESETS["tiny"])
    assert tensors["model.layers.3.self_attn.o_proj.weight"] == (128, 128)
    assert tensors["model.layers.0.self_attn.k_proj.weight"] == (64, 128)
    assert tensors["model.layers.0.mlp.experts.7.gate_proj.weight"] == (256, 128)
    assert tensors["model.layers.0.mlp.experts.7.down_proj.weight"] == (128, 256)
    assert tensors["model.layers.0.mlp.gate.weight"] == (8, 128) and tensors["lm_head.weight"] == (768, 128)
    assert len(tensors) == 3 + 4 * (9 + 3 * 8)


def test_a_checkpoint_config_is_read_by_a_plain_dict_reader(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    assert ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()), remat=SMALL.remat) == SMALL
