"""A command that runs in a sandbox, as its holder sees it."""

import signal
import time

from . import linux
from .process import Started
from .session import Session

KILL_SECONDS = 10.0
SHELL_GRACE_SECONDS = 1.0  # in which a shell whose command was killed must report that


class Running:
    """A command: a process of its own, or one that a session's shell runs.

    Attributes:
      identity: the number of its request.
      descriptor: readable when it has ended: its pidfd, or the shell's status.
      deadline: when it is to be killed (again), on the monotonic clock.
      limits_hit: the reasons for which it was killed.
      is_dying: whether its own process was killed; it ends within KILL_SECONDS or never.
      events: how often the sandbox's limits had struck when it began.
    """

    def __init__(self, identity: int, descriptor: int, timeout: float, events: dict[str, int]):
        self.identity = identity
        self.descriptor = descriptor
        self.events = events
        self.began = time.monotonic()
        self.deadline = self.began + timeout
        self.limits_hit: list[str] = []
        self.is_dying = False

    def processes(self) -> set[int]:
        """Return the processes of the command that are descendants of the holder or the shell."""
        raise NotImplementedError

    def kill(self, reason: str) -> None:
        """Kill the command; the holder's loop notices and reports its end."""
        raise NotImplementedError


class RunningProcess(Running):
    """A command in a process of its own."""

    def __init__(
        self,
        identity: int,
        descriptor: int,
        timeout: float,
        events: dict[str, int],
        started: Started,
    ):
        super().__init__(identity, descriptor, timeout, events)
        self.started = started

    def processes(self) -> set[int]:
        return linux.descendants_of({self.started.pid})

    def kill(self, reason: str) -> None:
        self.limits_hit.append(reason)
        self.is_dying = True
        self.deadline = time.monotonic() + KILL_SECONDS
        # What it started is killed when it has ended.
        linux.signal_process(self.started.pid, signal.SIGKILL)


class RunningInSession(Running):
    """A command that a session's shell runs."""

    def __init__(self, identity: int, timeout: float, events: dict[str, int], session: Session):
        super().__init__(identity, session.status, timeout, events)
        self.session = session

    def processes(self) -> set[int]:
        return self.session.foreground()

    def kill(self, reason: str) -> None:
        """Kill what the command started; at the second call for the same reason, the shell too.

        The second call comes SHELL_GRACE_SECONDS later, if the shell has not reported the command's
        end by then.
        """
        again = reason in self.limits_hit
        self.limits_hit.append(reason)
        if again:
            self.is_dying = True
            self.deadline = time.monotonic() + KILL_SECONDS
            linux.signal_process(self.session.pid, signal.SIGKILL)
        else:
            linux.kill_trees(self.processes)
            self.deadline = time.monotonic() + SHELL_GRACE_SECONDS
