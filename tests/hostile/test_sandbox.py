"""Hostile commands: the host and sibling sandboxes stay untouched, and a struck limit is told by
its name.
"""

import asyncio
import os
import pathlib
import shlex
import socket
import subprocess
import threading

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxFileError, probe, sync
from envs.rock.docker.probe import probe_docker
from tests.envs.rock.engine import engine
from tests.envs.rock.service import running
from tests.paths import ROOT

__all__ = ["engine"]  # a fixture
REPOSITORY = ROOT


_elsewhere: dict[
    str, dict[str, object]
] = {}  # what a config needs whose sandboxes are not this process's own


def _config(tier: str, **fields) -> SandboxConfig:
    if tier in _elsewhere:
        return SandboxConfig(**{"isolation": "best_available", **_elsewhere[tier], **fields})
    if (report := probe(tier=tier)).tier is None:
        pytest.skip(f"no {tier} tier here: {report.missing[0].reason}")
    return SandboxConfig(isolation="best_available", tier=tier, **fields)


def _needs(tier: str, guarantee: str) -> None:
    report = probe_docker() if tier == "docker" else probe(tier=None if tier == "remote" else tier)
    if guarantee not in report.guarantees:
        pytest.skip(f"{guarantee} is not enforced in the {tier} tier here")


@pytest.fixture(
    params=[
        "namespaces",
        "landlock",
        pytest.param("remote", marks=pytest.mark.slow),
        pytest.param("docker", marks=pytest.mark.slow),
    ]
)
def tier(request):
    if request.param == "docker":
        _elsewhere["docker"] = {
            "backend": "docker",
            "image": request.getfixturevalue("engine").image,
            "memory_mb": 128,
        }
    elif request.param == "remote":
        if (report := probe()).tier is None:
            pytest.skip(f"no sandbox here: {report.missing[0].reason}")
        site = request.getfixturevalue("admin")
        _elsewhere["remote"] = {
            "backend": "remote",
            "url": site.url,
            "token": running.TOKENS["default"],
        }
    return request.param


@pytest.fixture(scope="module")
def admin(tmp_path_factory):
    """An admin on the background loop, for callers on any loop."""
    entered = running.admin(tmp_path_factory.mktemp("admin"))
    yield sync.run(entered.__aenter__(), 30)
    sync.run(entered.__aexit__(None, None, None), 60)


def inside(config: SandboxConfig, work):
    async def run():
        async with Sandbox(config) as sandbox:
            return await work(sandbox)

    return asyncio.run(asyncio.wait_for(run(), 90))


def execute(config: SandboxConfig, command: str, **options):
    return inside(config, lambda sandbox: sandbox.execute(command, **options))


def python(program: str) -> str:
    return f"python3 -c {shlex.quote(program)}"


def host_processes(word: str) -> list[int]:
    """Host processes whose command line holds `word`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# Files


@pytest.mark.parametrize(
    "path",
    [
        "/root",
        "/home",
        str(REPOSITORY),
        f"{REPOSITORY}/envs/rock/sandbox.py",
        "/etc/shadow",
        "/etc/hostname",
        "/sys/kernel",
        "/var/log",
        "/proc/1/root/etc/shadow",
        "/proc/1/cwd/etc/shadow",
        "/tmp/..//root",
        "/boot",
        "/var/run/docker.sock",
        "/run/docker.sock",
        "/proc/kcore",
        "/proc/kmsg",
        "/dev/mem",
        "/sys/fs/cgroup/release_agent",
    ],
)
def test_nothing_of_the_host_can_be_read(tier, path):
    result = execute(
        _config(tier), f"if [ -d '{path}' ]; then ls -A '{path}'; else cat '{path}'; fi"
    )
    assert result.stdout in ("", "sandbox\n") and (
        result.exit_code != 0 or tier == "docker"
    )  # an image has folders of those names, and nothing in them


@pytest.mark.parametrize(
    "path",
    [
        "/usr/x",
        "/etc/x",
        "/x",
        "/bin/x",
        "/run/x",
        "/var/tmp/x",
        "/proc/sys/kernel/core_pattern",
        "/proc/sysrq-trigger",
        "/proc/self/oom_score_adj/x",
        "/dev/sda",
        "/dev/kmsg",
        "/dev/mem",
        "/dev/x",
        "/proc/sys/kernel/modprobe",
        "/sys/kernel/uevent_helper",
        "/sys/fs/cgroup/release_agent",
        "/sys/fs/cgroup/memory/release_agent",
        "/sys/fs/cgroup/memory/notify_on_release",
        "/sys/fs/cgroup/memory.max",
    ],
)
def test_nothing_outside_the_workspace_can_be_written(tier, path):
    assert (
        "WRITTEN"
        not in execute(_config(tier), f"echo '|/bin/false' > {path} && echo WRITTEN").stdout
    )


def test_the_kernels_id_of_a_command_owns_nothing_on_the_host(tier):
    """A user namespace alone, made by real root, would keep the kernel's id 0."""

    async def work(sandbox):
        running = asyncio.create_task(sandbox.execute("sleep 54321"))
        while not (found := host_processes("sleep\x0054321")):
            await asyncio.sleep(0.01)
        status = pathlib.Path(f"/proc/{found[0]}/status").read_text()
        await sandbox.kill_all()
        await running
        return status

    fields = dict(
        line.split(":\t", 1) for line in inside(_config(tier), work).splitlines() if ":\t" in line
    )
    expected_uids = {"0"} if os.geteuid() == 0 else set()
    assert (
        not set(fields["Uid"].split()) & expected_uids
        and not set(fields["Gid"].split()) & expected_uids
    )
    assert fields["Groups"].strip() in ("", fields["Gid"].split()[0]) or os.geteuid() != 0
    assert [fields[name].strip("0") for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")] == [
        ""
    ] * 4
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_setuid_and_device_files_give_nothing(tier):
    command = (
        "cp /usr/bin/id i && chmod 6755 i && ./i -u; mknod d c 1 1 && echo DEVICE; mknod b b 8 0 &&"
        " echo DEVICE; su -c 'echo ROOT' root"
    )
    assert (
        execute(_config(tier), command).stdout.strip() not in ("", "0")
        and "\n" not in execute(_config(tier), command).stdout.strip()
    )


# Processes


def test_no_process_of_the_host_can_be_seen_or_hurt(tier):
    victim = subprocess.Popen(["/bin/sleep", "60"])
    try:
        result = execute(
            _config(tier),
            f"kill -9 {victim.pid}; kill -9 {os.getpid()}; ls /proc/{os.getpid()}/fd; kill -9 -1;"
            " exit 1",
        )
        assert result.exit_code in (1, 137) and "failure" not in result.stderr
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_the_process_table_shows_only_the_sandbox():
    result = execute(_config("namespaces"), "ls -d /proc/[0-9]* | wc -l; hostname")
    assert int(result.stdout.split()[0]) < 8 and result.stdout.split()[1] == "sandbox"


DOUBLE_FORK = (
    "import os\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork():"
    " os._exit(0)\nos.execvp('sleep', ['sleep', '98765'])"
)


@pytest.mark.parametrize(
    "command",
    [
        "(setsid sleep 98765 &); sleep 98765",
        "setsid -f bash -c 'trap \"\" TERM INT HUP; exec -a x sleep 98765'; sleep 98765",
        "sleep 98765 & kill -STOP $!; kill -STOP $$; sleep 98765",
        "nohup sleep 98765 & disown; sleep 98765",
        python(DOUBLE_FORK) + "; sleep 98765",
    ],
)
def test_nothing_outlives_the_time_limit(tier, command):
    async def work(sandbox):
        # found among the host's processes, where another run of these tests may have its own
        seconds = f"98765{os.getpid()}"
        result = await sandbox.execute(command.replace("98765", seconds), timeout=0.4)
        return result, host_processes(seconds)

    result, left = inside(_config(tier), work)
    assert result.timed_out and result.exit_code == 137 and left == [] and result.seconds < 5


def test_kill_all_reaches_daemons_and_the_verifier_comes_after_them(tier):
    async def work(sandbox):
        tamper = (
            "setsid bash -c 'while :; do echo tampered > answer; done' & while ! [ -s answer ]; do"
            " :; done; touch ready; sleep 1000"
        )
        running = asyncio.create_task(sandbox.execute(tamper))
        while not await _there(sandbox, "ready"):
            await asyncio.sleep(0.01)
        await sandbox.kill_all()
        await running
        await sandbox.write_file("answer", "right")
        return (await sandbox.verify("sleep 0.2; cat answer")).stdout

    assert inside(_config(tier), work) == "right"


async def _there(sandbox: Sandbox, path: str) -> bool:
    try:
        await sandbox.read_file(path)
    except SandboxFileError:
        return False
    return True


# Resources


def test_a_memory_hog_dies_and_the_reason_is_told(tier):
    _needs(tier, "memory")
    hog = python("data = bytearray(1)\nwhile True: data += bytes(1 << 24)")
    if tier == "landlock":  # there each process also has a limit of its own, so it takes several
        hog = (
            "for i in 1 2 3 4; do "
            + python("import time; data = b'x' * (40 << 20); time.sleep(1)")
            + " & done; wait"
        )

    async def work(sandbox):
        return await sandbox.execute(hog + "; echo $?"), await sandbox.execute("echo alive")

    result, after = inside(_config(tier, memory_mb=64, disk_mb=8), work)
    assert "memory" in result.limits_hit and after.stdout == "alive\n"


@pytest.mark.parametrize("place", ["/dev/shm", "/tmp", "/workspace"])
def test_files_kept_in_memory_are_bounded_too(place):
    result = execute(
        _config("namespaces", disk_mb=4),
        f"head -c 100M /dev/zero | split -b 2M - {place}/f; du -sm {place} | cut -f1",
    )
    assert int(result.stdout) <= 16 and "space" in result.stderr


def test_a_fork_bomb_is_contained(tier):
    _needs(tier, "pids")

    async def work(sandbox):
        bomb = await sandbox.execute(
            "bomb() { bomb | bomb & }; bomb; sleep 0.5; echo end", timeout=3
        )
        return bomb, await sandbox.execute("echo alive")

    before = len(host_processes(""))
    bomb, after = inside(_config(tier, pids=32), work)
    assert after.stdout == "alive\n" and (
        "pids" in bomb.limits_hit
        or "Resource temporarily unavailable" in bomb.stderr
        or bomb.timed_out
    )
    assert len(host_processes("")) < before + 30


def test_a_spinning_command_gets_its_share_of_processor_time_and_no_more(tier):
    _needs(tier, "cpu")
    spin = (
        "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end:"
        " pass\nprint(time.process_time())"
    )
    assert float(execute(_config(tier, cpus=0.25), python(spin)).stdout) < 0.6


def test_one_sandboxs_processes_are_not_counted_against_another():
    """Trap 2: RLIMIT_NPROC set outside the user namespace counts over all sandboxes of an id."""

    async def work():
        async with (
            Sandbox(_config("namespaces", pids=40)) as one,
            Sandbox(_config("namespaces", pids=40)) as two,
        ):
            command = "for i in $(seq 25); do sleep 1 & done; wait; echo all"
            return await asyncio.gather(one.execute(command), two.execute(command))

    assert [(result.stdout, result.stderr) for result in asyncio.run(work())] == [("all\n", "")] * 2


def test_a_disk_full_by_bytes_is_an_error_of_the_command_and_can_be_cleaned(tier):
    async def work(sandbox):
        full = await sandbox.execute(
            "for i in 1 2 3 4 5 6 7 8; do head -c 1M /dev/urandom > f$i || break; done; sleep 0.5;"
            " exit 3"
        )
        return full, await sandbox.execute("rm f*; echo x > small; cat small")

    full, after = inside(_config(tier, disk_mb=4), work)
    assert (
        ("No space left" in full.stderr) if tier != "landlock" else (full.limits_hit == ("disk",))
    )
    assert after.stdout == "x\n"


def test_a_disk_full_by_inodes_is_an_error_of_the_command(tier):
    result = execute(
        _config(tier, inodes=100), "for i in $(seq 500); do : > f$i || exit 4; done; sleep 0.5"
    )
    assert result.exit_code == 4 if tier != "landlock" else result.limits_hit == ("disk",)


@pytest.mark.parametrize(
    "flood", ["yes 'no end to this'", "cat /dev/zero", "tr '\\0' '\\377' < /dev/zero"]
)  # lines; no line and all NUL; no UTF-8
def test_a_flood_of_output_is_cut_and_ended(tier, flood):
    result = execute(
        _config(tier, max_output_bytes=4096),
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
        _config(tier, open_files=96), f"{python(exhaust)}; {python('import os; os.abort()')}; ls"
    )
    assert result.stdout == "95\n"


def test_a_busy_sibling_is_not_disturbed(tier):
    async def work():
        async with Sandbox(_config(tier)) as calm, Sandbox(_config(tier)) as wild:
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

    result, content = asyncio.run(asyncio.wait_for(work(), 60))
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

    assert inside(_config(tier), work) == ("next\n", "graded")


# Network and system calls


def test_no_network_is_reached(tier):
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0rock-test-{os.getpid()}-{tier}")
    abstract.listen()
    reached = []

    def listen(listener):
        try:
            reached.append(listener.accept())
        except OSError:
            pass

    for listener in (server, abstract):
        threading.Thread(target=listen, args=(listener,), daemon=True).start()
    ways = [
        (socket.AF_INET, socket.SOCK_STREAM, server.getsockname()),
        (socket.AF_UNIX, socket.SOCK_STREAM, abstract.getsockname()),
        (socket.AF_INET, socket.SOCK_STREAM, ("169.254.169.254", 80)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("1.1.1.1", 53)),
        (socket.AF_INET6, socket.SOCK_STREAM, ("2606:4700:4700::1111", 53)),
        (socket.AF_INET, socket.SOCK_RAW, ("1.1.1.1", 0)),
        (40, socket.SOCK_STREAM, (2, 1)),
        (16, socket.SOCK_RAW, (0, 0)),
        (17, socket.SOCK_RAW, ("lo", 0)),  # vsock, netlink, packet
        (38, socket.SOCK_SEQPACKET, ("hash", "sha256")),
        (15, socket.SOCK_RAW, (0, 0)),
        (30, socket.SOCK_STREAM, (0, 0)),
        (44, socket.SOCK_RAW, (0, 0)),
    ]  # alg, key, tipc, xdp
    program = f"""
import socket
for family, kind, address in {[(int(family), int(kind), address) for family, kind, address in ways]}:
    try:
        s = socket.socket(family, kind, 1 if (family, kind) == (2, 3) else 0)
        s.settimeout(1); s.connect(address); s.send(b"x"); kind == 2 and s.recv(1); print("REACHED", family, kind, address)
    except OSError as error:
        print("no way:", error)
try:  # an ICMP socket without privileges, and a name
    ping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1)
    ping.settimeout(1); ping.sendto(b"\\x08\\0\\0\\0\\0\\0\\0\\0", ("1.1.1.1", 0)); ping.recv(1); print("ICMP was answered")
except OSError as error:
    print("no ICMP:", error)
try:
    print("REACHED by name", socket.getaddrinfo("example.com", 80))
except OSError as error:
    print("no name:", error)
"""

    async def work(sandbox):
        return await sandbox.execute(python(program)), (
            await sandbox.denials() if tier != "landlock" else []
        )

    result, denials = inside(_config(tier), work)
    pinged = any(
        (denial.protocol, denial.destination) == ("icmp", "1.1.1.1") for denial in denials
    )  # then the sandbox's own loopback answered, and its guard saw it
    assert ("no ICMP" in result.stdout or pinged) and "no name" in result.stdout
    server.close(), abstract.close()
    assert (
        "REACHED" not in result.stdout
        and result.stdout.count("no way:") == len(ways)
        and reached == []
    )


def test_siblings_do_not_meet(tier):
    """Neither by TCP, nor by an abstract socket, nor by signals."""
    listen = """
import socket, time
places = [(socket.AF_INET, ("127.0.0.1", 4321)), (socket.AF_UNIX, "\\0rock-siblings")]
listeners = []
for family, place in places:
    try:
        one = socket.socket(family); one.bind(place); one.listen(); one.settimeout(0.7); listeners.append(one)
    except OSError: print("cannot listen")
open("ready", "w").close()
for one in listeners:
    try: one.accept(); print("MET")
    except OSError: print("alone")
"""
    call = """
import os, socket, sys
for family, place in ((socket.AF_INET, ("127.0.0.1", 4321)), (socket.AF_UNIX, "\\0rock-siblings")):
    try:
        socket.socket(family).connect(place); print("MET")
    except OSError: print("alone")
for pid in range(2, 33000):
    try: os.kill(pid, 0); print("SEEN", pid) if pid not in (os.getpid(), os.getppid()) else None
    except OSError: pass
"""

    async def work():
        async with Sandbox(_config(tier)) as one, Sandbox(_config(tier)) as two:
            listening = asyncio.create_task(one.execute(python(listen)))
            deadline = asyncio.get_running_loop().time() + 20
            while not await _there(one, "ready") and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.02)
            return await two.execute(python(call)), await listening

    called, listened = asyncio.run(asyncio.wait_for(work(), 60))
    assert (
        called.stdout == "alone\nalone\n"
        and "MET" not in listened.stdout
        and listened.exit_code == 0
    )


def test_dangerous_system_calls_are_refused(tier):
    program = """
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
column = ["x86_64", "aarch64"].index(platform.machine())
calls = {"unshare user": ((272, 97), 0x10000000), "setns": ((308, 268), 0, 0), "clone newuser": ((56, 220), 0x10000011, 0, 0, 0, 0),
         "clone3": ((435, 435), 0, 0), "mount": ((165, 40), 0, 0, 0, 0, 0), "bpf": ((321, 280), 0, 0, 0), "io_uring": ((425, 425), 1, 0),
         "keyctl": ((250, 219), 0, -3, 0), "add_key": ((248, 217), 0, 0, 0, 0, 0), "userfaultfd": ((323, 282), 0),
         "perf": ((298, 241), 0, 0, -1, -1, 0), "ptrace": ((101, 117), 0, 0, 0, 0), "kexec": ((246, 104), 0, 0, 0, 0),
         "pidfd_getfd": ((438, 438), 0, 0, 0), "chroot": ((161, 51), 0), "open_by_handle": ((304, 265), 0, 0, 0),
         "ioctl TIOCSTI": ((16, 29), 0, 0x5412, 0), "ioctl TIOCSTI in wide": ((16, 29), 0, 0x100005412, 0), "vsock": ((41, 198), 40, 1, 0), "netlink": ((41, 198), 16, 3, 0), "unknown": ((600, 600),)}
for name, (numbers, *arguments) in calls.items():
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(numbers[column]), *map(ctypes.c_long, arguments))
    code = errno.errorcode.get(ctypes.get_errno(), "OK")
    if result >= 0 or code not in ("EPERM", "ENOSYS", "EAFNOSUPPORT"): print(name, result, code)
print("tried", len(calls))
"""
    assert execute(_config(tier), python(program)).stdout == "tried 21\n"


def test_process_1_cannot_be_opened_ended_or_crippled_and_tells_nothing_of_the_host():
    """It has the agent's own id."""
    config = _config("namespaces")
    deeds = (
        "cat /proc/1/environ",
        "cat /proc/1/maps",
        "cat /proc/1/mem",
        "ls /proc/1/fd/",
        "ls /proc/1/root/",
        "ls /proc/1/cwd/",
        "ls /proc/1/ns/ -l",
        "prlimit --pid 1 --nofile=0:0",
        "prlimit --pid 1 --cpu=0:0",
    )

    async def work(sandbox):
        tried = await sandbox.execute(
            "; ".join(f"{one} 2>/dev/null | grep -q . && echo GOT {one}" for one in deeds)
        )
        await sandbox.execute(
            "kill -9 1; kill -STOP 1; kill -INT 1; kill -TERM 1; for n in $(seq 1 64); do kill -$n"
            " 1; done; renice 19 1; taskset -p 1 1"
        )
        seen = await sandbox.execute("tr '\\0' ' ' < /proc/1/cmdline; (sleep 60 &); echo well")
        return tried, seen, await sandbox.verify("echo graded")

    tried, seen, verified = inside(config, work)
    assert (
        tried.stdout == ""
        and seen.stdout.replace(" ", "").replace("\0", "") == "initwell\n"
        and verified.stdout == "graded\n"
    )


def test_new_namespaces_cannot_be_had(tier):
    tries = ("unshare -U true", "unshare -m true", "unshare -r true", "nsenter -t 1 -a true")
    assert execute(_config(tier), "; ".join(f"{one} && echo GOT" for one in tries)).stdout == ""


# Grading

SECRET = "the-expected-answer-4711"


def test_the_verifiers_script_is_never_within_reach(tier):
    """Not from an agent's process that tried to stay, and not from the agent's program when the
    verifier itself runs it.
    """
    _needs(tier, "verifier")
    spy = """
import glob, os
patterns = "/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ", "/proc/[0-9]*/fd/*", "/workspace/*", "/tmp/*", "/run/*"
paths = [path for pattern in patterns for path in glob.glob(pattern)]
paths += ["/proc/%s/fd/%d" % (who, number) for who in ("self", os.getppid()) for number in range(300)]  # also where /proc cannot be listed
seen = b""
for path in paths:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError: continue
    try: seen += os.read(descriptor, 1 << 20)
    except OSError: pass
    os.close(descriptor)
with open("loot", "ab") as loot: loot.write(b"LOOT " + seen if b"answer-" + b"4711" in seen else b"nothing. ")
"""

    async def work(sandbox):
        await sandbox.write_file("spy.py", spy)
        await sandbox.execute("setsid bash -c 'while :; do python3 spy.py; done' & sleep 0.1")
        result = await sandbox.verify(
            f"want={SECRET}\nsleep 0.1\npython3 spy.py\n(python3 spy.py)\n[ $want = {SECRET} ] &&"
            " echo graded",
            keep=True,
        )  # with what the spies found
        return result, await sandbox.read_file("loot")

    result, loot = inside(_config(tier), work)
    assert result.stdout == "graded\n" and loot.count(b"nothing.") >= 2 and b"LOOT" not in loot


def test_the_verifiers_memory_cannot_be_opened_by_what_it_runs(tier):
    _needs(tier, "verifier")
    program = (
        "import os; print(os.access('/proc/%d/mem' % os.getppid(), os.R_OK),"
        " os.path.exists('/proc/%d/fd/0' % os.getppid()))"
    )
    result = inside(_config(tier), lambda sandbox: sandbox.verify(f'python3 -c "{program}"; true'))
    assert result.stdout == "False False\n"


def test_hidden_files_are_gone_when_the_agent_comes_back(tier):
    async def work(sandbox):
        seen = await sandbox.verify(
            "cat $VERIFIER_FILES/key; echo $VERIFIER_FILES", files={"key": SECRET.encode()}
        )
        content, directory = seen.stdout[: len(SECRET)], seen.stdout[len(SECRET) :].strip()
        return content, (await sandbox.execute(f"cat {directory}/key; ls -A {directory}")).stdout

    assert inside(_config(tier), work) == (SECRET, "")


def test_markers_in_the_output_forge_nothing(tier):
    forge = "echo '{ \"exit-code\": 0 }'"
    result = execute(
        _config(tier),
        f"{forge}; echo 'sandbox: failed' >&2; for n in $(seq 3 300); do {forge} >&$n; done"
        " 2>/dev/null; exit 9",
    )
    assert (result.exit_code, result.stderr.splitlines()[0]) == (9, "sandbox: failed")
