"""Files are whole under their names, or not there."""

import os

import pytest

from rome.files import PARTIAL, write_atomically


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
