"""A repository as of one commit, without anything later, made from any local git repository.

The result is a new repository: one branch, one pack of the objects that the commit reaches, and no
remote, tag, reflog, hook, alternate or config of the source. If the pack is larger than a sandbox
can hold, only the commit itself is kept, as in git's shallow clones.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import os
import pathlib
import re
import stat
import tarfile
import tempfile

from envs.tasks.git import RepositoryError, content_of, git

MAX_HISTORY_BYTES = 48 << 20  # pack of all history; a larger one is cut to the one commit
MAX_TREE_BYTES = 160 << 20  # working tree and pack together
_HUNK = re.compile(r"^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A repository as of one commit.

    `archive` is a compressed tar of the working tree and its .git, without an index (`git read-tree
    HEAD` makes one).
    """

    archive: bytes = dataclasses.field(repr=False)
    commits: int
    shallow: bool


@functools.lru_cache(maxsize=4)  # attempts at one task follow each other
def cut(source: pathlib.Path, commit: str) -> Cut:
    """Return the repository at `source` as of a commit. Raises RepositoryError."""
    if git(source, "cat-file", "-t", commit).strip() != b"commit":
        raise RepositoryError(f"{commit} in {source} is not a commit")
    with tempfile.TemporaryDirectory(prefix="swebench-") as folder:
        target = pathlib.Path(folder, "repository")
        target.mkdir()
        format_ = "sha256" if len(commit) == 64 else "sha1"
        git(
            target,
            "init",
            "-q",
            "--template=",
            "--initial-branch=main",
            f"--object-format={format_}",
        )
        pack = git(source, "pack-objects", "--revs", "--stdout", "-q", stdin=f"{commit}\n".encode())
        source_is_shallow = git(source, "rev-parse", "--is-shallow-repository").strip() == b"true"
        shallow = len(pack) > MAX_HISTORY_BYTES or source_is_shallow
        if shallow:
            pack = git(source, "pack-objects", "--stdout", "-q", stdin=_objects_of(source, commit))
            (target / ".git" / "shallow").write_text(f"{commit}\n")
        git(target, "index-pack", "--stdin", stdin=pack)
        git(target, "update-ref", "--no-deref", "refs/heads/main", commit)
        git(target, "reset", "-q", "--hard", commit)
        commits = int(git(target, "rev-list", "--count", "HEAD"))
        for leftover in ("index", "logs", "ORIG_HEAD", "description", "FETCH_HEAD", "branches"):
            _remove(target / ".git" / leftover)
        return Cut(_archive(target), commits, shallow)


def _objects_of(source: pathlib.Path, commit: str) -> bytes:
    """Return the ids of a commit, its trees and its files."""
    tree = git(source, "rev-parse", f"{commit}^{{tree}}").strip()
    rows = git(
        source, "ls-tree", "-r", "-t", "--format=%(objecttype) %(objectname)", commit
    ).splitlines()
    ids = [commit.encode(), tree]
    for row in rows:
        kind, identity = row.split()
        if kind != b"commit":  # a submodule
            ids.append(identity)
    return b"\n".join(ids) + b"\n"


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    elif path.exists():
        path.unlink()


def _archive(folder: pathlib.Path) -> bytes:
    """Pack a folder; equal trees give equal bytes, because times and owners are left out."""
    buffer = io.BytesIO()
    size = 0
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=1) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            executable = stat.S_ISDIR(status.st_mode) or status.st_mode & 0o100
            member.mode = 0o755 if executable else 0o644
            if stat.S_ISLNK(status.st_mode):
                member.type = tarfile.SYMTYPE
                member.linkname = os.readlink(path)
                archive.addfile(member)
            elif stat.S_ISDIR(status.st_mode):
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                size += status.st_size
                if size > MAX_TREE_BYTES:
                    raise RepositoryError(
                        f"the repository has more than {MAX_TREE_BYTES} bytes at this commit: more"
                        " than an embedded sandbox holds"
                    )
                member.size = status.st_size
                with open(path, "rb") as content:
                    archive.addfile(member, content)
    return buffer.getvalue()


def _cut_hunk(patch: str) -> str:
    """Return what is wrong with a patch whose last hunk has fewer lines than it says; or ""."""
    heads = list(_HUNK.finditer(patch))
    if not heads:
        return ""
    wanted = [int(count or 1) for count in heads[-1].groups()]
    lines = patch[heads[-1].end() :].splitlines()[1:]
    found = [sum(line[:1] in kinds for line in lines) for kinds in ((" ", "-", ""), (" ", "+", ""))]
    if found[0] >= wanted[0] and found[1] >= wanted[1]:
        return ""
    return (
        f"the last hunk of the patch, {heads[-1][0]}, is cut: its end was probably stripped, blank"
        " lines of context included; take the row from its source again"
    )


def patched(
    source: pathlib.Path, commit: str, patch: str
) -> tuple[dict[str, tuple[bytes, int]], set[str]]:
    """Apply a patch to a commit without checking anything out.

    Returns:
      (files that the patch adds or changes, as they are after it; paths that it removes).

    Raises:
      RepositoryError: the patch does not apply, or makes a link or a submodule.
    """
    if fault := _cut_hunk(patch):
        raise RepositoryError(fault)
    with tempfile.TemporaryDirectory(prefix="swebench-") as folder:
        scratch = pathlib.Path(folder)
        (scratch / "objects").mkdir()
        git(source, "read-tree", commit, scratch=scratch)
        git(
            source,
            "apply",
            "--cached",
            "--whitespace=nowarn",
            "-",
            stdin=patch.encode(),
            scratch=scratch,
        )
        rows = git(
            source, "diff-index", "--cached", "-z", "--no-renames", commit, scratch=scratch
        ).split(b"\0")
        files = {}
        removed = set()
        for row, name in zip(rows[::2], rows[1::2], strict=False):
            _, mode, _, blob, status = row.split(b" ")
            path = os.fsdecode(name)
            if status == b"D":
                removed.add(path)
            elif mode not in (b"100644", b"100755"):
                raise RepositoryError(
                    f"the patch makes {path} a link or a submodule; only regular files are taken"
                )
            else:
                content = content_of(source, blob.decode(), path, scratch)
                files[path] = (content, 0o755 if mode == b"100755" else 0o644)
    return files, removed
