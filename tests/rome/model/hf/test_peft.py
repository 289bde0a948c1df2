"""Adapters in PEFT's layout: the same numbers both ways, merged as the model merges them."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import load_hf, named_tensors, save_hf
from rome.model.hf.digest import FilesDigest, params_digest
from rome.model.hf.peft import CONFIG, TENSORS, HostAdapters, load_peft, save_peft
from rome.model.lora import Lora, adapter_shapes, find_targets, with_adapters
from rome.model.params import param_shardings
from rome.model.qwen3 import Qwen3, head_kernel
from rome.model.sharding import make_mesh
from tests.rome.model import small
from tests.rome.model.small import assert_trees_equal

MIXED = small.MIXED
LORA = Lora(3, 6.0, find_targets("all", MIXED))


def draw_adapters(config, lora, seed=2):
    random = np.random.RandomState(seed)

    def draw(leaf):
        return (0.3 * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, adapter_shapes(config, lora))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Adapters, and the directory that they were written to."""
    adapters = draw_adapters(MIXED, LORA)
    directory = tmp_path_factory.mktemp("peft")
    save_peft(HostAdapters.of(adapters, MIXED, LORA), "base", directory)
    return adapters, directory


def test_adapters_come_back_from_pefts_layout_bit_by_bit(written):
    adapters, directory = written
    found = load_peft(directory, MIXED)
    assert found.lora == LORA
    assert_trees_equal(found.stacked(MIXED), adapters)
    document = json.loads((directory / CONFIG).read_text())
    assert (document["r"], document["lora_alpha"], document["peft_type"]) == (3, 6.0, "LORA")
    assert "q_proj" in document["target_modules"] and "down_proj" in document["target_modules"]
    names = safetensors.numpy.load_file(directory / TENSORS)
    one = names["base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"]
    assert one.shape == (3, MIXED.hidden_size)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_merged_checkpoint_holds_what_the_model_computes_with(tmp_path, dtype):
    config = dataclasses.replace(MIXED, dtype=dtype)
    base = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), small.random_params(config))
    adapters = draw_adapters(config, LORA)
    host = HostAdapters.of(adapters, config, LORA)
    save_hf(base, config, tmp_path, dtype=jnp.dtype(dtype), adapters=host)
    merged, _ = load_hf(tmp_path, dtype=jnp.dtype(dtype))
    tokens_BT = jnp.arange(12).reshape(2, 6)
    rows = (tokens_BT, jnp.broadcast_to(jnp.arange(6), (2, 6)), jnp.ones_like(tokens_BT))

    def hidden(params):
        model = Qwen3(config, scan=False)
        return jax.jit(model.apply)({"params": params}, *rows).hidden_BTD.astype(jnp.float32)

    together = hidden(with_adapters(base, adapters, LORA))
    np.testing.assert_allclose(together, hidden(merged), atol=1e-5 if dtype == "float32" else 0.0)
    assert np.abs(together - hidden(base)).max() > 0.1


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.floats(0.1, 64), st.sets(st.sampled_from(LORA.targets), min_size=1))
def test_rows_are_merged_alike_however_a_tensor_is_cut(rank, alpha, chosen):
    lora = Lora(rank, alpha, tuple(target for target in LORA.targets if target in chosen))
    host = HostAdapters.of(draw_adapters(MIXED, lora), MIXED, lora)
    for name, (a, b) in host.pairs.items():
        rows = np.zeros((len(b), a.shape[1]), np.float32)
        whole = host.add(name, 0, rows)
        wanted = alpha / rank * b.astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_allclose(whole, wanted, atol=1e-4)
        parts = [host.add(name, start, rows[start : start + 5]) for start in range(0, len(b), 5)]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)
    untouched = np.zeros((2, 2), np.float16)
    assert host.add("model.norm.weight", 0, untouched) is untouched


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "describes no plain LoRA .use_dora=True."),
        ({"rank_pattern": {"q_proj": 8}}, "describes no plain LoRA .rank_pattern="),
        ({"peft_type": "IA3"}, "describes no plain LoRA .peft_type='IA3'."),
        ({"r": "x"}, "describes no plain LoRA .r='x'"),
        ({"r": 4}, "does not hold adapters of this model .*lora_A.weight is .3, 16., not .4, 16."),
    ],
)
def test_adapters_of_another_kind_are_refused_by_key(written, tmp_path, change, message):
    _, directory = written
    document = json.loads((directory / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(document | change))
    (tmp_path / TENSORS).write_bytes((directory / TENSORS).read_bytes())
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path, MIXED)


def test_adapters_of_another_model_or_cut_files_are_refused(written, tmp_path):
    _, directory = written
    wider = dataclasses.replace(MIXED, moe_intermediate_size=16)
    with pytest.raises(ValueError, match="does not hold adapters of this model"):
        load_peft(directory, wider)
    (tmp_path / CONFIG).write_bytes((directory / CONFIG).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        load_peft(tmp_path, MIXED)
    content = (directory / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_peft(tmp_path, MIXED)


def digest_of_blocks(params, config, rows):
    digest = FilesDigest()
    for name, tensor in reversed(list(named_tensors(params, config))):
        for start in range(0, len(tensor), rows):
            digest.add(name, start, np.ascontiguousarray(tensor[start : start + rows]))
    return digest.result()


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_digest_is_of_the_weights_and_not_of_how_they_lie(dtype):
    config = small.CONFIG
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), small.random_params(config))
    digest = params_digest(params, config)
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2}, config)
    assert params_digest(jax.device_put(params, param_shardings(mesh, config)), config) == digest
    assert digest_of_blocks(params, config, 3) == digest == digest_of_blocks(params, config, 1000)


def test_a_digest_tells_one_changed_bit_and_two_changed_places():
    params = small.random_params(small.CONFIG)
    digest = params_digest(params, small.CONFIG)
    down = params["layers"]["moe"]["down"]
    kept = down.copy()
    down[1, 2, 3, 4] = np.nextafter(down[1, 2, 3, 4], np.float32(9))
    assert params_digest(params, small.CONFIG) != digest
    down[:] = kept
    down[1, 2, [3, 4]] = down[1, 2, [4, 3]]  # rows of one tensor
    assert params_digest(params, small.CONFIG) != digest
    down[:] = kept
    down[:, [0, 1]] = down[:, [1, 0]]  # experts
    assert params_digest(params, small.CONFIG) != digest
    down[:] = kept
    assert params_digest(params, small.CONFIG) == digest


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.parametrize("targets", ["attention", "q_proj,v_proj", "all"])
def test_peft_computes_the_logits_that_we_do(tmp_path, targets):
    missing = [name for name in ("torch", "transformers", "peft") if not has_module(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; see tests/requirements-live.txt")
    import peft
    import torch
    import transformers

    config = dataclasses.replace(small.CONFIG, vocab_size=64)
    lora = Lora(4, 8.0, find_targets(targets, config))
    base = small.random_params(config)
    save_hf(base, config, tmp_path / "base")
    adapters = draw_adapters(config, lora)
    save_peft(HostAdapters.of(adapters, config, lora), str(tmp_path / "base"), tmp_path / "lora")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    tokens_BT = np.random.RandomState(0).randint(0, 64, (2, 9))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens_BT)).logits.numpy()
    ours = logits_of(with_adapters(base, adapters, lora), config, tokens_BT)
    assert np.abs(ours - logits_of(base, config, tokens_BT)).max() > 0.01
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def logits_of(params, config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]), tokens_BT.shape)
    rows = (jnp.asarray(tokens_BT), positions_BT, np.ones_like(tokens_BT))
    out = Qwen3(config, scan=False).apply({"params": params}, *rows)
    return np.asarray(out.hidden_BTD @ head_kernel(params, config))
