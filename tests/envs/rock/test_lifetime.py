"""Nothing leaks and nothing outlives its owner: descriptors, processes, cgroups, directories."""

import asyncio
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter

import pytest

from envs.rock import (
    CommandResult,
    Sandbox,
    SandboxError,
    SandboxStartError,
    sync,
)
from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups
from tests.envs.rock.lives import (
    config_of,
    descendants,
    echo,
    eventually,
    groups_of_zygote,
    zygote_pid,
)
from tests.paths import ROOT
from tests.processes import host_processes, open_files

REPOSITORY = str(ROOT)
MARK = f"31337{os.getpid()}"  # of what sleeps in sandboxes here: no other run has it
STATE = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")


@pytest.fixture(scope="module", autouse=True)
def own_zygote():
    """Bring another zygote, without what tests of other files may have left running."""
    zygote_client.shut_down()


def _opened(before: tuple[Counter, Counter]) -> list[str]:
    """Return what this process or its zygote has opened since `before`, and not closed."""
    return [*((open_files() - before[0]) + (open_files(zygote_pid()) - before[1])).elements()]


def _mounts() -> set[str]:
    """Return the mounts of this machine that are of sandboxes."""
    lines = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if "rock" in line}


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_many_sandboxes_leave_nothing_behind(tier):
    config = config_of(tier)

    async def one(number):
        async with Sandbox(config) as sandbox:
            return (await sandbox.execute(f"echo {number} > f; sleep 100 & cat f")).stdout

    async def all_of_them():
        return [result for _ in range(4) for result in await asyncio.gather(*map(one, range(15)))]

    asyncio.run(one(0))
    files = open_files(), open_files(zygote_pid())
    threads, mounts = set(threading.enumerate()), _mounts()
    assert not descendants(zygote_pid()) and not groups_of_zygote()
    assert (
        asyncio.run(asyncio.wait_for(all_of_them(), 240))
        == [f"{number}\n" for number in range(15)] * 4
    )
    assert _opened(files) == []
    assert not descendants(zygote_pid()) and not groups_of_zygote()
    assert not set(threading.enumerate()) - threads and not _mounts() - mounts


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_starts_and_stops_that_race_leave_nothing_and_raise_nothing_of_their_own(tier):
    config = config_of(tier)

    async def one(number):
        sandbox, delay = Sandbox(config), 0.0015 * (number % 12)
        starting = asyncio.create_task(sandbox.start())
        await asyncio.sleep(delay)
        if number % 3 == 0:
            starting.cancel()
        running = asyncio.create_task(sandbox.execute("sleep 60"))
        ends = await asyncio.gather(
            starting, running, sandbox.stop(), sandbox.stop(), return_exceptions=True
        )
        await sandbox.stop()
        return sandbox.is_alive(), [
            end
            for end in ends
            if not isinstance(
                end, (type(None), CommandResult, asyncio.CancelledError, SandboxError)
            )
        ]

    async def all_of_them():
        return [result for _ in range(3) for result in await asyncio.gather(*map(one, range(12)))]

    asyncio.run(one(11))
    before = open_files(), open_files(zygote_pid())
    assert asyncio.run(asyncio.wait_for(all_of_them(), 120)) == [(False, [])] * 36
    assert eventually(lambda: not descendants(zygote_pid()) and not groups_of_zygote())
    assert eventually(lambda: not _opened(before))


@pytest.mark.slow
def test_a_thousand_sandboxes_leave_nothing_behind():
    config = config_of()

    async def churn():
        for _ in range(1000):
            async with Sandbox(config) as sandbox:
                await sandbox.execute("true")

    asyncio.run(churn())
    before = open_files(), open_files(zygote_pid())
    asyncio.run(churn())
    assert _opened(before) == [] and not descendants(zygote_pid())


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_directories_without_permissions_are_removed_too(tier):
    async def work():
        async with Sandbox(config_of(tier)) as sandbox:
            await sandbox.execute(
                "mkdir -p a/b; ln -s / a/b/root; touch a/b/f; chmod 0 a/b a; ln -s / l; cd $TMPDIR"
                " && mkdir -m 0 t"
            )
            return str(sandbox._backend._slot)

    slot = asyncio.run(work())  # others may run sandboxes here, too
    assert slot not in os.listdir(STATE)


@pytest.mark.parametrize("call", ["execute", "session", "request"])
def test_an_answer_that_came_while_this_process_was_busy_is_taken(call, monkeypatch):
    """A trainer that compiles for longer than the wait may last is no fault of the sandbox."""

    async def work():
        async with Sandbox(config_of()) as sandbox:
            await sandbox.execute("true", timeout=60)
            # Each waits for 0.1 s; the limit of the command itself is far away all the same.
            grace = 0.1 - 60 if call == "execute" else 0.1
            monkeypatch.setattr("envs.rock.embedded.commands.REPLY_GRACE_SECONDS", grace)
            if call == "execute":
                waiting = asyncio.create_task(sandbox.execute("echo hi", timeout=60))
            elif call == "session":
                waiting = asyncio.create_task(sandbox.create_session())
            else:
                waiting = asyncio.create_task(
                    sandbox._backend._channel.request({"op": "kill"}, (), 0.1)
                )
            await asyncio.sleep(0)
            answered, _, _ = select.select([sandbox._backend._channel._socket], [], [], 60)
            assert answered
            time.sleep(0.5)
            return await waiting

    result = asyncio.run(asyncio.wait_for(work(), 180))
    assert call != "execute" or result.stdout == "hi\n"


def test_loops_in_many_threads_share_one_zygote():
    config = config_of()
    results = []

    def thread():
        results.append(asyncio.run(echo(config)))

    asyncio.run(echo(config))
    zygote = zygote_pid()
    threads = [threading.Thread(target=thread) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    assert results == ["hi\n"] * 6 and zygote_pid() == zygote


def test_a_hundred_sandboxes_live_at_once():
    config = config_of()

    async def work():
        sandboxes = [Sandbox(config) for _ in range(100)]
        await asyncio.gather(*(sandbox.start() for sandbox in sandboxes))
        results = await asyncio.gather(
            *(
                sandbox.execute(f"echo {number} > f; cat f")
                for number, sandbox in enumerate(sandboxes)
            )
        )
        await asyncio.gather(*(sandbox.stop() for sandbox in sandboxes))
        return [result.stdout for result in results]

    assert asyncio.run(asyncio.wait_for(work(), 120)) == [f"{number}\n" for number in range(100)]


def test_synchronous_callers_share_a_background_loop():
    sandbox = Sandbox(config_of())
    sync.run(sandbox.start(), 60)
    try:
        assert sync.run(sandbox.execute("echo hi"), 60).stdout == "hi\n"
        with pytest.raises(TimeoutError):
            sync.run(sandbox.execute("sleep 1000"), 0.2)
        assert sync.run(sandbox.execute("echo again"), 60).stdout == "again\n"
        with pytest.raises(SandboxError, match=r"sync\.run"):
            asyncio.run(sandbox.execute("true"))
    finally:
        sync.run(sandbox.stop(), 60)


def test_the_zygote_loads_little():
    """Each sandbox and each command begins as a fork of it."""
    program = (
        f"import sys; sys.path.insert(0, {REPOSITORY + '/envs/rock'!r}); from host import zygote;"
        " print(*sys.modules)"
    )
    loaded = set(
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.split()
    )
    assert not loaded & {
        "typing",
        "pathlib",
        "shutil",
        "tempfile",
        "traceback",
        "contextlib",
        "dataclasses",
        "asyncio",
        "subprocess",
        "logging",
    }


def test_a_forked_process_starts_a_zygote_of_its_own():
    program = textwrap.dedent(f"""
        import asyncio, os, sys
        sys.path.insert(0, {REPOSITORY!r})
        from envs.rock import Sandbox, SandboxConfig
        from envs.rock.embedded import zygote_client
        async def echo():
            config = SandboxConfig(isolation="best_available", tier="namespaces")
            async with Sandbox(config) as sandbox:
                return (await sandbox.execute("echo hi")).stdout, zygote_client._zygote._process.pid
        first = asyncio.run(echo())
        child = os.fork()
        if child == 0:
            second = asyncio.run(echo())
            zygote_client.shut_down()
            os._exit(0 if second[0] == "hi\\n" and second[1] != first[1] else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0 and asyncio.run(echo()) == first
        """)
    config_of()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_tree_that_cannot_be_mounted_is_an_error_with_its_reason_and_never_a_weaker_sandbox(
    monkeypatch,
):
    config = config_of()
    broken = zygote_client.spec

    def without_disk(*arguments):
        return broken(*arguments) | {"disk_bytes": "none"}

    monkeypatch.setattr(zygote_client, "spec", without_disk)
    with pytest.raises(SandboxStartError, match="mount tmpfs on /tmp/disk: "):
        asyncio.run(echo(config))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_an_ordinary_user_has_sandboxes_too_and_is_told_what_is_missing(tier, tmp_path_factory):
    config_of(tier)
    code = tempfile.mkdtemp(prefix="rock-test-", dir="/tmp")  # a place that another user can read
    try:
        os.chmod(code, 0o755)
        shutil.copytree(
            f"{REPOSITORY}/envs",
            f"{code}/envs",
            ignore=shutil.ignore_patterns("__pycache__", "tasks", "gem"),
        )
        program = textwrap.dedent(f"""
            import asyncio, json, os
            from envs.rock import IsolationError, Sandbox, SandboxConfig, probe
            deeds = (
                "id -u; echo x > f; setsid sleep {MARK}5 & cat f; cat {code}/secret;"
                " kill -9 {os.getpid()}; kill -9 -1"
            )
            async def main():
                config = SandboxConfig(isolation="best_available", tier={tier!r})
                async with Sandbox(config) as sandbox:
                    first = await sandbox.execute(deeds, timeout=20)
                    await sandbox.execute("mkdir -p locked/in; chmod 0 locked")
                    await sandbox.write_file("a/b", "c")
                    verified = await sandbox.verify(
                        "cat f a/b $VERIFIER_FILES/k", files={{"k": b"!"}}
                    )
                    slow = await sandbox.execute(
                        "setsid sleep {MARK}5 & sleep {MARK}5", timeout=0.3
                    )
                    return first.stdout, verified.stdout, slow.timed_out
            report = probe(tier={tier!r})
            try:
                asyncio.run(Sandbox(SandboxConfig(isolation="required")).start()); refusal = ""
            except IsolationError as error:
                refusal = str(error)
            guarantees = sorted(report.guarantees)
            print(json.dumps([asyncio.run(main()), guarantees, report.banner(), refusal]))
            """)
        pathlib.Path(code, "secret").write_text("SECRET")
        os.chown(f"{code}/secret", 64321, 64321)
        python = os.path.realpath("/usr/bin/python3")
        done = subprocess.run(
            [
                "setpriv",
                "--reuid",
                "64321",
                "--regid",
                "64321",
                "--clear-groups",
                python,
                "-c",
                program,
            ],
            cwd=code,
            timeout=180,
            env={"PATH": "/usr/bin:/bin", "TMPDIR": "/tmp"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (first, verified, timed_out), guarantees, banner, refusal = json.loads(done.stdout)
        assert first.split() == (["1000", "x"] if tier == "namespaces" else ["64321", "x"])
        assert verified == "x\nc!" and timed_out
        assert not os.listdir("/tmp/rock-64321")
        if cgroups.find()[0].version == 1:  # root's own groups: another user cannot write them
            assert (
                "memory" not in guarantees
                and "memory" in banner
                and "remedy" in banner
                and "memory" in refusal
            )
        assert eventually(lambda: not host_processes(f"sleep\0{MARK}5"))
    finally:
        shutil.rmtree(code)
        shutil.rmtree("/tmp/rock-64321", ignore_errors=True)
