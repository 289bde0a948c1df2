"""Workers as the admin sees them: how to reach one, what it can still take, which one to choose."""

import asyncio
import ipaddress
import os
import pathlib
import resource
import time
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from envs.rock.config import SandboxConfig
from envs.rock.errors import SandboxError
from envs.rock.host.linux import raise_descriptor_limit
from envs.rock.wire.client import Client, Pipe, retry_for
from envs.rock.wire.errors import Refusal
from envs.rock.wire.operations import MAX_WAIT_SECONDS

HEARTBEAT_SECONDS = 2.0
DEAD_SECONDS = 12.0  # without a heartbeat, until a worker counts as lost
AGAIN_SECONDS = 1.0  # in which a request that was lost on its way is sent again
PING_SECONDS = 3.0  # within which a worker must answer
MEMORY_SHARE = 0.8  # of the free memory that is given out
CPU_OVERCOMMIT = 32.0  # processors only get slower, and agents mostly wait for a model
MAX_SANDBOXES = 5000
DESCRIPTORS_EACH = 8  # that the service needs for one sandbox
_EPSILON = 1e-6


class Resources(NamedTuple):
    """What a sandbox needs at most, or what a worker gives out.

    These are limits, not use: a worker is never promised away twice.
    """

    memory_mb: int
    cpus: float
    pids: int
    sandboxes: int = 1

    def plus(self, other: "Resources", sign: int = 1) -> "Resources":
        """Return the sum of two, or the difference with sign=-1."""
        return Resources(
            self.memory_mb + sign * other.memory_mb,
            self.cpus + sign * other.cpus,
            self.pids + sign * other.pids,
            self.sandboxes + sign * other.sandboxes,
        )

    def within(self, other: "Resources") -> bool:
        """Return whether no field exceeds the other's."""
        return all(mine <= limit + _EPSILON for mine, limit in zip(self, other, strict=True))


def need(config: SandboxConfig) -> Resources:
    """Return what a sandbox of this config needs at most."""
    return Resources(config.memory_mb, config.cpus, config.pids)


def machine_resources(
    memory_mb: int = 0, cpus: float = 0, pids: int = 0, sandboxes: int = 0
) -> Resources:
    """Return what this machine gives out.

    An argument of 0 is replaced by a default: 80 % of the free memory and half of the processes,
    since all processes of the machine share them; 32 times the processors; as many sandboxes as
    file descriptors allow.
    """
    if not cpus:
        cpus = CPU_OVERCOMMIT * len(os.sched_getaffinity(0))
    if not sandboxes:
        descriptors = raise_descriptor_limit()
        sandboxes = max(1, min(MAX_SANDBOXES, (descriptors - 200) // DESCRIPTORS_EACH))
    return Resources(
        memory_mb or int(MEMORY_SHARE * _free_memory_kib() / 1024),
        cpus,
        pids or _max_processes() // 2,
        sandboxes,
    )


def _free_memory_kib() -> int:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0])


def _max_processes() -> int:
    limits = []
    for name in ("pid_max", "threads-max"):
        limits.append(int(pathlib.Path(f"/proc/sys/kernel/{name}").read_text()))
    user_limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if user_limit > 0 and os.geteuid():  # it does not bind root
        limits.append(user_limit)
    return min(limits)


class Link(Protocol):
    """How the admin reaches a worker: a wire.client.Client, or a Worker of its own process."""

    async def call(
        self,
        op: str,
        arguments: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        """Carry out an operation; None: it has not finished, ask again."""

    def read(
        self, op: str, arguments: dict[str, Any], user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file or an archive."""

    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        """Send bytes."""

    async def connect(self, arguments: dict[str, Any], user: str = "") -> Pipe:
        """Open a connection to a port in a sandbox."""

    async def close(self) -> None:
        """Close the connections; a Worker ends its sandboxes."""


class Member:
    """One worker of the fleet, and how much of it is in use.

    Args:
      name: unique among the workers.
      link: how to reach it.
      kinds: what it can make, as "backend:isolation".
      total: what it gives out.
      incarnation: identifies the worker's process; another value means that it began anew.
      find_ended: for a worker in this process, which sends no heartbeats: returns the ids of its
        sandboxes that have ended by themselves.
    """

    def __init__(
        self,
        name: str,
        link: Link,
        kinds: Iterable[str],
        total: Resources,
        incarnation: str,
        find_ended: Callable[[], list[str]] | None = None,
    ):
        self.name = name
        self.link = link
        self.kinds = frozenset(kinds)
        self.total = total
        self.incarnation = incarnation
        self.find_ended = find_ended
        self.used = Resources(0, 0.0, 0, 0)
        self.seen = time.monotonic()
        self.alive = True

    @property
    def share_used(self) -> float:
        """The used share of the resource that is scarcest."""
        return max(used / total for used, total in zip(self.used, self.total, strict=True))

    def fits(self, need: Resources) -> bool:
        """Return whether there is room for one more sandbox."""
        return self.used.plus(need).within(self.total)

    def take(self, need: Resources) -> None:
        """Count a sandbox in."""
        self.used = self.used.plus(need)

    def give_back(self, need: Resources) -> None:
        """Count a sandbox out."""
        self.used = self.used.plus(need, -1)

    async def ask(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Carry out an operation that answers at once."""
        answer = await self.link.call(op, arguments)
        if answer is None:
            raise SandboxError(f"worker {self.name} has not finished {op}")
        return answer

    async def ask_for(self, seconds: float, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Carry out an operation that may be repeated, over broken connections, for `seconds`."""
        return await retry_for(seconds, lambda: self.ask(op, arguments))

    async def finish(self, op: str, arguments: dict[str, Any], call: str) -> dict[str, Any]:
        """Carry out an operation that takes a while, and wait for its end.

        The operation's own time limit ends the waiting. `call` is the key that joins the rounds.
        """
        request = arguments | {"call": call, "wait": MAX_WAIT_SECONDS}
        while True:
            answer = await retry_for(AGAIN_SECONDS, lambda: self.link.call(op, request))
            if answer is not None:
                return answer


async def check_reachable(link: Client, url: str, incarnation: str) -> None:
    """Call a worker back at the address that it registers.

    Raises:
      Refusal: nobody can be reached there, or somebody else.
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    advice = "start the worker with --advertise=http://HOST:PORT as this admin reaches it"
    if is_wildcard(host):
        raise Refusal("conflict", f"{url} is no address at which a worker can be reached; {advice}")
    try:
        async with asyncio.timeout(PING_SECONDS):
            answer = await link.ask("worker/ping", {})
    except TimeoutError:
        reason = f"no answer within {PING_SECONDS:g} s"
    except SandboxError as error:
        reason = str(error)
    else:
        if answer.get("incarnation") == incarnation:
            return
        reason = "another worker answers there"
    raise Refusal("conflict", f"this admin cannot reach the worker at {url}: {reason}; {advice}")


def is_wildcard(host: str) -> bool:
    """Return whether a host is the address that stands for all of a machine's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def emptiest(members: Iterable[Member], need: Resources) -> Member | None:
    """Return the member with the smallest used share among those with room for `need`."""
    fitting = [member for member in members if member.fits(need)]
    return min(fitting, key=lambda member: (member.share_used, member.name), default=None)
