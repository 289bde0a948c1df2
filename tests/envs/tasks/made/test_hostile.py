"""Hostile repositories, packages and programs: none runs on this machine, or writes to it."""

import asyncio
import dataclasses
import json
import os
import pathlib
import subprocess

import pytest

from envs.tasks.git import RepositoryError, git
from envs.tasks.made import FAMILIES, write_draft
from envs.tasks.made.commits import _read_change, commit_draft
from envs.tasks.made.draft import is_plain_path, plain_name
from envs.tasks.made.packages import _read_test, record_package
from envs.tasks.made.prove import _read_results

SETTINGS = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
TESTS = "import unittest\nfrom core import one\n"


def run_git(folder, *arguments, given=b""):
    command = ["git", "-C", str(folder), *SETTINGS, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, input=given)
    return done.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path):
    """Make a repository with one commit that changes a source and its test."""
    folder = tmp_path / "repository"
    folder.mkdir()
    run_git(folder, "init", "-q", "-b", "main")
    for text in ("one = 0\n", "one = 1\n"):
        (folder / "core.py").write_text(text)
        (folder / "test_core.py").write_text(TESTS + f"# {text}")
        run_git(folder, "add", "-A")
        run_git(folder, "commit", "-q", "-m", "Set one\n\nA body.")
    return folder


def read(repository):
    return _read_change(repository, run_git(repository, "rev-parse", "HEAD"))


def test_a_commit_is_read_without_anything_that_the_repository_s_settings_name(
    repository, tmp_path
):
    marker = tmp_path / "ran"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    script.chmod(0o755)
    tree = run_git(repository, "rev-parse", "HEAD^{tree}")
    parent = run_git(repository, "rev-parse", "HEAD^")
    signed = (
        f"tree {tree}\nparent {parent}\nauthor A <a@b> 1700000000 +0000\n"
        "committer A <a@b> 1700000000 +0000\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n"
        " -----END PGP SIGNATURE-----\n\nSet one\nagain\n\nA body.\n"
    )
    commit = run_git(
        repository, "hash-object", "-t", "commit", "-w", "--stdin", given=signed.encode()
    )
    run_git(repository, "update-ref", "HEAD", commit)
    with open(repository / ".git" / "config", "a") as file:
        file.write(
            f"[log]\n\tshowSignature = true\n[gpg]\n\tprogram = {script}\n[core]\n"
            f"\tpager = {script}\n\tfsmonitor = {script}\n[diff]\n\texternal = {script}\n"
            f'[diff "x"]\n\tcommand = {script}\n\ttextconv = {script}\n'
            f'[filter "x"]\n\tsmudge = {script}\n\tclean = {script}\n\tprocess = {script}\n'
        )
    (repository / ".git" / "info" / "attributes").write_text("*.py diff=x filter=x\n")
    change = read(repository)
    assert change.subject == "Set one again" and change.after["core.py"] == "one = 1\n"
    assert not marker.exists()
    git(repository, "log", "-1", "--format=%s")  # the wrapper itself forbids it, too
    assert not marker.exists()


def test_odd_entries_of_a_tree_are_left_out_and_no_path_leaves_its_folder(repository):
    blob = run_git(repository, "hash-object", "-w", "--stdin", given=b"harm\n")
    link = run_git(repository, "hash-object", "-w", "--stdin", given=b"/etc/passwd")
    pointer = run_git(
        repository,
        "hash-object",
        "-w",
        "--stdin",
        given=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    )
    parent = run_git(repository, "rev-parse", "HEAD^")
    rows = run_git(repository, "ls-tree", "HEAD").splitlines()
    inner = run_git(repository, "mktree", given=f"100644 blob {blob}\tout.txt\n".encode())
    rows += [f"100644 blob {pointer}\tbig.bin", f"120000 blob {link}\tlink.txt"]
    rows += [f"160000 commit {parent}\tmodule", f'100644 blob {blob}\tquote"d.txt']
    listed = run_git(repository, "mktree", given="\n".join(sorted(rows)).encode() + b"\n")
    # mktree refuses the name `..`, so the tree is written by hand, as an attacker would.
    raw = subprocess.run(
        ["git", "-C", str(repository), "cat-file", "tree", listed], capture_output=True, check=True
    ).stdout
    raw = b"40000 ..\0" + bytes.fromhex(inner) + raw
    tree = run_git(
        repository, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", given=raw
    )
    commit = run_git(repository, "commit-tree", tree, "-p", parent, "-m", "Set one")
    change = _read_change(repository, commit)
    assert sorted(change.after) == ["core.py", "test_core.py"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"x = '" + b"a" * (3 << 20) + b"'\n", "too large"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (b"x = '\xff'\n", "no text"),
    ],
)
def test_a_source_that_cannot_be_used_is_a_reason(repository, content, says):
    (repository / "core.py").write_bytes(content)
    (repository / "test_core.py").write_text(TESTS)
    run_git(repository, "commit", "-q", "-a", "-m", "Spoil it")
    found = asyncio.run(commit_draft(repository, run_git(repository, "rev-parse", "HEAD"), "x"))
    assert isinstance(found, str) and says in found


def test_a_huge_source_of_the_parent_is_not_read(repository, monkeypatch):
    monkeypatch.setattr("envs.tasks.git.MAX_FILE_BYTES", 4)
    with pytest.raises(RepositoryError, match="at most 4"):
        read(repository)


def test_a_draft_writes_only_below_its_folder(tmp_path):
    draft = FAMILIES["text"].make(1)
    outside = (
        "../out",
        "/out",
        "a/../../out",
        "a//b",
        "",
        ".",
        ".git/config",
        "a\nb",
        "a'b",
        'a"b',
    )
    for path in outside:
        assert not is_plain_path(path)
        with pytest.raises(ValueError, match="plain path"):
            dataclasses.replace(draft, files={path: "harm"})
        with pytest.raises(ValueError, match="plain path"):
            dataclasses.replace(draft, program=path)
    with pytest.raises(ValueError, match=r"solve\.sh"):
        dataclasses.replace(draft, program="solve.sh")
    for name in ("a", "a/b/c", "a/_b", "a/b c", 'a/b"', "../b"):
        with pytest.raises(ValueError, match="no name such as"):
            dataclasses.replace(draft, name=name)
    assert plain_name("_my repo'") == "my-repo-" and plain_name("..") == "unnamed"
    with pytest.raises(ValueError, match="surrogates"):
        dataclasses.replace(draft, instruction="\ud800")
    write_draft(dataclasses.replace(draft, files={"a b/.c-d+e.txt": "fine"}), tmp_path / "task")
    assert os.listdir(tmp_path) == ["task"]


def test_lines_that_a_package_wrote_itself_are_no_tests():
    files = {"p/a.py": "", "record.py": ""}
    good = {
        "module": "p.a",
        "statements": ["f(1)"],
        "outcome": [[1, "2"]],
        "lines": {"p/a.py": [3]},
    }
    assert _read_test(json.dumps(good).encode(), files) == good
    torn = [
        {**good, "outcome": [["1"]]},
        {**good, "outcome": []},
        {**good, "lines": {"../p": [1]}},
        {**good, "lines": {"p/a.py": ["1"]}},
        {**good, "statements": [1]},
        {**good, "module": "p" * (1 << 20)},
        [good],
        7,
    ]
    for value in torn:
        assert _read_test(json.dumps(value).encode(), files) is None
    for line in (b"hello", b"\xff", b"[" * 100_000, b""):
        assert _read_test(line, files) is None


def test_results_that_a_program_changed_are_refused():
    assert _read_results(b'[]\n["a"]\n', 2) == [[], ["a"]]
    for content in (b"", b"[]\n", b"[]\n[]\n[]\n", b"[1]\n[]\n", b"{}\n[]\n", b"x\ny\n"):
        with pytest.raises(ValueError):
            _read_results(content, 2)


@pytest.mark.slow
def test_a_package_that_prints_and_breaks_out_is_recorded_in_its_sandbox_alone(tmp_path):
    package = tmp_path / "loud one"
    package.mkdir()
    marker = tmp_path / "ran"
    (package / "__init__.py").write_text(
        "import atexit, os, pathlib\n"
        "os.write(1, b'not json\\n')\n"
        "atexit.register(os.write, 1, b'{\"module\": 7}\\n')\n"
        f"try:\n    pathlib.Path({str(marker)!r}).write_text('')\nexcept OSError:\n    pass\n\n\n"
        "def double(x):\n    return x * 2\n"
    )
    recording = asyncio.run(record_package(pathlib.Path(package), 0, "best_available"))
    assert len(recording.tests) >= 8 and not marker.exists()
    assert {test["module"] for test in recording.tests} == {"loud one"}
