"""Worktrees: made, found again, and removed only when nothing was done there."""

import subprocess

import pytest

from rome.agent.iflow.places.worktree import WorktreeError, close_worktree, open_worktree


def git(folder, *arguments):
    who = ["-c", "user.name=u", "-c", "user.email=u@u"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    (folder / "a").write_text("committed")
    git(folder, "add", "a")
    git(folder, "commit", "-qm", "one")
    (folder / "a").write_text("not committed")
    return folder


def test_a_worktree_is_made_and_found_again(repository):
    made = open_worktree(str(repository), "try-1")
    assert (made.path / "a").read_text() == "committed"
    assert (made.branch, made.is_new) == ("iflow/try-1", True)
    assert git(repository, "status", "--porcelain") == "M a"
    (made.path / "b").write_text("x")
    for place in (repository, made.path):  # from inside it as well
        again = open_worktree(str(place), "try-1")
        assert (again.path, again.branch, again.is_new) == (made.path, made.branch, False)
    assert open_worktree(str(made.path), "two").path.parent == made.path.parent


def test_only_one_in_which_nothing_was_done_is_removed(repository):
    made = open_worktree(str(repository), "w")
    (made.path / "b").write_text("x")
    assert not close_worktree(made)
    git(made.path, "add", "b")
    git(made.path, "commit", "-qm", "two")
    assert not close_worktree(made)
    assert not close_worktree(open_worktree(str(repository), "w"))
    git(made.path, "reset", "-q", "--hard", made.base)
    assert close_worktree(made)
    assert not made.path.exists()
    assert git(repository, "branch", "--list", "iflow/*") == ""
    assert open_worktree(str(repository), "w").is_new


def test_hooks_of_the_repository_do_not_run(repository, tmp_path):
    hook = repository / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    open_worktree(str(repository), "w")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-f", ".", "a b", "x" * 65, "x.lock"])
def test_a_bad_name_is_refused(repository, name):
    with pytest.raises(WorktreeError, match="a name has 1 to 64"):
        open_worktree(str(repository), name)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(WorktreeError, match="no git repository; run git init"):
        open_worktree(str(tmp_path), "w")
    git(tmp_path, "init", "-q")
    with pytest.raises(WorktreeError, match="no commit yet"):
        open_worktree(str(tmp_path), "w")
    (tmp_path / ".iflow/worktrees/w").mkdir(parents=True)
    with pytest.raises(WorktreeError, match="no worktree; move it"):
        open_worktree(str(tmp_path), "w")
