"""Files in and out: only regular files of the workspace, whatever the agent put in their place."""

import asyncio
import os

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxFileError, probe


@pytest.fixture(params=["namespaces", "landlock"])
def inside(request):
    if (report := probe(tier=request.param)).tier is None:
        pytest.skip(f"no {request.param} tier here: {report.missing[0].reason}")

    def run(work, **fields):
        async def steps():
            async with Sandbox(SandboxConfig(isolation="best_available", tier=request.param, **fields)) as sandbox:
                return await work(sandbox)

        return asyncio.run(asyncio.wait_for(steps(), 60))

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
        await sandbox.upload({"run.sh": (b"#!/bin/bash\necho ran\n", 0o755), "notes/n.txt": "text"})
        return (await sandbox.execute("./run.sh && stat -c %a run.sh notes/n.txt && echo more >> notes/n.txt && cat notes/n.txt && rm -r notes run.sh && ls")).stdout

    assert inside(work) == "ran\n755\n644\ntextmore\n"


def test_writing_replaces_the_old_content(inside):
    async def work(sandbox):
        await sandbox.write_file("f", "a long old content")
        await sandbox.write_file(f"{sandbox.workspace}/f", "new")
        return await sandbox.read_file("/workspace/f")

    assert inside(work) == b"new"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "/workspace/../x", "", ".", "/workspace", "a\0b", "/workspacex/f"])
def test_paths_outside_are_refused(inside, path):
    async def work(sandbox):
        for call in (sandbox.read_file(path), sandbox.write_file(path, "x")):
            with pytest.raises(SandboxFileError) as caught:
                await call
            assert caught.value.reason == "outside"

    inside(work)


@pytest.mark.parametrize("link", ["/etc/passwd", "../../../../../../../../etc/passwd", "/proc/self/root/etc/passwd", "/workspace/real"])
def test_links_that_leave_the_workspace_are_not_followed(inside, link):
    async def work(sandbox):
        await sandbox.execute(f"echo x > real; ln -s {link} leaf; ln -s {os.path.dirname(link)} directory")
        name = os.path.basename(link)
        for call in (sandbox.read_file("leaf"), sandbox.write_file("leaf", "x"), sandbox.read_file(f"directory/{name}"),
                     sandbox.write_file(f"directory/{name}", "x"), sandbox.write_file("directory/new/f", "x")):
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

    before = [(os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in ("/etc/passwd", "/usr/bin/env")]
    inside(work)
    assert [(os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in ("/etc/passwd", "/usr/bin/env")] == before


@pytest.mark.parametrize("make", ["mkfifo odd", "mkdir odd", "python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('odd')\""])
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
        return [(await sandbox.read_file(name)).decode() for name in names], (await sandbox.execute("ls -A | wc -l")).stdout

    assert inside(work) == (names, "8\n")
