"""Hostile commands: no process leaves the tree that is killed, and none delays a sandbox's end."""

import asyncio
import os

import pytest

from envs.rock import Sandbox
from tests.hostile.sandboxes import (
    changed_zygote,
    execute,
    file_exists,
    host_processes,
    inside,
    make_config,
    python,
)

SECRET = "the-expected-answer-4711"

# A child of the caller's parent; flags are written as for a fork, with SIGCHLD or with no signal.
SIBLING = """
import ctypes, os, platform, sys, time
number = {{"x86_64": 56, "aarch64": 220}}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
pid = libc.syscall(number, ctypes.c_ulong({flags}), 0, 0, 0, 0)
if pid < 0:
    print("refused", ctypes.get_errno(), flush=True)
    os._exit(0)
if pid:
    print("cloned", flush=True)
    os._exit(0)
{deed}
"""
SLEEP = "time.sleep(600)"
SPY = """
import glob
end = time.monotonic() + 20
while time.monotonic() < end:
    for path in glob.glob("/proc/[0-9]*/root/run/verifier/key"):
        try: open("/workspace/loot", "w").write(open(path).read())
        except OSError: pass
"""
FLAGS = [0x8011, 0x8000, 0x8000 | 0x4111]  # CLONE_PARENT with SIGCHLD, no signal, VM and VFORK


# Each leaves a process that sleeps {mark} s, by another way to be nobody's child or to hide.
STAY = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
number = {{"x86_64": 56, "aarch64": 220}}[os.uname().machine]
def stay(*_):
    os.setsid()
    for sign in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(sign, signal.SIG_IGN)
    open("stays-{mark}", "w").close()
    os.execvp("sleep", ["sleep", "{mark}"])
{way}
end = time.monotonic() + 60
while not os.path.exists("stays-{mark}") and time.monotonic() < end: time.sleep(0.01)
print(os.path.exists("stays-{mark}"), flush=True)
"""
WAYS = {
    "a reaper of its own that dies": """
libc.prctl(36, 1, 0, 0, 0)
if os.fork() == 0:
    if os.fork() == 0: stay()
    os._exit(0)
""",
    "a reaper of its own that is stopped": """
if os.fork() == 0:
    libc.prctl(36, 1, 0, 0, 0)
    if os.fork() == 0:
        if os.fork() == 0: stay()
        os._exit(0)
    time.sleep(0.05); os.kill(os.getpid(), signal.SIGSTOP)
""",
    "a thread's child": """
threading.Thread(target=lambda: os.fork() or stay()).start()
""",
    "a child without a signal at its end": """
if libc.syscall(number, ctypes.c_ulong(0), 0, 0, 0, 0) == 0: stay()
""",
    "a child of a child that runs first": """
if libc.syscall(number, ctypes.c_ulong(0x4011), 0, 0, 0, 0) == 0:
    if os.fork() == 0: stay()
    os._exit(0)
""",
    "a chain that forks on while it is killed": """
if os.fork() == 0:
    while True:
        if os.fork(): os._exit(0)
        if os.fork() == 0: stay()
""",
    "a child that a stopped parent never collects": """
if os.fork() == 0:
    for _ in range(5): os.fork() or os._exit(0)
    if os.fork() == 0: stay()
    os.kill(os.getpid(), signal.SIGSTOP)
""",
    "a child with descriptors of other processes": """
if os.fork() == 0:
    for pid in (1, 2, 3, os.getppid()):
        try: os.set_inheritable(os.pidfd_open(pid), True)
        except OSError: pass
    stay()
""",
}


@pytest.fixture
def unfiltered(monkeypatch):
    """A zygote whose system-call filter lets every clone pass, as if a new way were found."""
    open_filter = "from host import seccomp; seccomp.REFUSED_CLONE_FLAGS = 0"
    with changed_zygote(monkeypatch, open_filter):
        yield


@pytest.mark.parametrize("how", ["execute", "session", "kill_all"])
def test_nothing_outlives_its_command(tier, how):
    async def leave(sandbox, program):
        if how == "execute":
            return (await sandbox.execute(f"exec {program}", timeout=90)).stdout
        session = await sandbox.create_session()
        result = await session.run(program, timeout=90)
        await (session.close() if how == "session" else sandbox.kill_all())
        return result.stdout

    async def work(sandbox):
        left = {}
        for number, (name, way) in enumerate(WAYS.items()):
            mark = f"7{os.getpid()}{number}"  # another run of these tests may have its own
            said = await leave(sandbox, python(STAY.format(way=way, mark=mark)))
            left[name] = ("True" in said, host_processes(f"sleep\0{mark}"))
        return left, (await sandbox.execute("echo well")).stdout

    left, after = inside(make_config(tier), work)
    assert left == {name: (True, []) for name in WAYS} and after == "well\n"


@pytest.mark.parametrize("flags", FLAGS)
def test_no_child_of_another_parent_can_be_made(tier, flags):
    program = SIBLING.format(flags=flags, deed=SLEEP)
    result = execute(make_config(tier), f"exec {python(program)}")
    assert result.stdout == "refused 1\n"


@pytest.mark.parametrize("flags", FLAGS[:2])
def test_a_child_of_another_parent_dies_with_its_command(unfiltered, flags):
    program = SIBLING.format(flags=flags, deed=SLEEP)

    async def work(sandbox):
        result = await sandbox.execute(f"exec {python(program)}")
        return result, await sandbox.execute("cat /proc/[0-9]*/comm")

    result, after = inside(make_config("namespaces"), work)
    assert result.stdout == "cloned\n" and "python" not in after.stdout


def test_a_child_of_another_parent_never_sees_a_verifier(unfiltered):
    program = SIBLING.format(flags=FLAGS[0], deed=SPY)

    async def work(sandbox):
        await sandbox.execute(f"exec {python(program)}")
        verified = await sandbox.verify(
            "sleep 0.3; cat $VERIFIER_FILES/key", files={"key": SECRET.encode()}
        )
        return verified.stdout, (await sandbox.execute("cat loot")).stdout

    assert inside(make_config("namespaces"), work) == (SECRET, "")


@pytest.mark.parametrize("place", ["execute", "session", "running"])
def test_a_child_of_another_parent_cannot_hang_the_stop(unfiltered, place, monkeypatch):
    # A stop that hangs takes longer than this test may.
    monkeypatch.setattr("envs.rock.embedded.channel.STOP_SECONDS", 900)
    program = python(SIBLING.format(flags=FLAGS[0], deed=SLEEP))

    async def work():
        sandbox = Sandbox(make_config("namespaces"))
        await sandbox.start()
        if place == "session":
            session = await sandbox.create_session()
            await session.run(f"({program}); exec {program}", timeout=60)
        elif place == "running":
            await sandbox.spawn(f"({program}); touch begun; {program} & sleep 60")
            while not await file_exists(sandbox, "begun"):
                await asyncio.sleep(0.01)
        else:
            await sandbox.execute(f"exec {program}")
        await sandbox.stop()

    asyncio.run(asyncio.wait_for(work(), 180))
