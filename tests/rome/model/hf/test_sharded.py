"""Checkpoints from and to arrays on meshes: what each device reads, what the host holds, what
several processes do.
"""

import dataclasses
import json
import math
import os
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
from jax.sharding import NamedSharding, PartitionSpec

from rome.model.hf import files
from rome.model.hf.checkpoint import load_hf, named_tensors, save_hf
from rome.model.hf.files import CheckpointReader
from rome.model.hf.names import expected_tensors, parameter_shapes
from rome.model.params import param_shardings
from rome.model.sharding import make_mesh
from rome.model.stacking import unstack_layers
from tests.paths import ROOT
from tests.rome.model import small
from tests.rome.model.small import assert_trees_equal

SMALL = small.CONFIG
MESHED = dataclasses.replace(SMALL, vocab_size=48)
MESHED_MIXED = dataclasses.replace(small.MIXED, vocab_size=48)
MESHES = [
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"replica": 2, "fsdp": 4},
    {"expert": 4, "tensor": 2},
]
ODD_BITS = {
    "float32": [0x80000000, 1, 0x7F800000, 0x7FC00001, 0x7F800001, 0xFFABCDEF],
    "bfloat16": [0x8000, 1, 0x7F80, 0x7FC1, 0x7F81, 0xFFAB],
}  # -0.0, denormal, inf, NaNs


@pytest.fixture(scope="module")
def params():
    return small.random_params(SMALL)


@pytest.mark.long
@pytest.mark.parametrize(
    "config, mesh_shape, dtype",
    [
        pytest.param(MESHED, MESHES[0], "float32", marks=pytest.mark.slow),
        (MESHED_MIXED, MESHES[0], "bfloat16"),
        pytest.param(MESHED, MESHES[1], "bfloat16", marks=pytest.mark.slow),
        (MESHED, MESHES[2], "float32"),
    ],
    ids=["split_three_ways", "two_kinds_of_layers", "copies", "experts"],
)
def test_arrays_on_any_mesh_are_written_and_read_bitwise(
    config, mesh_shape, dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        files, "BLOCK_BYTES", 128
    )  # so that parameters are put together on the devices, tensors cut into several blocks
    params = jax.tree.map(lambda w: w.astype(dtype), small.random_params(config))
    for leaf in jax.tree.leaves(params):
        bits = leaf.reshape(-1).view(f"u{leaf.dtype.itemsize}")
        bits[:6] = ODD_BITS[dtype][: len(bits)]
    shardings = param_shardings(make_mesh(mesh_shape, config), config)
    save_hf(params, config, tmp_path / "host", dtype=dtype, max_shard_bytes=8_000)
    save_hf(
        jax.device_put(params, shardings),
        config,
        tmp_path / "mesh",
        dtype=dtype,
        max_shard_bytes=8_000,
    )
    for file in (tmp_path / "host").iterdir():
        assert file.read_bytes() == (tmp_path / "mesh" / file.name).read_bytes()
    loaded, _ = load_hf(tmp_path / "mesh", dtype, shardings)

    def bits(tree):
        return jax.tree.map(lambda w: np.asarray(w).view(f"u{w.dtype.itemsize}"), tree)

    assert_trees_equal(bits(loaded), bits(params))
    jax.tree.map(
        lambda array, sharding: (
            pytest.fail(f"{array.sharding}") if array.sharding != sharding else None
        ),
        loaded,
        shardings,
    )
    for leaf in jax.tree.leaves(loaded):  # every copy, not only the one that NumPy looks at
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(
                np.asarray(shard.data).view(f"u{leaf.dtype.itemsize}"),
                np.asarray(leaf)[shard.index].view(f"u{leaf.dtype.itemsize}"),
            )


def test_widened_and_narrowed_weights_are_the_same_on_devices_as_on_the_host(params, tmp_path):
    shardings = param_shardings(make_mesh({"fsdp": 2}, SMALL), SMALL)
    for stored, wanted in (("float32", "bfloat16"), ("bfloat16", "float32")):
        save_hf(params, SMALL, tmp_path, dtype=stored)
        assert_trees_equal(
            jax.device_get(load_hf(tmp_path, wanted, shardings)[0]), load_hf(tmp_path, wanted)[0]
        )


def test_unstacked_layers_on_a_device_are_written_as_the_stack_is(tmp_path):
    params = small.random_params(small.MIXED)
    save_hf(params, small.MIXED, tmp_path / "stacked")
    save_hf(
        jax.device_put(unstack_layers(params, small.MIXED), jax.devices()[1]),
        small.MIXED,
        tmp_path / "unstacked",
    )
    assert (tmp_path / "stacked" / "model.safetensors").read_bytes() == (
        tmp_path / "unstacked" / "model.safetensors"
    ).read_bytes()
    name = "model.layers.2.mlp.down_proj.weight"
    (found,) = named_tensors(unstack_layers(params, small.MIXED), small.MIXED, only=name)
    assert found[0] == name
    np.testing.assert_array_equal(found[1], params["layers"]["mlp"]["down"][1].T)


def test_float16_checkpoints_are_read(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    half = {
        name: tensor.astype(np.float16)
        for name, tensor in safetensors.numpy.load_file(tmp_path / "model.safetensors").items()
    }
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    assert_trees_equal(
        load_hf(tmp_path)[0],
        jax.tree.map(lambda w: w.astype(np.float16).astype(np.float32), params),
    )


def test_shardings_that_do_not_fit_are_refused(params, tmp_path):
    save_hf(params, SMALL, tmp_path)
    shardings = param_shardings(make_mesh({"tensor": 2}, SMALL), SMALL)
    with pytest.raises(ValueError, match="shardings are not those of this checkpoint"):
        load_hf(tmp_path, shardings=shardings["layers"])
    mesh = shardings["norm"]["scale"].mesh
    shardings["layers"]["attention"]["q"] = NamedSharding(
        mesh, PartitionSpec(None, None, None, "tensor")
    )
    with pytest.raises(ValueError, match=r"layers/attention/q .* only the first may be split"):
        load_hf(tmp_path, shardings=shardings)


# -- what is read, what is held
# -------------------------------------------------------------------------------------------------


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


@pytest.mark.long
@pytest.mark.parametrize("mesh_shape", [{}, {"replica": 4, "fsdp": 2}], ids=str)
def test_every_byte_is_read_once_however_many_devices_hold_it(
    mesh_shape, reads, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "BLOCK_BYTES", 256)
    save_hf(small.random_params(MESHED), MESHED, tmp_path, dtype="bfloat16")
    total, told = sum(map(math.prod, expected_tensors(MESHED).values())) * 2, []
    load_hf(
        tmp_path,
        shardings=param_shardings(make_mesh(mesh_shape, MESHED), MESHED),
        progress=lambda done, total: told.append((done, total)),
    )
    assert sum(size for *_, size in reads) == total and max(size for *_, size in reads) <= 256
    assert len(
        {(name, row) for name, start, stop, _ in reads for row in range(start, stop)}
    ) == sum(shape[0] for shape in expected_tensors(MESHED).values())
    assert told == sorted(told) and told[-1] == (total, total) and len(told) == len(reads)


def test_a_process_reads_only_the_experts_and_rows_that_its_devices_hold(
    reads, tmp_path, monkeypatch
):
    """A sharding whose other half belongs to another process: what it asks of the files, until the
    arrays would be put together.
    """
    save_hf(small.random_params(MESHED), MESHED, tmp_path)
    mesh = make_mesh({"expert": 2, "tensor": 2}, MESHED)
    mine = mesh.devices.reshape(-1)[
        3
    ]  # second half of the experts, second half of heads, hidden units and vocabulary

    def partial(sharding):
        whole = sharding.addressable_devices_indices_map
        return types.SimpleNamespace(
            addressable_devices_indices_map=lambda shape: {mine: whole(shape)[mine]}
        )

    class Done(Exception):
        pass

    def stop(*_):
        raise Done

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", stop)
    with pytest.raises(Done):
        load_hf(tmp_path, shardings=jax.tree.map(partial, param_shardings(mesh, MESHED)))
    read = {name: (start, stop) for name, start, stop, _ in reads}
    assert {name for name in read if ".experts." in name} == {
        name for name in expected_tensors(MESHED) if ".experts.2." in name or ".experts.3." in name
    }
    assert read["model.layers.1.mlp.experts.2.up_proj.weight"] == (4, 8) and read[
        "model.layers.1.mlp.experts.2.down_proj.weight"
    ] == (0, 16)
    assert (
        read["model.layers.0.self_attn.q_proj.weight"] == (8, 16)
        and read["lm_head.weight"] == (24, 48)
        and read["model.norm.weight"] == (0, 16)
    )


@pytest.mark.slow
def test_two_processes_read_their_halves_and_write_their_shards(tmp_path):
    params = small.random_params(MESHED)
    save_hf(params, MESHED, tmp_path / "source", max_shard_bytes=8_000)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(port), str(number), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=800)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:] + said[1][-3000:]
    figures = [json.loads(text.splitlines()[-1]) for text in said]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert all(total / 2 <= figure["read"] < 0.6 * total for figure in figures), (
        figures
    )  # norms, and two key heads that four do not divide, are read twice
    assert (
        all(0 < figure["written"] < total for figure in figures)
        and sum(figure["written"] for figure in figures) == total
    )
    for file in (tmp_path / "source").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


TWO_PROCESSES = """
import json, pathlib, sys
import jax, numpy as np
port, number, directory = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
from rome.model.hf import files
from rome.model.hf.checkpoint import load_hf, read_config, save_hf
from rome.model.params import param_shardings
from rome.model.sharding import make_mesh
files.BLOCK_BYTES = 300
config = read_config(directory / "source")
whole, _ = load_hf(directory / "source")
totals = {}
watch = lambda name: lambda done, total: totals.update({name: done})
mesh = make_mesh({"expert": 2, "fsdp": 2, "tensor": 2}, config)
shardings = param_shardings(mesh, config)
params, _ = load_hf(directory / "source", shardings=shardings, progress=watch("read"))
for array, expected in zip(jax.tree.leaves(params), jax.tree.leaves(whole)):
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[shard.index])
save_hf(params, config, directory / "out", max_shard_bytes=8_000, progress=watch("written"))
print(json.dumps(totals))
"""

LARGER = dataclasses.replace(
    SMALL, hidden_size=128, num_layers=2, num_experts=16, moe_intermediate_size=512, vocab_size=4096
)  # 18 million parameters


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


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh_shape", [pytest.param({}, marks=pytest.mark.slow), {"expert": 2}], ids=str
)
def test_host_memory_holds_blocks_and_neither_parameters_nor_shards(
    mesh_shape, larger, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "BLOCK_BYTES", 2**17)
    shardings = param_shardings(make_mesh(mesh_shape, LARGER), LARGER)
    bound = (
        4 * files.THREADS * 2**17 + 2 * 10**6
    )  # blocks as read, as turned and as cut; names and plans
    assert 4 * math.prod(parameter_shapes(LARGER)["layers"]["moe"]["gate"].shape) > 1.2 * bound
    load_peak, (params, _) = traced_peak(lambda: load_hf(larger, shardings=shardings))
    save_peak, _ = traced_peak(lambda: save_hf(params, LARGER, tmp_path / "out", dtype="bfloat16"))
    assert load_peak < bound and save_peak < bound


RESIDENT = """
import json, resource, sys
import jax, numpy as np
from rome.model.hf.checkpoint import load_hf, read_config, save_hf
from rome.model.params import param_shardings
from rome.model.sharding import make_mesh
source, out, shape = sys.argv[1:]
config = read_config(source)
shardings = param_shardings(make_mesh(json.loads(shape), config), config)
def now():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
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
    """On CPU devices the arrays themselves are host memory: what is bounded is what comes on top,
    the compiler's own share included.
    """
    config = dataclasses.replace(
        SMALL,
        hidden_size=1024,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        num_layers=4,
        num_experts=16,
        moe_intermediate_size=2048,
        vocab_size=32_000,
        experts_per_token=2,
    )
    save_hf(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.bfloat16), parameter_shapes(config)),
        config,
        tmp_path / "source",
        dtype="bfloat16",
        max_shard_bytes=3 * 10**8,
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            RESIDENT,
            str(tmp_path / "source"),
            str(tmp_path / "out"),
            json.dumps(mesh_shape),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (
        figures["size"] > 9 * 10**8 and figures["extra"] < 3 * 10**8 + 2 * 32_000 * 1024 + 10**8
    ), figures
