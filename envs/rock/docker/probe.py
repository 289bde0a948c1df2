"""What containers of this machine's Docker engine enforce.

The docker package may be missing, so it is imported only when the engine is asked.
"""

from typing import Any

from envs.rock.errors import SandboxError
from envs.rock.tiers import GUARANTEES, Missing, TierReport


def probe_docker(runtime: str | None = None) -> TierReport:
    """Report what containers of the engine at DOCKER_HOST enforce; the tier is "docker".

    This may block for seconds. It raises nothing: see TierReport.require.

    Args:
      runtime: the engine's name of one, "runsc" for example; None for the engine's default.
    """
    try:
        from envs.rock.docker.engine import engine
    except ImportError as error:
        return TierReport.nothing(
            f"the package docker is not installed ({error})", "pip install 'docker>=7.1,<8'"
        )
    try:
        info = engine().info
    except SandboxError as error:
        return TierReport.nothing(
            str(error),
            "start dockerd, or let DOCKER_HOST name its socket, and be root or in the group docker",
        )
    if info.get("OSType") != "linux":
        return TierReport.nothing(
            f"the engine runs {info.get('OSType')} containers", "use a Linux engine"
        )
    runtimes = info.get("Runtimes", {})
    if runtime and runtime not in runtimes:
        return TierReport.nothing(
            f"the engine has no runtime {runtime!r}, only {', '.join(sorted(runtimes))}",
            f"install {runtime} and name it in /etc/docker/daemon.json",
        )
    missing = _missing_limits(info)
    guarantees = frozenset(GUARANTEES) - {item.guarantee for item in missing}
    return TierReport("docker", guarantees | {"view"}, missing)


def _missing_limits(info: dict[str, Any]) -> tuple[Missing, ...]:
    """Return the limits that the engine says it cannot enforce."""
    security_options = info.get("SecurityOptions") or ()
    enforced = {
        "syscalls": any("name=seccomp" in option for option in security_options),
        "memory": info.get("MemoryLimit"),
        "pids": info.get("PidsLimit"),
        "cpu": info.get("CpuCfsQuota"),
    }
    missing = []
    for name, works in enforced.items():
        if works:
            continue
        remedy = (
            "give the engine the memory, pids and cpu controllers (rootless: cgroup 2 with"
            " delegation)"
        )
        if name == "syscalls":
            remedy = "use an engine and a kernel with seccomp"
        missing.append(Missing(name, f"the engine does not enforce {name} limits", remedy))
    return tuple(missing)
