"""Processes of this machine that belong to a workspace, found by a variable that they inherit.

A process may leave its group, its session and its parent; its first environment stays readable.
One that was started without the variable on purpose is not found.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from typing import NamedTuple

MAX_ROUNDS = 50  # of killing what appeared meanwhile


class Process(NamedTuple):
    """A process: its parent, and its start in ticks since the machine's boot."""

    pid: int
    parent: int
    began: int


def now_ticks() -> int:
    """Return the time in the unit of `Process.began`."""
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    return int(seconds * os.sysconf("SC_CLK_TCK"))


def find_processes(mark: str) -> dict[int, Process]:
    """Return the running processes whose environment has `mark`, NAME=VALUE, by pid."""
    wanted = mark.encode()
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        # It may have ended meanwhile, or be another user's.
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{name}/environ", "rb") as file:
                if wanted not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            if fields[0] != b"Z":
                found[int(name)] = Process(int(name), int(fields[1]), int(fields[19]))
    return found


def children_of(pid: int) -> set[int]:
    """Return the direct children of a process with one thread."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(word) for word in file.read().split()}
    return set()


def kill_processes(mark: str, *, since: int = 0, spared: Collection[int] = ()) -> None:
    """Kill the processes with a mark.

    Args:
      mark: NAME=VALUE of their environment.
      since: only those that began then or later, and that no earlier one but the shell started.
      spared: pids to leave alone, the shell's first. What the others started is spared too.
    """
    shell = next(iter(spared), 0)
    for _ in range(MAX_ROUNDS):
        processes = find_processes(mark)
        chosen = [pid for pid in processes if _is_new(processes, pid, since, shell, spared)]
        if not chosen:
            return
        for pid in chosen:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def _is_new(
    processes: dict[int, Process], pid: int, since: int, shell: int, spared: Collection[int]
) -> bool:
    """Return whether a process began late enough, and each process above it, up to the shell."""
    if pid == shell:
        return False
    while pid in processes and pid != shell:
        if processes[pid].began < since or pid in spared:
            return False
        pid = processes[pid].parent
    return True
