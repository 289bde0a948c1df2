"""What the probe and the hashes of an engine can tell, and that they claim no more."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rome.engine import proof
from rome.engine.proof import Proof, changed_tensors, disagreement, fused_name, judge_probe
from rome.engine.weights import Weights
from rome.model.hf.checkpoint import save_hf
from tests.rome.serve.tiny import make_config, make_params

N = 256
CHANGE = np.random.default_rng(0)


def noise(scale):
    return CHANGE.normal(scale=scale, size=N)


def weights(expected, earlier, **fields):
    ids = list(range(N))
    made = Weights(pathlib.Path("w"), 2, ids, list(expected), 0.1, frozenset(["a"]), list(earlier))
    return dataclasses.replace(made, **fields)


def test_an_engine_that_kept_the_weights_is_told_where_rounding_is_smaller_than_the_step():
    before = noise(3.0)
    for step, rounding in ((1e-2, 1e-3), (1e-3, 1e-6), (0.05, 0.02)):
        now = before + noise(step)
        stale = before + noise(rounding)
        with pytest.raises(ValueError, match="nearer to the weights before"):
            judge_probe(weights(now, before), stale, None)
        error = judge_probe(weights(now, before), now + noise(rounding), None)
        assert 0.5 * rounding < error < rounding


def test_chance_condemns_no_engine_where_rounding_is_larger_than_the_step():
    """Engine and trainer round, each version otherwise: which is nearer says nothing then."""
    for _ in range(300):
        exact = noise(3.0)
        before, now = exact + noise(0.02), exact + noise(1e-3) + noise(0.02)
        judge_probe(weights(now, before), exact + noise(0.02), None)


def test_the_same_bits_as_with_other_weights_are_told_whatever_the_rounding():
    before, now, actual = noise(3.0), noise(3.0), noise(3.0)
    now = before + 1e-3
    actual = before + noise(0.02)
    earlier = Proof(1, 0.0, list(actual), None, "0.5.9")
    with pytest.raises(ValueError, match="to the last bit those that it gave with weights 1"):
        judge_probe(weights(now, before), list(actual), earlier)
    judge_probe(weights(now, before), list(actual + 1e-6), earlier)
    again = dataclasses.replace(earlier, version=2)
    judge_probe(weights(now, before), list(actual), again)
    judge_probe(weights(now, before, changed=frozenset()), list(actual), earlier)
    judge_probe(weights(before, before), list(actual), earlier)  # a step that changed nothing here


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 40.0])
def test_one_absurd_logprob_is_enough(wrong):
    now = noise(3.0)
    actual = now.copy()
    actual[7] = wrong
    with pytest.raises(ValueError, match="probe logprobs differ from the trainer's by"):
        judge_probe(weights(now, now), actual, None)


def test_names_of_a_checkpoint_are_those_of_sglangs_fused_tensors():
    layer = "model.layers.3."
    assert {
        name: fused_name(layer + name).removeprefix(layer)
        for name in (
            "self_attn.q_proj.weight",
            "self_attn.v_proj.bias",
            "self_attn.o_proj.weight",
            "self_attn.q_norm.weight",
            "mlp.gate.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "mlp.experts.12.gate_proj.weight",
            "mlp.experts.12.down_proj.weight",
        )
    } == {
        "self_attn.q_proj.weight": "self_attn.qkv_proj.weight",
        "self_attn.v_proj.bias": "self_attn.qkv_proj.bias",
        "self_attn.o_proj.weight": "self_attn.o_proj.weight",
        "self_attn.q_norm.weight": "self_attn.q_norm.weight",
        "mlp.gate.weight": "mlp.gate.weight",
        "mlp.up_proj.weight": "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight": "mlp.down_proj.weight",
        "mlp.experts.12.gate_proj.weight": "mlp.experts.w13_weight",
        "mlp.experts.12.down_proj.weight": "mlp.experts.w2_weight",
    }


def test_engines_are_compared_only_where_they_must_agree():
    ours = Proof(5, 0.0, [], [{"a": "1", "b": "2"}, {"a": "3"}], "0.5.23")

    def differing(**fields):
        return disagreement(ours, dataclasses.replace(ours, **fields))

    assert differing() == ""
    assert differing(checksums=[{"a": "1", "b": "9"}, {"a": "4"}]) == "a, b"
    other = [{"a": "9", "b": "9"}, {"a": "9"}]
    assert differing(checksums=other, version=4) == ""
    assert differing(checksums=other, server="0.5.15") == ""
    assert differing(checksums=other[:1]) == ""  # another number of GPUs
    assert differing(checksums=None) == ""


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_tensors_that_a_step_changed_are_found_by_their_bytes(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(proof, "FIRST_BLOCK_BYTES", 256)  # several blocks a tensor
    params = jax.tree.map(np.copy, make_params(0))
    save_hf(params, make_config(), tmp_path / "a", dtype=dtype)
    save_hf(params, make_config(), tmp_path / "same", dtype=dtype)
    params["embed"]["embedding"][-1, -1] *= 1.01
    params["layers"]["moe"]["down"][1, 2, 0, 0] *= 1.01
    params["norm"]["scale"][:] *= 1 + 1e-5  # less than bfloat16 can tell from 1
    save_hf(params, make_config(), tmp_path / "b", dtype=dtype, max_shard_bytes=100_000)
    assert changed_tensors(tmp_path / "a", tmp_path / "same") == frozenset()
    wanted = {"model.embed_tokens.weight", "model.layers.1.mlp.experts.2.down_proj.weight"}
    if dtype == jnp.float32:
        wanted.add("model.norm.weight")
    assert changed_tensors(tmp_path / "a", tmp_path / "b") == wanted


def test_a_tensor_without_rows_and_one_that_is_new_are_compared_too(tmp_path):
    scalar, other = (np.array(value, ml_dtypes.bfloat16) for value in (1.0, 2.0))
    for name, tensors in {
        "a": {"s": scalar, "empty": np.zeros((0, 3), np.float32), "shape": np.zeros((2, 3))},
        "b": {"s": other, "empty": np.zeros((0, 3), np.float32), "shape": np.zeros(6)},
    }.items():
        (tmp_path / name).mkdir()
        if name == "b":
            tensors["new"] = scalar
        safetensors.numpy.save_file(tensors, tmp_path / name / "model.safetensors")
    assert changed_tensors(tmp_path / "a", tmp_path / "b") == {"s", "shape", "new"}
