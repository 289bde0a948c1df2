"""What every backend keeps: the same steps, the same results and the same errors."""

import asyncio
import contextlib
import os

import pytest

from envs.rock import (
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxFileError,
    SandboxStartError,
    probe,
)
from tests.envs.rock.service import running
from tests.envs.rock.waiting import until_exists


@pytest.fixture(
    params=[
        "namespaces",
        "landlock",
        "remote",
        pytest.param("docker", marks=[pytest.mark.slow, pytest.mark.docker]),
        pytest.param("remote docker", marks=[pytest.mark.slow, pytest.mark.docker]),
    ]
)
def inside(request, tmp_path):
    tier = {"remote": None}.get(request.param, request.param)
    engine = request.getfixturevalue("engine") if "docker" in request.param else None
    if engine is None and (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no sandbox here: {report.missing[0].reason}")

    def run(work, **fields):
        if engine:
            fields = {"image": engine.image, "memory_mb": 128, **fields}

        async def local():
            async with Sandbox(
                SandboxConfig(
                    isolation="best_available",
                    **({"backend": "docker"} if engine else {"tier": tier}),
                    **fields,
                )
            ) as sandbox:
                return await work(sandbox)

        async def remote():
            async with (
                running.admin(tmp_path / "admin", backends=("embedded", "docker")) as site,
                Sandbox(site.config(**fields)) as sandbox,
            ):
                return await work(sandbox)

        return asyncio.run(
            asyncio.wait_for(remote() if request.param.startswith("remote") else local(), 90)
        )

    return run


def test_commands_report_how_they_ended(inside):
    async def work(sandbox):
        return [
            await sandbox.execute(command, timeout=timeout, env=env)
            for command, timeout, env in (
                ("echo out; echo err >&2; exit 3", None, None),
                ("echo $X $HOME", None, {"X": "y"}),
                ("echo begun; sleep 600", 1.0, None),
                ("yes | head -c 300000", None, None),
                ("printf '\\xff\\x00é'", None, None),
                ("kill -9 $$", None, None),
                ("a" * 200_000, None, None),
                ("echo 'é\ud800'", None, None),
            )
        ]

    plain, variable, slow, long, odd, killed, huge, surrogate = inside(work, max_output_bytes=1000)
    assert (plain.stdout, plain.stderr, plain.exit_code, plain.limits_hit) == (
        "out\n",
        "err\n",
        3,
        (),
    )
    assert variable.stdout.startswith("y /")
    assert (
        slow.timed_out
        and slow.exit_code == 137
        and slow.stdout == "begun\n"
        and slow.limits_hit == ("timeout",)
    )
    assert (
        long.truncated
        and len(long.stdout) == 1000
        and long.exit_code == 0
        and long.cut == (299_000, 0)
        and plain.cut == (0, 0)
    )
    assert (
        odd.stdout == "\ufffd\0é"
        and killed.exit_code == 137
        and huge.exit_code == 126
        and surrogate.stdout == "é?\n"
    )


def test_files_survive_the_way_in_and_out_and_links_lead_nowhere(inside, tmp_path):
    data = os.urandom(700_000)

    async def work(sandbox):
        await sandbox.write_files({"a/b.bin": data, "run": ("echo ran", 0o755), "empty": b""})
        await sandbox.execute(
            "ln -s /etc/passwd link; ln -s / root; mkfifo pipe; printf x > $'odd \\xff\\nname'"
        )
        read = (
            await sandbox.read_file("a/b.bin"),
            await sandbox.read_file("empty"),
            (await sandbox.execute("./run")).stdout,
        )
        reasons = []
        for path in ("link", "root/etc/passwd", "pipe", "a", "nothing", "../x", "/etc/passwd"):
            with pytest.raises(SandboxFileError) as caught:
                await sandbox.read_file(path)
            reasons.append(caught.value.reason)
        with pytest.raises(SandboxFileError) as large:
            await sandbox.read_file("a/b.bin", limit=1000)
        full = "no_space"
        if "disk" in sandbox.guarantees:
            with pytest.raises(SandboxFileError) as caught:
                await sandbox.write_file("big", b"x" * (20 << 20))
            full = caught.value.reason
        names = sorted(
            (entry.path, entry.kind, entry.size)
            for entry in await sandbox.list_files()
            if entry.path != "big"
        )
        down = await sandbox.download(".", tmp_path / "target")
        return read, reasons, large.value.reason, full, names, down

    read, reasons, large, full, names, down = inside(work)
    assert read == (data, b"", "ran\n")
    assert reasons[2:] == ["not_regular", "not_regular", "missing", "outside", "outside"] and set(
        reasons[:2]
    ) <= {"outside", "denied"}
    assert (large, full) == ("too_large", "no_space")
    assert [(name, kind) for name, kind, _ in names] == [
        ("a", "directory"),
        ("a/b.bin", "file"),
        ("empty", "file"),
        ("link", "link"),
        ("odd \udcff\nname", "file"),
        ("pipe", "special"),
        ("root", "link"),
        ("run", "file"),
    ]
    assert (
        sorted(down.skipped) == ["link", "pipe", "root"]
        and (tmp_path / "target/a/b.bin").read_bytes() == data
    )


def test_sessions_keep_their_state_and_end_with_exit(inside):
    async def work(sandbox):
        async with await sandbox.create_session(env={"Y": "z"}) as session:
            await session.run("cd /tmp; x=5; f() { return 7; }")
            told = await session.run("pwd; echo $x $Y; f")
            slow = await session.run("sleep 30", timeout=0.3)
            long = await session.run("head -c 70000 /dev/zero >&2")
            after = await session.run("echo $x")
            gone = await session.run("exit 4")
            with pytest.raises(SandboxClosedError):
                await session.run("true")
        assert (long.cut, long.truncated, after.cut) == ((0, 70_000 - (64 << 10)), True, (0, 0))
        return told, slow, after, gone

    told, slow, after, gone = inside(work)
    assert (
        told.stdout.endswith("5 z\n")
        and told.exit_code == 7
        and slow.timed_out
        and after.stdout == "5\n"
        and gone.exit_code == 4
    )


def test_jobs_run_beside_and_can_be_interrupted_and_killed(inside):
    async def work(sandbox):
        jobs = [
            await sandbox.spawn(command)
            for command in (
                "trap 'echo caught; exit 9' INT; touch set; while :; do sleep 0.02; done",
                "sleep 60",
                "exit 5",
            )
        ]
        await until_exists(sandbox, "set")
        await jobs[0].interrupt()
        return [
            await jobs[0].wait(),
            jobs[1].running,
            await jobs[1].kill(),
            await jobs[2].wait(),
            await jobs[2].wait(),
            jobs[1].running,
        ]

    caught, running_before, killed, ended, again, running_after = inside(work)
    assert (
        (caught.stdout, caught.exit_code) == ("caught\n", 9)
        and killed.exit_code == 137
        and ended == again
        and ended.exit_code == 5
    )
    assert running_before and not running_after


def test_snapshots_and_forks_hold_the_files_of_their_moment(inside):
    async def work(sandbox):
        await sandbox.execute("echo one > f; mkdir d; ln -s f l")
        snapshot = await sandbox.snapshot()
        await sandbox.execute("echo two > f; rm -r d")
        async with await sandbox.fork() as fork:
            forked = (await fork.execute("cat f; ls; echo three > f")).stdout
        await sandbox.restore(snapshot)
        restored = (await sandbox.execute("cat f l; ls")).stdout
        async with Sandbox(sandbox.config, snapshot) as another:
            begun = (await another.execute("cat f")).stdout
        await snapshot.delete()
        with pytest.raises(SandboxStartError):
            await Sandbox(sandbox.config, snapshot).start()
        return forked, restored, begun

    assert inside(work) == ("two\nf\nl\n", "one\none\nd\nf\nl\n", "one\n")


def test_verifiers_see_the_files_and_no_process_and_agents_see_no_verifier(inside):
    async def work(sandbox):
        await sandbox.spawn(
            "while :; do cat /proc/*/cmdline $VERIFIER_FILES/* /run/verifier/* >> seen 2>"
            " /dev/null; done",
            timeout=20,
        )
        await sandbox.execute("until [ -e seen ]; do sleep 0.05; done; echo answer > f", timeout=20)
        verdict = await sandbox.verify(
            "cat f $VERIFIER_FILES/secret; exit 6", files={"secret": b"the secret\n"}
        )
        return verdict, await sandbox.execute("grep -c 'the secret' seen; ls")

    verdict, after = inside(work)
    assert (verdict.stdout, verdict.exit_code) == (
        "answer\nthe secret\n",
        6,
    ) and after.stdout == "0\nf\nseen\n"


def test_what_has_ended_says_so_and_stopping_twice_is_fine(inside):
    async def work(sandbox):
        job = await sandbox.spawn("sleep 60")
        status = await sandbox.get_status()
        await sandbox.stop()
        await sandbox.stop()
        for call in (sandbox.execute("true"), sandbox.get_status(), sandbox.read_file("f")):
            with pytest.raises(SandboxClosedError):
                await call
        with contextlib.suppress(SandboxClosedError):  # its end was still told, or is not known
            assert (await job.wait()).exit_code == 137
        return status.commands, sandbox.is_alive()

    assert inside(work) == (1, False)


def test_a_caller_who_gives_up_leaves_nothing_running(inside):
    async def work(sandbox):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(sandbox.execute("sleep 60", timeout=100), 0.3)
        deadline = asyncio.get_running_loop().time() + 60
        while (
            await sandbox.get_status()
        ).commands and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return (await sandbox.get_status()).commands, (await sandbox.execute("echo well")).stdout

    assert inside(work) == (0, "well\n")


def test_what_makes_no_sense_is_a_value_error(inside):
    async def work(sandbox):
        for call in (
            sandbox.spawn("a\0b"),
            sandbox.verify("true", files={"../x": b""}),
            sandbox.expose_port(0),
            sandbox.execute("true", env={"a=b": "c"}),
        ):
            with pytest.raises(ValueError):
                await call
        return True

    assert inside(work)


def test_a_session_is_a_bash_that_nothing_of_ours_shows_in(inside):
    async def work(sandbox):
        async with await sandbox.create_session() as session:
            await session.run("read() { :; }; eval() { :; }; builtin() { :; }; printf() { :; }")
            said = [
                await session.run(command, timeout=20)
                for command in ("continue", "break 2", "- x", "(exit 5)", "echo $?", "declare a=b")
            ]
            await session.run("set -x; trap 'echo D' DEBUG")
            traced = await session.run("echo $a")
        return [(one.stdout, one.exit_code) for one in said], traced

    said, traced = inside(work)
    assert said == [("", 0), ("", 0), ("", 127), ("", 5), ("5\n", 0), ("", 0)]
    assert traced.stdout == "D\nb\n" and "ROCK" not in traced.stderr


def test_a_tree_keeps_its_folders_links_modes_and_times(inside, tmp_path):
    async def work(sandbox):
        await sandbox.execute(
            "mkdir -p t/empty t/d; echo x > t/d/f; ln -s gone t/l; ln t/d/f t/hard; chmod 640 t/d/f"
        )
        for copy in ("same", "deep/er"):
            async with contextlib.aclosing(sandbox.pack("t")) as pieces:
                await sandbox.unpack(copy, pieces)
        await sandbox.download("t", tmp_path / "down")
        await sandbox.upload(tmp_path / "down", "up")
        show = "ls -AR; stat -c '%n %a %h %Y' d/f; readlink l; cat d/f"
        trees = [
            (await sandbox.execute(f"cd {name} && {show}")).stdout
            for name in ("t", "same", "deep/er")
        ]
        return trees, (await sandbox.execute("cd up && ls -AR")).stdout

    trees, up = inside(work)
    assert trees[0] and trees == [trees[0]] * 3 and "./empty:" in up
