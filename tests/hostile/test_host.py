"""Hostile commands: files and processes of the host stay untouched."""

import asyncio
import os
import pathlib
import subprocess

import pytest

from tests.hostile.sandboxes import (
    execute,
    file_exists,
    host_processes,
    inside,
    make_config,
    python,
)
from tests.paths import ROOT

REPOSITORY = ROOT


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
        make_config(tier), f"if [ -d '{path}' ]; then ls -A '{path}'; else cat '{path}'; fi"
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
        not in execute(make_config(tier), f"echo '|/bin/false' > {path} && echo WRITTEN").stdout
    )


def test_the_kernels_id_of_a_command_owns_nothing_on_the_host(tier):
    """A user namespace alone, made by real root, would keep the kernel's id 0."""

    async def work(sandbox):
        seconds = f"54321{os.getpid()}"
        running = asyncio.create_task(sandbox.execute(f"sleep {seconds}"))
        while not (found := host_processes(f"sleep\0{seconds}")):
            await asyncio.sleep(0.01)
        status = pathlib.Path(f"/proc/{found[0]}/status").read_text()
        await sandbox.kill_all()
        await running
        return status

    fields = dict(
        line.split(":\t", 1)
        for line in inside(make_config(tier), work).splitlines()
        if ":\t" in line
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
        execute(make_config(tier), command).stdout.strip() not in ("", "0")
        and "\n" not in execute(make_config(tier), command).stdout.strip()
    )


def test_no_process_of_the_host_can_be_seen_or_hurt(tier):
    victim = subprocess.Popen(["/bin/sleep", "60"])
    try:
        result = execute(
            make_config(tier),
            f"kill -9 {victim.pid}; kill -9 {os.getpid()}; ls /proc/{os.getpid()}/fd; kill -9 -1;"
            " exit 1",
        )
        assert result.exit_code in (1, 137) and "failure" not in result.stderr
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_the_process_table_shows_only_the_sandbox():
    result = execute(make_config("namespaces"), "ls -d /proc/[0-9]* | wc -l; hostname")
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

    result, left = inside(make_config(tier), work)
    assert result.timed_out and result.exit_code == 137 and left == []


def test_kill_all_reaches_daemons_and_the_verifier_comes_after_them(tier):
    async def work(sandbox):
        tamper = (
            "setsid bash -c 'while :; do echo tampered > answer; done' & while ! [ -s answer ]; do"
            " :; done; touch ready; sleep 1000"
        )
        running = asyncio.create_task(sandbox.execute(tamper))
        while not await file_exists(sandbox, "ready"):
            await asyncio.sleep(0.01)
        await sandbox.kill_all()
        await running
        await sandbox.write_file("answer", "right")
        return (await sandbox.verify("sleep 0.2; cat answer")).stdout

    assert inside(make_config(tier), work) == "right"
