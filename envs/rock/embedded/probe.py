"""The best tier of the embedded backend on this machine, found by starting a sandbox in it."""

import os
import platform
import socket
import sys

from envs.rock.config import ISOLATIONS, TIERS, SandboxConfig
from envs.rock.embedded import zygote_client
from envs.rock.errors import SandboxError
from envs.rock.host import cgroups, landlock, linux, seccomp
from envs.rock.host.messages import parse, receive, send
from envs.rock.tiers import GUARANTEES, Missing, TierReport

TRIAL_SECONDS = 20.0
ATTEMPTS = 2  # at a tier, where a failure may be one of a moment
Obstacle = tuple[str, str]  # why a tier does not work, and the remedy
_BY_CGROUPS = ("memory", "cpu")
# Words of a kernel that refuses namespaces, and the calls that it refuses.
_REFUSALS = ("Operation not permitted", "Permission denied", "Function not implemented")
_REFUSED_CALLS = ("unshare", "mount", "setns", "id map")
# What was found out about a tier and stays so. A failure that may pass is not kept: it would be
# believed for as long as this process lives.
_found: dict[str, Obstacle | None] = {}


def probe(isolation: str = "best_available", tier: str | None = None) -> TierReport:
    """Report the best tier of this machine.

    A tier that works, or that the kernel refuses, is tried once in a process.

    Raises nothing about the machine: see TierReport.require.

    Args:
      isolation: "required" tries only the namespaces tier, "best_available" also landlock.
      tier: try only this one.

    Raises:
      ValueError: `isolation` is neither.
    """
    if isolation not in ISOLATIONS:
        raise ValueError(f"isolation is {isolation!r}; it is one of {', '.join(ISOLATIONS)}")
    tiers = TIERS[:1] if isolation == "required" else TIERS
    if tier:
        tiers = (tier,)
    obstacles: list[Obstacle] = []
    for name in tiers:
        obstacle = _try(name)
        if obstacle is None:
            return _report(name, obstacles)
        obstacles.append(obstacle)
    return TierReport.nothing(*obstacles[0])


def _report(tier: str, obstacles: list[Obstacle]) -> TierReport:
    """Report what a working tier enforces; `obstacles` are those of better tiers."""
    place, no_cgroups = cgroups.find()
    guarantees = {"network", "syscalls"}
    if tier == "namespaces":
        guarantees |= {"filesystem", "processes", "verifier", "view", "disk", "pids"}
    elif os.geteuid() == 0:
        guarantees |= {"filesystem", "pids", "verifier"}  # by a user id for each sandbox
    if place:
        guarantees |= set(place.parents)
    weaker = ("the landlock tier has no namespaces", "leave SandboxConfig.tier unset")
    if obstacles:
        weaker = obstacles[0]
    ungrouped = (
        no_cgroups or "the cpu controller is not available",
        "run as root, or as an ordinary user under `systemd-run --user --scope`, or mount cgroups"
        " writable into the container",
    )
    own_files = (
        "Landlock covers no modes, owners, times and attributes: commands have your user id and can"
        " change those of your files",
        "run as root, or where user namespaces work",
    )
    missing = []
    for name in GUARANTEES:
        if name not in guarantees:
            obstacle = ungrouped if name in _BY_CGROUPS else weaker
            if name == "filesystem":
                obstacle = own_files
            missing.append(Missing(name, *obstacle))
    return TierReport(tier, frozenset(guarantees), tuple(missing))


def _try(tier: str) -> Obstacle | None:
    """Run a command in a sandbox of this tier; return the obstacle, None if it works."""
    if tier in _found:
        return _found[tier]
    obstacle = _platform_obstacle()
    if obstacle is None and tier == "landlock":
        obstacle = _landlock_obstacle()
    if obstacle is not None:
        return _found.setdefault(tier, obstacle)
    error = ""
    for _ in range(ATTEMPTS):
        try:
            _try_to_run(tier)
            return _found.setdefault(tier, None)
        except (SandboxError, OSError) as failure:
            error = str(failure)
        is_refused = any(call in error for call in _REFUSED_CALLS)
        if is_refused and any(words in error for words in _REFUSALS):
            break
    else:
        return _trial_obstacle(tier, error)
    return _found.setdefault(tier, _trial_obstacle(tier, error))


def _trial_obstacle(tier: str, error: str) -> Obstacle:
    if tier == "namespaces" and any(call in error for call in _REFUSED_CALLS):
        return _userns_obstacle(error)
    return (
        f"a sandbox of the {tier} tier failed its trial ({error})",
        "try again; if it stays so, report it with the kernel's version,"
        f" {platform.release()}, and what the sandbox host process wrote to stderr",
    )


def _platform_obstacle() -> Obstacle | None:
    if sys.platform == "linux" and platform.machine() in seccomp.ARCHITECTURES:
        return None
    return (
        f"sandboxes need Linux on {' or '.join(seccomp.ARCHITECTURES)}, this is {sys.platform} on"
        f" {platform.machine()}",
        "use such a machine",
    )


def _landlock_obstacle() -> Obstacle | None:
    if landlock.abi() == 0:
        return (
            "this kernel offers no Landlock",
            "use a kernel from 5.13 on with landlock in its lsm= list, or one with user namespaces",
        )
    if __file__.startswith(landlock.PROGRAMS):
        return (
            f"this code lies in {os.path.dirname(__file__)}, which the landlock tier lets commands"
            " read",
            "move it out of /usr",
        )
    return None


def _try_to_run(tier: str) -> None:
    """Start a sandbox, run an empty command in it and end it.

    Raises:
      SandboxError: with the reason, if that fails.
    """
    config = SandboxConfig(isolation="best_available")
    with zygote_client.create(zygote_client.spec(config, tier)) as channel:
        _expect_reply(channel)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)  # an empty command, and its output
        error_output, stderr = os.pipe()
        try:
            request = {"id": 1, "op": "run", "timeout": TRIAL_SECONDS, "env": {}}
            send(channel, request, (null, stderr, null))
            os.close(stderr)
            reply = _expect_reply(channel)
            if reply.get("failure") or reply["exit_code"]:
                words = os.read(error_output, 4096).decode(errors="replace").strip()
                raise SandboxError(f"{reply['failure'] or reply['exit_code']}: {words}")
        finally:
            os.close(null)
            os.close(error_output)


def _expect_reply(channel: socket.socket) -> dict:
    if not linux.wait_readable(channel.fileno(), TRIAL_SECONDS):
        raise SandboxError(f"no answer within {TRIAL_SECONDS:.0f} s")
    data, _ = receive(channel)
    reply = parse(data)
    if "error" in reply:
        raise SandboxError(reply["error"])
    return reply


def _userns_obstacle(error: str) -> Obstacle:
    """Name what refuses user namespaces here, as far as it can be told from outside."""
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
        "leave the container, or start it with --security-opt seccomp=unconfined --security-opt"
        " apparmor=unconfined --security-opt systempaths=unconfined",
    )


def _setting(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _in_chroot() -> bool:
    """Return whether this process's / is another directory than its mount namespace's /."""
    with open("/proc/self/mountinfo") as file:
        return not any(line.split()[4] == "/" for line in file)
