"""Checkpoints: after any edits the files are, byte for byte, what they were."""

import asyncio
import os
import pathlib
import shutil
import stat
import subprocess
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.agent.iflow.places.checkpoint import ShadowRepository
from rome.agent.iflow.places.workspace import WorkspaceError
from tests.rome.agent.iflow.places import KINDS, work

NAMES = ("a", "b c", "d\ne", "ü.txt", "-x", "sub/a", "sub/deep/b", "a.crlf", ".hidden", "sub")


def tree(root: pathlib.Path, is_seen=lambda path: True) -> dict[str, tuple]:
    """Return mode and content of each file and link below a folder, git's own data left out."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != ".git"]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in files + links:
            path = pathlib.Path(folder, name)
            if not is_seen(path):
                continue
            if path.is_symlink():
                found[str(path.relative_to(root))] = ("link", os.readlink(path))
            else:
                mode = stat.S_IMODE(path.stat().st_mode)
                found[str(path.relative_to(root))] = (mode, path.read_bytes())
    return found


def clear(place: pathlib.Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    elif place.exists() or place.is_symlink():
        place.unlink()


def edit(root: pathlib.Path, name: str, kind: str, content: bytes) -> None:
    """Make one change; what stands in the way gives way."""
    place = root / name
    for above in reversed(place.relative_to(root).parents):
        if (root / above).is_symlink() or (root / above).is_file():
            clear(root / above)
    if kind == "mode" and place.is_file() and not place.is_symlink():
        place.chmod([0o600, 0o755, 0o640, 0o644, 0o444][len(content) % 5])
        return
    clear(place)
    if kind in ("remove", "mode"):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        place.symlink_to(content.hex() or "a")
    elif kind == "folder":
        place.mkdir()
        (place / "inner").write_bytes(content)
    else:
        place.write_bytes(content)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(["write", "write", "remove", "link", "folder", "mode"]),
        st.sampled_from([b"", b"x\r\ny\r\n", b"\0\xff", b"$Id$\n", b"line\n" * 9, b"no newline"]),
    ),
    max_size=6,
)


@settings(max_examples=6, deadline=None)
@given(before=EDITS, between=EDITS, after=EDITS)
def test_any_edits_are_taken_back(before, between, after):
    take_back(before, between, after)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(before=EDITS, between=EDITS, after=EDITS)
def test_very_many_edits_are_taken_back(before, between, after):
    take_back(before, between, after)


def take_back(before, between, after):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder, "root")
        root.mkdir()
        shadow = ShadowRepository(pathlib.Path(folder, "shadow"), root)
        states = []
        for edits in (before, between, after):
            for one in edits:
                edit(root, *one)
            states.append((shadow.take(), tree(root)))
        for name, state in [states[0], states[2], states[1]]:
            shadow.restore(name)
            assert tree(root) == state


def test_the_users_repository_and_what_it_ignores_are_left_alone(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=u", "-c", "user.email=u@u"]
    subprocess.run([*git, "init", "-q"], check=True)
    (root / ".gitignore").write_text("*.env\nbuild/\n")
    (root / ".gitattributes").write_text("* text eol=crlf filter=evil\n")
    subprocess.run([*git, "config", "filter.evil.clean", f"touch {tmp_path}/ran"], check=True)
    subprocess.run([*git, "config", "core.fsmonitor", f"touch {tmp_path}/ran"], check=True)
    (root / "code").write_bytes(b"a\nb\r\n")
    (root / "my.env").write_text("secret 1")
    shadow = ShadowRepository(tmp_path / "shadow", root)
    user = {p: p.read_bytes() for p in (root / ".git").rglob("*") if p.is_file()}
    first = shadow.take()
    (root / "code").write_bytes(b"changed")
    (root / "my.env").write_text("secret 2")
    (root / ".gitignore").write_text("")  # now it is not ignored, and a checkpoint has it
    shadow.take()
    (root / "new.env").write_text("secret 3")
    shadow.restore(first)
    assert (root / "code").read_bytes() == b"a\nb\r\n"
    assert (root / "my.env").read_text() == "secret 2"
    assert (root / "new.env").read_text() == "secret 3"
    assert user == {p: p.read_bytes() for p in (root / ".git").rglob("*") if p.is_file()}
    assert not (tmp_path / "ran").exists()


def test_a_repository_inside_is_kept_as_well(tmp_path):
    root = tmp_path / "root"
    inner = root / "pkg" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(inner)], check=True)
    (inner / "x").write_text("one")
    (root / "y").write_text("one")
    shadow = ShadowRepository(tmp_path / "shadow", root)
    kept = shadow.take()
    state = tree(root)
    (inner / "x").write_text("two")
    (inner / "z").write_text("new")
    shadow.restore(kept)
    assert tree(root) == state and (inner / ".git").is_dir()
    shutil.rmtree(inner)
    shadow.restore(kept)
    assert tree(root) == state


def test_worktrees_of_other_agents_are_left_alone(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / ".git" / "info" / "exclude").write_text("mine")
    shadow = ShadowRepository(tmp_path / "shadow", root)
    kept = shadow.take()
    other = root / ".iflow" / "worktrees" / "w"
    other.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    (other / "work").write_text("x")
    (root / "mine").write_text("x")
    (root / "new").write_text("x")
    shadow.restore(kept)
    assert (other / "work").exists() and (root / "mine").exists()
    assert not (root / "new").exists()


def test_a_restored_state_can_be_left_again(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_text("one")
    shadow = ShadowRepository(tmp_path / "shadow", root)
    first = shadow.take()
    (root / "a").write_text("two")
    second = shadow.take()
    ShadowRepository(tmp_path / "shadow", root).restore(first)  # another process
    assert (root / "a").read_text() == "one"
    shadow.restore(second)
    assert (root / "a").read_text() == "two"


def test_a_killed_git_stands_in_nobodys_way(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"a\r\n")
    (root / ".gitattributes").write_text("* text eol=lf\n")
    first = ShadowRepository(tmp_path / "shadow", root).take()
    (tmp_path / "shadow" / "git" / "index.lock").write_text("")
    (tmp_path / "shadow" / "git" / "info" / "attributes").unlink()  # killed before it was there
    shadow = ShadowRepository(tmp_path / "shadow", root)
    (root / "a").write_bytes(b"b\r\n")
    second = shadow.take()
    shadow.restore(first)
    assert (root / "a").read_bytes() == b"a\r\n"
    shadow.restore(second)
    assert (root / "a").read_bytes() == b"b\r\n"


def test_calls_at_the_same_time_wait_for_each_other(tmp_path):
    async def body(workspace):
        await workspace.write("a", b"x")
        cancelled = asyncio.ensure_future(workspace.snapshot())
        await asyncio.sleep(0.01)
        cancelled.cancel()
        names = await asyncio.gather(*(workspace.snapshot() for _ in range(3)))
        assert len(set(names)) == 1  # equal files have equal checkpoints

    work("host", tmp_path, body)


@pytest.mark.parametrize("name", ["", "x", "--help", "HEAD", "0" * 40])
def test_an_unknown_checkpoint_changes_nothing(tmp_path, name):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").write_text("one")
    shadow = ShadowRepository(tmp_path / "shadow", tmp_path / "root")
    shadow.take()
    with pytest.raises(WorkspaceError, match="no checkpoint"):
        shadow.restore(name)
    assert (tmp_path / "root" / "a").read_text() == "one"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_a_workspace_go_both_ways(kind, tmp_path):
    async def body(workspace):
        names = []
        for number in range(4):
            await workspace.execute(f"echo {number} > n; ln -sf n l{number}", timeout=9)
            names.append(await workspace.snapshot())
        for number in (1, 3, 0, 2):
            await workspace.restore(names[number])
            said = await workspace.execute("cat n; ls", timeout=9)
            links = "".join(f"l{n}\n" for n in range(number + 1))
            assert said.output == f"{number}\n{links}n\n"

    work(kind, tmp_path, body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_taken_while_a_job_runs(kind, tmp_path):
    async def body(workspace):
        await workspace.execute("echo one > a", timeout=9)
        job = await workspace.spawn("sleep 57")
        kept = await workspace.snapshot()
        await workspace.execute("echo two > a", timeout=9)
        await workspace.restore(kept)
        assert (await workspace.execute("cat a", timeout=9)).output == "one\n"
        await job.kill()

    work(kind, tmp_path, body)


def test_a_repository_below_that_was_removed_comes_back_with_its_commits(tmp_path):
    root = tmp_path / "project"
    inner = root / "lib"
    inner.mkdir(parents=True)

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=inner, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (inner / "a.txt").write_text("one")
    git("add", ".")
    git("commit", "-qm", "first")
    shadow = ShadowRepository(tmp_path / "session", root)
    shadow.take()
    (inner / "a.txt").write_text("two")
    git("commit", "-qam", "second")
    git("pack-refs", "--all")
    kept = shadow.take()
    shutil.rmtree(inner)
    shadow.restore(kept)
    assert (inner / "a.txt").read_text() == "two"
    assert git("log", "--format=%s").split() == ["second", "first"]
    assert git("status", "--porcelain") == "" and git("fsck", "--strict") == ""
    git("commit", "-q", "--allow-empty", "-m", "third")  # the data is its own again
