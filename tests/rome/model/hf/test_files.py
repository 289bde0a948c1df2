"""Checkpoint files that were cut off, forged or half written: found out in one line, and never
taken for a checkpoint.
"""

import json
import types

import jax
import pytest

from rome.model.hf import files
from rome.model.hf.checkpoint import load_hf, save_hf
from rome.model.hf.writer import CheckpointWriter
from tests.rome.model import small
from tests.rome.model.small import assert_trees_equal

SMALL = small.CONFIG


@pytest.fixture(scope="module")
def params():
    return small.random_params(SMALL)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 8_000], ids=["one_file", "shards"])
@pytest.mark.parametrize("calls", [0, 20])
def test_a_writer_that_dies_leaves_nothing_that_passes_for_a_checkpoint(
    params, max_shard_bytes, calls, tmp_path, monkeypatch
):
    save_hf(params, SMALL, tmp_path, max_shard_bytes=max_shard_bytes)
    write, left = CheckpointWriter.write, iter(range(calls))

    def dies(self, *arguments):
        if next(left, None) is None:
            raise OSError("the disk is gone")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", dies)
        with pytest.raises(OSError, match="the disk is gone"):
            save_hf(
                jax.tree.map(lambda w: w + 1, params),
                SMALL,
                tmp_path,
                max_shard_bytes=max_shard_bytes,
            )
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
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


def test_a_full_disk_is_found_out_before_the_old_checkpoint_is_touched(
    params, tmp_path, monkeypatch
):
    save_hf(params, SMALL, tmp_path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(
        files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=size // 4)
    )
    with pytest.raises(OSError, match=r"GB free, and the checkpoint takes .* make room") as error:
        save_hf(params, SMALL, tmp_path / "new")
    assert "\n" not in str(error.value)
    save_hf(params, SMALL, tmp_path)  # the old one makes room for the new one
    assert_trees_equal(load_hf(tmp_path)[0], params)


def broken_header(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda header: (
                header | {"model.norm.weight": header["model.norm.weight"] | {"dtype": "F8_E4M3"}}
            ),
            "model.norm.weight is F8_E4M3",
        ),
        (
            lambda header: (
                header
                | {"model.norm.weight": header["model.norm.weight"] | {"data_offsets": [0, 8]}}
            ),
            "not a whole safetensors file",
        ),
        (lambda header: header | {"model.norm.weight": {}}, "not a whole safetensors file"),
        (lambda header: [], "not a whole safetensors file"),
    ],
)
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
    with pytest.raises(
        ValueError, match=r"says that model-00001-of-.* holds model.norm.weight, but it does not"
    ):
        load_hf(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_hf(tmp_path)


def test_a_single_file_beside_another_checkpoints_index_is_never_a_silent_choice(params, tmp_path):
    base = tmp_path / "base"
    save_hf(params, SMALL, base, max_shard_bytes=8_000)
    tuned = jax.tree.map(lambda leaf: leaf + 1, params)
    save_hf(tuned, SMALL, tmp_path / "tuned")
    (base / "model.safetensors").write_bytes((tmp_path / "tuned/model.safetensors").read_bytes())
    shards = sorted(base.glob("model-*.safetensors"))
    with pytest.raises(ValueError, match=rf"two checkpoints: .*{shards[0].name}.*delete the one"):
        load_hf(base)
    for shard in shards:  # what a writer that leaves the index behind has
        shard.unlink()
    assert_trees_equal(load_hf(base)[0], tuned)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))  # an index of one file
    assert_trees_equal(load_hf(base)[0], tuned)
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is named by the index"):
        load_hf(base)
