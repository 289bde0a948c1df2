"""Hostile commands: nobody uses up, locks or watches what a kernel keeps once for all of a host.

Each test lets one sandbox take all that it gets, and then asks what is left for a sibling that
shares its user id (a fork) and for the host.
"""

import asyncio
import ctypes
import errno
import fcntl
import os
import pathlib
import shutil
import subprocess
import textwrap

import pytest

from envs.rock import Sandbox
from tests.hostile.sandboxes import execute, inside, make_config, python

# Each takes as much as it gets, prints how much, and keeps it until the sandbox ends.
TERMINALS = """
import os, time
taken = []
try:
    while len(taken) < 200: taken.append(os.openpty())
except OSError: pass
print(len(taken), flush=True)
"""
WATCHERS = """
import ctypes, time
libc = ctypes.CDLL(None)
taken = [libc.inotify_init() for _ in range(200)]
print(sum(one >= 0 for one in taken), flush=True)
"""
IN_FLIGHT = """
import array, socket, time
pairs, taken = [], 0
try:
    while taken < 2000:
        pairs.append(socket.socketpair())
        descriptors = array.array("i", [0] * 50)
        for _ in range(5):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            pairs[-1][0].sendmsg([b"x"], rights, socket.MSG_DONTWAIT)
            taken += 50
except OSError: pass
print(taken, flush=True)
"""
SIGNALS = """
import ctypes, os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 60))
libc = ctypes.CDLL(None)
taken = 0
while taken < 2000 and libc.sigqueue(os.getpid(), 34 + taken % 20, None) == 0: taken += 1
print(taken, flush=True)
"""
KEEP = "time.sleep(60)"
CONTEXTS = """
import ctypes, errno, platform
number = {"x86_64": 206, "aarch64": 0}[platform.machine()]
libc = ctypes.CDLL(None, use_errno=True)
context = ctypes.c_ulong(0)
print(libc.syscall(number, 128, ctypes.byref(context)), errno.errorcode[ctypes.get_errno()])
"""


async def take(sandbox: Sandbox, program: str, more: str = "") -> tuple[int, object]:
    """Run a program that keeps what it gets; return how much that is, and its job."""
    job = await sandbox.spawn(f"{python(program + KEEP)} > taken")
    for _ in range(500):
        if said := await sandbox.read_file("taken") if await exists(sandbox) else b"":
            return int(said), job
        await asyncio.sleep(0.02)
    raise AssertionError((await job.kill()).stderr)


async def exists(sandbox: Sandbox) -> bool:
    return "taken" in [entry.path for entry in await sandbox.list_files(".")]


def take_twice(program: str, open_files: int = 256) -> list[int]:
    """Return what a sandbox gets, and what a fork of it gets then."""

    async def work():
        config = make_config("namespaces", open_files=open_files, disk_mb=8)
        async with Sandbox(config) as first, await first.fork() as second:
            taken = []
            for sandbox in (first, second):
                taken.append((await take(sandbox, program))[0])
                await sandbox.write_file("sent", "by the holder")  # as a descriptor, in flight
            return taken

    return asyncio.run(asyncio.wait_for(work(), 180))


def test_asynchronous_io_takes_nothing_from_the_hosts_table(tier):
    assert execute(make_config(tier), python(CONTEXTS)).stdout == "-1 ENOSYS\n"


def test_terminals_are_few_and_others_keep_theirs():
    first, second = take_twice(TERMINALS)
    assert first == second <= 32 and first > 8
    near, far = os.openpty()
    os.close(near), os.close(far)


def test_watchers_of_files_are_few_and_others_keep_theirs():
    first, second = take_twice(WATCHERS)
    assert first == second == 16
    limit = execute(make_config("namespaces"), "cat /proc/sys/user/max_inotify_watches").stdout
    assert int(limit) == 4096
    libc = ctypes.CDLL(None)
    watcher = libc.inotify_init()
    assert watcher >= 0 and libc.inotify_add_watch(watcher, b"/", 2) >= 0
    os.close(watcher)


def test_watchers_are_not_counted_to_the_hosts_user():
    """Nine sandboxes would take all that root has."""
    if os.geteuid() != 0:
        pytest.skip("sandboxes of an ordinary user have that user's id, see SECURITY.md")

    async def work():
        sandboxes = [Sandbox(make_config("namespaces")) for _ in range(9)]
        await asyncio.gather(*(sandbox.start() for sandbox in sandboxes))
        taken = await asyncio.gather(*(take(sandbox, WATCHERS) for sandbox in sandboxes))
        libc = ctypes.CDLL(None)
        mine = [libc.inotify_init() for _ in range(8)]
        for one in mine:
            os.close(one)
        await asyncio.gather(*(sandbox.stop() for sandbox in sandboxes))
        return {amount for amount, _ in taken}

    assert asyncio.run(asyncio.wait_for(work(), 180)) == {16}


def test_descriptors_in_flight_do_not_stop_another_sandboxs_files():
    first, _ = take_twice(IN_FLIGHT, open_files=512)
    assert first >= 250


def test_queued_signals_are_few():
    first, second = take_twice(SIGNALS)
    assert 0 < first <= 256 and second <= 256


@pytest.mark.parametrize("how", ["flock", "lockf"])
def test_a_lock_of_a_program_is_nobody_elses(how):
    lock = python(
        f"import fcntl\nfile = open('/usr/bin/env')\nfcntl.{how}(file, fcntl.LOCK_SH"
        f" if '{how}' == 'lockf' else fcntl.LOCK_EX)\nopen('taken', 'w').write('1')\n"
        "import time; time.sleep(600)"
    )

    async def work():
        async with (
            Sandbox(make_config("namespaces")) as one,
            Sandbox(make_config("namespaces")) as two,
        ):
            await one.spawn(lock)
            while not await exists(one):
                await asyncio.sleep(0.01)
            sibling = await two.execute("flock -n /usr/bin/env true; echo $?", timeout=60)
            with open("/usr/bin/env", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return sibling.stdout

    assert asyncio.run(asyncio.wait_for(work(), 180)) == "0\n"


def test_what_others_start_is_not_seen(tier):
    """The host, a sibling, and above all the verifier of another episode."""
    # A container's own helpers run `find` in it, so only the named program counts.
    watch = """
    import ctypes, os, select, struct, sys
    libc = ctypes.CDLL(None)
    watcher = libc.inotify_init()
    if watcher < 0:
        print("no watches", flush=True); open("taken", "w").close(); sys.exit()
    program = libc.inotify_add_watch(watcher, b"/usr/bin/factor", 0xFFF)
    for place in (b"/usr/bin", b"/usr/lib", b"/"):
        libc.inotify_add_watch(watcher, place, 0xFFF)
    open("taken", "w").close()
    while select.select([watcher], [], [], 0.4)[0]:
        events = os.read(watcher, 4096)
        while events:
            watch, mask, _, length = struct.unpack_from("iIII", events)
            name = events[16 : 16 + length].rstrip(b"\\0")
            events = events[16 + length :]
            if watch == program or name == b"factor":
                print("SEEN", watch, mask, name, flush=True)
    """

    async def work():
        async with Sandbox(make_config(tier)) as spy, Sandbox(make_config(tier)) as other:
            job = await spy.spawn(f"exec {python(textwrap.dedent(watch))}")
            while not await exists(spy):
                await asyncio.sleep(0.01)
            await other.verify("/usr/bin/factor 12")
            subprocess.run(["/usr/bin/factor", "12"], stdout=subprocess.DEVNULL, check=True)
            return (await job.wait()).stdout

    seen = asyncio.run(asyncio.wait_for(work(), 180))
    assert "SEEN" not in seen


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
def test_a_lease_cannot_be_had_so_no_reader_waits_for_it(tier):
    lease = (
        "import fcntl\nfile = open('f', 'w')\ntry: fcntl.fcntl(file, 1024, 1)\n"
        "except OSError as error: print(error.errno)\nimport time; time.sleep(30)"
    )

    async def work(sandbox):
        await sandbox.write_file("f", "held")
        job = await sandbox.spawn(f"exec {python(lease)} > taken")
        for _ in range(500):
            if (content := await sandbox.read_file("f")) == b"":
                break  # it is open for writing
            await asyncio.sleep(0.01)
        content = await sandbox.read_file("f")
        return (await job.kill()).exit_code, content

    assert inside(make_config(tier), work) == (137, b"")
    lone = (
        "import fcntl\ntry: fcntl.fcntl(open('f', 'w'), 1024, 1)\n"
        "except OSError as error: print(error.errno)"
    )
    assert execute(make_config(tier), python(lone)).stdout == f"{errno.EPERM}\n"


def test_syncing_writes_nothing_of_the_host():
    """Its time would be that of a slow disk, and a checkpoint's write would wait."""
    result = execute(make_config("namespaces"), "sync && echo done; strace -V > /dev/null 2>&1")
    assert result.stdout == "done\n"


SHARED_FILES = (
    "echo {} > /dev/shm/left; mkdir -p /dev/shm/a/b; : > /dev/shm/a/b/c; ls -A /dev/shm | wc -l"
)


@pytest.mark.parametrize("how", ["execute", "session", "kill_all", "fork"])
def test_no_file_of_shared_memory_outlives_its_commands(how):
    async def work(sandbox):
        if how == "session":
            async with await sandbox.create_session() as session:
                made = await session.run(SHARED_FILES)
                assert (await session.run("ls -A /dev/shm | wc -l")).stdout == "2\n"  # it lives
        else:
            made = await sandbox.execute(SHARED_FILES)
        if how == "kill_all":
            await sandbox.kill_all()
        if how == "fork":
            async with await sandbox.fork() as copy:
                return made.stdout, (await copy.execute("ls -A /dev/shm")).stdout
        return made.stdout, (await sandbox.execute("ls -A /dev/shm; : > /dev/shm/again")).stdout

    assert inside(make_config("namespaces"), work) == ("2\n", "")


def test_files_of_shared_memory_take_none_from_the_verifier():
    async def work(sandbox):
        await sandbox.execute("head -c 15M /dev/zero > /dev/shm/x")
        before = (await sandbox.get_status()).memory_bytes
        verified = await sandbox.verify("x=$(head -c 1M /dev/zero | tr '\\0' x); echo ${#x}")
        after = (await sandbox.get_status()).memory_bytes
        return before, after, verified.stdout

    before, after, said = inside(make_config("namespaces", memory_mb=64, disk_mb=8), work)
    assert said == "1048576\n"
    assert before is None or before - after > 6 << 20


def test_shared_memory_is_limited_in_files():
    many = "i=0; while : > /dev/shm/$i; do i=$((i + 1)); done 2> /dev/null; echo $i"
    assert int(execute(make_config("namespaces"), many, timeout=20).stdout) <= 1024


@pytest.mark.parametrize("tier", ["namespaces", "landlock"])
@pytest.mark.parametrize(
    "command",
    ["git init -q r && cd r && git status -s && echo well", "node -e 'console.log(\"well\")'"],
)
def test_ordinary_programs_run_in_every_tier(tier, command):
    if shutil.which(command.split()[0], path="/usr/bin:/bin") is None:
        pytest.skip(f"this machine has no {command.split()[0]}")

    async def work(sandbox):
        async with await sandbox.create_session() as session:
            inside_session = await session.run(command)
        return inside_session.stdout, (await sandbox.execute(f"rm -rf r; {command}")).stdout

    assert inside(make_config(tier), work) == ("well\n", "well\n")


def test_the_trainer_is_not_scheduled_from_landlock():
    """Its commands may have the trainer's own user id."""
    me = os.getpid()
    schedule = f"""
    import os
    for what in (
        lambda: os.sched_setaffinity({me}, [0]),
        lambda: os.sched_setscheduler({me}, os.SCHED_IDLE, os.sched_param(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, {me}, 19),
        lambda: os.setpriority(os.PRIO_USER, 0, 19),
        lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, 5),
    ):
        try: what(); print("done")
        except OSError as error: print(error.errno)
    """
    before = os.sched_getaffinity(me)
    result = execute(make_config("landlock"), python(textwrap.dedent(schedule)))
    assert result.stdout.split() == ["1"] * 4 + ["done"] * 2
    assert os.sched_getaffinity(me) == before and os.getpriority(os.PRIO_PROCESS, me) < 19


def test_programs_are_an_overlay_of_the_hosts_where_that_can_be(tmp_path):
    result = execute(make_config("namespaces"), "grep ' /usr ' /proc/self/mountinfo")
    mounts = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    if any(line.split()[4].startswith("/usr/") for line in mounts):
        pytest.skip("file systems are mounted below /usr here")
    assert " - overlay " in result.stdout
