"""A shell in a sandbox that stays between commands; shell.py is what it runs around them.

It has a pipe of commands and one of reports. The end of the shell itself is seen by its pidfd.
"""

import errno
import fcntl
import os

from . import linux, shell
from .process import Started

COMMANDS_FD = linux.FIRST_PASSED_FD
REPORTS_FD = linux.FIRST_PASSED_FD + 1
# Where bash saves the two.
_SAVED_COMMANDS_FD = 10
_SAVED_REPORTS_FD = 11
LOOP = shell.loop(_SAVED_COMMANDS_FD, _SAVED_REPORTS_FD, f"{COMMANDS_FD}<&- {REPORTS_FD}>&-")
COMMAND_BYTES = 1 << 17  # capacity of the pipe of commands: the longest one, and its frame


class Session:
    """One shell. The holder polls `status` while a command runs, and `pidfd` always.

    Attributes:
      name: its number, which the manager uses.
      status: descriptor from which the shell's reports are read.
      pid: the shell's process id.
      pidfd: readable when the shell has ended.
      silent: whether no report of the running command can come any more.
    """

    def __init__(self, name: int):
        self.name = name
        self.pid = 0
        self.pidfd = -1
        self.silent = False
        self._frame = shell.Frame(_SAVED_REPORTS_FD)
        self._commands_read, self._commands = os.pipe()
        self.status, self._status_write = os.pipe()
        os.set_blocking(self._commands, False)
        os.set_blocking(self.status, False)
        fcntl.fcntl(self._commands, fcntl.F_SETPIPE_SZ, COMMAND_BYTES)
        self._background: set[int] = set()  # processes that earlier commands left

    def pass_pipes(self) -> None:
        """Give the pipes their numbers, in the process that becomes the shell."""
        os.dup2(self._commands_read, COMMANDS_FD)
        os.dup2(self._status_write, REPORTS_FD)

    def started(self, started: Started) -> None:
        """Note the shell's process and close its ends of the pipes, in the holder."""
        self.pid = started.pid
        self.pidfd = os.pidfd_open(started.pid)
        os.close(self._commands_read)
        os.close(self._status_write)

    def send(self, command: bytes) -> None:
        """Give the shell a command.

        Raises:
          OSError: the pipe is not empty: something else has written to it.
        """
        self._background = set(linux.children_of(self.pid))
        self.silent = False
        records = self._frame.records(command)
        if os.write(self._commands, records) < len(records):
            raise OSError(errno.EBUSY, "the session's shell does not read its commands")

    def read_status(self) -> int | None:
        """Return the exit code if the shell has reported it."""
        try:
            said = os.read(self.status, shell.MAX_REPORT_BYTES)
        except BlockingIOError:
            return None
        report = self._frame.receive(said)
        if report is not None:
            return report[0]
        self.silent = not said or self._frame.overflowed
        return None

    def foreground(self) -> set[int]:
        """Return the processes that the running command started."""
        return linux.descendants_of(set(linux.children_of(self.pid)) - self._background)

    def close(self) -> None:
        """Close the holder's descriptors."""
        for descriptor in (self._commands, self.status, self.pidfd):
            os.close(descriptor)
