"""Git worktrees: a second set of files of a repository, in which an agent works undisturbed."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess

FOLDER = ".iflow/worktrees"  # below the repository
BRANCH = "iflow/"
GIT_SECONDS = 120.0


class WorktreeError(ValueError):
    """No worktree could be made or removed; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Worktree:
    """A worktree."""

    path: pathlib.Path  # of its files
    branch: str  # that is checked out there
    base: str  # commit that it began with
    is_new: bool  # whether it was made just now


def open_worktree(directory: str, name: str) -> Worktree:
    """Return the worktree of that name of a repository; it is made where there is none.

    It begins with what is committed: changes that are not stay where they are. The directory may
    lie in the repository, or in one of its worktrees.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name) or name.endswith(".lock"):
        raise WorktreeError(
            f"worktree {name!r}: a name has 1 to 64 letters, digits, dots, dashes and underscores,"
            " and begins with a letter, digit or underscore"
        )
    common = _common_folder(directory)
    path = common.parent / FOLDER / name
    branch = BRANCH + name
    if path.exists():
        if pathlib.Path(_git(str(path), "rev-parse", "--show-toplevel")) != path.resolve():
            raise WorktreeError(f"{path} is there and no worktree; move it or use another name")
        base = _git(str(path), "merge-base", "HEAD", _git(directory, "rev-parse", "HEAD"))
        return Worktree(path, _git(str(path), "branch", "--show-current"), base, False)
    base = _git(directory, "rev-parse", "--verify", "HEAD^{commit}")
    has_branch = _git(directory, "for-each-ref", f"refs/heads/{branch}")
    start = [str(path), branch] if has_branch else ["-b", branch, str(path), base]
    _exclude(common)
    _git(directory, "worktree", "add", "--quiet", *start)
    return Worktree(path, branch, base, True)


def close_worktree(worktree: Worktree) -> bool:
    """Remove a worktree in which nothing was done, its branch too; return whether it was removed.

    One with changes, files that git does not know, or commits of its own stays.
    """
    path = str(worktree.path)
    is_changed = bool(_git(path, "status", "--porcelain", "--ignored"))
    if is_changed or _git(path, "rev-parse", "HEAD") != worktree.base:
        return False
    repository = str(_common_folder(path).parent)
    _git(repository, "worktree", "remove", path)
    if worktree.is_new:
        _git(repository, "branch", "--quiet", "-d", worktree.branch)
    return True


def _common_folder(directory: str) -> pathlib.Path:
    """Return the folder with git's data that all worktrees of a repository share."""
    found = _git(directory, "rev-parse", "--path-format=absolute", "--git-common-dir")
    return pathlib.Path(found)


def _exclude(common: pathlib.Path) -> None:
    """Keep the worktrees out of the repository's own list of unknown files."""
    path = common / "info" / "exclude"
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else ""
    line = f"/{FOLDER}/"
    if line not in text.splitlines():
        separator = "" if not text or text.endswith("\n") else "\n"
        path.write_text(f"{text}{separator}{line}\n")


def _git(directory: str, *arguments: str) -> str:
    """Run git, without hooks, and return its output."""
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", *arguments]
    environment = os.environ | {"LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise WorktreeError(f"a worktree needs git and the directory {directory}") from error
    except subprocess.TimeoutExpired as error:
        raise WorktreeError(f"git {arguments[0]} took more than {GIT_SECONDS:g} seconds") from error
    if done.returncode != 0:
        reason = done.stderr.strip()[:500]
        if "not a git repository" in reason:
            reason = f"{directory} is no git repository; run git init and commit first"
        elif "Needed a single revision" in reason:
            reason = f"{directory} has no commit yet; make one first"
        raise WorktreeError(f"no worktree: {reason}")
    return done.stdout.strip()
