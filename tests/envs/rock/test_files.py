"""Files in and out: only regular files of the workspace, whatever the agent put in their place."""

import asyncio
import contextlib
import os

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxFileError, probe
from tests.envs.rock.waiting import until_exists


@pytest.fixture(params=["namespaces", "landlock"])
def inside(request):
    if (report := probe(tier=request.param)).tier is None:
        pytest.skip(f"no {request.param} tier here: {report.missing[0].reason}")

    def run(work, **fields):
        async def steps():
            async with Sandbox(
                SandboxConfig(isolation="best_available", tier=request.param, **fields)
            ) as sandbox:
                return await work(sandbox)

        return asyncio.run(asyncio.wait_for(steps(), 180))

    return run


def test_bytes_survive_the_way_in_and_out(inside):
    data = bytes(range(256)) * 1000

    async def work(sandbox):
        await sandbox.write_file("a/b/c.bin", data)
        count = (await sandbox.execute("wc -c < a/b/c.bin")).stdout
        return count, await sandbox.read_file("a/b/c.bin")

    assert inside(work) == ("256000\n", data)


def test_uploaded_files_have_their_modes_and_belong_to_the_agent(inside):
    async def work(sandbox):
        await sandbox.write_files(
            {"run.sh": (b"#!/bin/bash\necho ran\n", 0o755), "notes/n.txt": "text"}
        )
        return (
            await sandbox.execute(
                "./run.sh && stat -c %a run.sh notes/n.txt && echo more >> notes/n.txt && cat"
                " notes/n.txt && rm -r notes run.sh && ls"
            )
        ).stdout

    assert inside(work) == "ran\n755\n644\ntextmore\n"


def test_writing_replaces_the_old_content(inside):
    async def work(sandbox):
        await sandbox.write_file("f", "a long old content")
        await sandbox.write_file(f"{sandbox.workspace}/f", "new")
        return await sandbox.read_file("/workspace/f")

    assert inside(work) == b"new"


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "/workspace/../x",
        "",
        ".",
        "/workspace",
        "a\0b",
        "/workspacex/f",
    ],
)
def test_paths_outside_are_refused(inside, path):
    async def work(sandbox):
        for call in (sandbox.read_file(path), sandbox.write_file(path, "x")):
            with pytest.raises(SandboxFileError) as caught:
                await call
            assert caught.value.reason == "outside"

    inside(work)


@pytest.mark.parametrize(
    "link",
    [
        "/etc/passwd",
        "../../../../../../../../etc/passwd",
        "/proc/self/root/etc/passwd",
        "/workspace/real",
    ],
)
def test_links_that_leave_the_workspace_are_not_followed(inside, link):
    async def work(sandbox):
        await sandbox.execute(
            f"echo x > real; ln -s {link} leaf; ln -s {os.path.dirname(link)} directory"
        )
        name = os.path.basename(link)
        for call in (
            sandbox.read_file("leaf"),
            sandbox.write_file("leaf", "x"),
            sandbox.read_file(f"directory/{name}"),
            sandbox.write_file(f"directory/{name}", "x"),
            sandbox.write_file("directory/new/f", "x"),
        ):
            with pytest.raises(SandboxFileError) as caught:
                await call
            assert caught.value.reason == "outside"

    inside(work)


def test_a_link_within_the_workspace_is_followed(inside):
    async def work(sandbox):
        await sandbox.execute("mkdir d; echo x > d/f; ln -s d/f l; ln -s d e")
        return await sandbox.read_file("l"), await sandbox.read_file("e/f")

    assert inside(work) == (b"x\n", b"x\n")


def test_an_agents_hard_link_to_a_host_file_gives_no_way_to_write_it(inside):
    async def work(sandbox):
        await sandbox.execute("ln /etc/passwd p; ln /usr/bin/env e")
        for name in ("p", "e"):
            try:
                await sandbox.write_file(name, "x")
            except SandboxFileError as error:
                assert error.reason == "denied"

    before = [
        (os.stat(path).st_mtime_ns, os.stat(path).st_size)
        for path in ("/etc/passwd", "/usr/bin/env")
    ]
    inside(work)
    assert [
        (os.stat(path).st_mtime_ns, os.stat(path).st_size)
        for path in ("/etc/passwd", "/usr/bin/env")
    ] == before


@pytest.mark.parametrize(
    "make",
    [
        "mkfifo odd",
        "mkdir odd",
        "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('odd')\"",
    ],
)
def test_what_is_not_a_regular_file_neither_blocks_nor_passes(inside, make):
    async def work(sandbox):
        made = await sandbox.execute(make)
        for call in (sandbox.read_file("odd"), sandbox.write_file("odd", "x")):
            if made.exit_code == 0:
                with pytest.raises(SandboxFileError) as caught:
                    await call
                assert caught.value.reason == "not_regular"
            else:
                call.close()

    inside(work)


def test_missing_and_too_large_files_are_told_apart(inside):
    async def work(sandbox):
        await sandbox.execute("truncate -s 10M sparse; echo x > file")
        reasons = []
        for path in ("nothing", "file/below", "sparse"):
            with pytest.raises(SandboxFileError) as caught:
                await sandbox.read_file(path, limit=1000)
            reasons.append(caught.value.reason)
        return reasons

    assert inside(work) == ["missing", "missing", "too_large"]


def test_odd_names_are_just_names(inside):
    names = ["-rf", "a b", "new\nline", "$(id)", "\u00fc", "x" * 200, "*"]

    async def work(sandbox):
        for name in names:
            await sandbox.write_file(name, name)
        return [(await sandbox.read_file(name)).decode() for name in names], (
            await sandbox.execute("ls -A | wc -l")
        ).stdout

    assert inside(work) == (names, "8\n")


def test_a_tree_survives_the_way_in_and_out(inside, tmp_path):
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/data.bin").write_bytes(os.urandom(700_000))  # several pieces
    (source / "run.sh").write_text("echo ran\n")
    (source / "run.sh").chmod(0o755)
    (source / "deep/link").symlink_to("/etc/passwd")

    async def work(sandbox):
        up = await sandbox.upload(source, "tree")
        listed = (
            await sandbox.execute("cd tree && find . -type f -printf '%P %m\\n' | sort")
        ).stdout
        return up, listed, await sandbox.download("tree", tmp_path / "target")

    up, listed, down = inside(work)
    assert listed == "deep/er/data.bin 644\nrun.sh 755\n"
    assert up == (2, 700_009, ()) and down == (2, 700_009, ("deep/link",))
    for name in ("deep/er/data.bin", "run.sh"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert os.access(tmp_path / "target/run.sh", os.X_OK)


def test_a_download_takes_nothing_but_files(inside, tmp_path):
    """Links, FIFOs, setuid bits and unreadable modes are the agent's; what arrives on the host has
    none of them.
    """

    async def work(sandbox):
        await sandbox.execute(
            "mkdir -p out/d && ln -s /etc/passwd out/l && ln -s .. out/d/up && mkfifo out/f && echo"
            " x > out/s && chmod 4755 out/s && ln out/s out/d/hard"
        )
        return await sandbox.download("out", tmp_path / "target")

    moved = inside(work)
    assert sorted(moved.skipped) == ["d/up", "f", "l"] and moved.files == 2
    found = {
        path.relative_to(tmp_path / "target").as_posix(): path.lstat().st_mode & 0o7777
        for path in (tmp_path / "target").rglob("*")
    }
    assert found == {"d": 0o755, "s": 0o755, "d/hard": 0o755}


def test_a_download_is_bounded_and_never_overwrites(inside, tmp_path):
    async def work(sandbox):
        await sandbox.execute(
            "mkdir out; head -c 3000000 /dev/zero > out/a; head -c 3000000 /dev/zero > out/b"
        )
        with pytest.raises(SandboxFileError) as caught:
            await sandbox.download("out", tmp_path / "target", limit=4_000_000)
        (tmp_path / "there").write_text("mine")
        with pytest.raises(FileExistsError):
            await sandbox.download("out/a", tmp_path / "there")
        return caught.value.reason

    assert inside(work) == "too_large"
    assert (
        sum(path.stat().st_size for path in (tmp_path / "target").iterdir()) <= 4_000_000
        and (tmp_path / "there").read_text() == "mine"
    )


def test_a_swap_of_directory_and_link_leads_nowhere(inside, tmp_path):
    """An agent that exchanges a directory with a link to /etc all the time gets nothing of the host
    into a download.
    """

    async def work(sandbox):
        swap = await sandbox.spawn(
            "mkdir -p out/a && echo inner > out/a/passwd; ln -s /etc out/b; touch set; while :;"
            " do mv out/a out/c; mv out/b out/a; mv out/c out/b; mv out/a out/c; mv out/b out/a;"
            " mv out/c out/b; done",
            timeout=60,
        )
        await until_exists(sandbox, "set")
        for number in range(30):
            with contextlib.suppress(SandboxFileError):
                await sandbox.download("out", tmp_path / str(number))
        contents = {path.read_text() for path in tmp_path.rglob("passwd") if path.is_file()}
        await swap.kill()
        return contents

    assert inside(work) <= {"inner\n"}


def test_a_path_too_long_to_be_named_is_told_and_stops_nothing_else(inside):
    """The kernel opens no path of more than 4,096 bytes, but directories can be made below it."""
    deed = "n=$(printf 'x%.0s' $(seq 200)); for i in $(seq 30); do mkdir $n && cd $n || exit; done"

    async def work(sandbox):
        await sandbox.execute(f"{deed}; echo deep > f")
        with pytest.raises(SandboxFileError) as error:
            await sandbox.list_files(".")
        await sandbox.write_file("g", "well")
        copied = await sandbox.verify("cat g")
        return error.value.reason, copied.stdout

    assert inside(work) == ("too_large", "well")
