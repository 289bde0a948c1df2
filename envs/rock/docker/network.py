"""Guards in the networks of containers: what is refused is recorded, what is granted is relayed.

A container has no network device but its loopback. A guard (host/egress.py) is put into its network
namespace, as into that of an embedded sandbox. One more thread serves the guards of all
containers, however busy the event loops are; granted connections go to the container's event loop,
which connects to the outside.

This needs root on the engine's own machine, and a runtime whose containers use the kernel's
network; `obstacle` says what is missing.
"""

import asyncio
import contextlib
import logging
import os
import pathlib
import select
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from envs.rock.config import Denial, SandboxConfig
from envs.rock.errors import SandboxClosedError, SandboxError
from envs.rock.host import linux
from envs.rock.host.egress import Grant, Guard, Way
from envs.rock.wire.forwarding import MAX_CONNECTIONS, Connections

log = logging.getLogger("rock.docker")
T = TypeVar("T")
# Runtimes whose processes are processes of this machine's kernel.
HOST_KERNEL_RUNTIMES = (
    "runc",
    "crun",
    "io.containerd.runc.v2",
    "io.containerd.runtime.v1.linux",
)


def obstacle(runtime: str) -> str:
    """Return why no guard can be put into a container's network; "" where one can be tried."""
    if runtime not in HOST_KERNEL_RUNTIMES:
        return (
            f"runtime {runtime!r} has a network of its own inside, which cannot be watched from"
            " outside"
        )
    if os.geteuid() != 0:
        return "only root can enter a container's network, and this process is not root"
    return ""


class ContainerNetwork:
    """One container's guard and the connections that it grants.

    Create it in a thread, since it waits for the kernel. `close`, and the relays, belong to the
    event loop of the sandbox.
    """

    def __init__(
        self, pid: int, container: str, config: SandboxConfig, loop: asyncio.AbstractEventLoop
    ):
        """Put a guard into a container's network.

        Args:
          pid: a process of the container, as this machine counts processes.
          container: the engine's id of it.
          config: with the egress policy.
          loop: the sandbox's.

        Raises:
          SandboxError: the network cannot be entered or guarded.
        """
        self._loop = loop
        self._label = config.label
        self._lock = threading.Lock()
        self._closed = False
        self._handing_over = 0  # connections on their way to the event loop
        self._last_count = 0
        self._connections = Connections(_no_way_in, config.label, config.opened_doors())
        grants = [Grant(*grant) for grant in config.grants()]

        def make_guard() -> Guard:
            _enable_ipv6()
            return Guard(grants)

        self._guard = _in_network_of(pid, container, make_guard)
        _guard_thread().add(self, self._guard.descriptors())

    def serve(self, descriptor: int) -> None:
        """Handle what the guard has received, in the guards' thread."""
        with self._lock:
            if not self._closed:
                self._relay_all(self._guard.serve(descriptor))

    async def count(self) -> int:
        """Return how many attempts were refused until now."""
        await asyncio.to_thread(self._catch_up)
        return self._guard.denials() + len(self._connections.denials)

    async def denials_since_last_call(self) -> int:
        """Return how many attempts were refused since this was last called."""
        count = await self.count()
        new = count - self._last_count
        self._last_count = count
        return max(0, new)

    async def denials(self) -> list[Denial]:
        """Return the recorded attempts, oldest first."""
        await asyncio.to_thread(self._catch_up)
        records = [Denial(*record, self._label) for record in self._guard.records]
        return sorted(records + self._connections.denials)

    async def adopt(self, other: "ContainerNetwork") -> None:
        """Take over the denials of a verifier's container, which count as this sandbox's.

        The verifier's own result has reported their number already.
        """
        denials = await other.denials()
        self._connections.denials += denials
        self._last_count += len(denials)

    def close(self) -> None:
        """Remove the guard and cut all connections; recorded denials stay readable."""
        self._connections.close()
        _guard_thread().remove(self._guard.descriptors())
        with self._lock:
            if not self._closed:
                self._closed = True
                self._guard.close()

    def _catch_up(self) -> None:
        with self._lock:
            if not self._closed:
                self._relay_all(self._guard.catch_up())

    def _relay_all(self, connections: list[tuple[Way, socket.socket]]) -> None:
        for way, connection in connections:
            if self._handing_over >= MAX_CONNECTIONS:
                # The loop is busy. An agent must not fill this process with sockets meanwhile.
                connection.close()
                continue
            self._handing_over += 1
            try:
                self._loop.call_soon_threadsafe(self._take_over, way, connection)
            except RuntimeError:  # the loop is closed
                connection.close()

    def _take_over(self, way: Way, connection: socket.socket) -> None:
        self._handing_over -= 1
        if self._closed:
            connection.close()
        else:
            self._connections.relay_outbound(*way, connection)


def _enable_ipv6() -> None:
    """Switch on IPv6, so that attempts over it are seen; Docker switches it off without a network.

    /proc/sys/net is that of the thread's namespace. On a kernel without IPv6, or one that does not
    allow the change, IPv6 leads nowhere.
    """
    with contextlib.suppress(OSError):
        for name in ("all", "lo"):
            pathlib.Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0")


async def _no_way_in(port: int) -> socket.socket:
    raise SandboxError(f"port {port}: a container's ports are reached by an exec")


def _in_network_of(pid: int, container: str, work: Callable[[], T]) -> T:
    """Run `work` in the network namespace of a container's process and return its result.

    It runs in a thread of its own, which ends there: no other work is ever done in that namespace
    by mistake.

    Raises:
      SandboxError: the process is not of that container, or its network is this process's own.
    """
    results: list[T] = []
    errors: list[OSError | SandboxError] = []

    def enter_and_work() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                _check_namespace(pid, container, namespace.fileno())
                linux.setns(namespace.fileno(), linux.CLONE_NEWNET)
            results.append(work())
        except (OSError, SandboxError) as error:
            errors.append(error)

    thread = threading.Thread(target=enter_and_work, name="rock-docker-namespace")
    thread.start()
    thread.join()
    for error in errors:
        if isinstance(error, OSError):
            raise SandboxError(f"the container's network cannot be guarded: {error}") from error
        raise error
    return results[0]


def _check_namespace(pid: int, container: str, namespace: int) -> None:
    # This is checked after the open: a process id that passed to another process is noticed.
    if container not in pathlib.Path(f"/proc/{pid}/cgroup").read_text():
        raise SandboxClosedError(
            f"process {pid} is not of the container; does the engine run in another pid namespace"
            " than this process?"
        )
    if os.fstat(namespace).st_ino == os.stat("/proc/self/ns/net").st_ino:
        raise SandboxError("the container has this machine's own network")


class _GuardThread:
    """The thread that serves all guards of this process."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._networks: dict[int, ContainerNetwork] = {}
        threading.Thread(target=self._serve, name="rock-docker-network", daemon=True).start()

    def add(self, network: ContainerNetwork, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            self._networks[descriptor] = network
            self._poll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptors: list[int]) -> None:
        """Stop serving descriptors; call this before they are closed and their numbers reused."""
        for descriptor in descriptors:
            if self._networks.pop(descriptor, None):
                self._poll.unregister(descriptor)

    def _serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                network = self._networks.get(descriptor)
                if network is None:
                    continue
                try:
                    network.serve(descriptor)
                except Exception as error:
                    log.error("the guard of a container failed", exc_info=error)
                    self.remove([descriptor])


_the_guard_thread: _GuardThread | None = None
_lock = threading.Lock()


def _guard_thread() -> _GuardThread:
    global _the_guard_thread
    with _lock:
        if _the_guard_thread is None:
            _the_guard_thread = _GuardThread()
        return _the_guard_thread


def _forget_after_fork() -> None:
    global _the_guard_thread, _lock
    _the_guard_thread = None
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
