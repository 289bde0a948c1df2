"""Every way of copying a tree keeps the same: what `fork` keeps, all of them keep or name."""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import pathlib
import shlex
import shutil
import stat

import hypothesis
import hypothesis.strategies as st
import pytest

from envs.rock import Sandbox, SandboxConfig, SyncSandbox, probe
from tests.envs.rock.service import running

# -- trees, and what one is like

_names = st.sampled_from(["a", "b", "sp ace", "-rf", "ü", "x" * 120, "new\nline", "\udcff"])
_times = st.sampled_from(
    [0, 1, 1_000_000_000_123_456_789, 1_700_000_000_000_000_000, -1_500_000_000]
)
_modes = st.sampled_from([0o644, 0o600, 0o755, 0o444, 0o640, 0o1777])
_members = st.one_of(
    st.tuples(st.just("file"), _modes, _times, st.binary(max_size=2000)),
    st.tuples(st.just("link"), st.sampled_from(["a", "../b", "/nowhere/at all", "."]), _times),
    st.tuples(st.just("again"), st.integers(0, 3)),
    st.tuples(st.just("fifo")),
)
trees = st.recursive(
    st.dictionaries(_names, _members, max_size=4),
    lambda inner: st.dictionaries(
        _names,
        _members
        | st.tuples(st.just("directory"), st.sampled_from([0o755, 0o700, 0o1777]), _times, inner),
        max_size=4,
    ),
    max_leaves=4,
)


def make(tree: dict, place: pathlib.Path, files: list | None = None) -> None:
    """Make a tree. "again" is another name of one of the files made before."""
    files = [] if files is None else files
    for name, (kind, *about) in tree.items():
        path = place / name
        if kind == "file":
            mode, modified, content = about
            path.write_bytes(content)
            path.chmod(mode)
            os.utime(path, ns=(modified, modified))
            files.append(path)
        elif kind == "link":
            target, modified = about
            path.symlink_to(target)
            os.utime(path, ns=(modified, modified), follow_symlinks=False)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "again" and files:
            os.link(files[about[0] % len(files)], path)
        elif kind == "directory":
            mode, modified, inner = about
            path.mkdir()
            make(inner, path, files)
            path.chmod(mode)
            os.utime(path, ns=(modified, modified))


# Run by a Python on this host or in a sandbox, so it imports what both have.
DESCRIBE = r"""
import os, stat, sys
def describe(root):
    found, inodes = {}, {}
    for parent, directories, names in os.walk(root):
        for name in sorted(directories + names):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            about = [stat.S_IFMT(status.st_mode), status.st_mtime_ns]
            if stat.S_ISLNK(status.st_mode):
                about.append(os.readlink(path))
            elif stat.S_ISREG(status.st_mode):
                about += [stat.S_IMODE(status.st_mode), open(path, "rb").read().hex()]
            else:
                about.append(stat.S_IMODE(status.st_mode))
            found[os.path.relpath(path, root)] = about
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                inodes.setdefault(status.st_ino, []).append(os.path.relpath(path, root))
    groups = sorted(sorted(group) for group in inodes.values())
    return found, groups
"""
namespace: dict = {}
exec(DESCRIBE, namespace)
describe = namespace["describe"]
TELL = (
    DESCRIBE
    + "\nprint(ascii(describe(os.fsencode(sys.argv[1]).decode('utf-8', 'surrogateescape'))))"
)


def without_fifos(described):
    found, groups = described
    kept = {path: about for path, about in found.items() if not stat.S_ISFIFO(about[0])}
    named = sorted(path for path, about in found.items() if stat.S_ISFIFO(about[0]))
    return (kept, groups), named


def inside(sandbox, path: str):
    """Describe a directory of a sandbox, by a program in it."""
    sandbox.write_file(".tell.py", TELL)
    told = sandbox.execute(f"python3 .tell.py {path}", timeout=30)
    assert told.exit_code == 0, told.stderr
    return eval(told.stdout)


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def sandbox(request, tmp_path_factory):
    tier = request.param
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")
    config = SandboxConfig(isolation="best_available", tier=tier, max_output_bytes=8 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where ~/.rock is
        with SyncSandbox(config) as started:
            yield started


_numbers = itertools.count()


TREE = {
    "empty": ("directory", 0o700, 1_000_000_000_123_456_789, {}),
    "d": (
        "directory",
        0o755,
        1,
        {
            "-rf\n": ("file", 0o1777, -1_500_000_000, b"x" * 600_000),
            "\udcff": ("link", "../empty", 5),
            "again": ("again", 0),
            "zeros": ("file", 0o444, 0, bytes(300_000) + b"end"),
        },
    ),
    "dangling": ("link", "/nowhere/at all", 7),
    "pipe": ("fifo",),
    "n" * 200: ("file", 0o640, 1_700_000_000_000_000_000, b""),
}


@pytest.mark.slow
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(tree=trees)
def test_every_way_keeps_any_tree_as_it_is(sandbox, tmp_path_factory, tree):
    check_every_way(sandbox, tmp_path_factory, tree)


def test_every_way_keeps_a_tree_as_it_is_and_names_what_it_cannot_keep(sandbox, tmp_path_factory):
    check_every_way(sandbox, tmp_path_factory, TREE)


def check_every_way(sandbox, tmp_path_factory, tree) -> None:
    place = tmp_path_factory.mktemp("tree")
    source = place / "source"
    source.mkdir()
    make(tree, source)
    expected, named = without_fifos(describe(source))
    name = f"t{next(_numbers)}"
    up = sandbox.upload(source, name)
    assert inside(sandbox, name) == expected and sorted(up.skipped) == named
    down = sandbox.download(name, place / "down")
    assert as_a_download_has_it(describe(place / "down")) == as_a_download_has_it(expected)
    assert sorted(down.skipped) == sorted(
        path for path, about in expected[0].items() if stat.S_ISLNK(about[0])
    )
    sandbox.commit("tree")
    with SyncSandbox(dataclasses.replace(sandbox.config, image="tree")) as image:
        assert inside(image, name) == expected
    with sandbox.fork() as fork:
        assert inside(fork, name) == expected
    sandbox.execute(f"rm -rf {name}")


def test_what_is_not_a_file_a_directory_or_a_link_is_named(sandbox, tmp_path):
    bind = shlex.quote("import socket; socket.socket(1).bind('s/sock')")
    sandbox.execute(f"mkdir -p s/d; mkfifo s/d/fifo; python3 -c {bind}")
    down = sandbox.download("s", tmp_path / "down")
    assert set(down.skipped) <= {"d/fifo", "sock"} and "d/fifo" in down.skipped
    os.mkfifo(tmp_path / "down/pipe")
    assert sandbox.upload(tmp_path / "down", "again") == (0, 0, ("pipe",))
    sandbox.execute("rm -rf s again")


# -- what people copy

MAKE_REPOSITORY = """
set -e
git init -q repo && cd repo
git config user.name n && git config user.email e@x
mkdir -p src logs && echo one > src/f && ln -s f src/l && ln -s ../gone src/dangling
printf '#!/bin/sh\necho ran\n' > run && chmod 755 run
git add -A && git commit -qm first && git gc -q
cd .. && python3 -m venv --without-pip venv
touch -d 2001-02-03 repo/src/f
"""
USE_REPOSITORY = (
    "cd repo && git status --short && git log --format=%s && ls -A .git/refs logs -d && ./run"
    " && cat src/l && readlink src/dangling && date -r src/f +%F && ../venv/bin/python -c"
    " 'import sys; print(sys.prefix != sys.base_prefix)'"
)
USED = "first\n.git/refs\nlogs\nran\none\n../gone\n2001-02-03\nTrue\n"


async def copies_of_a_repository(first: Sandbox, again, tmp_path) -> dict[str, str]:
    """What using the repository says in each copy of the sandbox's files."""
    said = {}

    async def use(way: str, sandbox: Sandbox, below: str = ".") -> None:
        result = await sandbox.execute(f"cd {below} && {USE_REPOSITORY}", timeout=30)
        said[way] = result.stdout + result.stderr

    made = await first.execute(MAKE_REPOSITORY, timeout=60)
    assert made.exit_code == 0, made.stderr
    await use("itself", first)
    async with await first.fork() as fork:
        await use("fork", fork)
    snapshot = await first.snapshot()
    async with Sandbox(first.config, snapshot) as from_snapshot:
        await use("snapshot", from_snapshot)
    await snapshot.delete()
    await first.commit("kept")
    async with again() as image:
        await use("commit", image)
    async with contextlib.aclosing(first.pack(".")) as pieces:
        await first.unpack("unpacked", pieces)
    await use("pack", first, "unpacked")
    down = await first.download(".", tmp_path / "down")
    assert {"repo/src/l", "repo/src/dangling", "venv/bin/python"} <= set(down.skipped)
    # A download makes no links; with those that it named, it is the same.
    for path in down.skipped:
        target = (await first.execute(f"readlink {path}")).stdout.rstrip("\n")
        if target and not path.startswith("unpacked"):
            (tmp_path / "down" / path).symlink_to(target)
    await first.upload(tmp_path / "down/repo", "up/repo")
    await first.upload(tmp_path / "down/venv", "up/venv")
    await use("download and upload", first, "up")
    return said


@pytest.mark.parametrize(
    "backend",
    ["namespaces", *(pytest.param(one, marks=pytest.mark.slow) for one in ("landlock", "remote"))],
)
def test_a_repository_and_a_virtual_environment_survive_every_way(backend, tmp_path, monkeypatch):
    tier = backend if backend != "remote" else None
    if probe(tier=tier).tier is None or not shutil.which("git"):
        pytest.skip(f"no sandbox of {backend} here, or no git")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # What git needs in the landlock tier, which has no /etc of its own.
    env = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}

    async def work():
        limits = {"disk_mb": 64, "memory_mb": 512, "env": env}
        if backend == "remote":
            async with running.admin(tmp_path / "data") as site:
                config = site.config(**limits)
                async with Sandbox(config) as first:
                    named = site.config(image="kept", **limits)
                    return await copies_of_a_repository(first, lambda: Sandbox(named), tmp_path)
        config = SandboxConfig(isolation="best_available", tier=tier, **limits)
        async with Sandbox(config) as first:
            named = dataclasses.replace(config, image="kept")
            return await copies_of_a_repository(first, lambda: Sandbox(named), tmp_path)

    said = asyncio.run(asyncio.wait_for(work(), 120))
    assert said == dict.fromkeys(said, USED)


def as_a_download_has_it(described):
    """Without links, and with the modes that leave a sandbox."""
    found, groups = described
    kept = {}
    for path, (kind, modified, mode, *content) in found.items():
        if stat.S_ISDIR(kind):
            kept[path] = (kind, modified, 0o755)
        elif stat.S_ISREG(kind):
            kept[path] = (kind, modified, 0o755 if mode & 0o100 else 0o644, *content)
    return kept, groups
