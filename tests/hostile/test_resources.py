"""Hostile commands: limits hold, and a struck limit is told by its name."""

import asyncio
import os

import pytest

from envs.rock import Sandbox
from tests.hostile.sandboxes import execute, host_processes, inside, make_config, needs, python


def test_a_memory_hog_dies_and_the_reason_is_told(tier):
    needs(tier, "memory")
    hog = python("data = bytearray(1)\nwhile True: data += bytes(1 << 24)")
    if tier == "landlock":  # there each process also has a limit of its own, so it takes several
        hog = (
            "for i in 1 2 3 4; do "
            + python("import time; data = b'x' * (40 << 20); time.sleep(1)")
            + " & done; wait"
        )

    async def work(sandbox):
        return await sandbox.execute(hog + "; echo $?"), await sandbox.execute("echo alive")

    result, after = inside(make_config(tier, memory_mb=64, disk_mb=8), work)
    assert "memory" in result.limits_hit and after.stdout == "alive\n"


@pytest.mark.parametrize("place", ["/dev/shm", "/tmp", "/workspace"])
def test_files_kept_in_memory_are_bounded_too(place):
    result = execute(
        make_config("namespaces", disk_mb=4),
        f"head -c 100M /dev/zero | split -b 2M - {place}/f; du -sm {place} | cut -f1",
    )
    assert int(result.stdout) <= 16 and "space" in result.stderr


def test_a_fork_bomb_is_contained(tier):
    needs(tier, "pids")

    mark = f"bomb-{os.getpid()}"  # is in the command line of each process that comes of it

    async def work(sandbox):
        bomb = await sandbox.execute(
            f": {mark}; bomb() {{ bomb | bomb & }}; bomb; sleep 0.5; echo end", timeout=3
        )
        return bomb, await sandbox.execute("echo alive")

    bomb, after = inside(make_config(tier, pids=32), work)
    assert after.stdout == "alive\n" and (
        "pids" in bomb.limits_hit
        or "Resource temporarily unavailable" in bomb.stderr
        or bomb.timed_out
    )
    assert host_processes(mark) == []


def test_a_spinning_command_gets_its_share_of_processor_time_and_no_more(tier):
    needs(tier, "cpu")
    spin = (
        "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end:"
        " pass\nprint(time.process_time())"
    )
    assert float(execute(make_config(tier, cpus=0.25), python(spin)).stdout) < 0.6


def test_one_sandboxs_processes_are_not_counted_against_another():
    """Trap 2: RLIMIT_NPROC set outside the user namespace counts over all sandboxes of an id."""

    async def work():
        async with (
            Sandbox(make_config("namespaces", pids=40)) as one,
            Sandbox(make_config("namespaces", pids=40)) as two,
        ):
            command = "for i in $(seq 25); do sleep 1 & done; wait; echo all"
            return await asyncio.gather(one.execute(command), two.execute(command))

    assert [(result.stdout, result.stderr) for result in asyncio.run(work())] == [("all\n", "")] * 2


def test_a_disk_full_by_bytes_is_an_error_of_the_command_and_can_be_cleaned(tier):
    async def work(sandbox):
        full = await sandbox.execute(
            "for i in 1 2 3 4 5 6 7 8; do head -c 1M /dev/urandom > f$i || exit 3; done; sleep 60"
        )
        # A command has 0.1 s to make room before it is ended as the first one was: where the
        # machine is busy, that may be too little to start `rm` in.
        while (after := await sandbox.execute("rm -f f*; echo x > small; cat small")).limits_hit:
            continue
        return full, after

    full, after = inside(make_config(tier, disk_mb=4), work)
    assert (
        ("No space left" in full.stderr) if tier != "landlock" else (full.limits_hit == ("disk",))
    )
    assert after.stdout == "x\n"


def test_a_disk_full_by_inodes_is_an_error_of_the_command(tier):
    result = execute(
        make_config(tier, inodes=100), "for i in $(seq 500); do : > f$i || exit 4; done; sleep 60"
    )
    assert result.exit_code == 4 if tier != "landlock" else result.limits_hit == ("disk",)


@pytest.mark.parametrize(
    "flood", ["yes 'no end to this'", "cat /dev/zero", "tr '\\0' '\\377' < /dev/zero"]
)  # lines; no line and all NUL; no UTF-8
def test_a_flood_of_output_is_cut_and_ended(tier, flood):
    result = execute(
        make_config(tier, max_output_bytes=4096),
        f"{flood} | head -c 1000000000; echo after >&2",
        timeout=60,
    )
    assert (
        len(result.stdout) == 4096
        and result.truncated
        and result.cut[0] > 60_000_000
        and result.limits_hit == ("output",)
        and result.exit_code == 137
    )


def test_descriptors_and_core_files_are_limited(tier):
    exhaust = "import os\ntry:\n  while True: n = os.dup(0)\nexcept OSError: print(n)"
    result = execute(
        make_config(tier, open_files=96),
        f"{python(exhaust)}; {python('import os; os.abort()')}; ls",
    )
    assert result.stdout == "95\n"


def test_a_busy_sibling_is_not_disturbed(tier):
    async def work():
        async with Sandbox(make_config(tier)) as calm, Sandbox(make_config(tier)) as wild:
            await calm.write_file("f", "mine")
            steady = asyncio.create_task(
                calm.execute("for i in $(seq 20); do sleep 0.05; cat f; done")
            )
            await wild.execute(
                "kill -9 -1; echo theirs > /workspace/f; echo theirs > /tmp/f; bomb() { bomb | bomb"
                " & }; bomb; sleep 1",
                timeout=2,
            )
            return await steady, await calm.read_file("f")

    result, content = asyncio.run(asyncio.wait_for(work(), 180))
    assert (result.stdout, result.exit_code, content) == ("mine" * 20, 0, b"mine")


@pytest.mark.parametrize(
    "deed",
    [
        "chmod 0 . /tmp",
        "rm -rf /workspace /tmp . ..; rmdir . /workspace /tmp",
        "mv /workspace /elsewhere; mv . ../x",
        "ln -sfn /nowhere /workspace; ln -s . self",
        "head -c 1G /dev/zero > full; head -c 1G /dev/zero > /tmp/full",
        "for i in $(seq 5000); do : > i$i || break; done",
        "setfattr -n user.x -v y .; chattr +i .",
        "mkfifo bash env sh; chmod 0 *",
        "ulimit -n 4; ulimit -u 1; ulimit -f 1; ulimit -v 1",
        "kill -9 $PPID; kill -9 1; kill -STOP 1; kill -9 -1",
        "exec >&- 2>&-; exit 3",
        "mkdir -m 0 -p a/b; mkdir $(printf 'x%.0s' $(seq 250))",
        "mkdir -p run/verifier proc dev tmp; mount -t tmpfs x /tmp",
        "chmod -R 7777 .; umask 777; : > f",
    ],
)
def test_no_deed_of_the_agent_makes_the_next_command_or_the_verifier_fail(tier, deed):
    """Else a failing agent could turn its failure into a fault of ours, which is masked."""

    async def work(sandbox):
        await sandbox.execute(deed, timeout=3)
        following = await sandbox.execute("cd . && echo next")
        verified = await sandbox.verify("cd . && cat $VERIFIER_FILES/f", files={"f": b"graded"})
        return following.stdout, verified.stdout

    assert inside(make_config(tier), work) == ("next\n", "graded")
