"""Nothing leaks and nothing outlives its owner: descriptors, processes, cgroups, directories."""

import asyncio
import glob
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from envs.rock import (
    CommandResult,
    Sandbox,
    SandboxClosedError,
    SandboxConfig,
    SandboxError,
    SandboxStartError,
    probe,
    sync,
)
from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups, linux
from tests.paths import ROOT

REPOSITORY = str(ROOT)
STATE = pathlib.Path(tempfile.gettempdir(), f"rock-{os.getuid()}")


def _config(tier: str = "namespaces", **fields) -> SandboxConfig:
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")
    return SandboxConfig(isolation="best_available", tier=tier, **fields)


def _zygote_pid() -> int:
    return zygote_client._zygote._process.pid


def _descendants(pid: int) -> list[int]:
    children = [
        int(word)
        for path in glob.glob(f"/proc/{pid}/task/*/children")
        for word in pathlib.Path(path).read_text().split()
    ]
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _eventually(condition, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def _groups() -> set[str]:
    place, _ = cgroups.find()
    return (
        {
            path
            for parent in set(place.parents.values())
            for path in glob.glob(f"{parent}/rock-*-{_zygote_pid()}")
        }
        if place
        else set()
    )


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_many_sandboxes_leave_nothing_behind(tier):
    config = _config(tier)

    async def one(number):
        async with Sandbox(config) as sandbox:
            return (await sandbox.execute(f"echo {number} > f; sleep 100 & cat f")).stdout

    async def all_of_them():
        return [result for _ in range(4) for result in await asyncio.gather(*map(one, range(15)))]

    asyncio.run(one(0))
    before = (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir(f"/proc/{_zygote_pid()}/fd")),
        _descendants(_zygote_pid()),
        _groups(),
        threading.active_count(),
        pathlib.Path("/proc/self/mountinfo").read_text().count("\n"),
    )
    assert (
        asyncio.run(asyncio.wait_for(all_of_them(), 120))
        == [f"{number}\n" for number in range(15)] * 4
    )
    after = (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir(f"/proc/{_zygote_pid()}/fd")),
        _descendants(_zygote_pid()),
        _groups(),
        threading.active_count(),
        pathlib.Path("/proc/self/mountinfo").read_text().count("\n"),
    )
    assert after == before and before[2] == []


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_starts_and_stops_that_race_leave_nothing_and_raise_nothing_of_their_own(tier):
    config = _config(tier)

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
    before = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{_zygote_pid()}/fd"))
    assert asyncio.run(asyncio.wait_for(all_of_them(), 60)) == [(False, [])] * 36
    assert _eventually(lambda: not _descendants(_zygote_pid()) and not _groups())
    assert _eventually(
        lambda: (
            (len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{_zygote_pid()}/fd")))
            == before
        )
    )


@pytest.mark.slow
def test_a_thousand_sandboxes_leave_nothing_behind():
    config = _config()

    async def churn():
        for _ in range(1000):
            async with Sandbox(config) as sandbox:
                await sandbox.execute("true")

    asyncio.run(churn())
    before = len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{_zygote_pid()}/fd"))
    asyncio.run(churn())
    assert (
        len(os.listdir("/proc/self/fd")),
        len(os.listdir(f"/proc/{_zygote_pid()}/fd")),
    ) == before and not _descendants(_zygote_pid())


_MANAGER = """
import asyncio, os, sys
sys.path.insert(0, {repository!r})
from envs.rock import Sandbox, SandboxConfig
from envs.rock.embedded import zygote_client
async def main():
    config = SandboxConfig(isolation="best_available", tier={tier!r})
    sandboxes = [Sandbox(config) for _ in range(3)]
    await asyncio.gather(*(sandbox.start() for sandbox in sandboxes))
    command = "setsid sleep {mark} & sleep {mark}"
    running = [
        asyncio.create_task(sandbox.execute(command, timeout=600)) for sandbox in sandboxes
    ]
    await asyncio.sleep(0.3)
    print(zygote_client._zygote._process.pid, flush=True)
    await asyncio.gather(*running)
asyncio.run(main())
"""


def _start_manager(tier: str, mark: int) -> tuple[subprocess.Popen, int]:
    _config(tier)
    program = _MANAGER.format(repository=REPOSITORY, tier=tier, mark=mark)
    manager = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    return manager, int(manager.stdout.readline())


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_when_the_manager_is_killed_everything_ends_and_is_removed(tier):
    before = set(os.listdir(STATE)) if STATE.exists() else set()
    manager, zygote = _start_manager(tier, mark=31337)
    processes = [zygote, *_descendants(zygote)]
    assert len(processes) >= 1 + 3 * 3
    place, _ = cgroups.find()
    manager.kill()
    manager.wait()
    assert _eventually(lambda: not any(map(_alive, processes)))
    assert not [
        path
        for parent in (place.parents.values() if place else ())
        for path in glob.glob(f"{parent}/rock-*-{zygote}")
    ]
    assert not {name for name in set(os.listdir(STATE)) - before if _owner(name) == zygote}


def _owner(name: str) -> int | None:
    try:
        return int(json.loads((STATE / name).read_bytes().strip(b"\0 ") or b"{}").get("zygote", 0))
    except (OSError, ValueError, AttributeError):
        return None


def test_when_the_zygote_is_killed_nothing_runs_on_and_the_next_start_sweeps():
    manager, zygote = _start_manager("namespaces", mark=31338)
    processes = _descendants(zygote)
    os.kill(zygote, signal.SIGKILL)
    assert manager.wait(30) != 0  # its commands fail: SandboxClosedError, not a wait without end
    assert _eventually(lambda: not any(map(_alive, processes)))
    place, _ = cgroups.find()
    left = {name for name in os.listdir(STATE)}
    zygote_client.shut_down()  # so that the next sandbox brings a new zygote
    assert asyncio.run(_echo(_config())) == "hi\n"
    assert not [
        path
        for parent in (place.parents.values() if place else ())
        for path in glob.glob(f"{parent}/rock-*-{zygote}")
    ]
    assert not left & {name for name in os.listdir(STATE) if _owner(name) == zygote}


async def _echo(config: SandboxConfig) -> str:
    async with Sandbox(config) as sandbox:
        return (await sandbox.execute("echo hi")).stdout


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_directories_without_permissions_are_removed_too(tier):
    async def work():
        async with Sandbox(_config(tier)) as sandbox:
            await sandbox.execute(
                "mkdir -p a/b; ln -s / a/b/root; touch a/b/f; chmod 0 a/b a; ln -s / l; cd $TMPDIR"
                " && mkdir -m 0 t"
            )
            return str(sandbox._backend._slot)

    slot = asyncio.run(work())  # others may run sandboxes here, too
    assert slot not in os.listdir(STATE)


def test_a_sandbox_whose_holder_is_killed_says_so():
    async def work():
        async with Sandbox(_config()) as sandbox:
            running = asyncio.create_task(sandbox.execute("sleep 1000"))
            await asyncio.sleep(0.1)
            (holder,) = [
                int(word)
                for word in (
                    pathlib.Path(f"/proc/{_zygote_pid()}/task/{_zygote_pid()}/children")
                    .read_text()
                    .split()
                )
            ]
            children = _descendants(holder)
            os.kill(holder, signal.SIGKILL)
            with pytest.raises(SandboxClosedError):
                await running
            with pytest.raises(SandboxClosedError):
                await sandbox.execute("true")
            return children

    children = asyncio.run(work())
    assert _eventually(lambda: not any(map(_alive, children)))


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
@pytest.mark.parametrize("command", ["true", "sleep 1000"])
def test_a_holder_that_is_stuck_is_killed_and_nothing_is_left(tier, command, monkeypatch):
    monkeypatch.setattr("envs.rock.embedded.channel.STOP_SECONDS", 0.5)

    async def work():
        sandbox = Sandbox(_config(tier))
        sibling = Sandbox(_config(tier))
        await sandbox.start()
        (holder,) = linux.children_of(_zygote_pid())
        await sibling.start()
        running = await sandbox.spawn(command)
        await asyncio.sleep(0.2)
        processes = _descendants(holder)
        os.kill(holder, signal.SIGSTOP)
        await sandbox.stop()
        with pytest.raises(SandboxClosedError):
            await running.wait()
            await sandbox.execute("true")
        left = [pid for pid in [holder, *processes] if _alive(pid)]
        groups = len(_groups())
        alive = (await sibling.execute("echo alive")).stdout
        await sibling.stop()
        return left, alive, groups

    groups_of_one = asyncio.run(_count_groups_of_one(tier))
    assert asyncio.run(asyncio.wait_for(work(), 60)) == ([], "alive\n", groups_of_one)
    assert not _descendants(_zygote_pid()) and not _groups()


@pytest.mark.parametrize("call", ["execute", "session", "request"])
def test_an_answer_that_came_while_this_process_was_busy_is_taken(call, monkeypatch):
    """A trainer that compiles for longer than the wait may last is no fault of the sandbox."""
    monkeypatch.setattr("envs.rock.embedded.commands.REPLY_GRACE_SECONDS", 0.1)

    async def work():
        async with Sandbox(_config()) as sandbox:
            await sandbox.execute("true", timeout=5)
            if call == "execute":
                waiting = asyncio.create_task(sandbox.execute("echo hi", timeout=0.3))
            elif call == "session":
                waiting = asyncio.create_task(sandbox.create_session())
            else:
                waiting = asyncio.create_task(
                    sandbox._backend._channel.request({"op": "kill"}, (), 0.1)
                )
            await asyncio.sleep(0)
            time.sleep(0.8)
            return await waiting

    result = asyncio.run(asyncio.wait_for(work(), 60))
    assert call != "execute" or result.stdout == "hi\n"


async def _count_groups_of_one(tier: str) -> int:
    async with Sandbox(_config(tier)):
        return len(_groups())


def test_loops_in_many_threads_share_one_zygote():
    config = _config()
    results = []

    def thread():
        results.append(asyncio.run(_echo(config)))

    asyncio.run(_echo(config))
    zygote = _zygote_pid()
    threads = [threading.Thread(target=thread) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert results == ["hi\n"] * 6 and _zygote_pid() == zygote


def test_a_hundred_sandboxes_live_at_once():
    config = _config()

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
    sandbox = Sandbox(_config())
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
    _config()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_tree_that_cannot_be_mounted_is_an_error_with_its_reason_and_never_a_weaker_sandbox(
    monkeypatch,
):
    config = _config()
    broken = zygote_client.spec

    def without_disk(*arguments):
        return broken(*arguments) | {"disk_bytes": "none"}

    monkeypatch.setattr(zygote_client, "spec", without_disk)
    with pytest.raises(SandboxStartError, match="mount tmpfs on /tmp/disk: "):
        asyncio.run(_echo(config))


def test_a_dead_init_ends_its_commands_and_the_next_one_is_an_error():
    async def run():
        async with Sandbox(_config()) as sandbox:
            await sandbox.execute("true")
            (holder,) = _descendants(_zygote_pid())[:1]
            (init,) = [
                int(word)
                for word in (
                    pathlib.Path(f"/proc/{holder}/task/{holder}/children").read_text().split()
                )
            ]
            running = asyncio.create_task(sandbox.execute("sleep 60"))
            await asyncio.sleep(0.3)
            os.kill(init, signal.SIGKILL)
            return await running, await asyncio.gather(
                sandbox.execute("true"), return_exceptions=True
            )

    interrupted, (after,) = asyncio.run(run())
    assert interrupted.exit_code == 137 and isinstance(after, SandboxError)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_an_ordinary_user_has_sandboxes_too_and_is_told_what_is_missing(tier, tmp_path_factory):
    _config(tier)
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
                "id -u; echo x > f; setsid sleep 4242 & cat f; cat {code}/secret;"
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
                    slow = await sandbox.execute("setsid sleep 4242 & sleep 4242", timeout=0.3)
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
            timeout=90,
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
        assert _eventually(
            lambda: (
                not [
                    path
                    for path in glob.glob("/proc/[0-9]*/cmdline")
                    if _reads(path, b"sleep\x004242")
                ]
            )
        )
    finally:
        shutil.rmtree(code)
        shutil.rmtree("/tmp/rock-64321", ignore_errors=True)


def _reads(path: str, word: bytes) -> bool:
    try:
        return word in pathlib.Path(path).read_bytes()
    except OSError:
        return False
