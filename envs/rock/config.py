"""What a sandbox is asked to be, and what a command's end looks like."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

ISOLATIONS = ("required", "best_available")
TIERS = ("namespaces", "landlock")


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of one sandbox. Which of them are enforced here, `probe` and `Sandbox.guarantees` say."""

    isolation: str = "required"  # "best_available" falls back to weaker tiers and says so
    tier: str | None = None  # None: the best one that works here; a name: that one or an error
    memory_mb: int = 256  # of all processes together, files in the workspace included
    pids: int = 64  # processes and threads together
    cpus: float = 1.0
    disk_mb: int = 16  # workspace and /tmp together; also the largest file
    inodes: int = 4096
    open_files: int = 256  # of one process
    timeout: float = 30.0  # seconds for a command that names none
    start_timeout: float = 30.0
    max_output_bytes: int = 64 * 1024  # kept of stdout and of stderr, each
    env: Mapping[str, str] = field(default_factory=dict)  # added to PATH, HOME and LANG; nothing of the host's environment is

    def __post_init__(self):
        if self.isolation not in ISOLATIONS:
            raise ValueError(f"isolation is {self.isolation!r}; it is one of {', '.join(ISOLATIONS)}")
        if self.tier is not None and self.tier not in TIERS:
            raise ValueError(f"tier is {self.tier!r}; it is one of {', '.join(TIERS)} or None")
        if self.isolation == "required" and self.tier == "landlock":
            raise ValueError("isolation='required' cannot be had from tier='landlock'; use isolation='best_available'")
        for name in ("memory_mb", "pids", "cpus", "disk_mb", "inodes", "open_files", "timeout", "start_timeout", "max_output_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.open_files < 64:
            raise ValueError(f"open_files is {self.open_files}; a sandbox's own process needs 64")
        check_environment(self.env)
        if self.disk_mb >= self.memory_mb:
            raise ValueError(f"disk_mb={self.disk_mb} leaves no memory for programs in memory_mb={self.memory_mb}: files are kept in memory")


def check_environment(env: Mapping[str, str]) -> None:
    """ValueError for a variable that cannot be passed to a program."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"environment variable {name!r}={value!r} cannot be passed to a program")


@dataclass(frozen=True)
class CommandResult:
    """How a command ended. A killed one has exit code 137 (128 + SIGKILL), and `limits_hit` says by what."""

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    truncated: bool  # more was written than max_output_bytes
    seconds: float
    limits_hit: tuple[str, ...] = ()  # of "timeout", "memory", "pids", "disk", "output", "killed"


class SandboxStatus(NamedTuple):
    """What a sandbox uses at one moment. None: not counted on this machine."""

    memory_bytes: int | None  # files of the workspace included
    pids: int | None
    cpu_seconds: float  # of commands that have ended
    disk_bytes: int
    inodes: int
    commands: int  # that run now
    sessions: int
    network_denials: int | None  # connections and datagrams that found no way out since the start
