"""Checkpoints: the same bytes both ways, and Hugging Face transformers as the judge of what the model computes."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from rome.model import hf_files
from rome.model.config import PRESETS, ModelConfig
from rome.model.hf import expected_tensors, load_hf, named_tensors, save_hf
from rome.model.hf_files import CheckpointReader, CheckpointWriter
from rome.model.hf_names import parameter_shapes
from rome.model.moe import router_loss
from rome.model.qwen3 import Qwen3, head_kernel, unstack_layers
from rome.model.sharding import make_mesh, param_shardings
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


@pytest.mark.slow
@pytest.mark.parametrize("case", record_golden.CASES)
def test_transformers_has_our_names_and_gives_our_logits_for_every_switch(case, tmp_path):
    needs_transformers()
    import torch
    import transformers

    config = ModelConfig.from_hf(record_golden.CASES[case], remat="none")
    params, tokens_BT = small.random_params(config), record_golden.tokens_of(case)
    save_hf(params, config, tmp_path / "ours", max_shard_bytes=8_000)
    model, report = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    loaded, same = load_hf(tmp_path / "theirs", remat="none")
    assert same == config
    assert_trees_equal(loaded, params)
    out = Qwen3(config, scan=config.scan_layers).apply({"params": params}, tokens_BT, np.arange(tokens_BT.shape[1])[None].repeat(2, 0), np.ones_like(tokens_BT))
    np.testing.assert_allclose(out.hidden_BTD @ head_kernel(params, config), model.eval()(torch.tensor(tokens_BT)).logits.detach(), atol=1e-4)


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


# -- presets -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, parameters", [
    ("qwen3_30b_a3b", 30_532_122_624), ("qwen3_coder_30b_a3b", 30_532_122_624), ("qwen3_235b_a22b", 235_093_634_560), ("qwen3_coder_480b_a35b", 480_154_875_392),
])
def test_published_models_have_exactly_their_published_parameters(preset, parameters):
    config = PRESETS[preset]
    shapes = expected_tensors(config)
    assert sum(map(math.prod, shapes.values())) == parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config)))
    assert len(shapes) == 3 + config.num_layers * (9 + 3 * config.num_experts)
    last = f"model.layers.{config.num_layers - 1}.mlp.experts.{config.num_experts - 1}.down_proj.weight"
    assert shapes[last] == (config.hidden_size, config.moe_intermediate_size) and shapes["lm_head.weight"] == (151936, config.hidden_size)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (128,) and not any("bias" in name for name in shapes)


# -- any config, any mesh ----------------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw):
    pick = lambda *values: draw(st.sampled_from(values))
    layers, heads = pick(1, 2, 3), pick(1, 2, 4)
    dense = tuple(draw(st.sets(st.integers(0, layers - 1), max_size=layers - 1)))
    return dataclasses.replace(
        SMALL, vocab_size=pick(7, 40), hidden_size=pick(6, 16), num_layers=layers, num_heads=heads, num_kv_heads=pick(*(n for n in (1, 2, 4) if heads % n == 0)),
        head_dim=pick(2, 4), num_experts=pick(2, 5), moe_intermediate_size=pick(3, 8), intermediate_size=12 if dense else 0, dense_layers=tuple(sorted(dense)),
        scan_layers=not dense, tie_embeddings=pick(True, False), attention_bias=pick(True, False), norm_topk_prob=pick(True, False))


@settings(max_examples=12, deadline=None)
@given(config=configs(), dtype=st.sampled_from(["float32", "bfloat16"]), limit=st.sampled_from([300, 5_000, 10**9]), block=st.sampled_from([1, 100, 10**6]))
def test_any_config_comes_back_bitwise_and_the_library_reads_our_files(config, dtype, limit, block, tmp_path_factory):
    directory = tmp_path_factory.mktemp("any")
    params = jax.tree.map(lambda w: w.astype(dtype), small.random_params(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_files, "BLOCK_BYTES", block)
        save_hf(params, config, directory, dtype=dtype, max_shard_bytes=limit)
        loaded, same = load_hf(directory, dtype=dtype, remat=config.remat, scan_layers=config.scan_layers)
    assert same == config
    assert_trees_equal(loaded, params)
    theirs = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in safetensors.numpy.load_file(path).items()}
    assert {name: tensor.shape for name, tensor in theirs.items()} == expected_tensors(config)
    for name, tensor in named_tensors(params, config):
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
        assert theirs[name].dtype == dtype


MESHED = dataclasses.replace(SMALL, vocab_size=48)
MESHED_MIXED = dataclasses.replace(MIXED, vocab_size=48)
MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"replica": 2, "fsdp": 4}, {"expert": 4, "tensor": 2}]
ODD_BITS = {"float32": [0x80000000, 1, 0x7f800000, 0x7fc00001, 0x7f800001, 0xffabcdef], "bfloat16": [0x8000, 1, 0x7f80, 0x7fc1, 0x7f81, 0xffab]}  # -0.0, denormal, inf, NaNs


@pytest.mark.parametrize("config, mesh_shape, dtype", [
    (MESHED, MESHES[0], "float32"), (MESHED_MIXED, MESHES[0], "bfloat16"), (MESHED, MESHES[1], "bfloat16"), (MESHED, MESHES[2], "float32"),
], ids=["split_three_ways", "two_kinds_of_layers", "copies", "experts"])
def test_arrays_on_any_mesh_are_written_and_read_bitwise(config, mesh_shape, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "BLOCK_BYTES", 128)  # so that parameters are put together on the devices, tensors cut into several blocks
    params = jax.tree.map(lambda w: w.astype(dtype), small.random_params(config))
    for leaf in jax.tree.leaves(params):
        bits = leaf.reshape(-1).view(f"u{leaf.dtype.itemsize}")
        bits[:6] = ODD_BITS[dtype][:len(bits)]
    shardings = param_shardings(make_mesh(mesh_shape, config), config)
    save_hf(params, config, tmp_path / "host", dtype=dtype, max_shard_bytes=8_000)
    save_hf(jax.device_put(params, shardings), config, tmp_path / "mesh", dtype=dtype, max_shard_bytes=8_000)
    for file in (tmp_path / "host").iterdir():
        assert file.read_bytes() == (tmp_path / "mesh" / file.name).read_bytes()
    loaded, _ = load_hf(tmp_path / "mesh", dtype, shardings)
    bits = lambda tree: jax.tree.map(lambda w: np.asarray(w).view(f"u{w.dtype.itemsize}"), tree)
    assert_trees_equal(bits(loaded), bits(params))
    jax.tree.map(lambda array, sharding: pytest.fail(f"{array.sharding}") if array.sharding != sharding else None, loaded, shardings)
    for leaf in jax.tree.leaves(loaded):  # every copy, not only the one that NumPy looks at
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data).view(f"u{leaf.dtype.itemsize}"), np.asarray(leaf)[shard.index].view(f"u{leaf.dtype.itemsize}"))


def test_widened_and_narrowed_weights_are_the_same_on_devices_as_on_the_host(params, tmp_path):
    shardings = param_shardings(make_mesh({"fsdp": 2}, SMALL), SMALL)
    for stored, wanted in (("float32", "bfloat16"), ("bfloat16", "float32")):
        save_hf(params, SMALL, tmp_path, dtype=stored)
        assert_trees_equal(jax.device_get(load_hf(tmp_path, wanted, shardings)[0]), load_hf(tmp_path, wanted)[0])


def test_unstacked_layers_on_a_device_are_written_as_the_stack_is(tmp_path):
    params = small.random_params(MIXED)
    save_hf(params, MIXED, tmp_path / "stacked")
    save_hf(jax.device_put(unstack_layers(params, MIXED), jax.devices()[1]), MIXED, tmp_path / "unstacked")
    assert (tmp_path / "stacked" / "model.safetensors").read_bytes() == (tmp_path / "unstacked" / "model.safetensors").read_bytes()
    name = "model.layers.2.mlp.down_proj.weight"
    (found,) = named_tensors(unstack_layers(params, MIXED), MIXED, only=name)
    assert found[0] == name
    np.testing.assert_array_equal(found[1], params["layers"]["mlp"]["down"][1].T)


def test_float16_checkpoints_are_read(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    half = {name: tensor.astype(np.float16) for name, tensor in safetensors.numpy.load_file(tmp_path / "model.safetensors").items()}
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    assert_trees_equal(load_hf(tmp_path)[0], jax.tree.map(lambda w: w.astype(np.float16).astype(np.float32), params))


def test_shardings_that_do_not_fit_are_refused(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    shardings = param_shardings(make_mesh({"tensor": 2}, SMALL), SMALL)
    with pytest.raises(ValueError, match="shardings are not those of this checkpoint"):
        load_hf(tmp_path, shardings=shardings["layers"])
    mesh = shardings["norm"]["scale"].mesh
    shardings["layers"]["attention"]["q"] = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor"))
    with pytest.raises(ValueError, match="layers/attention/q .* only the first may be split"):
        load_hf(tmp_path, shardings=shardings)


# -- what is read, what is held ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """(tensor, start, stop, bytes) of every read."""
    seen, read = [], CheckpointReader.read

    def watched(self, name, start=0, stop=None):
        rows = read(self, name, start, stop)
        seen.append((name, start, start + len(rows), rows.nbytes))
        return rows

    monkeypatch.setattr(CheckpointReader, "read", watched)
    return seen


@pytest.mark.parametrize("mesh_shape", [{}, {"replica": 4, "fsdp": 2}], ids=str)
def test_every_byte_is_read_once_however_many_devices_hold_it(mesh_shape, reads, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "BLOCK_BYTES", 256)
    save_hf(small.random_params(MESHED), MESHED, tmp_path, dtype="bfloat16")
    total, told = sum(map(math.prod, expected_tensors(MESHED).values())) * 2, []
    load_hf(tmp_path, shardings=param_shardings(make_mesh(mesh_shape, MESHED), MESHED), progress=lambda done, total: told.append((done, total)))
    assert sum(size for *_, size in reads) == total and max(size for *_, size in reads) <= 256
    assert len({(name, row) for name, start, stop, _ in reads for row in range(start, stop)}) == sum(shape[0] for shape in expected_tensors(MESHED).values())
    assert told == sorted(told) and told[-1] == (total, total) and len(told) == len(reads)


def test_a_process_reads_only_the_experts_and_rows_that_its_devices_hold(reads, tmp_path, monkeypatch):
    """A sharding whose other half belongs to another process: what it asks of the files, until the arrays would be put together."""
    save_hf(small.random_params(MESHED), MESHED, tmp_path)
    mesh = make_mesh({"expert": 2, "tensor": 2}, MESHED)
    mine = mesh.devices.reshape(-1)[3]  # second half of the experts, second half of heads, hidden units and vocabulary

    def partial(sharding):
        whole = sharding.addressable_devices_indices_map
        return types.SimpleNamespace(addressable_devices_indices_map=lambda shape: {mine: whole(shape)[mine]})

    class Done(Exception):
        pass

    def stop(*_):
        raise Done

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", stop)
    with pytest.raises(Done):
        load_hf(tmp_path, shardings=jax.tree.map(partial, param_shardings(mesh, MESHED)))
    read = {name: (start, stop) for name, start, stop, _ in reads}
    assert {name for name in read if ".experts." in name} == {name for name in expected_tensors(MESHED) if ".experts.2." in name or ".experts.3." in name}
    assert read["model.layers.1.mlp.experts.2.up_proj.weight"] == (4, 8) and read["model.layers.1.mlp.experts.2.down_proj.weight"] == (0, 16)
    assert read["model.layers.0.self_attn.q_proj.weight"] == (8, 16) and read["lm_head.weight"] == (24, 48) and read["model.norm.weight"] == (0, 16)


@pytest.mark.slow
def test_two_processes_read_their_halves_and_write_their_shards(tmp_path):
    params = small.random_params(MESHED)
    save_hf(params, MESHED, tmp_path / "source", max_shard_bytes=8_000)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    started = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(port), str(number), str(tmp_path)], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True) for number in range(2)]
    try:
        said = [process.communicate(timeout=250)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:] + said[1][-3000:]
    figures = [json.loads(text.splitlines()[-1]) for text in said]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all(total / 2 <= figure["read"] < 0.6 * total for figure in figures), figures  # norms, and two key heads that four do not divide, are read twice
    assert all(0 < figure["written"] < total for figure in figures) and sum(figure["written"] for figure in figures) == total
    for file in (tmp_path / "source").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


TWO_PROCESSES = """
import json, pathlib, sys
import jax, numpy as np
port, number, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from rome.model import hf_files
from rome.model.hf import load_hf, read_config, save_hf
from rome.model.sharding import make_mesh, param_shardings
hf_files.BLOCK_BYTES = 300
config = read_config(directory / "source")
whole, _ = load_hf(directory / "source")
totals = {}
watch = lambda name: lambda done, total: totals.update({name: done})
params, _ = load_hf(directory / "source", shardings=param_shardings(make_mesh({"expert": 2, "fsdp": 2, "tensor": 2}, config), config), progress=watch("read"))
for array, expected in zip(jax.tree.leaves(params), jax.tree.leaves(whole)):
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
save_hf(params, config, directory / "out", max_shard_bytes=8_000, progress=watch("written"))
print(json.dumps(totals))
"""

LARGER = dataclasses.replace(SMALL, hidden_size=128, num_layers=2, num_experts=16, moe_intermediate_size=512, vocab_size=4096)  # 18 million parameters


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    directory = tmp_path_factory.mktemp("larger")
    save_hf(small.random_params(LARGER), LARGER, directory, max_shard_bytes=2 * 10**7)
    return directory


def traced_peak(run):
    """Most bytes that NumPy held at once while `run` ran; arrays on devices are not among them."""
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


@pytest.mark.parametrize("mesh_shape", [{}, {"expert": 2}], ids=str)
def test_host_memory_holds_blocks_and_neither_parameters_nor_shards(mesh_shape, larger, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_files, "BLOCK_BYTES", 2**17)
    shardings = param_shardings(make_mesh(mesh_shape, LARGER), LARGER)
    bound = 4 * hf_files.THREADS * 2**17 + 2 * 10**6  # blocks as read, as turned and as cut; names and plans
    assert 4 * math.prod(parameter_shapes(LARGER)["layers"]["moe"]["gate"].shape) > 1.2 * bound
    load_peak, (params, _) = traced_peak(lambda: load_hf(larger, shardings=shardings))
    save_peak, _ = traced_peak(lambda: save_hf(params, LARGER, tmp_path / "out", dtype="bfloat16"))
    assert load_peak < bound and save_peak < bound


RESIDENT = """
import json, resource, sys
import jax, numpy as np
from rome.model.hf import load_hf, read_config, save_hf
from rome.model.sharding import make_mesh, param_shardings
source, out, shape = sys.argv[1:]
config = read_config(source)
shardings = param_shardings(make_mesh(json.loads(shape), config), config)
now = lambda: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = now()
params, _ = load_hf(source, "bfloat16", shardings)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
if shape == "{}":  # fake devices of one memory would each hold a copy of what is being written
    save_hf(params, config, out, dtype="bfloat16")
print(json.dumps({"size": size, "extra": peak() - before - size}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mesh_shape", [{}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_resident_memory_exceeds_the_arrays_by_about_one_shard_and_one_tensor(mesh_shape, tmp_path):
    """On CPU devices the arrays themselves are host memory: what is bounded is what comes on top, the compiler's own share included."""
    config = dataclasses.replace(SMALL, hidden_size=1024, num_heads=8, num_kv_heads=4, head_dim=128, num_layers=4, num_experts=16, moe_intermediate_size=2048,
                                 vocab_size=32_000, experts_per_token=2)
    save_hf(jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.bfloat16), parameter_shapes(config)), config, tmp_path / "source", dtype="bfloat16",
            max_shard_bytes=3 * 10**8)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", RESIDENT, str(tmp_path / "source"), str(tmp_path / "out"), json.dumps(mesh_shape)], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["size"] > 9 * 10**8 and figures["extra"] < 3 * 10**8 + 2 * 32_000 * 1024 + 10**8, figures


# -- crashes and full disks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [10**9, 8_000], ids=["one_file", "shards"])
@pytest.mark.parametrize("calls", [0, 20])
def test_a_writer_that_dies_leaves_nothing_that_passes_for_a_checkpoint(params, max_shard_bytes, calls, tmp_path, monkeypatch):
    save_hf(params, SMALL, tmp_path, max_shard_bytes=max_shard_bytes)
    write, left = CheckpointWriter.write, iter(range(calls))

    def dies(self, *arguments):
        if next(left, None) is None:
            raise OSError("the disk is gone")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", dies)
        with pytest.raises(OSError, match="the disk is gone"):
            save_hf(jax.tree.map(lambda w: w + 1, params), SMALL, tmp_path, max_shard_bytes=max_shard_bytes)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load_hf(tmp_path)
    save_hf(params, SMALL, tmp_path, max_shard_bytes=max_shard_bytes)
    assert_trees_equal(load_hf(tmp_path)[0], params)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", ["finish", "commit"])
def test_a_crash_before_the_commit_leaves_no_checkpoint(params, step, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, step, dies)
    with pytest.raises(KeyboardInterrupt):
        save_hf(params, SMALL, tmp_path, max_shard_bytes=8_000)
    with pytest.raises(FileNotFoundError):
        load_hf(tmp_path)


def test_a_full_disk_is_found_out_before_the_old_checkpoint_is_touched(params, tmp_path, monkeypatch):
    save_hf(params, SMALL, tmp_path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(hf_files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=size // 4))
    with pytest.raises(OSError, match="GB free, and the checkpoint takes .* make room") as error:
        save_hf(params, SMALL, tmp_path / "new")
    assert "\n" not in str(error.value)
    save_hf(params, SMALL, tmp_path)  # the old one makes room for the new one
    assert_trees_equal(load_hf(tmp_path)[0], params)


def broken_header(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8:8 + length]))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:])


@pytest.mark.parametrize("change, message", [
    (lambda header: header | {"model.norm.weight": header["model.norm.weight"] | {"dtype": "F8_E4M3"}}, "model.norm.weight is F8_E4M3"),
    (lambda header: header | {"model.norm.weight": header["model.norm.weight"] | {"data_offsets": [0, 8]}}, "not a whole safetensors file"),
    (lambda header: header | {"model.norm.weight": {}}, "not a whole safetensors file"),
    (lambda header: [], "not a whole safetensors file"),
])
def test_a_header_that_makes_no_sense_is_one_clear_line(params, change, message, tmp_path):
    save_hf(params, SMALL, tmp_path)
    broken_header(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load_hf(tmp_path)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


def test_an_index_that_lies_about_its_files_is_found_out(params, tmp_path):
    save_hf(params, SMALL, tmp_path, max_shard_bytes=8_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="says that model-00001-of-.* holds model.norm.weight, but it does not"):
        load_hf(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_hf(tmp_path)
