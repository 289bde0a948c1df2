"""What the Docker backend enforces, and what it refuses because it cannot."""

import asyncio
import json
import os
import shlex

import pytest

from envs.rock import (
    IsolationError,
    Sandbox,
    SandboxStartError,
)
from tests.envs.rock.in_docker import config, containers

# an engine of their own, and a minute on two idle cores
pytestmark = [pytest.mark.slow, pytest.mark.docker]


def test_every_limit_is_on_and_the_engine_says_so(inside):
    async def work(sandbox):
        from envs.rock.docker.engine import engine as docker_engine

        engine = docker_engine()
        about = await engine.call(
            engine.client.inspect_container, sandbox._backend._running.container.id
        )
        seen = await sandbox.execute(
            "cat /proc/self/status; ulimit -n -c -u; id -u; cat /proc/net/route | wc -l; echo x >"
            " /etc/x; echo x > /usr/x; ls -A /root /home"
        )
        return about, seen, sandbox.guarantees, sandbox.tier

    about, seen, guarantees, tier = inside(work, cpus=0.5, pids=40)
    host = about["HostConfig"]
    assert (
        not host["Privileged"]
        and host["CapDrop"] == ["ALL"]
        and not host["CapAdd"]
        and host["ReadonlyRootfs"]
        and host["NetworkMode"] == "none"
    )
    assert (
        host["Memory"] == host["MemorySwap"] == 128 << 20
        and host["PidsLimit"] == 104
        and host["CpuQuota"] == 50_000
        and host["LogConfig"]["Type"] == "none"
    )
    assert (
        "no-new-privileges" in host["SecurityOpt"]
        and not host["Binds"]
        and not host["Devices"]
        and int(about["Config"]["User"].split(":")[0]) >= 20_000
    )
    fields = dict(line.split(":\t", 1) for line in seen.stdout.splitlines() if ":\t" in line)
    assert [
        fields[name].strip("0") for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")
    ] == [""] * 5
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2") and int(
        fields["Uid"].split()[0]
    ) >= 20_000
    assert seen.stderr.count("Read-only file system") == 2 and seen.stdout.endswith(
        "\n1\n/home:\n\n/root:\n"
    )  # one line: the head of an empty routing table
    assert tier == "docker" and guarantees >= {
        "filesystem",
        "network",
        "syscalls",
        "processes",
        "verifier",
        "view",
        "disk",
        "pids",
        "memory",
        "cpu",
    }


def test_the_system_call_filter_refuses_what_the_embedded_one_refuses(inside):
    from envs.rock.docker.limits import seccomp_profile
    from envs.rock.host import seccomp

    profile = json.loads(seccomp_profile())
    named = {name for rule in profile["syscalls"] for name in rule["names"]}
    assert named == set(seccomp.DENIED) | set(seccomp.ABSENT) | {
        "clone",
        "fcntl",
        "ioctl",
        "prlimit64",
        "socket",
        "socketpair",
    }
    numbers = (
        {
            "unshare": 272,
            "clone": 56,
            "bpf": 321,
            "io_uring": 425,
            "keyctl": 250,
            "ptrace": 101,
            "socket": 41,
            "socketpair": 53,
            "ioctl": 16,
        }
        if os.uname().machine == "x86_64"
        else {
            "unshare": 97,
            "clone": 220,
            "bpf": 280,
            "io_uring": 425,
            "keyctl": 219,
            "ptrace": 117,
            "socket": 198,
            "socketpair": 199,
            "ioctl": 29,
        }
    )
    calls = [
        ("unshare", "0x10000000"),
        ("clone", "0x10000011,0,0,0,0"),
        ("clone", "0x8011,0,0,0,0"),
        ("bpf", "0,0,0"),
        ("io_uring", "1,0"),
        ("keyctl", "0,-3,0"),
        ("ptrace", "0,0,0,0"),
        ("socket", "40,1,0"),
        ("socket", "16,3,0"),
        ("socket", "3,1,0"),
        ("socketpair", "2,1,0,0"),
        ("ioctl", "0,0x5412,0"),
        ("ioctl", "0,0x100005412,0"),
    ]
    program = "; ".join(
        f"$r = syscall({numbers[name]},{arguments}); print '{name} ', $r < 0 ? $!+0 : 'GOT', ' '"
        for name, arguments in calls
    )
    allowed = (
        f"; print syscall({numbers['socket']},1,1,0) > 0, syscall({numbers['socket']},2,1,0) > 0,"
        f" syscall({numbers['socket']},10,2,0) > 0"
    )
    refused = inside(
        lambda sandbox: sandbox.execute(
            f"perl -e {shlex.quote(program + allowed)}; echo > /dev/tcp/1.1.1.1/53 && echo GOT"
        )
    )
    assert refused.stdout.split() == [
        "unshare",
        "1",
        "clone",
        "1",
        "clone",
        "1",
        "bpf",
        "1",
        "io_uring",
        "38",
        "keyctl",
        "1",
        "ptrace",
        "1",
        "socket",
        "97",
        "socket",
        "97",
        "socket",
        "97",
        "socketpair",
        "97",
        "ioctl",
        "1",
        "ioctl",
        "1",
        "111",
    ]
    assert "Connection refused" in refused.stderr


def test_what_cannot_be_enforced_is_refused(engine):
    async def start(**fields):
        await Sandbox(config(engine, **fields)).start()

    with pytest.raises(
        IsolationError, match=r"no runtime 'nowhere', only .*runc.*remedy: install nowhere"
    ):
        asyncio.run(start(runtime="nowhere"))
    with pytest.raises(SandboxStartError, match="has no image 'no/such:1'; pull it or build it"):
        asyncio.run(start(image="no/such:1"))
    assert containers() == []


def test_without_an_engine_the_probe_says_what_is_missing(monkeypatch):
    from envs.rock.docker.probe import probe_docker

    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    report = probe_docker()
    assert (
        report.tier is None
        and "nothing is at unix:///nonexistent" in report.missing[0].reason
        and "start dockerd" in report.missing[0].remedy
    )
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    assert "unix:// socket" in probe_docker().missing[0].reason


def test_a_fork_bomb_and_a_memory_hog_are_contained_and_named(inside):
    async def work(sandbox):
        bomb = await sandbox.execute("bomb() { bomb | bomb & }; bomb; sleep 60", timeout=0.5)
        hog = await sandbox.execute("x=x; while :; do x=$x$x; done; echo $?")
        return bomb, hog, await sandbox.execute("echo well")

    bomb, hog, after = inside(work, pids=32, memory_mb=64)
    assert bomb.timed_out and "Resource temporarily unavailable" in bomb.stderr
    assert "memory" in hog.limits_hit and hog.exit_code == 137 and after.stdout == "well\n"


def test_a_flood_is_cut_and_ended(inside):
    result = inside(
        lambda sandbox: sandbox.execute("yes 'no end to this'; echo after", timeout=60),
        max_output_bytes=4096,
    )
    assert (
        len(result.stdout) == 4096
        and result.truncated
        and result.limits_hit == ("output",)
        and result.exit_code == 137
    )


def test_disks_are_limited_in_bytes_and_files(inside):
    async def work(sandbox):
        big = await sandbox.execute(
            "head -c 100M /dev/zero | split -b 1M - f; head -c 100M /dev/zero | split -b 1M -"
            " /tmp/f; du -scm . /tmp | tail -1 | cut -f1; rm -f f* /tmp/f*"
        )
        many = await sandbox.execute("for i in $(seq 300); do : > i$i || exit 4; done; echo all")
        return int(big.stdout), big.stderr, many.exit_code

    used, said, many = inside(work, disk_mb=8, inodes=200)
    assert 6 <= used <= 8 and "No space left" in said and many == 4


@pytest.mark.parametrize(
    "deed",
    [
        "chmod 0 . /tmp; ln -sfn /nowhere /workspace",
        "rm -rf /workspace /tmp . ..; mkdir -p run/rock; mkfifo sh bash",
        (
            "head -c 1G /dev/zero > full; head -c 1G /dev/zero > /tmp/full; head -c 1G /dev/zero >"
            " /dev/shm/full; chmod 0 ."
        ),
        "for n in $(seq 64); do kill -$n 1; done; kill -9 $PPID; kill -9 -1",
        (
            "echo x > /proc/1/mem; echo x > /proc/$PPID/mem; cat /proc/$PPID/environ; while :; do"
            " kill -9 -1; done"
        ),
        (
            "ulimit -n 4; ulimit -u 1; mkdir -m 0 -p a/b; b() { while :; do kill -USR1 1; done; };"
            " b & b & b"
        ),
    ],
)
def test_no_deed_of_the_agent_makes_the_next_command_or_the_verifier_fail(inside, deed):
    async def work(sandbox):
        await sandbox.execute(deed, timeout=1)
        following = await sandbox.execute("cd . && echo next")
        verified = await sandbox.verify("cd . && cat $VERIFIER_FILES/f", files={"f": b"graded"})
        return following.stdout, verified.stdout

    assert inside(work) == ("next\n", "graded")
