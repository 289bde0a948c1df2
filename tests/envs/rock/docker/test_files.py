"""Files of the Docker backend: in and out of a running container."""

import asyncio
import functools

import pytest

from envs.rock import (
    SandboxFileError,
)

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


def test_files_survive_the_way_in_and_out_with_modes_and_odd_names(inside, tmp_path):
    data = bytes(range(256)) * 3000
    names = ["-rf", "a b", "new\nline", "$(id)", "ü", "x" * 200, "*"]
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "deep/er/data.bin").write_bytes(data)
    (source / "run.sh").write_text("#!/bin/bash\necho ran\n")
    (source / "run.sh").chmod(0o755)
    (source / "deep/link").symlink_to("/etc/passwd")

    async def work(sandbox):
        for name in names:
            await sandbox.write_file(name, name)
        contents = [(await sandbox.read_file(name)).decode() for name in names]
        up = await sandbox.upload(source, "tree")
        await sandbox.write_file("/workspace/tree/run.sh.old", "long content")
        await sandbox.write_file("tree/run.sh.old", "new")
        ran = await sandbox.execute(
            "cd tree; ./run.sh && find . -type f -printf '%P %m\\n' | sort; cat run.sh.old; ln -s"
            " /etc/passwd l; mkfifo p; chmod 4755 run.sh; rm run.sh.old"
        )
        down = await sandbox.download("tree", tmp_path / "target")
        listed = {entry.path: entry.kind for entry in await sandbox.list_files("tree")}
        return contents, up, ran, down, listed

    contents, up, ran, down, listed = inside(work)
    assert contents == names and up.files == 2 and up.skipped == ()
    assert ran.stdout == "ran\ndeep/er/data.bin 644\nrun.sh 755\nrun.sh.old 644\nnew"
    assert (
        down.files == 2
        and sorted(down.skipped) == ["deep/link", "l", "p"]
        and (tmp_path / "target/deep/er/data.bin").read_bytes() == data
    )
    assert (tmp_path / "target/run.sh").stat().st_mode & 0o7777 == 0o755
    assert listed == {
        "deep": "directory",
        "deep/er": "directory",
        "deep/er/data.bin": "file",
        "deep/link": "link",
        "run.sh": "file",
        "l": "link",
        "p": "special",
    }


def test_only_regular_files_below_the_workspace_are_read_and_written(inside):
    async def work(sandbox):
        await sandbox.execute(
            "echo x > real; mkdir d; echo y > d/f; ln -s d/f in; ln -s d e; ln -s /workspace/real"
            " absolute; ln -s ../etc/passwd out; ln -s /etc etc; ln -s loop loop; mkfifo fifo;"
            " truncate -s 4M sparse; echo z > closed; chmod 0 closed"
        )
        good = await sandbox.read_file("in"), await sandbox.read_file("e/f")
        await sandbox.write_file("e/new/g", "written")
        reasons = {}
        for path in (
            "../x",
            "/etc/passwd",
            "a/../../x",
            "",
            "/workspace",
            "absolute",
            "out",
            "etc/passwd",
            "etc/new/f",
            "loop",
            "fifo",
            "d",
            "nothing",
            "real/below",
            "sparse",
            "closed",
        ):
            for what, call in (
                ("read", functools.partial(sandbox.read_file, path, limit=1000)),
                ("write", functools.partial(sandbox.write_file, path, "x")),
            ):
                try:
                    await call()
                    reasons[path, what] = ""
                except SandboxFileError as error:
                    reasons[path, what] = error.reason
        full = await asyncio.gather(
            sandbox.write_file("big", b"x" * (20 << 20)), return_exceptions=True
        )
        return (
            good,
            await sandbox.read_file("d/new/g"),
            reasons,
            full[0],
            (await sandbox.execute("cat sparse closed; rm big; echo well")).stdout,
        )

    good, written, reasons, full, after = inside(work)
    assert (
        good == (b"y\n", b"y\n")
        and written == b"written"
        and full.reason == "no_space"
        and after == "xxwell\n"
    )
    outside = {path for path, what in reasons if reasons[path, what] == "outside"}
    assert outside == {
        "../x",
        "/etc/passwd",
        "a/../../x",
        "",
        "/workspace",
        "absolute",
        "out",
        "etc/passwd",
        "etc/new/f",
        "loop",
    }
    rest = {
        f"{what} {path}": reason for (path, what), reason in reasons.items() if path not in outside
    }
    assert rest == {
        "read fifo": "not_regular",
        "write fifo": "not_regular",
        "read d": "not_regular",
        "write d": "not_regular",
        "read nothing": "missing",
        "write nothing": "",
        "read real/below": "missing",
        "write real/below": "missing",
        "read sparse": "too_large",
        "write sparse": "",
        "read closed": "denied",
        "write closed": "",
    }
