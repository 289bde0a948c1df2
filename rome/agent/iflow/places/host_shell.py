"""A bash of this machine that keeps its state between commands.

The frame around each command is the one of a sandbox's sessions (`envs.rock.host.shell`): commands
and the reports of their ends travel on pipes of their own, so no output can be taken for an end.

What belongs to a shell is found by a variable that processes inherit: one may leave its group, its
session and its parent, but its first environment stays readable. One that was started without the
variable on purpose is not found.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from envs.rock.backend import MAX_COMMAND_BYTES
from envs.rock.host import shell
from rome.agent.iflow.places.output import OutputKeeper

# As bash finds them, and where it saves them out of reach of what commands start.
_COMMANDS_FD = 8
_REPORTS_FD = 9
_SAVED_COMMANDS_FD = 10
_SAVED_REPORTS_FD = 11
_LOOP = shell.loop(_SAVED_COMMANDS_FD, _SAVED_REPORTS_FD, f"{_COMMANDS_FD}<&- {_REPORTS_FD}>&-")
_HIGH_FD = 64  # above all of the above
_PIPE_BYTES = 2 * MAX_COMMAND_BYTES
_READ_BYTES = 1 << 16
MAX_ROUNDS = 50  # of killing what appeared meanwhile
GRACE_SECONDS = 1.0  # in which a shell whose command was killed must be ready again


class Ended(NamedTuple):
    """How a command ended."""

    exit_code: int | None  # None where it was ended at its time limit
    is_flooded: bool  # whether it was ended for the length of its output
    is_alive: bool  # whether the shell lives on


class HostShell:
    """One bash, made by `start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, descriptors: list[int], directory: str, mark: str
    ) -> None:
        for descriptor in descriptors:
            os.set_blocking(descriptor, False)
        self._descriptors = descriptors
        self._commands, self._reports, self._output = descriptors
        self._process = process
        self._directory = directory
        self._mark = mark
        self._ended = asyncio.ensure_future(process.wait())
        self._frame = shell.Frame(_SAVED_REPORTS_FD)
        self._keeper: OutputKeeper | None = None

    @classmethod
    async def start(cls, directory: str, environment: Mapping[str, str], mark: str) -> HostShell:
        """Start a bash; OSError where there is none, or no directory.

        Its processes are found by a mark, which is NAME=VALUE of the environment.
        """
        commands_read, commands = _pipe()
        reports, reports_write = _pipe()
        output, output_write = _pipe()
        fcntl.fcntl(commands, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        descriptors = [commands, reports, output]
        moves = f"exec {_COMMANDS_FD}<&{commands_read} {_REPORTS_FD}>&{reports_write}"
        closing = f"{commands_read}<&- {reports_write}>&-"
        start = f'{moves} {closing}; exec /bin/bash --noprofile --norc -c "$1" bash'
        try:
            process = await asyncio.create_subprocess_exec(
                *("/bin/bash", "--noprofile", "--norc", "-c", start, "bash", _LOOP),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=(commands_read, reports_write),
                cwd=directory,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        finally:
            for descriptor in (commands_read, reports_write, output_write):
                os.close(descriptor)
        return cls(process, descriptors, directory, mark)

    @property
    def is_alive(self) -> bool:
        """Whether it can run commands."""
        return not self._ended.done()

    @property
    def directory(self) -> str:
        """Where the shell is now; where it began, once it has ended."""
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self._process.pid}/cwd")
        return self._directory

    async def run(self, command: bytes, timeout: float, keeper: OutputKeeper) -> Ended:
        """Run a command of at most MAX_COMMAND_BYTES; cancelling it ends what it started."""
        loop = asyncio.get_running_loop()
        began = now_ticks()
        self._spared = [self._process.pid, *children_of(self._process.pid)]
        self._keeper = keeper
        self._report: asyncio.Future[int] = loop.create_future()
        self._flood: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._reports, self._read_report)
        loop.add_reader(self._output, self._read_output)
        try:
            os.write(self._commands, self._frame.records(command))
            waiting: set[asyncio.Future[Any]] = {self._report, self._flood, self._ended}
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            is_late = not (self._report.done() or self._ended.done())
            is_flooded = is_late and self._flood.done()
            if is_late:
                await self._end_command(began)
        except BrokenPipeError:  # the shell ended between two commands
            await self._ended
            is_late = is_flooded = False
        except asyncio.CancelledError:
            await asyncio.shield(self._end_command(began))
            raise
        finally:
            if self._descriptors:
                loop.remove_reader(self._reports)
                loop.remove_reader(self._output)
                self._drain()
        code: int | None = None
        if is_flooded:
            code = 137
        elif not is_late:
            code = self._report.result() if self._report.done() else self._ended.result()
            code = code if code >= 0 else 128 - code
        return Ended(code, is_flooded, not self._ended.done())

    async def close(self) -> None:
        """End the shell and all that its commands started."""
        if not self._descriptors:
            return
        await asyncio.to_thread(kill_processes, self._mark)
        await self._ended
        self._close_descriptors()

    async def _end_command(self, began: int) -> None:
        """Kill what the running command started, and the shell if it is not ready then."""
        await asyncio.to_thread(kill_processes, self._mark, since=began, spared=self._spared)
        waiting: set[asyncio.Future[Any]] = {self._report, self._ended}
        await asyncio.wait(waiting, timeout=GRACE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not self._report.done() and not self._ended.done():
            self._process.kill()
            await self._ended

    def _read_report(self) -> None:
        try:
            data = os.read(self._reports, shell.MAX_REPORT_BYTES)
        except BlockingIOError:
            return
        report = self._frame.receive(data)
        if report is not None and not self._report.done():
            self._report.set_result(report[0])
        elif not data:
            asyncio.get_running_loop().remove_reader(self._reports)

    def _read_output(self) -> int:
        assert self._keeper is not None
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            asyncio.get_running_loop().remove_reader(self._output)
            return 0
        self._keeper.write(data)
        if self._keeper.is_flooded and not self._flood.done():
            self._flood.set_result(None)
        return len(data)

    def _drain(self) -> None:
        """Read what lies in the pipe, and no more: processes in the background may go on."""
        left = fcntl.fcntl(self._output, fcntl.F_GETPIPE_SZ)
        while left > 0 and (size := self._read_output()):
            left -= size

    def _close_descriptors(self) -> None:
        loop = asyncio.get_running_loop()
        for descriptor in self._descriptors:
            loop.remove_reader(descriptor)  # a command may still be on its way to its end
            os.close(descriptor)
        self._descriptors = []


def _pipe() -> tuple[int, int]:
    """Return the ends of a pipe, on descriptors that no number of the shell's meets."""
    ends = []
    for descriptor in os.pipe():
        ends.append(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD))
        os.close(descriptor)
    return ends[0], ends[1]


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
