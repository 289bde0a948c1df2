"""Files are whole under their names, or not there."""

import os
import re

import pytest

from rome.data.trajectory import load_trajectory
from rome.files import PARTIAL, find_shipped, read_json, write_atomically
from rome.model.hf.checkpoint import read_config
from rome.model.hf.files import CheckpointReader
from rome.model.tokenizer import Tokenizer
from rome.stages.config import load_config
from rome.train.metrics import read_metrics
from rome.train.report import read_outcomes, read_report
from tests.paths import ROOT


@pytest.mark.parametrize("fsync", [True, False])
def test_the_file_has_the_new_content_and_nothing_is_left_beside_it(tmp_path, fsync):
    path = tmp_path / "file.json"
    path.write_text("old")
    write_atomically(path, "nëw", fsync=fsync)
    assert path.read_bytes() == "nëw".encode()
    write_atomically(path, b"\x00\xff", fsync=fsync)
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file.json"]


def test_content_and_name_are_synced_before_it_returns(tmp_path, monkeypatch):
    synced = []

    def record(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", record)
    write_atomically(tmp_path / "file", "text")
    assert synced == [str(tmp_path / f"file{PARTIAL}"), str(tmp_path)]
    write_atomically(tmp_path / "file", "text", fsync=False)
    assert len(synced) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_shipped_files_are_found_from_any_folder_and_the_users_own_come_first(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert find_shipped("experiments/sft.py") == ROOT / "experiments/sft.py"
    assert find_shipped("no/such.py").parts == ("no", "such.py")
    assert load_config("experiments/sft.py", "smoke").preset == "smoke"
    assert Tokenizer.load("rome/model/tokenizer/tiny").vocab_size > 0
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "sft.py").write_text("mine = True")
    assert not find_shipped("experiments/sft.py").is_absolute()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"a": 1', "Expecting"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe\xff", "decode"),
    ],
    ids=range(6),
)
def test_an_error_of_json_names_the_file_and_the_remedy(tmp_path, content, reason):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is not JSON .*{reason}.*Write it again"):
        read_json(path, "Write it again.")
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert read_json(path, "") == {"a": "ä"}


DAMAGED = ["", "{", "[" * 100_000, "5", "null"]
READERS = {
    "trajectory.json": load_trajectory,
    "report.json": lambda path: read_report(path.parent),
    "evals/sft_000003.json": lambda path: read_outcomes(path.parents[1], "sft", 3),
    "config.json": lambda path: read_config(path.parent),
    "model.safetensors.index.json": lambda path: CheckpointReader(path.parent),
    "tokenizer.json": lambda path: Tokenizer.load(path.parent),
    "metrics.jsonl": lambda path: read_metrics(path.parent),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_every_reader_names_its_damaged_file(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content + "\n" * (name == "metrics.jsonl"))
    if name == "metrics.jsonl" and content in ("5", "null"):
        pytest.skip("a line that is JSON")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        READERS[name](path)
