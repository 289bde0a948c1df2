"""Commands and jobs of the Docker backend."""

import asyncio
import os

import pytest

from envs.rock import (
    Sandbox,
    SandboxClosedError,
    SandboxFileError,
)
from tests.processes import host_processes

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


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
        slow = await sandbox.execute(
            f"trap '' TERM INT; setsid sleep {seconds} & kill -STOP $!; sleep {seconds}",
            timeout=0.4,
        )
        return before, left, slow, host_processes(seconds)

    before, left, slow, later = inside(work)
    assert before.stdout == "there\n" and left == later == 0
    assert slow.timed_out and slow.exit_code == 137 and slow.limits_hit == ("timeout",)


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
