"""Weights read parameter by parameter: the same bits as any other way, on one device or a mesh."""

import shutil

import jax
import numpy as np
import pytest

from rome.model.hf import files
from rome.model.hf.checkpoint import load_hf, save_hf
from rome.model.hf.leaves import LeafReader, leaves
from rome.model.params import PARAM_AXES, engine_mesh_of
from rome.model.sharding import make_engine_mesh
from rome.model.stacking import unstack_layers
from tests.rome.model.small import CONFIG, DENSE, MIXED, random_params

MODELS = {"experts": CONFIG, "dense": DENSE, "mixed": MIXED}


@pytest.fixture(params=MODELS, scope="module")
def checkpoint(request, tmp_path_factory):
    config = MODELS[request.param]
    directory = tmp_path_factory.mktemp("model") / request.param
    save_hf(random_params(config), config, directory)
    return directory


def assert_same(params, directory, dtype):
    stacked, config = load_hf(directory, dtype=np.dtype(dtype))
    expected = unstack_layers(stacked, config)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "expert, tensor", [(1, 1), pytest.param(1, 2, marks=pytest.mark.slow), (2, 2)]
)
def test_every_bit_is_that_of_a_load_in_one_piece(checkpoint, expert, tensor, dtype, monkeypatch):
    if "experts" not in str(checkpoint) and expert > 1:
        return  # nothing to share
    monkeypatch.setattr(files, "BLOCK_BYTES", 600)  # several blocks a tensor, also on devices
    with LeafReader(checkpoint, dtype) as reader:
        mesh = make_engine_mesh(expert, tensor, reader.config)
        params = reader.read_all(mesh or jax.devices()[0])
    assert engine_mesh_of(params) is mesh
    assert_same(params, checkpoint, dtype)


@pytest.mark.long
def test_a_mesh_holds_each_expert_head_and_hidden_unit_once(checkpoint):
    with LeafReader(checkpoint, "float32") as reader:
        config = reader.config
        expert = 1 if config.mlp_layers else 2
        params = reader.read_all(make_engine_mesh(expert, 2, config))
    for leaf in leaves(config):
        array = leaf.in_tree(params)[leaf.path[-1]]
        copies = len(array.sharding.device_set) * np.prod(array.sharding.shard_shape(leaf.shape))
        parts = {"experts": expert, "vocab": 2 * expert, None: 1}
        shares = [parts.get(name, 2) for name in PARAM_AXES[leaf.name] if "embed" not in str(name)]
        assert copies == 2 * expert * np.prod(leaf.shape) / np.prod(shares), leaf.name


class Ledger:
    """What lies on the devices while weights are replaced."""

    def __init__(self, monkeypatch, old):
        self.old = jax.tree.leaves(old)
        self.most = 0
        self.new = []
        read = LeafReader._read

        def counted(reader, leaf, place):
            array = read(reader, leaf, place)
            self.new.append(array)
            self.most = max(self.most, self.bytes())
            return array

        monkeypatch.setattr(LeafReader, "_read", counted)

    def bytes(self):
        arrays = [one for one in (*self.old, *self.new) if not one.is_deleted()]
        return sum(one.nbytes for one in arrays)


@pytest.mark.long
def test_old_weights_make_room_one_by_one(checkpoint, monkeypatch):
    device = jax.devices()[0]
    with LeafReader(checkpoint, "float32") as reader:
        old = reader.read_all(device)
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(old))
        ledger = Ledger(monkeypatch, old)
        new = reader.read_all(device, old)
    assert ledger.most == total  # never one array more
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert_same(new, checkpoint, "float32")


@pytest.mark.parametrize("fault", ["cut off", "not finite"])
def test_a_failure_midway_leaves_nothing_of_the_old_weights(tmp_path, fault):
    params = random_params(CONFIG)
    save_hf(params, CONFIG, tmp_path / "good")
    with LeafReader(tmp_path / "good", "float32") as reader:
        old = reader.read_all(jax.devices()[0])
    if fault == "not finite":
        params["layers"]["attention"]["q"][1, 3, 1, 2] = np.inf
    save_hf(params, CONFIG, tmp_path / "bad")
    with LeafReader(tmp_path / "bad", "float32") as reader:
        if fault == "cut off":
            file = tmp_path / "bad" / files.SINGLE
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size // 2)
        with pytest.raises(ValueError, match=fault):
            reader.read_all(jax.devices()[0], old)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_a_directory_that_vanishes_while_it_is_read_is_read_to_its_end(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    with LeafReader(copy, "float32") as reader:
        shutil.rmtree(copy)
        assert_same(reader.read_all(jax.devices()[0]), checkpoint, "float32")


def test_every_parameter_and_every_tensor_is_there_once():
    for config in MODELS.values():
        found = leaves(config)
        names = [tensor.name for leaf in found for tensor in leaf.tensors]
        assert len(set(names)) == len(names)
        places = {(leaf.path, leaf.layer) for leaf in found}
        assert len(places) == len(found)
