"""The Docker backend, on an engine of the tests' own (engine.py): what it enforces, its commands,
sessions, files and copies.
"""

import asyncio
import io
import json
import os
import shlex
import tarfile
import time

import pytest

from envs.rock import (
    IsolationError,
    Sandbox,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
)
from tests.envs.rock.in_docker import config, containers
from tests.processes import host_processes

pytestmark = pytest.mark.slow  # an engine of their own, and a minute on two idle cores


# What is enforced


def test_every_limit_is_on_and_the_engine_says_so(inside):
    async def work(sandbox):
        from envs.rock.docker.engine import engine as docker_engine

        engine = docker_engine()
        about = await engine.call(
            engine.client.inspect_container, sandbox._backend._running.container.id
        )
        seen = await sandbox.execute(
            "cat /proc/self/status; ulimit -n -c -u; id -u; cat /proc/net/route | wc -l; echo x >"
            " /etc/x; echo x > /usr/x; ls -A /root /home"
        )
        return about, seen, sandbox.guarantees, sandbox.tier

    about, seen, guarantees, tier = inside(work, cpus=0.5, pids=40)
    host = about["HostConfig"]
    assert (
        not host["Privileged"]
        and host["CapDrop"] == ["ALL"]
        and not host["CapAdd"]
        and host["ReadonlyRootfs"]
        and host["NetworkMode"] == "none"
    )
    assert (
        host["Memory"] == host["MemorySwap"] == 128 << 20
        and host["PidsLimit"] == 104
        and host["CpuQuota"] == 50_000
        and host["LogConfig"]["Type"] == "none"
    )
    assert (
        "no-new-privileges" in host["SecurityOpt"]
        and not host["Binds"]
        and not host["Devices"]
        and int(about["Config"]["User"].split(":")[0]) >= 20_000
    )
    fields = dict(line.split(":\t", 1) for line in seen.stdout.splitlines() if ":\t" in line)
    assert [
        fields[name].strip("0") for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")
    ] == [""] * 5
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2") and int(
        fields["Uid"].split()[0]
    ) >= 20_000
    assert seen.stderr.count("Read-only file system") == 2 and seen.stdout.endswith(
        "\n1\n/home:\n\n/root:\n"
    )  # one line: the head of an empty routing table
    assert tier == "docker" and guarantees >= {
        "filesystem",
        "network",
        "syscalls",
        "processes",
        "verifier",
        "view",
        "disk",
        "pids",
        "memory",
        "cpu",
    }


def test_the_system_call_filter_refuses_what_the_embedded_one_refuses(inside):
    from envs.rock.docker.limits import seccomp_profile
    from envs.rock.host import seccomp

    profile = json.loads(seccomp_profile())
    named = {name for rule in profile["syscalls"] for name in rule["names"]}
    assert named == set(seccomp.DENIED) | set(seccomp.ABSENT) | {
        "clone",
        "socket",
        "socketpair",
        "ioctl",
        "prlimit64",
    }
    numbers = (
        {
            "unshare": 272,
            "clone": 56,
            "bpf": 321,
            "io_uring": 425,
            "keyctl": 250,
            "ptrace": 101,
            "socket": 41,
            "socketpair": 53,
            "ioctl": 16,
        }
        if os.uname().machine == "x86_64"
        else {
            "unshare": 97,
            "clone": 220,
            "bpf": 280,
            "io_uring": 425,
            "keyctl": 219,
            "ptrace": 117,
            "socket": 198,
            "socketpair": 199,
            "ioctl": 29,
        }
    )
    calls = [
        ("unshare", "0x10000000"),
        ("clone", "0x10000011,0,0,0,0"),
        ("bpf", "0,0,0"),
        ("io_uring", "1,0"),
        ("keyctl", "0,-3,0"),
        ("ptrace", "0,0,0,0"),
        ("socket", "40,1,0"),
        ("socket", "16,3,0"),
        ("socket", "3,1,0"),
        ("socketpair", "2,1,0,0"),
        ("ioctl", "0,0x5412,0"),
        ("ioctl", "0,0x100005412,0"),
    ]
    program = "; ".join(
        f"$r = syscall({numbers[name]},{arguments}); print '{name} ', $r < 0 ? $!+0 : 'GOT', ' '"
        for name, arguments in calls
    )
    allowed = (
        f"; print syscall({numbers['socket']},1,1,0) > 0, syscall({numbers['socket']},2,1,0) > 0,"
        f" syscall({numbers['socket']},10,2,0) > 0"
    )
    refused = inside(
        lambda sandbox: sandbox.execute(
            f"perl -e {shlex.quote(program + allowed)}; echo > /dev/tcp/1.1.1.1/53 && echo GOT"
        )
    )
    assert refused.stdout.split() == [
        "unshare",
        "1",
        "clone",
        "1",
        "bpf",
        "1",
        "io_uring",
        "38",
        "keyctl",
        "1",
        "ptrace",
        "1",
        "socket",
        "97",
        "socket",
        "97",
        "socket",
        "97",
        "socketpair",
        "97",
        "ioctl",
        "1",
        "ioctl",
        "1",
        "111",
    ]
    assert "Connection refused" in refused.stderr


def test_what_cannot_be_enforced_is_refused(engine):
    async def start(**fields):
        await Sandbox(config(engine, **fields)).start()

    with pytest.raises(
        IsolationError, match="no runtime 'nowhere', only .*runc.*remedy: install nowhere"
    ):
        asyncio.run(start(runtime="nowhere"))
    with pytest.raises(SandboxStartError, match="has no image 'no/such:1'; pull it or build it"):
        asyncio.run(start(image="no/such:1"))
    assert containers() == []


def test_without_an_engine_the_probe_says_what_is_missing(monkeypatch):
    from envs.rock.docker.probe import probe_docker

    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    report = probe_docker()
    assert (
        report.tier is None
        and "nothing is at unix:///nonexistent" in report.missing[0].reason
        and "start dockerd" in report.missing[0].remedy
    )
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    assert "unix:// socket" in probe_docker().missing[0].reason


# Commands


def test_commands_tell_their_true_ends(inside):
    async def work(sandbox):
        plain = await sandbox.execute(
            "echo out; echo err >&2; pwd; echo $HOME $A; exit 7", env={"A": "b"}
        )
        others = [
            await sandbox.execute(command)
            for command in (
                "kill -9 $$",
                "no_such_program",
                "echo '{\"ExitCode\": 0}'; exit 9",
                "exec >&- 2>&-; sleep 0.2; exit 3",
                "kill -9 $PPID; exec >&- 2>&-; sleep 60",
            )
        ]
        return plain, [other.exit_code for other in others], (await sandbox.execute("\0")).exit_code

    plain, codes, unspeakable = inside(work)
    assert (
        (plain.stdout, plain.stderr, plain.exit_code)
        == ("out\n/workspace\n/workspace b\n", "err\n", 7)
        and plain.limits_hit == ()
        and not plain.truncated
    )
    assert codes == [137, 127, 9, 3, 137] and unspeakable == 126


def test_nothing_outlives_its_command_nor_the_time_limit(inside):
    seconds = f"8765{os.getpid()}"

    async def work(sandbox):
        before = await sandbox.execute(
            f"sleep {seconds} & setsid sleep {seconds} & (setsid sleep {seconds} &); echo there"
        )
        left = host_processes(seconds)
        began = time.monotonic()
        slow = await sandbox.execute(
            f"trap '' TERM INT; setsid sleep {seconds} & kill -STOP $!; sleep {seconds}",
            timeout=0.4,
        )
        return before, left, slow, host_processes(seconds), time.monotonic() - began

    before, left, slow, later, took = inside(work)
    assert before.stdout == "there\n" and left == later == 0
    assert (
        slow.timed_out and slow.exit_code == 137 and slow.limits_hit == ("timeout",) and took < 10
    )


def test_a_fork_bomb_and_a_memory_hog_are_contained_and_named(inside):
    async def work(sandbox):
        bomb = await sandbox.execute("bomb() { bomb | bomb & }; bomb; sleep 60", timeout=0.5)
        hog = await sandbox.execute("x=x; while :; do x=$x$x; done; echo $?")
        return bomb, hog, await sandbox.execute("echo well")

    bomb, hog, after = inside(work, pids=32, memory_mb=64)
    assert bomb.timed_out and "Resource temporarily unavailable" in bomb.stderr
    assert "memory" in hog.limits_hit and hog.exit_code == 137 and after.stdout == "well\n"


def test_a_flood_is_cut_and_ended(inside):
    result = inside(
        lambda sandbox: sandbox.execute("yes 'no end to this'; echo after", timeout=60),
        max_output_bytes=4096,
    )
    assert (
        len(result.stdout) == 4096
        and result.truncated
        and result.limits_hit == ("output",)
        and result.exit_code == 137
    )


def test_disks_are_limited_in_bytes_and_files(inside):
    async def work(sandbox):
        big = await sandbox.execute(
            "head -c 100M /dev/zero | split -b 1M - f; head -c 100M /dev/zero | split -b 1M -"
            " /tmp/f; du -scm . /tmp | tail -1 | cut -f1; rm -f f* /tmp/f*"
        )
        many = await sandbox.execute("for i in $(seq 300); do : > i$i || exit 4; done; echo all")
        return int(big.stdout), big.stderr, many.exit_code

    used, said, many = inside(work, disk_mb=8, inodes=200)
    assert 6 <= used <= 8 and "No space left" in said and many == 4


@pytest.mark.parametrize(
    "deed",
    [
        "chmod 0 . /tmp; ln -sfn /nowhere /workspace",
        "rm -rf /workspace /tmp . ..; mkdir -p run/rock; mkfifo sh bash",
        (
            "head -c 1G /dev/zero > full; head -c 1G /dev/zero > /tmp/full; head -c 1G /dev/zero >"
            " /dev/shm/full; chmod 0 ."
        ),
        "for n in $(seq 64); do kill -$n 1; done; kill -9 $PPID; kill -9 -1",
        (
            "echo x > /proc/1/mem; echo x > /proc/$PPID/mem; cat /proc/$PPID/environ; while :; do"
            " kill -9 -1; done"
        ),
        (
            "ulimit -n 4; ulimit -u 1; mkdir -m 0 -p a/b; b() { while :; do kill -USR1 1; done; };"
            " b & b & b"
        ),
    ],
)
def test_no_deed_of_the_agent_makes_the_next_command_or_the_verifier_fail(inside, deed):
    async def work(sandbox):
        await sandbox.execute(deed, timeout=1)
        following = await sandbox.execute("cd . && echo next")
        verified = await sandbox.verify("cd . && cat $VERIFIER_FILES/f", files={"f": b"graded"})
        return following.stdout, verified.stdout

    assert inside(work) == ("next\n", "graded")


def test_background_jobs_end_are_killed_and_are_interrupted(inside):
    async def work(sandbox):
        jobs = [
            await sandbox.spawn(command, timeout=limit)
            for command, limit in (
                ("sleep 0.2; echo done", 30),
                ("exit 9", 30),
                ("sleep 60", 0.5),
                ("sleep 60", 60),
                ("trap 'kill %1; echo heard; exit 5' INT; echo set; sleep 60 & wait", 30),
            )
        ]
        assert (
            jobs[3].running
            and (await sandbox.execute("echo beside")).stdout == "beside\n"
            and (await sandbox.get_status()).commands >= 1
        )
        await jobs[4].interrupt()
        return [
            await jobs[0].wait(),
            await jobs[1].wait(),
            await jobs[2].wait(),
            await jobs[3].kill(),
            await jobs[4].wait(),
        ]

    good, bad, slow, killed, interrupted = inside(work)
    assert (good.stdout, good.exit_code, bad.exit_code, slow.timed_out) == ("done\n", 0, 9, True)
    assert (killed.exit_code, killed.limits_hit) == (137, ("killed",)) and (
        interrupted.stdout,
        interrupted.exit_code,
    ) == ("set\nheard\n", 5)


def test_kill_all_ends_everything_and_files_stay(inside):
    seconds = f"8766{os.getpid()}"

    async def work(sandbox):
        running = asyncio.create_task(
            sandbox.execute(f"echo kept > f; setsid sleep {seconds} & sleep {seconds}")
        )
        session = await sandbox.create_session()
        while b"kept" not in await content(sandbox, "f"):
            await asyncio.sleep(0.01)
        await sandbox.kill_all()
        with pytest.raises(SandboxClosedError):
            await session.run("true")
        return await running, host_processes(seconds), await sandbox.read_file("f")

    killed, left, kept = inside(work)
    assert (killed.exit_code, killed.limits_hit, left, kept) == (137, ("killed",), 0, b"kept\n")


async def content(sandbox: Sandbox, path: str) -> bytes:
    try:
        return await sandbox.read_file(path)
    except SandboxFileError:
        return b""


def test_the_status_counts_what_is_used(inside):
    async def work(sandbox):
        before = await sandbox.get_status()
        await sandbox.execute("head -c 3000000 /dev/urandom > f; touch a b c")
        job = await sandbox.spawn("sleep 60 & sleep 60")
        await asyncio.sleep(0.2)
        return before, await sandbox.get_status(), await job.kill(), await sandbox.denials()

    before, after, _, denials = inside(work)
    assert (
        after.disk_bytes - before.disk_bytes >= 3_000_000
        and after.inodes - before.inodes == 4
        and after.cpu_seconds > before.cpu_seconds
    )
    assert (
        (after.commands, after.sessions, after.network_denials, denials) == (1, 0, 0, [])
        and after.pids >= 3
        and after.memory_bytes > 3_000_000
    )


# Sessions


def test_a_session_keeps_its_state_and_tells_its_shells_exit_codes(inside):
    async def work(sandbox):
        async with await sandbox.create_session({"A": "b"}) as session:
            await session.run("mkdir -p d; cd d; x=5; f() { echo f$x; }; sleep 50 & export y=7")
            state = await session.run(
                "pwd; f; bash -c 'echo $y $A'; jobs -p | wc -l; kill %1 && echo killed"
            )
            codes = [
                (await session.run(command)).exit_code
                for command in (
                    "true",
                    "(exit 77)",
                    "if",
                    "bash -c 'kill -9 $$'",
                    "printf '0 \\0'; false",
                )
            ]
            beside = await sandbox.execute("echo beside")
            streams = await session.run("echo a; echo b >&2; echo -n c")
            long = await session.run("head -c 300000 /dev/zero | tr '\\0' x; echo end >&2")
            ended = await session.run("echo bye; exit 3"), session.ended
            return state, codes, beside, streams, long, ended

    state, codes, beside, streams, long, (ended, over) = inside(work, max_output_bytes=1000)
    assert (
        state.stdout.split() == ["/workspace/d", "f5", "7", "b", "1", "killed"]
        and codes == [0, 77, 2, 137, 1]
        and beside.stdout == "beside\n"
    )
    assert (streams.stdout, streams.stderr, streams.truncated) == ("a\nc", "b\n", False) and (
        long.stdout,
        long.stderr,
        long.truncated,
    ) == ("x" * 1000, "end\n", True)
    assert (ended.stdout, ended.exit_code, over) == ("bye\n", 3, True)


def test_the_channel_of_a_sessions_exit_codes_is_out_of_reach_for_what_it_runs(inside):
    """Neither inherited nor to be found in /proc: the shell cannot be opened by its own user."""

    async def work(sandbox):
        async with await sandbox.create_session() as session:
            forge = (
                "for n in $(seq 3 255); do echo -ne '0 \\0' >&$n; done; for f in /proc/$PPID/fd/*"
                " /proc/[0-9]*/fd/*; do echo -ne '0 \\0' > $f; done; ls /proc/$PPID/fd/; ls"
                " /run/rock; exit 6"
            )
            return await session.run(
                f"bash -c {shlex.quote('{ ' + forge + '; } 2>/dev/null')}"
            ), await session.run("(exit 8)")

    forged, after = inside(work)
    assert (forged.exit_code, after.exit_code) == (6, 8) and "/proc" not in forged.stdout


def test_at_the_time_limit_the_command_dies_and_the_shell_and_its_older_jobs_stay(inside):
    async def work(sandbox):
        async with await sandbox.create_session() as session:
            await session.run("x=1; sleep 4343 & true")
            slow = await session.run("sleep 60; echo after $?", timeout=0.3)
            flood = await session.run("yes", timeout=30)
            later = await session.run("echo $x; jobs -r | wc -l")
            running = asyncio.create_task(session.run("x=kept; sleep 60; echo $? $x"))
            await asyncio.sleep(0.3)
            await session.interrupt()
            interrupted = await running
            spinning = await session.run("while :; do :; done", timeout=0.3)
            with pytest.raises(SandboxClosedError, match="create another session"):
                await session.run("true")
            return (
                slow,
                flood,
                later,
                interrupted,
                spinning,
                session.ended,
                await sandbox.execute("echo well"),
            )

    slow, flood, later, interrupted, spinning, ended, after = inside(work)
    assert (
        slow.timed_out
        and slow.limits_hit == ("timeout",)
        and slow.stdout == "after 137\n"
        and later.stdout.split() == ["1", "1"]
    )
    assert (
        flood.limits_hit == ("output",)
        and flood.truncated
        and interrupted.stdout == "130 kept\n"
        and not interrupted.timed_out
    )
    assert spinning.timed_out and spinning.exit_code == 137 and ended and after.stdout == "well\n"


def test_closing_a_session_ends_all_that_it_started(inside):
    seconds = f"8767{os.getpid()}"

    async def work(sandbox):
        async with await sandbox.create_session() as session:
            await session.run(
                f"sleep {seconds} & setsid sleep {seconds} & (setsid sleep {seconds} &); sleep 0.3"
            )
            began = host_processes(seconds)
        return began, (await sandbox.get_status()).sessions, host_processes(seconds)

    began, sessions, left = inside(work)
    assert began >= 3 and (sessions, left) == (0, 0)


# Files


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
    assert contents == names and up.files == 2 and up.skipped == ("deep/link",)
    assert ran.stdout == "ran\ndeep/er/data.bin 644\nrun.sh 755\nrun.sh.old 644\nnew"
    assert (
        down.files == 2
        and sorted(down.skipped) == ["l", "p"]
        and (tmp_path / "target/deep/er/data.bin").read_bytes() == data
    )
    assert (tmp_path / "target/run.sh").stat().st_mode & 0o7777 == 0o755
    assert listed == {
        "deep": "directory",
        "deep/er": "directory",
        "deep/er/data.bin": "file",
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
                ("read", lambda: sandbox.read_file(path, limit=1000)),
                ("write", lambda: sandbox.write_file(path, "x")),
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


# Copies of its files


def test_a_snapshot_outlives_its_sandbox_and_many_start_from_it(engine):
    async def work():
        async with Sandbox(config(engine)) as first:
            await first.execute(
                "mkdir -p a/b; echo one > a/b/f; ln -s a/b/f link; ln a/b/f hard; chmod 640 a/b/f;"
                " mkdir c; echo deep > c/g; chmod 0 c/g c; touch -d 2001-02-03 old; echo t >"
                " /tmp/t; truncate -s 5M sparse; echo odd > 'odd\nname'"
            )
            job = await first.spawn("sleep 60")
            with pytest.raises(SandboxError, match="a command is running"):
                await first.snapshot()
            await job.kill()
            snapshot = await first.snapshot()
            await first.execute("echo two > a/b/f; rm old")
            changed = await first.execute("cat link; ls")
            await first.restore(snapshot)
            restored = await first.execute("cat link; ls old")
        forks = [Sandbox(config(engine), snapshot) for _ in range(2)]
        await asyncio.gather(*(fork.start() for fork in forks))
        seen = [
            await fork.execute(
                "cat link hard /tmp/t; stat -c '%a %Y' a/b/f old | tr '\\n' ' '; wc -c < sparse;"
                " cat odd*; chmod 700 c; cat c/g; echo more >> a/b/f; cat link"
            )
            for fork in forks
        ]
        await asyncio.gather(*(fork.stop() for fork in forks))
        await snapshot.delete()
        with pytest.raises(SandboxStartError, match="was deleted"):
            await Sandbox(config(engine), snapshot).start()
        return changed, restored, seen

    changed, restored, seen = asyncio.run(asyncio.wait_for(work(), 60))
    assert (
        changed.stdout.startswith("two\n")
        and "old" not in changed.stdout
        and restored.stdout == "one\nold\n"
    )
    for one in seen:
        lines = one.stdout.splitlines()
        assert (
            lines[:3] == ["one", "one", "t"]
            and "640 " in lines[3]
            and "644 981" in lines[3]
            and lines[3].endswith("5242880")
            and lines[4:] == ["odd", "deep", "one", "more"]
        ), one
    assert containers() == []


# The verifier

SECRET = "the-expected-answer-4711"


def test_the_verifier_comes_after_the_agent_in_a_place_of_its_own(inside):
    """Programs of the agent's that the verifier runs can read neither its script, from its memory
    or its descriptors, nor change its files or the agent's.
    """
    spy = f"""
for f in /proc/[0-9]*/cmdline /proc/[0-9]*/environ /proc/[0-9]*/mem /proc/$PPID/fd/* /workspace/answer /tmp/* /run/rock/*; do
  head -c 100000 "$f" 2>/dev/null
done | tr '\\0' '\\n' | grep -c {SECRET.replace("-", "[-]")}
cat; echo x > $VERIFIER_FILES/f; rm -f $VERIFIER_FILES/f; echo tampered > answer"""

    async def work(sandbox):
        await sandbox.write_files({"spy": spy, "answer": "right"})
        await sandbox.execute(
            "setsid bash -c 'while :; do echo tampered > /tmp/x; done' & cat > /tmp/bashrc; echo"
            " done"
        )
        result = await sandbox.verify(
            f"want={SECRET}; bash spy 2>/dev/null; (bash spy 2>/dev/null); [ $want = {SECRET} ] &&"
            " cat $VERIFIER_FILES/f answer; ls -A /tmp; exit 4",
            files={"f": b"graded "},
        )
        slow = await sandbox.verify("sleep 60", timeout=0.3)
        return (
            result,
            slow,
            await sandbox.read_file("answer"),
            (await sandbox.execute("ls -A $VERIFIER_FILES /run/rock/files; echo gone")).stdout,
        )

    result, slow, answer, after = inside(work, env={"BASH_ENV": "/tmp/bashrc"})
    assert (
        (result.stdout, result.exit_code) == ("0\n0\ngraded tampered\n", 4)
        and slow.timed_out
        and answer == b"right"
        and "gone" in after
        and "f" not in after.split()
    )


def test_a_verifier_may_keep_what_it_writes(inside):
    async def work(sandbox):
        await sandbox.execute("echo old > f; echo x > gone; mkdir d; echo y > d/g; chmod 0 d/g d")
        await sandbox.verify("echo new > f; rm gone; chmod 700 d; touch left", keep=True)
        await sandbox.verify("echo lost > f")
        return await sandbox.execute("cat f; ls; ls d; echo more >> f")

    assert inside(work).stdout == "new\nd\nf\nleft\ng\n"


def test_a_sandbox_can_be_committed_to_an_image_and_an_images_own_workspace_is_there(engine):
    from envs.rock.docker.engine import engine as docker_engine

    client = docker_engine().client
    place = client.create_container(engine.image, ["sh"])["Id"]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in ("workspace", "workspace/of"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("workspace/of/image"))
    client.put_archive(place, "/", content.getvalue())
    client.commit(place, "rock-test/filled", "1")
    client.remove_container(place)

    async def work():
        async with Sandbox(config(engine, image="rock-test/filled:1")) as first:
            begun = (await first.execute("ls -R; echo mine >> of/image; echo t > /tmp/t")).stdout
            await first.commit("rock-test/committed:2")
            await first.execute("rm -r of")
            async with Sandbox(config(engine, image="rock-test/committed:2")) as second:
                seen = (
                    await second.execute("cat of/image /tmp/t; rm of/image; echo two > /tmp/t")
                ).stdout
                await second.commit("rock-test/committed")
        async with Sandbox(config(engine, image="rock-test/committed:latest")) as third:
            return begun, seen, (await third.execute("ls of; cat /tmp/t")).stdout

    assert asyncio.run(asyncio.wait_for(work(), 60)) == (
        ".:\nof\n\n./of:\nimage\n",
        "mine\nt\n",
        "two\n",
    )
    assert containers() == []
