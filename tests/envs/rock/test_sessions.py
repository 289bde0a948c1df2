"""Shells that live on, commands in the background, and what a sandbox says of itself."""

import asyncio
import os
import pathlib
import shlex
import signal

import pytest

from envs.rock import (
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxFileError,
    SyncSandbox,
    probe,
)
from envs.rock.embedded import zygote_client
from tests.envs.rock.waiting import until_exists, until_running
from tests.processes import host_processes

# `sleep NAP` takes longer than a test may, and is found among this machine's processes: no other
# run of these tests has it.
NAP = f"600.{os.getpid()}"


@pytest.fixture(scope="module", autouse=True)
def own_zygote():
    """Bring another zygote, without what tests of other files may have left running."""
    zygote_client.shut_down()


@pytest.fixture(params=["namespaces", "landlock"])
def inside(request):
    tier = request.param
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")

    def run(work, **fields):
        async def main():
            async with Sandbox(
                SandboxConfig(isolation="best_available", tier=tier, **fields)
            ) as sandbox:
                return await work(sandbox)

        return asyncio.run(asyncio.wait_for(main(), 180))

    return run


def in_session(inside, work, **fields):
    async def with_session(sandbox):
        async with await sandbox.create_session() as session:
            return await work(sandbox, session)

    return inside(with_session, **fields)


def test_a_cancelled_command_leaves_its_session_usable_and_none_behind(inside):
    async def work(sandbox, session):
        await session.run("X=1")
        for command in (f"echo lost; sleep {NAP}", f"trap '' INT TERM; echo lost; sleep {NAP}"):
            running = asyncio.create_task(session.run(command))
            await asyncio.sleep(0.3)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert (await session.run("echo $X")).stdout == "1\n"
        running = asyncio.create_task(session.run(f"sleep {NAP}; sleep {NAP}"))
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await session.close()
        return (await sandbox.get_status()).sessions

    assert in_session(inside, work) == 0


def test_directory_variables_functions_and_background_processes_stay(inside):
    async def work(sandbox, session):
        await session.run("mkdir -p d; cd d; x=5; f() { echo f$x; }; sleep 50 & export y=7")
        return await session.run(
            "pwd; f; bash -c 'echo $y'; jobs -p | wc -l; kill %1 && echo killed"
        )

    result = in_session(inside, work)
    assert (
        result.stdout.split()[0].endswith("/d")
        and result.stdout.split()[1:] == ["f5", "7", "1", "killed"]
        and result.exit_code == 0
    )


@pytest.mark.parametrize(
    "command, code",
    [
        ("true", 0),
        ("false", 1),
        ("(exit 77)", 77),
        ("no_such_program", 127),
        ("if", 2),
        ("kill -9 $BASHPID", 137),
        ("bash -c 'kill -9 $$'", 137),
        ("set -e; (exit 4) || true", 0),
        ("false\n\n# a remark", 1),
        ("printf '0\\0'; false", 1),
    ],
)
def test_exit_codes_are_the_shells(inside, command, code):
    async def work(sandbox, session):
        return await session.run(command)

    assert in_session(inside, work).exit_code == code


def test_streams_are_kept_apart_and_cut_and_belong_to_their_command(inside):
    async def work(sandbox, session):
        return [
            await session.run(command)
            for command in (
                "echo a; echo b >&2",
                "head -c 5000 /dev/zero | tr '\\0' x",
                "echo -n c",
                "",
            )
        ]

    first, long, third, nothing = in_session(inside, work, max_output_bytes=1000)
    assert (
        (first.stdout, first.stderr) == ("a\n", "b\n")
        and long.stdout == "x" * 1000
        and long.truncated
    )
    assert (third.stdout, third.truncated, nothing.stdout, nothing.exit_code) == ("c", False, "", 0)


def test_large_output_does_not_block_the_shell(inside):
    async def work(sandbox, session):
        return await session.run("head -c 3000000 /dev/zero; echo end >&2")

    result = in_session(inside, work)
    assert result.truncated and result.stderr == "end\n" and result.exit_code == 0


def test_at_the_time_limit_the_command_dies_and_the_shell_and_its_older_jobs_stay(inside):
    async def work(sandbox, session):
        await session.run("x=1; sleep 4343 & true")
        slow = await session.run("sleep 600; echo after $?", timeout=1)
        return slow, await session.run("echo $x; jobs -r | wc -l")

    slow, after = in_session(inside, work)
    assert (
        slow.timed_out
        and slow.limits_hit == ("timeout",)
        and slow.stdout == "after 137\n"
        and after.stdout.split() == ["1", "1"]
    )


def test_a_shell_that_does_not_come_back_ends_and_says_so(inside):
    async def work(sandbox, session):
        spinning = await session.run("while :; do :; done", timeout=0.3)
        with pytest.raises(SandboxClosedError, match="create another session"):
            await session.run("true")
        async with await sandbox.create_session() as another:
            return spinning, session.ended, await another.run("echo well")

    spinning, ended, after = in_session(inside, work)
    assert spinning.timed_out and spinning.exit_code == 137 and ended and after.stdout == "well\n"


@pytest.mark.parametrize(
    "command, code",
    [
        ("echo bye; exit 3", 3),
        ("exec bash -c 'exit 9'", 9),
        ("kill -9 $$", 137),
        ("set -e; false", 1),
    ],
)
def test_a_command_that_ends_the_shell_ends_the_session_with_its_code(inside, command, code):
    async def work(sandbox, session):
        result = await session.run(command)
        return result, session.ended, await sandbox.execute("echo well")

    result, ended, after = in_session(inside, work)
    assert result.exit_code == code and ended and after.stdout == "well\n"


def test_an_interrupt_ends_what_runs_and_nothing_else(inside):
    async def work(sandbox, session):
        running = asyncio.create_task(session.run(f"x=kept; sleep {NAP}; echo $? $x", timeout=900))
        await until_running(f"sleep\0{NAP}")
        await session.interrupt()
        return await running

    result = in_session(inside, work)
    assert result.stdout == "130 kept\n"


def test_no_process_of_a_session_finds_the_pipe_that_carries_exit_codes(inside):
    program = (
        "import os\nfor n in range(3, 256):\n    try: os.write(n, b'0\\\\0')\n    except OSError:"
        " continue\n    print(n)"
    )

    async def work(sandbox, session):
        return await session.run(f"python3 -c {shlex.quote(program)}; (exit 6)")

    result = in_session(inside, work)
    assert result.stdout == "" and result.exit_code == 6


def test_a_flood_in_a_session_is_ended_and_the_shell_stays(inside):
    async def work(sandbox, session):
        return await session.run("yes", timeout=30), await session.run("echo well")

    flood, after = in_session(inside, work)
    assert flood.limits_hit == ("output",) and flood.truncated and after.stdout == "well\n"


def test_sessions_are_apart_and_run_beside_each_other_and_beside_commands(inside):
    async def work(sandbox):
        one, two = await sandbox.create_session(), await sandbox.create_session({"A": "b"})
        await asyncio.gather(one.run("x=1; cd /tmp 2>/dev/null || cd $TMPDIR"), two.run("x=2"))
        slow = asyncio.create_task(one.run(f"sleep {NAP}; echo $x", timeout=900))
        await until_running(f"sleep\0{NAP}")
        beside = await two.run("echo $x $A"), await sandbox.execute("echo here")
        await one.interrupt()
        return [result.stdout for result in (*beside, await slow)]

    assert inside(work) == ["2 b\n", "here\n", "1\n"]


def test_a_session_ends_with_kill_all_and_before_the_verifier(inside):
    async def work(sandbox):
        session = await sandbox.create_session()
        await session.run("echo kept > f; sleep 4344 &")
        verified = await sandbox.verify("cat f")
        with pytest.raises(SandboxClosedError):
            await session.run("true")
        return verified.stdout, (await sandbox.execute("cat f")).stdout

    assert inside(work) == ("kept\n", "kept\n")


def test_closing_a_session_ends_all_that_it_started(inside):
    seconds = f"4345{os.getpid()}"

    async def work(sandbox):
        async with await sandbox.create_session() as session:
            await session.run(
                f"sleep {seconds} & setsid sleep {seconds} & (setsid sleep {seconds} &)"
            )
            await until_running(f"sleep\0{seconds}", 3)
        return (await sandbox.get_status()).sessions, host_processes(f"sleep\0{seconds}")

    assert inside(work) == (0, 0)


def test_background_jobs_tell_their_true_ends(inside):
    async def work(sandbox):
        good, bad, slow, endless = [
            await sandbox.spawn(command, timeout=limit)
            for command, limit in (
                ("sleep 0.2; echo done", 30),
                ("exit 9", 30),
                ("sleep 60", 0.5),
                ("sleep 60", 60),
            )
        ]
        assert (
            endless.running
            and (await sandbox.execute("echo beside")).stdout == "beside\n"
            and (await sandbox.get_status()).commands >= 1
        )
        return [
            await good.wait(),
            await bad.wait(),
            await slow.wait(),
            await endless.kill(),
            await good.wait(),
        ]

    good, bad, slow, killed, again = inside(work)
    assert (
        (good.stdout, good.exit_code, bad.exit_code) == ("done\n", 0, 9)
        and slow.timed_out
        and again == good
    )
    assert killed.exit_code == 137 and killed.limits_hit == ("killed",)


def test_a_job_is_interrupted(inside):
    async def work(sandbox):
        job = await sandbox.spawn("trap 'echo heard; exit 5' INT; touch set; sleep 60 & wait")
        await until_exists(sandbox, "set")
        await job.interrupt()
        return await job.wait()

    result = inside(work)
    assert (result.stdout, result.exit_code) == ("heard\n", 5)


def test_the_status_counts_what_is_used(inside):
    async def work(sandbox):
        before = await sandbox.get_status()
        await sandbox.execute("head -c 3000000 /dev/urandom > f; touch a b c")
        job = await sandbox.spawn(f"sleep {NAP} & sleep {NAP}")
        await until_running(f"sleep\0{NAP}", 2)
        return before, await sandbox.get_status(), await job.kill(), sandbox.is_alive()

    before, after, _, alive = inside(work)
    assert (
        after.disk_bytes - before.disk_bytes >= 3_000_000
        and after.inodes - before.inodes == 4
        and after.cpu_seconds > before.cpu_seconds
    )
    assert (after.commands, after.sessions, alive) == (1, 0, True) and (
        after.pids is None or after.pids >= 2
    )
    assert after.memory_bytes is None or after.memory_bytes > 0


def test_a_command_that_ended_as_the_verifier_began_is_not_taken_for_it(inside):
    """Its end and the request meet in one turn of the holder, and the verifier gets the descriptor
    that it had.
    """

    async def work(sandbox):
        job = await sandbox.spawn("until [ -e end ]; do sleep 0.05; done; exec sleep 0.5")
        zygote = zygote_client._zygote._process.pid
        (holder,) = [
            int(word)
            for word in pathlib.Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        ]
        await sandbox.write_file("end", "")  # it ends while the holder is stopped
        os.kill(holder, signal.SIGSTOP)
        verifying = asyncio.create_task(sandbox.verify("sleep 600", timeout=0.3))
        await asyncio.sleep(1.2)
        os.kill(holder, signal.SIGCONT)
        return await verifying, await job.wait()

    verified, ended = inside(work)
    assert verified.timed_out and ended.exit_code == 0


def test_more_than_a_sandbox_holds_is_an_error_and_harms_nothing(inside):
    async def work(sandbox):
        sessions = [await sandbox.create_session() for _ in range(8)]
        refused = await asyncio.gather(sandbox.create_session(), return_exceptions=True)
        jobs = [await sandbox.spawn("sleep 60") for _ in range(16)]
        too_many = await asyncio.gather(sandbox.execute("true"), return_exceptions=True)
        await jobs[0].kill()
        return (
            refused,
            too_many,
            await sandbox.execute("echo well"),
            [await session.run("echo $((1 + 1))") for session in sessions],
        )

    (refused,), (too_many,), after, answers = inside(work)
    assert (
        "at most 8 sessions" in str(refused)
        and "16 commands are running" in str(too_many)
        and after.stdout == "well\n"
    )
    assert {answer.stdout for answer in answers} == {"2\n"}


def test_a_port_of_the_sandbox_can_be_reached_from_here():
    if (report := probe(tier="namespaces")).tier is None:
        pytest.skip(f"no namespaces tier here: {report.missing[0].reason}")
    server = (
        "import socket\ns = socket.create_server(('127.0.0.1', 7777))\nprint('up',"
        " flush=True)\nwhile True:\n c, _ = s.accept()\n c.sendall(c.recv(100)[::-1]); c.close()"
    )

    async def work():
        async with Sandbox(SandboxConfig(isolation="best_available")) as sandbox:
            closed = await sandbox.expose_port(7777)
            reader, writer = await asyncio.open_connection(*closed)
            nothing = await asyncio.wait_for(reader.read(), 60)  # nobody listens yet
            writer.close()
            await sandbox.write_files({"s.py": server, "log": ""})
            await sandbox.spawn("python3 s.py > log")
            while b"up" not in await sandbox.read_file("log"):
                await asyncio.sleep(0.01)
            address = await sandbox.expose_port(7777)
            answers = []
            for word in (b"abc", b"12345"):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(word)
                answers.append(await asyncio.wait_for(reader.read(), 60))
                writer.close()
        with pytest.raises(OSError):  # the door closes with its sandbox
            await asyncio.open_connection(*address)
        return nothing, answers

    assert asyncio.run(asyncio.wait_for(work(), 180)) == (b"", [b"cba", b"54321"])


def test_a_caller_without_an_event_loop_gets_the_same(tmp_path):
    if (report := probe()).tier is None:
        pytest.skip(f"no sandbox here: {report.missing[0].reason}")
    with SyncSandbox(SandboxConfig(isolation="best_available")) as sandbox:
        assert (
            sandbox.execute("echo hi", timeout=5).stdout == "hi\n"
            and sandbox.is_alive()
            and sandbox.tier
        )
        sandbox.write_files({"a/f": "text", "g": b"\0"})
        assert (
            sandbox.read_file("a/f") == b"text" and sandbox.download("a", tmp_path / "a").files == 1
        )
        with sandbox.create_session() as session:
            session.run("x=5")
            assert session.run("echo $x").stdout == "5\n"
        job = sandbox.spawn("sleep 60")
        assert job.running and job.kill().exit_code == 137
        with sandbox.fork() as copy:
            assert copy.execute("cat a/f; rm a/f").stdout == "text"
        assert sandbox.read_file("a/f") == b"text"
        with pytest.raises(SandboxFileError):
            sandbox.read_file("nothing")
        with pytest.raises(AttributeError, match="no synchronous form"):
            sandbox.read_stream("g")
    assert not sandbox.is_alive()
