"""The workers as the admin sees them: what each can still take, and which one a sandbox goes to."""

import os
import pathlib
import resource
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from envs.rock.config import SandboxConfig

HEARTBEAT_SECONDS = 2.0
DEAD_SECONDS = 12.0  # without a heartbeat
PING_SECONDS = 3.0  # in which a worker must answer


class Resources(NamedTuple):
    """What a sandbox needs at most, and what a worker gives out.

    Limits, not use: a worker is never promised away twice.
    """

    memory_mb: int
    cpus: float
    pids: int
    sandboxes: int = 1

    def plus(self, other: "Resources", sign: int = 1) -> "Resources":
        return Resources(*(one + sign * two for one, two in zip(self, other)))

    def within(self, other: "Resources") -> bool:
        return all(one <= two + 1e-6 for one, two in zip(self, other))


def need(config: SandboxConfig) -> Resources:
    return Resources(config.memory_mb, config.cpus, config.pids)


def machine_resources(
    memory_mb: int = 0, cpus: float = 0, pids: int = 0, sandboxes: int = 0
) -> Resources:
    """What this machine gives out, where 0 leaves it to us: 80 % of the memory that is free and
    half of the processes, since those run out for all; processors 32 times over, since they only
    get slower, and agents mostly think.
    """
    if not memory_mb:
        fields = dict(
            line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
        )
        memory_mb = int(0.8 * int(fields["MemAvailable"].split()[0]) / 1024)
    if not pids:
        limits = [
            int(pathlib.Path(f"/proc/sys/kernel/{name}").read_text())
            for name in ("pid_max", "threads-max")
        ]
        pids = (
            min(
                *limits,
                *(
                    limit
                    for limit in resource.getrlimit(resource.RLIMIT_NPROC)[:1]
                    if limit > 0 and os.geteuid()
                ),
            )
            // 2
        )
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Resources(
        memory_mb,
        cpus or 32.0 * len(os.sched_getaffinity(0)),
        pids,
        sandboxes or max(1, min(5000, (descriptors - 200) // 8)),
    )


class Member:
    """One worker."""

    def __init__(
        self,
        name: str,
        link: Any,
        kinds: Iterable[str],
        resources: Resources,
        incarnation: str,
        local: bool,
    ):
        self.name, self.link, self.kinds, self.total, self.incarnation, self.local = (
            name,
            link,
            frozenset(kinds),
            resources,
            incarnation,
            local,
        )
        self.used = Resources(0, 0.0, 0, 0)
        self.seen = time.monotonic()
        self.alive = True

    @property
    def share_used(self) -> float:
        return max(used / total for used, total in zip(self.used, self.total))

    def fits(self, need: Resources) -> bool:
        return self.used.plus(need).within(self.total)

    def take(self, need: Resources) -> None:
        self.used = self.used.plus(need)

    def give_back(self, need: Resources) -> None:
        self.used = self.used.plus(need, -1)


def emptiest(members: Iterable[Member], need: Resources) -> Member | None:
    """The one that is least full among those where it fits."""
    return min(
        (member for member in members if member.fits(need)),
        key=lambda member: (member.share_used, member.name),
        default=None,
    )
