"""Downloads from a sandbox, an admin or a worker that lies about what it holds."""

import asyncio
import io
import os
import tarfile

import pytest

from envs.rock import SandboxError
from envs.rock.transfer import download
from envs.rock.wire.codec import entries_from_json

LEAVING = [
    "{victim}/absolute.sh",
    "../victim/up.sh",
    "a/../../victim/up.sh",
    "../victim",
    "..",
    "a/..",
]


class Liar:
    """A sandbox that sends what it is told to."""

    def __init__(self, members: list[tuple[str, bytes]]):
        self._members = members

    async def pack(self, path: str = "."):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as tar:
            for name, kind in self._members:
                member = tarfile.TarInfo("")
                member.name = name
                member.type = kind
                member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else "a"
                member.mode = 0o6777
                member.mtime = 1234
                content = b"#!/bin/sh\n" if kind == tarfile.REGTYPE else b""
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        yield buffer.getvalue()


def download_from(members: list[tuple[str, bytes]], tmp_path, limit: int = 1 << 20):
    return asyncio.run(download(Liar(members), "", tmp_path / "target", limit, "/workspace"))


def everything_in(directory) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


KINDS = [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", LEAVING)
def test_a_member_never_leaves_the_target(path, kind, tmp_path):
    (tmp_path / "victim").mkdir()
    path = path.format(victim=tmp_path / "victim")
    with pytest.raises(SandboxError, match="leaves its directory"):
        download_from([("a", tarfile.DIRTYPE), (path, kind)], tmp_path)
    assert everything_in(tmp_path) <= {"victim", "target", "target/a"}


@pytest.mark.parametrize(
    "members",
    [
        [("a", "f"), ("a/b", "f")],
        [("a", "f"), ("a", "f")],
        [("a", "d"), ("a", "d")],
        [("a", "d"), ("a", "f")],
        [("a", "f"), ("a", "d")],
    ],
)
def test_what_is_no_tree_is_an_error_of_the_sandbox(members, tmp_path):
    kinds = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE}
    with pytest.raises(SandboxError, match="twice, or below"):
        download_from([(path, kinds[kind]) for path, kind in members], tmp_path)


def test_links_and_special_files_are_named_and_modes_are_plain(tmp_path):
    members = [
        ("l", tarfile.SYMTYPE),
        ("l/passwd", tarfile.REGTYPE),
        ("a", tarfile.REGTYPE),
        ("again", tarfile.LNKTYPE),
        ("to a link", tarfile.LNKTYPE),
        ("fifo", tarfile.FIFOTYPE),
        ("device", tarfile.CHRTYPE),
    ]
    moved = download_from(members, tmp_path)
    assert moved.skipped == ("l", "fifo", "device") and moved.files == 4
    target = tmp_path / "target"
    assert everything_in(target) == {"a", "again", "to a link", "l", "l/passwd"}
    assert (target / "a").stat().st_mode & 0o7777 == 0o755
    assert (target / "a").stat().st_mtime == 1234
    assert (target / "again").stat().st_nlink == 3 and not (target / "l").is_symlink()


def test_names_that_only_look_like_ways_out_are_kept(tmp_path):
    names = ["..a", "...", "a..", ".hidden", "sp ace", "~", "-rf", "C:", "back\\slash", "\udcff"]
    download_from([(name, tarfile.REGTYPE) for name in names], tmp_path)
    assert sorted(os.listdir(tmp_path / "target")) == sorted(names)


def test_what_is_no_archive_is_an_error_of_the_sandbox(tmp_path):
    class Nonsense(Liar):
        async def pack(self, path: str = "."):
            yield b"nonsense" * 100

    with pytest.raises(SandboxError, match="not its files"):
        asyncio.run(download(Nonsense([]), "", tmp_path / "target", 1 << 20, "/workspace"))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "..", "", "a\0b"])
def test_an_answer_that_lists_a_way_out_is_refused_before_anyone_uses_it(path):
    with pytest.raises(SandboxError, match="listing"):
        entries_from_json({"entries": [["a", "file", 1, 420], [path, "file", 1, 420]]})


@pytest.mark.parametrize("field", [[], ["a"], ["a", "file", -1, 420], ["a", "socket", 1, 420]])
def test_an_answer_with_a_malformed_entry_is_refused(field):
    with pytest.raises(SandboxError, match="list_files"):
        entries_from_json({"entries": [field]})
