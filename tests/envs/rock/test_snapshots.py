"""Files as they were: snapshots, sandboxes that start from them, and going back."""

import asyncio
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxError, SandboxStartError, probe
from envs.rock.embedded.sandbox import EmbeddedSnapshot
from envs.rock.host import tree
from tests.paths import ROOT

STATE = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")


@pytest.fixture(params=["namespaces", "landlock"])
def config(request):
    if (report := probe(tier=request.param)).tier is None:
        pytest.skip(f"no {request.param} tier here: {report.missing[0].reason}")
    return SandboxConfig(isolation="best_available", tier=request.param)


def snapshots(made: EmbeddedSnapshot) -> set[str]:
    """Return all snapshots of the process that made this one; those of others come and go."""
    owner, _, _ = pathlib.Path(made.path).name.partition(".")
    return {str(path) for path in STATE.glob(f"{owner}.*.snapshot")}


def run(work):
    return asyncio.run(asyncio.wait_for(work(), 180))


MAKE = """mkdir -p a/b; echo one > a/b/f; ln -s a/b/f link; ln -s /nowhere dangling
printf 'x' > 'odd name
'; chmod 640 a/b/f; chmod 0 a; touch -d 2001-02-03 old; echo t > ${TMPDIR:-/tmp}/t; mkfifo pipe
head -c 2000000 /dev/zero > zeros; echo '#!/bin/sh
echo ran' > tool; chmod +x tool"""
SHOW = (
    "chmod 700 a; stat -c '%n %a %Y' a/b/f old tool | sed 's/f 640 .*/f 640/'; cat link; readlink"
    " dangling; ls -b; cat ${TMPDIR:-/tmp}/t; wc -c < zeros; ./tool; id -u"
)


def test_a_sandbox_that_starts_from_a_snapshot_has_its_files_and_not_its_fifos(config):
    async def work():
        async with Sandbox(config) as first:
            await first.execute(MAKE)
            snapshot = await first.snapshot()
            async with Sandbox(config, snapshot) as second:
                shown = [await second.execute(SHOW), await first.execute("rm pipe; " + SHOW)]
                return (
                    shown,
                    await second.execute(
                        "echo more >> a/b/f; rm zeros; mkdir -p a/new; cat a/b/f; ls"
                    ),
                    await first.execute("cat a/b/f; ls"),
                )

    (second, first), changed, original = run(work)
    ours, theirs = second.stdout.replace("uid", "").splitlines(), first.stdout.splitlines()
    assert ours[:-1] == theirs[:-1] and second.stderr == first.stderr == "" and "ran" in ours
    assert (
        changed.stdout.startswith("one\nmore\n")
        and "zeros" not in changed.stdout
        and changed.stderr == ""
    )
    assert (
        original.stdout.startswith("one\n")
        and "more" not in original.stdout
        and "zeros" in original.stdout
    )


def test_a_snapshot_outlives_its_sandbox_many_start_from_it_and_it_goes_when_deleted_and_unused(
    config,
):
    async def work():
        async with Sandbox(config) as first:
            await first.execute("echo kept > f")
            snapshot = await first.snapshot()
            others = snapshots(snapshot) - {snapshot.path}
        forks = [Sandbox(config, snapshot) for _ in range(8)]
        await asyncio.gather(*(fork.start() for fork in forks))
        results = await asyncio.gather(
            *(fork.execute(f"echo {number} >> f; cat f") for number, fork in enumerate(forks))
        )
        deeper = await forks[0].snapshot()
        await snapshot.delete()
        with pytest.raises(SandboxStartError, match="was deleted"):
            await Sandbox(config, snapshot).start()
        late = await asyncio.gather(*(fork.execute("cat f") for fork in forks))
        await asyncio.gather(*(fork.stop() for fork in forks))
        async with Sandbox(config, deeper) as last:
            grandchild = await last.execute("cat f")
        await deeper.delete()
        said = [[one.stdout for one in some] for some in (results, late, [grandchild])]
        return said, snapshots(snapshot) - others

    (results, late, grandchild), left = run(work)
    assert results == late == [f"kept\n{number}\n" for number in range(8)] and grandchild == [
        "kept\n0\n"
    ]
    assert not left


def test_restoring_goes_back_and_ends_what_runs(config):
    async def work():
        async with Sandbox(config) as sandbox:
            await sandbox.execute("echo one > f")
            snapshot = await sandbox.snapshot()
            await sandbox.execute("echo two > f; touch more")
            session = await sandbox.create_session()
            await sandbox.restore(snapshot)
            return (
                (await sandbox.execute("cat f; ls")).stdout,
                session,
                await asyncio.gather(session.run("true"), return_exceptions=True),
            )

    text, _, (after,) = run(work)
    assert text == "one\nf\n" and isinstance(after, SandboxError)


def test_forks_are_limited_and_isolated_as_any_other(config):
    async def work():
        async with Sandbox(config) as first:
            await first.execute("echo secret > f; sleep 4747 &")
            snapshot = await first.snapshot()
            job = await first.spawn("sleep 60")
            async with Sandbox(config, snapshot) as second:
                seen = await second.execute(
                    "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[s]leep 60'; kill -9 -1",
                    timeout=20,
                )
                full = await second.execute(
                    "head -c 100000000 /dev/zero > big; ls -s big | cut -d' ' -f1"
                )
                return seen, full, job.running, (await second.get_status()).disk_bytes

    seen, full, running, used = run(work)
    if config.tier == "namespaces":
        assert seen.stdout == "0\n"
        assert int(full.stdout) <= 16384 and used <= 16 << 20
    assert running


def test_holes_stay_holes_on_the_hosts_disk(config):
    async def work():
        async with Sandbox(config) as sandbox:
            await sandbox.execute(
                "for n in $(seq 200); do truncate -s 15M hole$n; done; truncate -s 2M mixed; printf"
                " end | dd of=mixed bs=1 seek=1500000 conv=notrunc"
            )
            snapshot = await sandbox.snapshot()
            used = sum(
                path.stat().st_blocks * 512 for path in pathlib.Path(snapshot.path).rglob("*")
            )
            async with Sandbox(config, snapshot) as fork:
                read = await fork.execute(
                    "stat -c %s hole7 mixed; tail -c +1500001 mixed | head -c 3; tr -d '\\0' <"
                    " mixed | wc -c"
                )
            await snapshot.delete()
            return used, read.stdout

    used, read = run(work)
    assert used < 4 << 20 and read == "15728640\n2097152\nend3\n"


@pytest.mark.long
def test_one_file_of_many_names_is_kept_once_however_often_it_is_forked(config):
    async def work():
        async with Sandbox(config) as sandbox:
            await sandbox.execute(
                "mkdir -p d; head -c 4M /dev/zero > d/one; for n in $(seq 300); do ln d/one name$n;"
                " done",
                timeout=60,
            )
            snapshot = await sandbox.snapshot()
            async with Sandbox(config, snapshot) as fork:
                await fork.execute("chmod 700 d; echo more >> small")
                again = await fork.snapshot()
                same = (await fork.execute("cmp d/one name300 && stat -c %s name7")).stdout
        used = [
            len(
                {
                    (status.st_dev, status.st_ino)
                    for path in pathlib.Path(one.path).rglob("*")
                    for status in [path.stat()]
                    if status.st_size == 4 << 20
                }
            )
            for one in (snapshot, again)
        ]
        await snapshot.delete(), await again.delete()
        return used, same

    assert run(work) == ([1, 1], "4194304\n")


def test_a_tree_that_cannot_be_copied_is_an_error_and_leaves_nothing(config):
    async def work():
        async with Sandbox(config) as sandbox:
            whole = await sandbox.snapshot()
            before = snapshots(whole)
            await sandbox.execute("d=.; for n in $(seq 100); do d=$d/x; done; mkdir -p $d")
            with pytest.raises(SandboxError, match="more than 64 levels deep"):
                await sandbox.snapshot()
            job = await sandbox.spawn("sleep 60")
            with pytest.raises(SandboxError, match="a command is running"):
                await sandbox.snapshot()
            await job.kill()
            said = (await sandbox.execute("rm -r x && echo well")).stdout
            return said, whole.path in before, snapshots(whole) - before

    assert run(work) == ("well\n", True, set())


def test_files_that_an_idle_sessions_processes_remove_meanwhile_are_no_error(config):
    async def work():
        async with Sandbox(config) as sandbox, await sandbox.create_session() as session:
            await session.run("mkdir many zz; for n in $(seq 60); do echo $n > many/$n; done")
            churn = "touch zz/f{1..8}; mkdir zz/d{1..8}; rm -r zz/*"
            await session.run(f"(while :; do {churn}; done) &")
            snapshots = [await sandbox.snapshot() for _ in range(6)]
            async with Sandbox(config, snapshots[-1]) as copy:
                count = (await copy.execute("ls many | wc -l")).stdout
            for snapshot in snapshots:
                await snapshot.delete()
            return count

    assert run(work) == "60\n"


@pytest.mark.parametrize("becomes", ["nothing", "link", "directory", "fifo", "file"])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_replaced_between_its_listing_and_its_copy_is_left_out(
    kind, becomes, tmp_path, monkeypatch
):
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target):
        directory.mkdir()
    (source / "kept").write_text("kept")
    changing = source / "changing"
    make = {
        "nothing": lambda: None,
        "file": lambda: changing.write_text("new"),
        "directory": changing.mkdir,
        "link": lambda: changing.symlink_to("/etc/passwd"),
        "fifo": lambda: os.mkfifo(changing),
    }
    make[kind]()
    copy_link, open_source = tree._Copy._copy_link, tree._open_source

    def replace() -> None:
        changing.rmdir() if kind == "directory" else changing.unlink()
        make[becomes]()

    def replaced_link(self, source, target, name, status):
        replace()
        copy_link(self, source, target, name, status)

    def replaced_source(name, flags, directory):
        if name == "changing":
            replace()
        return open_source(name, flags, directory)

    monkeypatch.setattr(tree._Copy, "_copy_link", replaced_link)
    monkeypatch.setattr(tree, "_open_source", replaced_source)
    descriptors = [os.open(one, os.O_RDONLY) for one in (source, target)]
    tree.copy_tree(*descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    assert (target / "kept").read_text() == "kept"
    assert sorted(os.listdir(target)) == (["changing", "kept"] if becomes == kind else ["kept"])


def test_snapshots_end_with_the_process_that_made_them_killed_or_not(config):
    program = f"""
import asyncio, os, sys
sys.path.insert(0, {str(ROOT)!r})
from envs.rock import Sandbox, SandboxConfig
async def main():
    async with Sandbox(SandboxConfig(isolation="best_available", tier={config.tier!r})) as sandbox:
        await sandbox.execute("mkdir -p a/b; chmod 0 a")
        print((await sandbox.snapshot()).path, flush=True)
        if sys.argv[1] == "killed": os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    for end in ("ended", "killed"):
        path = subprocess.run(
            [sys.executable, "-c", program, end], stdout=subprocess.PIPE, text=True, timeout=60
        ).stdout.strip()
        ends = time.monotonic() + 60
        while os.path.exists(path) and time.monotonic() < ends:
            time.sleep(0.05)
        assert path.endswith(".snapshot") and not os.path.exists(path)


def test_a_snapshot_of_another_tier_is_refused(config):
    async def work():
        async with Sandbox(config) as sandbox:
            snapshot = await sandbox.snapshot()
            await Sandbox(config, EmbeddedSnapshot(snapshot.path, "another")).start()

    with pytest.raises(SandboxStartError, match="the snapshot is of tier another"):
        run(work)


def test_a_verifier_works_on_a_view_and_leaves_no_trace(config):
    """What it writes, overwrites and removes is gone when it ends: grading twice is grading the
    same.
    """
    if config.tier == "landlock":
        pytest.skip("this tier grades in place, and its guarantees say so")

    async def work():
        async with Sandbox(config) as sandbox:
            return await grade(sandbox)

    async def grade(sandbox):
        await sandbox.execute(
            "echo mine > kept; echo mine > changed; mkdir d; echo x > d/removed; chmod 500 d"
        )
        deed = (
            "cat kept changed; echo theirs > changed; chmod 700 d; rm d/removed; echo new > added;"
            " head -c 40M /dev/zero > big || echo full; cat changed added; ls d"
        )
        first = await sandbox.verify(deed)
        second = await sandbox.verify(
            "cat kept changed; ls -a d; ls; grep -c ' /run/view ' /proc/self/mountinfo"
        )
        after = await sandbox.execute("cat changed; ls . d; stat -c %a d; ls /run")
        return first.stdout, second.stdout, after.stdout

    first, second, after = run(work)
    assert first == "mine\nmine\nfull\ntheirs\nnew\n"
    assert second == "mine\nmine\n.\n..\nremoved\nchanged\nd\nkept\n0\n"
    assert after == "mine\n.:\nchanged\nd\nkept\n\nd:\nremoved\n500\n"
