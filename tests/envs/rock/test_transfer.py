"""Downloads from a sandbox, an admin or a worker that lies about what it holds."""

import asyncio
import os

import pytest

from envs.rock import SandboxError
from envs.rock.config import FileEntry
from envs.rock.transfer import download
from envs.rock.wire.codec import entries_from_json

LEAVING = [
    "{victim}/absolute.sh",
    "../victim/up.sh",
    "a/../../victim/up.sh",
    "../victim",
    "..",
    "/",
    "a/..",
]
ODD = ["", ".", "./a", "a//b", "a/", "a\0b", "a/./b"]


class Liar:
    """A sandbox that lists what it is told to."""

    def __init__(self, entries: list[FileEntry]):
        self._entries = entries

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        return self._entries

    async def read_stream(self, path: str):
        yield b"#!/bin/sh\n"


def download_from(entries: list[FileEntry], tmp_path) -> None:
    asyncio.run(download(Liar(entries), "", tmp_path / "target", 1 << 20, "/workspace"))


def everything_in(directory) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("path", LEAVING + ODD)
def test_a_listed_path_never_leaves_the_target(path, kind, tmp_path):
    (tmp_path / "victim").mkdir()
    path = path.format(victim=tmp_path / "victim")
    entries = [FileEntry("a", "directory", 0, 0o755), FileEntry(path, kind, 10, 0o755)]
    with pytest.raises(SandboxError, match="listing"):
        download_from(entries, tmp_path)
    assert everything_in(tmp_path) <= {"victim", "target", "target/a"}


@pytest.mark.parametrize(
    "entries",
    [
        [("a/b", "file")],
        [("a", "file"), ("a/b", "file")],
        [("a", "link"), ("a/b", "directory")],
        [("a", "file"), ("a", "file")],
        [("a", "directory"), ("a", "directory")],
    ],
)
def test_a_listing_that_is_no_tree_is_an_error_of_the_sandbox(entries, tmp_path):
    listed = [FileEntry(path, kind, 1, 0o644) for path, kind in entries]
    with pytest.raises(SandboxError, match="listing"):
        download_from(listed, tmp_path)


def test_names_that_only_look_like_ways_out_are_kept(tmp_path):
    names = ["..a", "...", "a..", ".hidden", "sp ace", "~", "-rf", "C:", "back\\slash", "\udcff"]
    download_from([FileEntry(name, "file", 10, 0o644) for name in names], tmp_path)
    assert sorted(os.listdir(tmp_path / "target")) == sorted(names)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "..", "", "a\0b"])
def test_an_answer_that_lists_a_way_out_is_refused_before_anyone_uses_it(path):
    with pytest.raises(SandboxError, match="listing"):
        entries_from_json({"entries": [["a", "file", 1, 420], [path, "file", 1, 420]]})


@pytest.mark.parametrize("field", [[], ["a"], ["a", "file", -1, 420], ["a", "socket", 1, 420]])
def test_an_answer_with_a_malformed_entry_is_refused(field):
    with pytest.raises(SandboxError, match="list_files"):
        entries_from_json({"entries": [field]})
