"""The whole tool on small slices (slow: needs libtpu)."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.paths import ROOT

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)


CUDA_PLUGIN = ROOT / ".cache/cuda"


def run_compile(*flags: str, packages: Sequence[str] = ()) -> subprocess.CompletedProcess:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
    if packages:
        environment["PYTHONPATH"] = os.pathsep.join(packages)
    return subprocess.run(
        [sys.executable, "-m", "launch.compile", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(3000)
@needs_libtpu
def test_a_small_real_slice_compiles_and_reports(tmp_path):
    file = tmp_path / "found.json"
    done = run_compile(
        "--config=experiments/ipa.py:qwen3_30b_a3b",
        "--topology=v5p:2x2x1",
        "--layers=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.expert=2",
        "--config.rows_per_microbatch=4",
        "--config.row_length=1024",
        "--config.max_context=1024",
        "--config.max_new_tokens=512",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["fits"] and found["devices"] == 4 and found["layers"] == 1
    assert found["bytes_per_device"] == pytest.approx(sum(found["bytes"].values()), abs=8)
    assert found["flops"] >= found["model_flops"]  # recomputation on top
    assert not found["kernels_not_counted"]
    assert 0 < found["roofline_mfu_serial"] < found["roofline_mfu"] < 1
    # what the schedule hides lies between nothing and all, and so does the MFU of its order
    assert all(-1e-6 <= one["hidden_share"] <= 1 for one in found["overlap"])
    sent = sum(one["seconds"] for one in found["overlap"])
    assert sent == pytest.approx(found["seconds"]["collectives"], rel=0.05)
    assert 0 < found["roofline_mfu_scheduled"] <= found["roofline_mfu"]


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(3000)
@needs_libtpu
def test_an_exchange_of_experts_sends_twice_forward_and_three_times_backward(tmp_path):
    file = tmp_path / "found.json"
    done = run_compile(
        "--config=experiments/ipa.py:qwen3_30b_a3b",
        "--topology=v5p:2x2x1",
        "--layers=1",
        "--config.mesh.fsdp=1",
        "--config.mesh.expert=4",
        "--config.rows_per_microbatch=4",
        "--config.row_length=1024",
        "--config.max_context=1024",
        "--config.max_new_tokens=512",
        "--config.learner.exchange=all_to_all",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    sent = [one for one in found["collectives"] if one["kind"] == "ragged-all-to-all"]
    assert [one["axes"] for one in sent] == ["expert"] and sent[0]["runs"] == 5 * 2  # parts
    assert (
        sent[0]["bytes"] == 5 * 1024 * 8 * 2048 * 2 * 3 / 4
    )  # k rows of bfloat16 a token, but those that stay


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(3000)
@needs_libtpu
def test_an_engines_call_compiles_on_its_mesh_with_the_kernels_of_tpus(tmp_path):
    file = tmp_path / "found.json"
    done = run_compile(
        "--config=experiments/ipa.py:qwen3_30b_a3b",
        "--topology=v6e:2x4",
        "--layers=1",
        "--engine=expert=4,tensor=2",
        "--calls=64",
        "--config.engine.cache_tokens=65536",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["fits"] and found["kernels"] == ["ragged_paged", "megablox"]
    assert found["bytes_per_device"] == sum(found["bytes"].values())
    assert found["bytes"]["cache"] == 65536 * 2 * 4 * 128 * 2 / 2  # half of the key heads
    call = found["calls"]["64"]
    reduced = [one for one in call["collectives"] if one["kind"] == "all-reduce"]
    assert {one["axes"] for one in reduced} == {"tensor", "expert+tensor"}
    assert 0 < call["decoded_tokens_per_s"] < 1e6


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    not (CUDA_PLUGIN / "jax_plugins").is_dir(),
    reason="JAX's CUDA plugin is not in .cache/cuda; `make test-all` puts it there",
)
def test_an_engines_call_compiles_for_the_gpus_of_a_node(tmp_path):
    file = tmp_path / "found.json"
    done = run_compile(
        "--config=experiments/ipa.py:qwen3_30b_a3b",
        "--topology=h100:8",
        "--layers=1",
        "--engine=expert=4,tensor=2",
        "--calls=16",
        "--config.engine.cache_tokens=65536",
        f"--json={file}",
        packages=[str(CUDA_PLUGIN), *sys.path],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["fits"] and found["devices"] == 8 and found["kernels"][0] == "gather"
    assert found["bytes_per_device"] == sum(found["bytes"].values())
    call = found["calls"]["16"]
    assert {one["axes"] for one in call["collectives"]} == {"tensor", "expert+tensor"}
    assert 0 < call["decoded_tokens_per_s"] < 1e6


@pytest.mark.long
@pytest.mark.parametrize("topology", ["h100:8", "h100:many", "h100:0", "h100"])
def test_gpus_without_their_compiler_are_refused_with_what_to_install(topology):
    flags = [f"--topology={topology}", "--engine=expert=8"]
    done = run_compile("--config=experiments/ipa.py:qwen3_30b_a3b", *flags)
    assert done.returncode == 2 and not done.stdout
    assert "jax-cuda12-pjrt==" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_an_unknown_chip_is_refused_with_those_that_are_known():
    flags = ["--topology=h200:8", "--engine=expert=8"]
    done = run_compile("--config=experiments/ipa.py:qwen3_30b_a3b", *flags)
    assert done.returncode == 2 and "is of no known chip; choose one of v5e" in done.stderr


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(3000)
@needs_libtpu
def test_a_slice_that_is_too_small_fails_with_advice_and_figures(tmp_path):
    file = tmp_path / "found.json"
    done = run_compile(
        "--config=experiments/sft.py:qwen3_30b_a3b",
        "--topology=v5e:2x2",
        "--config.mesh.fsdp=4",
        "--config.mesh.expert=1",
        "--config.rows=4",
        "--config.rows_per_microbatch=4",
        f"--json={file}",
    )
    assert done.returncode == 1, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert not found["fits"] and found["bytes_per_device"] > 4 * 30.5e9 and found["advice"]
    assert "DOES NOT FIT" in done.stdout and "times the devices" in done.stdout


@pytest.mark.slow
@pytest.mark.device
@needs_libtpu
def test_a_mesh_that_is_not_the_slice_is_one_line():
    done = run_compile(
        "--config=experiments/ipa.py:qwen3_30b_a3b",
        "--topology=v5p:2x2x1",
        "--config.mesh.fsdp=2",
        "--config.mesh.expert=1",
    )
    assert done.returncode == 2 and "has 2 devices, v5p:2x2x1 has 4" in done.stderr


QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(3000)
@needs_libtpu
def test_adapters_of_a_dense_4b_train_on_a_chip_of_16_gb(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    file = tmp_path / "found.json"
    done = run_compile(
        "--config=experiments/sft.py",
        "--topology=v5e:1x1",
        f"--config.model={tmp_path}",
        "--config.lora.rank=16",
        "--config.learner.remat=full",
        "--config.row_length=4096",
        "--config.rows=1",
        "--config.rows_per_microbatch=1",
        f"--json={file}",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["fits"] and found["devices"] == 1 and found["usable_bytes"] < 16 * 2**30
    assert found["bytes"]["base"] == pytest.approx(2 * 4.02e9, rel=0.01)  # bfloat16, frozen
    assert found["bytes"]["optimizer"] == pytest.approx(2 * found["bytes"]["params"], rel=1e-3)
    assert found["bytes"]["optimizer"] < 0.4e9
