"""Files are whole under their names, or not there."""

import os

import pytest

from rome.files import PARTIAL, find_shipped, write_atomically
from rome.model.tokenizer import Tokenizer
from rome.stages.config import load_config
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
    config = load_config(str(ROOT / "experiments/ipa.py"), "smoke")
    assert Tokenizer.load(config.tokenizer).vocab_size > 0
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "sft.py").write_text("mine = True")
    assert not find_shipped("experiments/sft.py").is_absolute()
