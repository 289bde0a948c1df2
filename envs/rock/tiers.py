"""What isolation this machine can give, found by trying it, and for what it cannot give: why, and
the remedy.
"""

import functools
import os
import platform
import select
import socket
import sys
from typing import NamedTuple

from envs.rock.config import ISOLATIONS, TIERS, SandboxConfig
from envs.rock.embedded import zygote_client
from envs.rock.errors import IsolationError, SandboxError
from envs.rock.host import cgroups, landlock, seccomp
from envs.rock.host.messages import parse, receive, send

TRIAL_SECONDS = 20.0
GUARANTEES = {
    "filesystem": "commands read only system programs and their workspace",
    "network": "commands reach no network, the host's own services included",
    "syscalls": "dangerous system calls are refused",
    "processes": "commands see no process but their own, and none outlives its command",
    "view": "what the verifier writes leaves the agent's files as they are",
    "verifier": "what the verifier runs cannot look into the verifier",
    "disk": "the workspace is limited in bytes and files",
    "pids": "the number of processes is limited",
    "memory": "the memory of a sandbox is limited in total",
    "cpu": "the processor time of a sandbox is limited",
}
REQUIRED = frozenset(GUARANTEES) - {"cpu"}  # a deadline bounds processor time anyway


class Missing(NamedTuple):
    guarantee: str
    reason: str
    remedy: str


class TierReport(NamedTuple):
    tier: str | None  # the best tier that works here; None: no sandbox can be had at all
    guarantees: frozenset[str]  # what that tier enforces here
    missing: tuple[Missing, ...]

    def banner(self) -> str:
        """For a person to read before a run in a weaker tier; "" when nothing is missing."""
        if not self.missing:
            return ""
        lines = [
            f"SANDBOX ISOLATION IS WEAK: tier {self.tier or 'none'}. NOT enforced on this machine:"
        ]
        lines += [
            f"  {item.guarantee:<10} {GUARANTEES[item.guarantee]}: {item.reason}"
            for item in self.missing
        ]
        lines += [
            f"  remedy: {remedy}" for remedy in dict.fromkeys(item.remedy for item in self.missing)
        ]
        width = max(map(len, lines))
        return "\n".join(["!" * width, *lines, "!" * width])

    def require(self, isolation: str) -> None:
        """IsolationError when this is not what was asked for."""
        refused = (
            [item for item in self.missing if item.guarantee in REQUIRED]
            if isolation == "required"
            else []
        )
        if self.tier is None or refused:
            causes = dict.fromkeys(
                f"{item.reason}; remedy: {item.remedy}" for item in refused or self.missing
            )
            names = ", ".join(item.guarantee for item in refused or self.missing)
            raise IsolationError(
                f"isolation={isolation!r} cannot be enforced here ({names}): " + " | ".join(causes)
            )


def probe(isolation: str = "best_available", tier: str | None = None) -> TierReport:
    """The best tier here (or the one named), tried once for each process.

    Raises nothing: see TierReport.require.

    Args:
      isolation: "required" tries namespaces only; "best_available" also the Landlock tier.
      tier: try just this one.
    """
    if isolation not in ISOLATIONS:
        raise ValueError(f"isolation is {isolation!r}; it is one of {', '.join(ISOLATIONS)}")
    tiers = (tier,) if tier else TIERS[:1] if isolation == "required" else TIERS
    failures = []
    for name in tiers:
        reason, remedy = _try(name)
        if not reason:
            return _report(name, failures)
        failures.append((reason, remedy))
    return TierReport(None, frozenset(), tuple(Missing(name, *failures[0]) for name in GUARANTEES))


def _report(tier: str, failures: list[tuple[str, str]]) -> TierReport:
    """What the working tier enforces. `failures`: why better ones do not work."""
    place, no_cgroups = cgroups.find()
    guarantees = {"filesystem", "network", "syscalls"}
    if tier == "namespaces":
        guarantees |= {"processes", "verifier", "view", "disk", "pids"}
    elif os.geteuid() == 0:
        guarantees |= {"pids", "verifier"}  # by a user id for each sandbox
    if place:
        guarantees |= set(place.parents)
    weaker = (
        failures[0]
        if failures
        else ("the landlock tier has no namespaces", "leave SandboxConfig.tier unset")
    )
    ungrouped = (
        no_cgroups or "the cpu controller is not available",
        (
            "run as root, or as an ordinary user under `systemd-run --user --scope`, or mount"
            " cgroups writable into the container"
        ),
    )
    return TierReport(
        tier,
        frozenset(guarantees),
        tuple(
            Missing(name, *(ungrouped if name in ("memory", "cpu") else weaker))
            for name in GUARANTEES
            if name not in guarantees
        ),
    )


@functools.cache
def _try(tier: str) -> tuple[str, str]:
    """("", "") if a sandbox of this tier runs a command here; else why it does not, and the remedy."""
    if sys.platform != "linux" or platform.machine() not in seccomp.ARCHITECTURES:
        return (
            (
                f"sandboxes need Linux on {' or '.join(seccomp.ARCHITECTURES)}, this is"
                f" {sys.platform} on {platform.machine()}"
            ),
            "use such a machine",
        )
    if tier == "landlock":
        if landlock.abi() == 0:
            return (
                "this kernel offers no Landlock",
                (
                    "use a kernel from 5.13 on with landlock in its lsm= list, or one with user"
                    " namespaces"
                ),
            )
        if __file__.startswith(landlock.PROGRAMS):
            return (
                (
                    f"this code lies in {os.path.dirname(__file__)}, which the landlock tier lets"
                    " commands read"
                ),
                "move it out of /usr",
            )
    try:
        _try_to_run(tier)
    except (SandboxError, OSError) as error:
        return (
            _userns_obstacle(str(error))
            if tier == "namespaces"
            else (str(error), f"report this with the kernel's version, {platform.release()}")
        )
    return "", ""


def _try_to_run(tier: str) -> None:
    """Start a sandbox, run an empty command in it and end it; SandboxError with the reason if that
    fails.
    """
    with zygote_client.create(
        zygote_client.spec(SandboxConfig(isolation="best_available"), tier)
    ) as channel:
        _expect(channel)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # an empty command, and its output
        trial, stderr = os.pipe()
        try:
            send(
                channel,
                {"id": 1, "op": "run", "timeout": TRIAL_SECONDS, "env": {}},
                (null, stderr, null),
            )
            os.close(stderr)
            reply = _expect(channel)
            if reply.get("failure") or reply["exit_code"]:
                raise SandboxError(
                    f"{reply['failure'] or reply['exit_code']}:"
                    f" {os.read(trial, 4096).decode(errors='replace').strip()}"
                )
        finally:
            os.close(null), os.close(trial)


def _expect(channel: socket.socket) -> dict:
    if not select.select([channel], [], [], TRIAL_SECONDS)[0]:
        raise SandboxError(f"no answer within {TRIAL_SECONDS:.0f} s")
    reply = parse(receive(channel)[0])
    if "error" in reply:
        raise SandboxError(reply["error"])
    return reply


def _userns_obstacle(error: str) -> tuple[str, str]:
    """Name what refuses user namespaces here, as well as it can be told from outside."""
    if _setting("/proc/sys/user/max_user_namespaces") == "0":
        return (
            f"user namespaces are switched off ({error})",
            "sysctl user.max_user_namespaces=10000",
        )
    if _setting("/proc/sys/kernel/unprivileged_userns_clone") == "0" and os.geteuid():
        return (
            f"user namespaces are switched off for ordinary users ({error})",
            "sysctl kernel.unprivileged_userns_clone=1",
        )
    if _setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            f"AppArmor restricts user namespaces, as on Ubuntu from 23.10 ({error})",
            "run as root, or sysctl kernel.apparmor_restrict_unprivileged_userns=0",
        )
    if _in_chroot():
        return (
            f"inside a chroot the kernel refuses user namespaces ({error})",
            "enter the tree with pivot_root (a container) instead of chroot",
        )
    return (
        f"this machine refuses user namespaces ({error})",
        (
            "leave the container, or start it with --security-opt seccomp=unconfined --security-opt"
            " apparmor=unconfined --security-opt systempaths=unconfined"
        ),
    )


def _setting(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _in_chroot() -> bool:
    """Whether this process's / is not the / of its mount namespace."""
    with open("/proc/self/mountinfo") as file:
        return not any(line.split()[4] == "/" for line in file)


def probe_docker(runtime: str | None = None) -> TierReport:
    """What containers of the Docker engine of this machine enforce; its tier is "docker".

    It may block for seconds, and raises nothing.

    Args:
      runtime: by its name in the engine, "runsc" say; None: the engine's default.
    """

    def none(reason: str, remedy: str) -> TierReport:
        return TierReport(
            None, frozenset(), tuple(Missing(name, reason, remedy) for name in GUARANTEES)
        )

    try:
        from envs.rock.docker import container
    except ImportError as error:
        return none(
            f"the package docker is not installed ({error})", "pip install 'docker>=7.1,<8'"
        )
    try:
        info = container.engine().info
    except SandboxError as error:
        return none(
            str(error),
            "start dockerd, or let DOCKER_HOST name its socket, and be root or in the group docker",
        )
    if info.get("OSType") != "linux":
        return none(f"the engine runs {info.get('OSType')} containers", "use a Linux engine")
    if runtime and runtime not in info.get("Runtimes", {}):
        return none(
            f"the engine has no runtime {runtime!r}, only"
            f" {', '.join(sorted(info.get('Runtimes', {})))}",
            f"install {runtime} and name it in /etc/docker/daemon.json",
        )
    cgroups_remedy = (
        "give the engine the memory, pids and cpu controllers (rootless: cgroup 2 with delegation)"
    )
    found = {
        "syscalls": any("name=seccomp" in option for option in info.get("SecurityOptions") or ()),
        "memory": info.get("MemoryLimit"),
        "pids": info.get("PidsLimit"),
        "cpu": info.get("CpuCfsQuota"),
    }
    missing = tuple(
        Missing(
            name,
            f"the engine does not enforce {name} limits",
            "use an engine and a kernel with seccomp" if name == "syscalls" else cgroups_remedy,
        )
        for name, works in found.items()
        if not works
    )
    return TierReport(
        "docker", frozenset(GUARANTEES) - {item.guarantee for item in missing} | {"view"}, missing
    )
