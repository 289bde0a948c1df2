"""Checkpoints: the same bytes both ways, and Hugging Face transformers as the judge of what the
model computes.
"""

import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.model.config import PRESETS, ModelConfig
from rome.model.hf import files
from rome.model.hf.checkpoint import load_hf, named_tensors, save_hf
from rome.model.hf.names import expected_tensors, parameter_shapes
from rome.model.moe import router_loss
from rome.model.qwen3 import Qwen3, head_kernel
from tests.rome.model import record_golden, small
from tests.rome.model.small import assert_trees_equal

SMALL = small.CONFIG
GOLDEN = np.load(record_golden.GOLDEN)


@pytest.fixture(scope="module")
def params():
    return small.random_params(SMALL)


def run_ours(directory, tokens_BT):
    """Logits, loss, router loss and gradients by checkpoint name, through load_hf and save_hf."""
    params, config = load_hf(directory)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

    def objective(params):
        out = Qwen3(config, scan=config.scan_layers).apply(
            {"params": params}, jnp.asarray(tokens_BT), positions_BT, jnp.ones_like(positions_BT)
        )
        logits_BTV = out.hidden_BTD @ head_kernel(params, config)
        logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        loss = -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1))
        aux = router_loss(out.router, config)
        return loss + record_golden.AUX_COEFFICIENT * aux, (logits_BTV, loss, aux)

    (_, (logits_BTV, loss, aux)), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params
    )
    save_hf(gradients, config, directory / "gradients")
    return {"logits": logits_BTV, "loss": loss, "aux_loss": aux}, safetensors.numpy.load_file(
        directory / "gradients" / "model.safetensors"
    )


def compare(ours, our_gradients, theirs, their_gradients):
    assert np.abs(ours["logits"] - theirs["logits"]).max() < 1e-4
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    np.testing.assert_allclose(ours["aux_loss"], theirs["aux_loss"], rtol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        np.testing.assert_allclose(
            our_gradients[name], gradient, rtol=1e-3, atol=2e-6, err_msg=name
        )


@pytest.mark.long
@pytest.mark.parametrize("case", record_golden.CASES)
def test_logits_and_gradients_equal_those_recorded_from_transformers(case, tmp_path):
    hf = record_golden.CASES[case]
    weights = record_golden.hf_weights(hf, record_golden.seed_of(case))
    record_golden.write_checkpoint(hf, weights, tmp_path)
    names = [str(name) for name in GOLDEN[f"{case}/gradient_names"]]
    parts = np.split(
        GOLDEN[f"{case}/gradients"], np.cumsum([weights[name].size for name in names])[:-1]
    )
    their_gradients = {
        name: part.reshape(weights[name].shape) for name, part in zip(names, parts, strict=True)
    }
    ours, our_gradients = run_ours(tmp_path, record_golden.tokens_of(case))
    compare(ours, our_gradients, {key: GOLDEN[f"{case}/{key}"] for key in ours}, their_gradients)


def needs_transformers():
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"{' and '.join(missing)} not installed; pip install -r tests/requirements-live.txt"
            " compares live"
        )


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("seed", range(4))
def test_logits_and_gradients_equal_transformers_live_on_random_configs(seed, tmp_path):
    needs_transformers()
    random = np.random.RandomState(seed)
    key_heads, groups, experts = (
        random.choice([1, 2, 3]),
        random.choice([1, 2, 4]),
        random.choice([4, 8, 16]),
    )
    hf = record_golden.COMMON | dict(
        num_attention_heads=int(key_heads * groups),
        num_key_value_heads=int(key_heads),
        head_dim=int(random.choice([4, 8])),
        num_experts=int(experts),
        num_experts_per_tok=int(random.choice([1, 2, 4])),
        moe_intermediate_size=int(random.choice([4, 8])),
        norm_topk_prob=bool(random.choice([0, 1])),
        tie_word_embeddings=bool(random.choice([0, 1])),
        rope_theta=float(random.choice([1e4, 1e6, 1e7])),
        hidden_size=int(random.choice([16, 24])),
    )
    record_golden.write_checkpoint(hf, record_golden.hf_weights(hf, seed), tmp_path)
    tokens_BT = random.randint(1, hf["vocab_size"], size=(3, 20))
    theirs = record_golden.run_transformers(tmp_path, tokens_BT)
    their_gradients = {
        name.removeprefix("grad:"): value
        for name, value in theirs.items()
        if name.startswith("grad:")
    }
    compare(*run_ours(tmp_path, tokens_BT), theirs, their_gradients)


@pytest.mark.slow
def test_transformers_loads_what_we_write_and_we_load_what_transformers_writes(params, tmp_path):
    needs_transformers()
    import torch
    import transformers

    save_hf(params, SMALL, tmp_path / "ours", max_shard_bytes=8_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    model.save_pretrained(tmp_path / "theirs")
    loaded, config = load_hf(tmp_path / "theirs", remat=SMALL.remat)
    assert config == SMALL
    assert_trees_equal(loaded, params)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert_trees_equal(
        load_hf(tmp_path / "half")[0],
        jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(np.float32), params),
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", record_golden.CASES)
def test_transformers_has_our_names_and_gives_our_logits_for_every_switch(case, tmp_path):
    needs_transformers()
    import torch
    import transformers

    config = ModelConfig.from_hf(record_golden.CASES[case], remat="none")
    params, tokens_BT = small.random_params(config), record_golden.tokens_of(case)
    save_hf(params, config, tmp_path / "ours", max_shard_bytes=8_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    loaded, same = load_hf(tmp_path / "theirs", remat="none")
    assert same == config
    assert_trees_equal(loaded, params)
    out = Qwen3(config, scan=config.scan_layers).apply(
        {"params": params},
        tokens_BT,
        np.arange(tokens_BT.shape[1])[None].repeat(2, 0),
        np.ones_like(tokens_BT),
    )
    np.testing.assert_allclose(
        out.hidden_BTD @ head_kernel(params, config),
        model.eval()(torch.tensor(tokens_BT)).logits.detach(),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, tie_embeddings=True), small.MIXED],
    ids=["untied", "tied", "mixed"],
)
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
    files = {
        path.name: safetensors.numpy.load_file(path) for path in tmp_path.glob("*.safetensors")
    }
    assert (
        {name for tensors in files.values() for name in tensors}
        == set(index["weight_map"])
        == set(expected_tensors(SMALL))
    )
    assert all(name in files[file] for name, file in index["weight_map"].items())
    assert all(
        sum(tensor.nbytes for tensor in tensors.values()) <= 8_000 for tensors in files.values()
    )
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


@pytest.mark.parametrize(
    "broken, named", [("config.json", "config.json"), ("model.safetensors", "model.safetensors")]
)
def test_an_absent_or_cut_off_file_is_one_clear_line(params, tmp_path, broken, named):
    save_hf(params, SMALL, tmp_path)
    path = tmp_path / broken
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
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
    assert tensors["model.layers.0.mlp.gate.weight"] == (8, 128) and tensors["lm_head.weight"] == (
        768,
        128,
    )
    assert len(tensors) == 3 + 4 * (9 + 3 * 8)


def test_a_checkpoint_config_is_read_by_a_plain_dict_reader(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    assert (
        ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()), remat=SMALL.remat)
        == SMALL
    )


# -- presets
# -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "preset, parameters",
    [
        ("qwen3_30b_a3b", 30_532_122_624),
        ("qwen3_coder_30b_a3b", 30_532_122_624),
        ("qwen3_235b_a22b", 235_093_634_560),
        ("qwen3_coder_480b_a35b", 480_154_875_392),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_1_7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_14b", 14_768_307_200),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_published_models_have_exactly_their_published_parameters(preset, parameters):
    config = PRESETS[preset]
    shapes = expected_tensors(config)
    assert (
        sum(map(math.prod, shapes.values()))
        == parameters
        == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
    )
    in_mlp = 3 if config.is_dense else 1 + 3 * config.num_experts
    outside = 2 if config.tie_embeddings else 3
    assert len(shapes) == outside + config.num_layers * (8 + in_mlp)
    layer, expert = config.num_layers - 1, config.num_experts - 1
    last = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    if config.is_dense:
        last = f"model.layers.{layer}.mlp.down_proj.weight"
    hidden = config.intermediate_size or config.moe_intermediate_size
    assert shapes[last] == (config.hidden_size, hidden)
    head = None if config.tie_embeddings else (151936, config.hidden_size)
    assert shapes.get("lm_head.weight") == head
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (128,) and not any(
        "bias" in name for name in shapes
    )


# -- any config, any mesh
# -------------------------------------------------------------------------------------------------


@st.composite
def configs(draw):
    def pick(*values):
        return draw(st.sampled_from(values))

    layers, heads = pick(1, 2, 3), pick(1, 2, 4)
    dense = tuple(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)))
    if draw(st.booleans()):
        return dataclasses.replace(
            small.DENSE,
            num_layers=layers,
            intermediate_size=pick(3, 24),
            tie_embeddings=pick(True, False),
            attention_bias=pick(True, False),
        )
    return dataclasses.replace(
        SMALL,
        vocab_size=pick(7, 40),
        hidden_size=pick(6, 16),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=pick(*(n for n in (1, 2, 4) if heads % n == 0)),
        head_dim=pick(2, 4),
        num_experts=pick(2, 5),
        moe_intermediate_size=pick(3, 8),
        intermediate_size=12 if dense else 0,
        dense_layers=tuple(sorted(dense)),
        scan_layers=not dense,
        tie_embeddings=pick(True, False),
        attention_bias=pick(True, False),
        norm_topk_prob=pick(True, False),
    )


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    limit=st.sampled_from([300, 5_000, 10**9]),
    block=st.sampled_from([1, 100, 10**6]),
)
def test_any_config_comes_back_bitwise_and_the_library_reads_our_files(
    config, dtype, limit, block, tmp_path_factory
):
    directory = tmp_path_factory.mktemp("any")
    params = jax.tree.map(lambda w: w.astype(dtype), small.random_params(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        save_hf(params, config, directory, dtype=dtype, max_shard_bytes=limit)
        loaded, same = load_hf(
            directory, dtype=dtype, remat=config.remat, scan_layers=config.scan_layers
        )
    assert same == config
    assert_trees_equal(loaded, params)
    theirs = {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    assert {name: tensor.shape for name, tensor in theirs.items()} == expected_tensors(config)
    for name, tensor in named_tensors(params, config):
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
        assert theirs[name].dtype == dtype
