"""The network of a container, from outside: the guard of host/egress.py in its network namespace.

A container of ours has nothing but its loopback (network_mode none). A thread of this process steps
into that namespace, makes the guard's sockets there and ends; a socket stays where it was made, so
the process itself never leaves its own network. One more thread serves the guards of all
containers, however busy the event loops are; what is granted is handed to the container's loop,
which makes the outer connection.

It takes root on the engine's own machine, and a runtime whose containers use the kernel's network.
What is missing is told by `obstacle`.
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
from envs.rock.host.egress import Grant, Guard
from envs.rock.wire.forwarding import MAX_CONNECTIONS, Connections

log = logging.getLogger("rock.docker")
T = TypeVar("T")
RUNC = (
    "runc",
    "crun",
    "io.containerd.runc.v2",
    "io.containerd.runtime.v1.linux",
)  # runtimes whose processes are this kernel's


def obstacle(runtime: str) -> str:
    """Why no guard can be put into a container's network; "" where one can be tried."""
    if runtime not in RUNC:
        return f"runtime {runtime!r} has a network of its own inside, which nobody outside sees"
    return (
        ""
        if os.geteuid() == 0
        else "only root can enter a container's network, and this process is not root"
    )


class ContainerNetwork:
    """One container's guard and the ways that it lets out.

    Make it in a thread (it waits for the kernel), with the event loop of the sandbox.

    Raises: SandboxError where the namespace cannot be entered or guarded.
    """

    def __init__(
        self, pid: int, container: str, config: SandboxConfig, loop: asyncio.AbstractEventLoop
    ):
        self._loop, self._label = loop, config.label
        self._lock = threading.Lock()
        self._closed, self._handing_over, self._told = False, 0, 0
        self._connections = Connections(_no_way_in, config.label)
        grants = [Grant(*grant) for grant in config.grants()]
        self._guard = _inside(pid, container, lambda: _switch_ipv6_on() or Guard(grants))
        _watchman().add(self, self._guard.descriptors())

    def serve(self, descriptor: int) -> None:
        """In the watchman's thread."""
        with self._lock:
            if not self._closed:
                self._let_out(self._guard.serve(descriptor))

    async def count(self) -> int:
        """Attempts until now that were denied."""
        await asyncio.to_thread(self._catch_up)
        return self._guard.denials() + len(self._connections.denials)

    async def since_last_told(self) -> int:
        """Those that this did not return before."""
        count = await self.count()
        self._told, before = count, self._told
        return max(0, count - before)

    async def denials(self) -> list[Denial]:
        await asyncio.to_thread(self._catch_up)
        return sorted(
            [Denial(*record, self._label) for record in self._guard.records]
            + self._connections.denials
        )

    async def adopt(self, other: "ContainerNetwork") -> None:
        """What was tried in the container of a verifier was tried by the sandbox; the verifier's
        result has told of it.
        """
        denials = await other.denials()
        self._connections.denials += denials
        self._told += len(denials)

    def close(self) -> None:
        """On the sandbox's loop. What was seen stays to be asked for."""
        self._connections.close()
        _watchman().remove(self._guard.descriptors())
        with self._lock:
            if not self._closed:
                self._closed = True
                self._guard.close()

    def _catch_up(self) -> None:
        with self._lock:
            if not self._closed:
                self._let_out(self._guard.catch_up())

    def _let_out(self, connections: list) -> None:
        for way, connection in connections:
            if (
                self._handing_over >= MAX_CONNECTIONS
            ):  # the loop is busy, and an agent must not fill this process with sockets meanwhile
                connection.close()
                continue
            self._handing_over += 1
            try:
                self._loop.call_soon_threadsafe(self._take, way, connection)
            except RuntimeError:  # the loop is closed
                connection.close()

    def _take(self, way: tuple, connection: socket.socket) -> None:
        self._handing_over -= 1
        if self._closed:
            connection.close()
        else:
            self._connections.relay_outbound(*way, connection)


def _switch_ipv6_on() -> None:
    """Docker switches it off where there is no network, and then what is tried over it is not seen.

    (/proc/sys/net is that of the thread's namespace.)
    """
    with contextlib.suppress(
        OSError
    ):  # a kernel without it, or one that lets nobody: it leads nowhere then
        for name in ("all", "lo"):
            pathlib.Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("0")


async def _no_way_in(port: int) -> socket.socket:
    raise SandboxError(f"port {port}: a container's ports are reached by an exec")


def _inside(pid: int, container: str, work: Callable[[], T]) -> T:
    """What `work` returns when it is done in the network namespace of process `pid`, which must be
    of that container and must not be our own.
    """
    outcome: list = []

    def step_in() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                # Looked at after the open: a process id that has passed to another process is
                # noticed.
                if container not in pathlib.Path(f"/proc/{pid}/cgroup").read_text():
                    raise SandboxClosedError(
                        f"process {pid} is not of the container; does the engine run in another pid"
                        " namespace than this process?"
                    )
                if os.fstat(namespace.fileno()).st_ino == os.stat("/proc/self/ns/net").st_ino:
                    raise SandboxError("the container has this machine's own network")
                linux.setns(namespace.fileno(), linux.CLONE_NEWNET)
            outcome.append(work())
        except (OSError, SandboxError) as error:
            outcome.append(error)

    thread = threading.Thread(
        target=step_in, name="rock-docker-namespace"
    )  # its own, which ends there: no other work is ever done in a namespace by mistake
    thread.start()
    thread.join()
    if isinstance(outcome[0], OSError):
        raise SandboxError(f"the container's network cannot be guarded: {outcome[0]}") from outcome[
            0
        ]
    if isinstance(outcome[0], SandboxError):
        raise outcome[0]
    return outcome[0]


class _Watchman:
    """The thread that serves all guards of this process."""

    def __init__(self):
        self._poll = select.epoll()
        self._networks: dict[int, ContainerNetwork] = {}
        threading.Thread(target=self._watch, name="rock-docker-network", daemon=True).start()

    def add(self, network: ContainerNetwork, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            self._networks[descriptor] = network
            self._poll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptors: list[int]) -> None:
        """Before they are closed: their numbers may be another's then."""
        for descriptor in descriptors:
            if self._networks.pop(descriptor, None):
                self._poll.unregister(descriptor)

    def _watch(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if network := self._networks.get(descriptor):
                    try:
                        network.serve(descriptor)
                    except Exception as error:
                        log.error("the guard of a container failed", exc_info=error)
                        self.remove([descriptor])


_the_watchman: _Watchman | None = None
_lock = threading.Lock()


def _watchman() -> _Watchman:
    global _the_watchman
    with _lock:
        if _the_watchman is None:
            _the_watchman = _Watchman()
        return _the_watchman


def _forget_after_fork() -> None:
    global _the_watchman, _lock
    _the_watchman, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_after_fork)
