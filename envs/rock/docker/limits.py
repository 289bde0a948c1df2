"""The limits of every container: system calls, memory, processes, disk, devices."""

import json
import os

from docker import APIClient

from envs.rock.config import SandboxConfig
from envs.rock.docker import scripts
from envs.rock.host import seccomp

# For our execs, which have many threads as they begin; RLIMIT_NPROC counts the agent's own limit.
RESERVED_PIDS = 64
CPU_PERIOD_MICROSECONDS = 100_000
MIN_CPU_QUOTA = 1000  # the kernel's minimum
MIN_INODES = 16
PLACE_INODES = 1024
TOOLS = "/run/tools"  # of a verifier, in its container
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_LOW_HALF = 0xFFFFFFFF
_HIDDEN_BELOW_PROC = (
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
)
_HIDDEN_BELOW_SYS = (
    "block",
    "bus",
    "class",
    "dev",
    "devices/virtual",
    "firmware",
    "hypervisor",
    "kernel",
    "module",
    "power",
)


def host_config(
    client: APIClient, config: SandboxConfig, user: int, place_bytes: int, tools: str = ""
) -> dict:
    """Return Docker's HostConfig with every limit set.

    /tmp gets a quarter of disk_mb and of inodes, because Docker cannot let two mounts share one
    limit.

    Args:
      client: the SDK's, whose API version the result follows.
      config: the sandbox's.
      user: the user id of the agent.
      place_bytes: size of the directory of the sandbox's own programs (scripts.PLACE).
      tools: directory of this machine that is mounted read-only at TOOLS; "" for none.
    """
    disk = config.disk_mb << 20
    tmp_disk = disk // 4
    tmp_inodes = config.inodes // 4
    workspace_inodes = max(MIN_INODES, config.inodes - tmp_inodes)
    memory = config.memory_mb << 20
    limits = {
        "nofile": config.open_files,
        # 1, not 0: a core_pattern that is a pipe ignores 0, and the host's crash handler would run.
        "core": 1,
        "fsize": disk,
        "memlock": 64 << 10,
        "msgqueue": 0,
    }
    hidden = [f"/proc/{name}" for name in _HIDDEN_BELOW_PROC]
    hidden += [f"/sys/{name}" for name in _HIDDEN_BELOW_SYS]
    made = client.create_host_config(
        privileged=False,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges", f"seccomp={seccomp_profile()}"],
        read_only=True,
        network_mode="none",
        dns=["127.0.0.1"],
        dns_search=["."],
        ipc_mode="private",
        runtime=config.runtime,
        auto_remove=True,
        log_config={"Type": "none"},
        binds=[f"{os.path.abspath(tools)}:{TOOLS}:ro"] if tools else None,
        mem_limit=memory,
        memswap_limit=memory,
        pids_limit=config.pids + RESERVED_PIDS,
        cpu_period=CPU_PERIOD_MICROSECONDS,
        cpu_quota=max(MIN_CPU_QUOTA, int(config.cpus * CPU_PERIOD_MICROSECONDS)),
        shm_size=min(16, max(1, config.memory_mb // 16)) << 20,
        ulimits=[{"Name": name, "Soft": limit, "Hard": limit} for name, limit in limits.items()],
        tmpfs={
            "/workspace": _tmpfs(disk - tmp_disk, workspace_inodes, "700", user),
            "/tmp": _tmpfs(tmp_disk, max(MIN_INODES, tmp_inodes), "1777"),
            scripts.PLACE: _tmpfs(place_bytes, PLACE_INODES, "711", scripts.KEEPER),
        },
    )
    return {"MaskedPaths": hidden} | made


def _tmpfs(size: int, inodes: int, mode: str, owner: int = 0) -> str:
    limits = f"size={size},nr_inodes={inodes},mode={mode},uid={owner},gid={owner}"
    return f"rw,exec,nosuid,nodev,{limits}"


def seccomp_profile() -> str:
    """Return the system-call filter of the embedded backend as Docker's JSON.

    Docker's own profile is not used because it leaves AF_VSOCK and io_uring open.
    """
    rules = [
        _refuse(sorted(seccomp.DENIED), _EPERM),
        _refuse(sorted(seccomp.ABSENT), _ENOSYS),
    ]
    for bit in range(32):
        if seccomp.REFUSED_CLONE_FLAGS >> bit & 1:
            rules.append(_refuse(["clone"], _EPERM, (0, "SCMP_CMP_MASKED_EQ", 1 << bit, 1 << bit)))
    for family in range(seccomp.AF_INET6):
        if family not in (seccomp.AF_UNIX, seccomp.AF_INET):
            of_family = (0, "SCMP_CMP_MASKED_EQ", _LOW_HALF, family)
            rules.append(_refuse(["socket"], _EAFNOSUPPORT, of_family))
    newer_family = (0, "SCMP_CMP_GT", seccomp.AF_INET6, 0)
    rules.append(_refuse(["socket"], _EAFNOSUPPORT, newer_family))
    not_unix = (0, "SCMP_CMP_NE", seccomp.AF_UNIX, 0)
    rules.append(_refuse(["socketpair"], _EAFNOSUPPORT, not_unix))
    # Only for the caller itself: process 1 has the same user id as the agent.
    rules.append(_refuse(["prlimit64"], _EPERM, (0, "SCMP_CMP_NE", 0, 0)))
    for request in (seccomp.TIOCSTI, seccomp.TIOCLINUX):
        of_request = (1, "SCMP_CMP_MASKED_EQ", _LOW_HALF, request)
        rules.append(_refuse(["ioctl"], _EPERM, of_request))
    for command in (seccomp.F_SETLEASE, seccomp.F_NOTIFY):
        of_command = (1, "SCMP_CMP_MASKED_EQ", _LOW_HALF, command)
        rules.append(_refuse(["fcntl"], _EPERM, of_command))
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": [f"SCMP_ARCH_{os.uname().machine.upper()}"],
        "syscalls": rules,
    }
    return json.dumps(profile)


def _refuse(names: list[str], answer: int, *conditions: tuple[int, str, int, int]) -> dict:
    """Return the rule that these calls fail with the errno `answer`.

    Args:
      names: of system calls.
      answer: the errno.
      conditions: (argument's index, operator, value, second value); without any, always.
    """
    fields = [
        {"index": index, "op": operator, "value": value, "valueTwo": second}
        for index, operator, value, second in conditions
    ]
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": answer, "args": fields}
