"""Checkpoints of the files: a snapshot of a sandbox, or a shadow git repository on the host."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from rome.agent.iflow.places.workspace import WorkspaceError

GIT_DATA = "git-data"  # of a repository below, in the folder of its shadow
GIT_SECONDS = 300.0  # for one command of git
_ORDINARY_MODES = (0o644, 0o755)
# No command, filter, hook or setting of the user's or of the project's has a say in the shadow.
_SETTINGS = {
    "core.autocrlf": "false",
    "core.fileMode": "true",
    "core.symlinks": "true",
    "core.fsmonitor": "false",
    "core.hooksPath": "/dev/null",
    "core.quotePath": "false",
    "core.protectNTFS": "false",
    "core.protectHFS": "false",
    "gc.auto": "0",
    "commit.gpgSign": "false",
    "user.name": "iflow",
    "user.email": "iflow@localhost",
}
_EXCLUDED = b"\n/.iflow/worktrees/\n"  # where other agents may be at work
_ATTRIBUTES = "* -text -eol -filter -ident -working-tree-encoding -crlf -diff -merge\n"


class ShadowRepository:
    """Checkpoints of a folder in a git repository of their own, apart from any of the user's.

    What .gitignore names stays as it is, at a checkpoint and when one is restored. Repositories
    inside the folder have a shadow each; their git data stays as it is, and comes back where it was
    removed. Bytes, modes, symbolic links and files that git does not know come back; empty
    directories do not. All raise WorkspaceError where git is missing or fails.

    Args:
      folder: for the shadow repositories.
      root: the folder whose files are kept.
    """

    def __init__(self, folder: pathlib.Path, root: pathlib.Path) -> None:
        self._folder = folder
        self._root = root
        self._is_prepared = False
        # A call that was cancelled goes on in its thread, and the next one waits for it.
        self._turn = threading.RLock()

    def take(self) -> str:
        """Keep the files and return the checkpoint's name, a commit."""
        with self._turn:
            self._prepare()
            files = self._list("--cached", "--others", "--modified", "--deleted")
            gone = {path for tag, path in files if tag == "R"} | self._behind_links(files)
            new = {path for tag, path in files if tag in "?C" and not path.endswith("/")} - gone
            self._update_index(sorted(gone), "--force-remove")
            self._update_index(sorted(new), "--add", "--remove", "--replace")
            modes = self._unusual_modes({path for _, path in files})
            nested = {name: self._nested(name).take() for name in _repositories(files)}
            for name in nested:
                _keep_git(self._root / name / ".git", self._nested(name)._folder / GIT_DATA)
            details = json.dumps({"modes": modes, "nested": nested})
            tree = self._git("write-tree").strip()
            return self._git("commit-tree", tree, given=details).strip()

    def restore(self, checkpoint: str) -> None:
        """Bring the files back to a checkpoint; what is there now is kept as another one."""
        with self._turn:
            self._restore(checkpoint)

    def _restore(self, checkpoint: str) -> None:
        self._root.mkdir(parents=True, exist_ok=True)  # a repository below may be gone
        details = self._details(checkpoint)
        self.take()
        listing = self._git("ls-tree", "-r", "-z", "--full-tree", checkpoint).split("\0")[:-1]
        wanted = {path: kind[:6] for kind, _, path in (line.partition("\t") for line in listing)}
        # Left alone for now: the .gitignore that is restored may name them.
        later = [path for _, path in self._list("--cached") if path not in wanted]
        self._update_index(later, "--force-remove")
        self._make_way(wanted)
        self._git("read-tree", "--reset", "-u", checkpoint)
        others = self._list("--others")
        _remove(self._root, [path for _, path in others if not path.endswith("/")])
        self._set_modes(wanted, details["modes"])
        for name in set(_repositories(others)) - set(details["nested"]):
            shutil.rmtree(self._root / name, ignore_errors=True)
        for name, commit in details["nested"].items():
            self._nested(name).restore(commit)
            kept, git = self._nested(name)._folder / GIT_DATA, self._root / name / ".git"
            if kept.exists() and not git.exists():
                shutil.copytree(kept, git, symlinks=True)

    def _list(self, *kinds: str) -> list[tuple[str, str]]:
        """Return (tag, path) of the index and of what is not ignored; a path may come twice.

        The tags are git's: H in the index, ? not in it, C changed, R removed. A repository below is
        one path that ends with a slash.
        """
        options = ("-z", "-t", "--exclude-standard", *kinds)
        lines = self._git("ls-files", *options).split("\0")[:-1]
        return [(line[0], line[2:]) for line in lines]

    def _behind_links(self, files: Iterable[tuple[str, str]]) -> set[str]:
        """Return the paths below a symbolic link: git takes what it finds there for them."""
        above = {path: list(pathlib.PurePath(path).parents)[:-1] for _, path in files}
        folders = {folder for parents in above.values() for folder in parents}
        links = {folder for folder in folders if (self._root / folder).is_symlink()}
        return {path for path, parents in above.items() if not links.isdisjoint(parents)}

    def _details(self, checkpoint: str) -> dict[str, Any]:
        """Return what a checkpoint keeps beside its tree."""
        if re.fullmatch("[0-9a-f]{40,64}", checkpoint):
            with contextlib.suppress(WorkspaceError):
                commit = self._git("cat-file", "commit", checkpoint)
                details: dict[str, Any] = json.loads(commit.partition("\n\n")[2])
                return details
        raise WorkspaceError(f"there is no checkpoint {checkpoint!r} of {self._root}")

    def _unusual_modes(self, paths: Iterable[str]) -> dict[str, int]:
        """Return the modes that git does not keep."""
        modes = {}
        for path in sorted(paths):
            with contextlib.suppress(OSError):
                mode = os.lstat(self._root / path).st_mode
                if stat.S_ISREG(mode) and stat.S_IMODE(mode) not in _ORDINARY_MODES:
                    modes[path] = stat.S_IMODE(mode)
        return modes

    def _update_index(self, paths: Iterable[str], *options: str) -> None:
        text = "".join(f"{path}\0" for path in paths)
        if text:
            self._git("update-index", *options, "-z", "--stdin", given=text)

    def _make_way(self, wanted: Iterable[str]) -> None:
        """Remove what stands in the way of a wanted file: a directory, or a file above it."""
        for path in wanted:
            for above in list(pathlib.PurePath(path).parents)[:-1]:
                place = self._root / above
                if place.is_symlink() or place.is_file():
                    place.unlink()
            if (self._root / path).is_dir():
                _clear(self._root / path)

    def _set_modes(self, wanted: Mapping[str, str], unusual: Mapping[str, int]) -> None:
        for path, kind in wanted.items():
            if kind != "120000":  # a symbolic link
                ordinary = 0o755 if kind == "100755" else 0o644
                os.chmod(self._root / path, unusual.get(path, ordinary))

    def _nested(self, name: str) -> ShadowRepository:
        folder = self._folder / "nested" / name.strip("/").replace("%", "%25").replace("/", "%2F")
        return ShadowRepository(folder, self._root / name)

    def _prepare(self) -> None:
        """Create the shadow repository where there is none, or only a part of one."""
        if self._is_prepared:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        # A process that was killed may have left it; two of them never have one session.
        (self._folder / "git" / "index.lock").unlink(missing_ok=True)
        self._git("init", "--quiet")
        info = self._folder / "git" / "info"
        info.mkdir(exist_ok=True)
        (info / "attributes").write_text(_ATTRIBUTES)
        own = b""  # what the user's repository ignores without telling others
        with contextlib.suppress(OSError):
            own = (self._root / ".git" / "info" / "exclude").read_bytes()
        (info / "exclude").write_bytes(own + _EXCLUDED)
        self._is_prepared = True

    def _git(self, *arguments: str, given: str = "") -> str:
        """Run git on the shadow repository and return its output."""
        settings = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = kept | {
            "GIT_DIR": str(self._folder / "git"),
            "GIT_WORK_TREE": str(self._root),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0",
            "LC_ALL": "C.UTF-8",
            # Equal files have equal checkpoints.
            "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
            "GIT_COMMITTER_DATE": "2000-01-01T00:00:00Z",
        }
        try:
            done = subprocess.run(
                ["git", *settings, *arguments],
                cwd=self._root,
                env=environment,
                input=os.fsencode(given),
                capture_output=True,
                timeout=GIT_SECONDS,
                check=False,
            )
        except FileNotFoundError as error:
            raise WorkspaceError("checkpoints need git, which is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise WorkspaceError(
                f"git {arguments[0]} took more than {GIT_SECONDS:g} seconds in {self._root}"
            ) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip()
            raise WorkspaceError(f"git {arguments[0]} failed in {self._root}: {said[:500]}")
        return os.fsdecode(done.stdout)


def _keep_git(git: pathlib.Path, kept: pathlib.Path) -> None:
    """Keep the git data of a repository, in case that it is removed; objects are shared by links.

    Where it lies on another file system than the session, none is kept.
    """
    if not git.is_dir():  # a file, where it is a worktree or a submodule
        return
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.iterdir():
        if old.name != "objects":
            _clear(old)
    try:
        # An object never changes, so those that were linked before are left as they are.
        shutil.copytree(git, kept, symlinks=True, copy_function=_link_or_copy, dirs_exist_ok=True)
    except (OSError, shutil.Error):
        shutil.rmtree(kept)


def _link_or_copy(source: str, target: str) -> None:
    if "/objects/" not in target:
        shutil.copy2(source, target, follow_symlinks=False)
    elif not os.path.exists(target):
        os.link(source, target)


def _clear(path: pathlib.Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _repositories(files: Iterable[tuple[str, str]]) -> list[str]:
    """Return the repositories of a list of files."""
    return [path for tag, path in files if tag == "?" and path.endswith("/")]


def _remove(root: pathlib.Path, paths: Iterable[str]) -> None:
    """Remove files, and the directories that are empty then."""
    for path in paths:
        place = root / path
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            place.unlink()
        for above in place.parents:
            if above == root:
                break
            try:
                above.rmdir()
            except OSError:
                break
