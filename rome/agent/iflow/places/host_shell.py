"""A bash of this machine that keeps its state between commands.

The frame around each command is the one of a sandbox's sessions (`envs.rock.host.shell`): commands
and the reports of their ends travel on pipes of their own, so no output can be taken for an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from envs.rock.backend import MAX_COMMAND_BYTES
from envs.rock.host import shell
from rome.agent.iflow.places.host_processes import children_of, kill_processes, now_ticks
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
GRACE_SECONDS = 1.0  # in which a shell whose command was killed must be ready again


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
      exit_code: None where it was ended at its time limit.
      is_flooded: whether it was ended for the length of its output.
      is_alive: whether the shell lives on.
    """

    exit_code: int | None
    is_flooded: bool
    is_alive: bool


class HostShell:
    """One bash; `start` makes it.

    Args:
      directory: where it begins.
      environment: all its variables.
      mark: NAME=VALUE of the environment by which its processes are found.
    """

    def __init__(self, directory: str, environment: Mapping[str, str], mark: str) -> None:
        self._directory = directory
        self._environment = dict(environment)
        self._mark = mark
        self._frame = shell.Frame(_SAVED_REPORTS_FD)
        self._keeper: OutputKeeper | None = None
        self._descriptors: list[int] = []

    async def start(self) -> None:
        """Start the process.

        Raises:
          OSError: there is no bash or no directory.
        """
        commands_read, self._commands = _pipe()
        self._reports, reports_write = _pipe()
        self._output, output_write = _pipe()
        self._descriptors = [self._commands, self._reports, self._output]
        fcntl.fcntl(self._commands, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        for descriptor in self._descriptors:
            os.set_blocking(descriptor, False)
        passed = (commands_read, reports_write)
        moves = f"exec {_COMMANDS_FD}<&{commands_read} {_REPORTS_FD}>&{reports_write}"
        closing = f"{commands_read}<&- {reports_write}>&-"
        start = f'{moves} {closing}; exec /bin/bash --noprofile --norc -c "$1" bash'
        try:
            self._process = await asyncio.create_subprocess_exec(
                "/bin/bash",
                "--noprofile",
                "--norc",
                "-c",
                start,
                "bash",
                _LOOP,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output_write,
                stderr=output_write,
                pass_fds=passed,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,
            )
        except BaseException:
            self._close_descriptors()
            raise
        finally:
            for descriptor in (*passed, output_write):
                os.close(descriptor)
        self._ended = asyncio.ensure_future(self._process.wait())

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
        """Run a command; cancelling it ends what it started.

        Args:
          command: text for bash, at most MAX_COMMAND_BYTES.
          timeout: seconds.
          keeper: takes its output.
        """
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
        is_alive = not self._ended.done()
        if is_flooded:
            return Ended(137, True, is_alive)
        if is_late:
            return Ended(None, False, is_alive)
        if self._report.done():
            return Ended(self._report.result(), False, is_alive)
        code = self._ended.result()
        return Ended(code if code >= 0 else 128 - code, False, False)

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
