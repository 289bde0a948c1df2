"""Sessions of the Docker backend."""

import asyncio
import os
import shlex

import pytest

from envs.rock import (
    SandboxClosedError,
)
from tests.processes import host_processes

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


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
