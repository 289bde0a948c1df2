"""The whole tool on small slices (slow: needs libtpu), and what it keeps."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch.compile import load_programs, save_programs
from rome.losses import LOSSES, LossConfig
from rome.model.sharding import batch_sharding, make_mesh
from rome.train.state import init_state, make_optimizer
from rome.train.step import Learner
from tests.rome.train.test_step import MODEL, packed

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'")


def run_compile(*flags: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    return subprocess.run([sys.executable, "-m", "launch.compile", *flags], capture_output=True, text=True, env=environment)


def test_saved_programs_load_and_compute_the_same(tmp_path):
    optimizer = make_optimizer(learning_rate=1e-2, warmup_updates=0, decay_updates=0, weight_decay=0.0, clip=1.0)
    learner = Learner(MODEL, LOSSES["sft"], LossConfig(), optimizer, make_mesh({"fsdp": 8}, MODEL))
    batch = packed(8, "sft")[0]
    save_programs(tmp_path, {"score": learner.lower(batch)["score"].compile()}, "cpu:8")
    params = learner.place(init_state(MODEL, optimizer, seed=0)).params
    inputs = jax.device_put((batch.tokens_BT, batch.positions_BT, batch.segments_BT), batch_sharding(learner.mesh))
    loaded = load_programs(tmp_path)
    assert "load_programs" in (tmp_path / "README.txt").read_text()
    np.testing.assert_array_equal(np.asarray(loaded["score"](params, *inputs, batch.routes_BTLk)), learner.score(params, [batch])[0])


def test_a_directory_without_executables_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no executables"):
        load_programs(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_libtpu
def test_a_small_real_slice_compiles_and_reports(tmp_path):
    file, kept = tmp_path / "found.json", tmp_path / "programs"
    done = run_compile("--config=experiments/ipa.py:qwen3_30b_a3b", "--topology=v5p:2x2x1", "--layers=1", "--config.mesh.fsdp=2", "--config.mesh.expert=2",
                       "--config.rows_per_microbatch=4", "--config.row_length=1024", "--config.max_context=1024", "--config.max_new_tokens=512",
                       f"--json={file}", f"--save={kept}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert found["fits"] and found["devices"] == 4 and found["layers"] == 1
    assert found["bytes_per_device"] == pytest.approx(sum(found["bytes"].values()), abs=8)
    assert found["flops"] >= found["model_flops"] and not found["kernels_not_counted"]  # recomputation on top
    assert 0 < found["roofline_mfu_serial"] < found["roofline_mfu"] < 1
    assert {path.name for path in kept.iterdir()} == {"README.txt", "score.pickle", "accumulate.pickle", "apply.pickle"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@needs_libtpu
def test_a_slice_that_is_too_small_fails_with_advice_and_figures(tmp_path):
    file = tmp_path / "found.json"
    done = run_compile("--config=experiments/sft.py:qwen3_30b_a3b", "--topology=v5e:2x2", "--config.mesh.fsdp=4", "--config.mesh.expert=1",
                       "--config.rows=4", "--config.rows_per_microbatch=4", f"--json={file}")
    assert done.returncode == 1, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert not found["fits"] and found["bytes_per_device"] > 4 * 30.5e9 and found["advice"]
    assert "DOES NOT FIT" in done.stdout and "times the devices" in done.stdout


@pytest.mark.slow
@needs_libtpu
def test_a_mesh_that_is_not_the_slice_is_one_line():
    done = run_compile("--config=experiments/ipa.py:qwen3_30b_a3b", "--topology=v5p:2x2x1", "--config.mesh.fsdp=2", "--config.mesh.expert=1")
    assert done.returncode == 2 and "has 2 devices, v5p:2x2x1 has 4" in done.stderr
