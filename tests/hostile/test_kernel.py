"""Hostile commands: no network, no sibling, no dangerous system call."""

import asyncio
import contextlib
import os
import socket
import threading

import pytest

from envs.rock import Sandbox
from tests.hostile.sandboxes import execute, file_exists, inside, make_config, python


def test_no_network_is_reached(tier):
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0rock-test-{os.getpid()}-{tier}")
    abstract.listen()
    reached = []

    def listen(listener):
        with contextlib.suppress(OSError):
            reached.append(listener.accept())

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
    destinations = [(int(family), int(kind), address) for family, kind, address in ways]
    program = f"""
import socket
for family, kind, address in {destinations}:
    try:
        s = socket.socket(family, kind, 1 if (family, kind) == (2, 3) else 0)
        s.settimeout(1); s.connect(address); s.send(b"x"); kind == 2 and s.recv(1)
        print("REACHED", family, kind, address)
    except OSError as error:
        print("no way:", error)
try:  # an ICMP socket without privileges, and a name
    ping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1)
    ping.settimeout(1); ping.sendto(b"\\x08\\0\\0\\0\\0\\0\\0\\0", ("1.1.1.1", 0)); ping.recv(1)
    print("ICMP was answered")
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

    result, denials = inside(make_config(tier), work)
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
        one = socket.socket(family); one.bind(place); one.listen(); one.settimeout(0.7)
        listeners.append(one)
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
        async with Sandbox(make_config(tier)) as one, Sandbox(make_config(tier)) as two:
            listening = asyncio.create_task(one.execute(python(listen)))
            deadline = asyncio.get_running_loop().time() + 60
            while (
                not await file_exists(one, "ready") and asyncio.get_running_loop().time() < deadline
            ):
                await asyncio.sleep(0.02)
            return await two.execute(python(call)), await listening

    called, listened = asyncio.run(asyncio.wait_for(work(), 180))
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
calls = {
    "unshare user": ((272, 97), 0x10000000),
    "setns": ((308, 268), 0, 0),
    "clone newuser": ((56, 220), 0x10000011, 0, 0, 0, 0),
    "clone3": ((435, 435), 0, 0),
    "mount": ((165, 40), 0, 0, 0, 0, 0),
    "bpf": ((321, 280), 0, 0, 0),
    "io_uring": ((425, 425), 1, 0),
    "keyctl": ((250, 219), 0, -3, 0),
    "add_key": ((248, 217), 0, 0, 0, 0, 0),
    "userfaultfd": ((323, 282), 0),
    "perf": ((298, 241), 0, 0, -1, -1, 0),
    "ptrace": ((101, 117), 0, 0, 0, 0),
    "kexec": ((246, 104), 0, 0, 0, 0),
    "pidfd_getfd": ((438, 438), 0, 0, 0),
    "chroot": ((161, 51), 0),
    "open_by_handle": ((304, 265), 0, 0, 0),
    "ioctl TIOCSTI": ((16, 29), 0, 0x5412, 0),
    "ioctl TIOCSTI in wide": ((16, 29), 0, 0x100005412, 0),
    "vsock": ((41, 198), 40, 1, 0),
    "netlink": ((41, 198), 16, 3, 0),
    "unknown": ((600, 600),),
}
for name, (numbers, *arguments) in calls.items():
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(numbers[column]), *map(ctypes.c_long, arguments))
    code = errno.errorcode.get(ctypes.get_errno(), "OK")
    if result >= 0 or code not in ("EPERM", "ENOSYS", "EAFNOSUPPORT"): print(name, result, code)
print("tried", len(calls))
"""
    assert execute(make_config(tier), python(program)).stdout == "tried 21\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of calls are x86_64's")
def test_what_reaches_other_processes_or_file_systems_of_the_host_is_refused():
    program = """
import ctypes, errno, fcntl, os
libc = ctypes.CDLL(None, use_errno=True)
usr = os.open("/usr", os.O_RDONLY)
here = os.open(".", os.O_RDONLY)
passwd = os.open("/usr/bin/env", os.O_RDONLY)
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
def put(path, text): os.write(os.open(path, os.O_WRONLY), text)
deeds = {
    "FITRIM": lambda: fcntl.ioctl(usr, 0xC0185879, bytes(24)),
    "FIFREEZE": lambda: fcntl.ioctl(usr, 0xC0045877, 0),
    "EXT4_IOC_SHUTDOWN": lambda: fcntl.ioctl(usr, 0x8004587D, bytes(4)),
    "FIBMAP": lambda: fcntl.ioctl(passwd, 1, bytes(4)),
    "FS_IOC_SETFLAGS": lambda: fcntl.ioctl(passwd, 0x40086602, bytes(8)),
    "quotactl": lambda: call(179, 0, 0, 0, 0),
    "swapon": lambda: call(167, b"/usr", 0),
    "fsopen": lambda: call(430, b"tmpfs", 0),
    "pidfd_getfd of process 1": lambda: call(438, os.pidfd_open(1), 0, 0),
    "process_vm_readv of process 1": lambda: call(310, 1, 0, 0, 0, 0, 0),
    "kcmp": lambda: call(312, 1, 1, 0, 0, 0),
    "setns by pidfd": lambda: call(308, os.pidfd_open(1), 0x20000),
    "its oom_score_adj": lambda: put("/proc/self/oom_score_adj", b"-1000"),
    "that of process 1": lambda: put("/proc/1/oom_score_adj", b"0"),
    "a setting": lambda: put("/proc/sys/user/max_inotify_instances", b"9999"),
    "a terminal": lambda: os.open("/dev/tty", os.O_RDWR),
    "nice": lambda: os.nice(-5),
    "an extended attribute": lambda: os.setxattr("/usr", "user.x", b"x"),
    "real-time scheduling": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "another sandbox's program": lambda: os.utime("/usr/bin/env"),
}
for name, deed in deeds.items():
    try: deed(); print("DONE", name)
    except OSError: pass
print("tried", len(deeds))
"""
    assert execute(make_config("namespaces"), python(program)).stdout == "tried 20\n"


def test_process_1_cannot_be_opened_ended_or_crippled_and_tells_nothing_of_the_host():
    """It has the agent's own id."""
    config = make_config("namespaces")
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
    assert execute(make_config(tier), "; ".join(f"{one} && echo GOT" for one in tries)).stdout == ""
