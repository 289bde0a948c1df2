"""Reads repositories of others: the newest tree, and commits with their files before and after.

git reads objects only: nothing is checked out, so hooks, filters and monitors of the repository do
not run. What cannot be read is set aside with its record and the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator

from envs.tasks.git import RepositoryError, contents_of, git, is_repository
from rome.synth.build import kind_of_licence
from rome.synth.cpt.document import SetAside, shown_path
from rome.synth.cpt.filters import MAX_FILE_BYTES, path_fault, text_of

MAX_TREE_FILES = 50_000
MAX_READ_BYTES = 64 << 20  # that one process of git reads
MAX_CHANGED_FILES = 8
MAX_MESSAGE_CHARACTERS = 20_000
_LICENCE = re.compile(r"(LICEN[CS]E|COPYING)", re.IGNORECASE)
_REGULAR = ("100644", "100755", "100664")


@dataclasses.dataclass(frozen=True)
class Repository:
    """A local repository.

    Attributes:
      folder: bare or with a working tree.
      name: of its folder.
      head: the newest commit.
      licence: its kind, or "".
    """

    folder: pathlib.Path
    name: str
    head: str
    licence: str

    @property
    def id(self) -> str:
        """What tells this state of this repository from others; a name for files."""
        place = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8]
        return f"{self.head[:12]}-{place}"


@dataclasses.dataclass(frozen=True)
class Commit:
    """A commit with one parent and the texts that it changes.

    Attributes:
      id: its full name.
      message: of its author.
      before: path -> text at the parent; files that it adds are missing.
      after: path -> text; files that it deletes are missing.
    """

    id: str
    message: str
    before: dict[str, str]
    after: dict[str, str]


def open_repository(folder: pathlib.Path) -> Repository:
    """Return a repository.

    Raises:
      RepositoryError: there is none, or it has no commit that can be read.
    """
    folder = folder.resolve()
    if not is_repository(folder):
        raise RepositoryError("no git repository is here")
    head = git(folder, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()
    name = folder.parent.name if folder.name == ".git" else folder.name.removesuffix(".git")
    return Repository(folder, shown_path(name), head, _licence_of(folder, head))


def _licence_of(folder: pathlib.Path, head: str) -> str:
    """Return the kind of permissive licence that lies at the top of a commit's tree, or ""."""
    for path, (mode, blob) in sorted(_top_entries(folder, head).items()):
        if not (_LICENCE.match(path) and mode in _REGULAR):
            continue
        content = contents_of(folder, [blob], MAX_FILE_BYTES)[0]
        if kind := kind_of_licence(content.decode(errors="replace")):
            return kind
    return ""


def _top_entries(folder: pathlib.Path, commit: str) -> dict[str, tuple[str, str]]:
    """Return name -> (mode, object) of what lies at the top of a commit's tree."""
    found = {}
    for row in git(folder, "ls-tree", "-z", commit).split(b"\0"):
        if row:
            entry, _, name = row.partition(b"\t")
            mode, _, identity = entry.decode().split()
            found[os.fsdecode(name)] = (mode, identity)
    return found


def read_tree(repository: Repository, commit: str = "") -> tuple[dict[str, str], list[SetAside]]:
    """Return path -> text of the files of a commit that are used, and those set aside.

    Args:
      repository: that holds it.
      commit: "" for the newest.

    Raises:
      RepositoryError: it cannot be read, or has more than MAX_TREE_FILES files.
    """
    listed = git(repository.folder, "ls-tree", "-r", "-z", "--long", commit or repository.head)
    rows = [row for row in listed.split(b"\0") if row]
    if len(rows) > MAX_TREE_FILES:
        raise RepositoryError(f"{len(rows)} files; at most {MAX_TREE_FILES} are read")
    place = str(repository.folder)
    aside = []
    wanted: dict[str, tuple[str, int]] = {}
    for row in rows:
        entry, _, raw = row.partition(b"\t")
        mode, _, blob, size = entry.decode().split()
        path = os.fsdecode(raw)
        fault = _entry_fault(path, mode, size)
        if fault:
            aside.append(SetAside(place, shown_path(path), fault))
        else:
            wanted[path] = (blob, int(size))
    texts = {}
    for path, content in _read_files(repository, wanted):
        text, fault = ("", content) if isinstance(content, str) else text_of(content)
        if fault:
            aside.append(SetAside(place, path, fault))
        else:
            texts[path] = text
    return texts, aside


def list_paths(repository: Repository, commit: str) -> list[str]:
    """Return the paths of a commit's tree that could be used, sorted.

    Raises:
      RepositoryError: it cannot be read.
    """
    listed = git(repository.folder, "ls-tree", "-r", "-z", "--name-only", commit)
    paths = [os.fsdecode(raw) for raw in listed.split(b"\0") if raw]
    return sorted(path for path in paths if not path_fault(path))


def _entry_fault(path: str, mode: str, size: str) -> str:
    if mode not in _REGULAR:
        return "a link or a submodule"
    if not size.isdecimal():  # git writes BAD
        return "its content is missing: a partial clone, or a damaged one"
    if int(size) > MAX_FILE_BYTES:
        return f"more than {MAX_FILE_BYTES} bytes"
    return path_fault(path)


def _read_files(
    repository: Repository, wanted: dict[str, tuple[str, int]]
) -> Iterator[tuple[str, bytes | str]]:
    """Yield each path with its content, or with the reason why it cannot be read."""
    for paths in _in_portions(wanted):
        blobs = [wanted[path][0] for path in paths]
        try:
            contents = contents_of(repository.folder, blobs, MAX_READ_BYTES)
            yield from zip(paths, contents, strict=True)
        except (RepositoryError, ValueError):
            yield from _read_one_by_one(repository, paths, blobs)


def _read_one_by_one(
    repository: Repository, paths: list[str], blobs: list[str]
) -> Iterator[tuple[str, bytes | str]]:
    """Yield what can be read of files among which some cannot."""
    for path, blob in zip(paths, blobs, strict=True):
        try:
            yield path, contents_of(repository.folder, [blob], MAX_READ_BYTES)[0]
        except (RepositoryError, ValueError) as error:
            yield path, f"cannot be read: {str(error)[:200]}"


def _in_portions(wanted: dict[str, tuple[str, int]]) -> Iterator[list[str]]:
    """Yield the paths in portions that one process reads."""
    portion: list[str] = []
    size = 0
    for path, (_, bytes_) in wanted.items():
        if portion and (size + bytes_ > MAX_READ_BYTES or len(portion) >= 1000):
            yield portion
            portion, size = [], 0
        portion.append(path)
        size += bytes_
    if portion:
        yield portion


def list_commits(repository: Repository, count: int) -> list[str]:
    """Return the newest commits with one parent, the newest first; at most `count`.

    Raises:
      RepositoryError: the history cannot be read.
    """
    listed = git(
        repository.folder,
        "rev-list",
        "--no-merges",
        "--min-parents=1",
        f"--max-count={count}",
        repository.head,
    )
    return listed.decode().split()


def read_commit(repository: Repository, commit: str) -> Commit | str:
    """Return a commit, or the reason why it is not used.

    Raises:
      RepositoryError: it cannot be read.
    """
    folder = repository.folder
    listed = git(folder, "diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-abbrev", commit)
    fields = listed.split(b"\0")[1:-1]  # the commit's own name comes first
    changes = list(zip(fields[::2], fields[1::2], strict=False))
    if not 0 < len(changes) <= MAX_CHANGED_FILES:
        return f"changes {len(changes)} files; 1 to {MAX_CHANGED_FILES} are used"
    message = git(folder, "log", "-1", "--format=%B", "--encoding=UTF-8", commit)
    try:
        words = message.decode().strip()
    except UnicodeDecodeError:
        return "its message is not UTF-8"
    if not words or len(words) > MAX_MESSAGE_CHARACTERS:
        return f"its message has {len(words)} characters"
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for row, raw in changes:
        path = os.fsdecode(raw)
        old_mode, new_mode, old_blob, new_blob, _ = row.decode().lstrip(":").split(" ")
        if fault := path_fault(path):
            return f"changes {shown_path(path)}: {fault}"
        for texts, mode, blob in ((sides[0], old_mode, old_blob), (sides[1], new_mode, new_blob)):
            if mode == "000000":
                continue
            fault = "a link or a submodule"
            if mode in _REGULAR:
                try:
                    content = contents_of(folder, [blob], MAX_FILE_BYTES)[0]
                except RepositoryError as error:
                    return f"changes {path}: {error}"
                texts[path], fault = text_of(content)
            if fault:
                return f"changes {path}: {fault}"
    return Commit(commit, words, *sides)
