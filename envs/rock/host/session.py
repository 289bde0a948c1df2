"""A shell in a sandbox that stays between commands.

bash reads commands from one pipe and reports on another how each ended. Both pipes are closed while
a command runs, so nothing that it starts can forge an exit code. A command can make the shell
itself misreport or end; its end is seen by its pidfd.
"""

import fcntl
import os

from . import linux
from .process import Started

COMMANDS_FD = linux.FIRST_PASSED_FD
STATUS_FD = linux.FIRST_PASSED_FD + 1
COMMAND_BYTES = 1 << 17  # capacity of the pipe of commands
MAX_STATUS_BYTES = 64
LOOP = (
    f'while IFS= read -r -d "" -u {COMMANDS_FD} ROCK_COMMAND; do '
    f'eval "$ROCK_COMMAND" {COMMANDS_FD}<&- {STATUS_FD}>&-; printf "%d\\0" "$?" >&{STATUS_FD}; done'
)


class Session:
    """One shell. The holder polls `status` while a command runs, and `pidfd` always.

    Attributes:
      name: its number, which the manager uses.
      status: descriptor from which the shell's reports are read.
      pid: the shell's process id.
      pidfd: readable when the shell has ended.
    """

    def __init__(self, name: int):
        self.name = name
        self.pid = 0
        self.pidfd = -1
        self._commands_read, self._commands = os.pipe()
        self.status, self._status_write = os.pipe()
        os.set_blocking(self._commands, False)
        os.set_blocking(self.status, False)
        fcntl.fcntl(self._commands, fcntl.F_SETPIPE_SZ, COMMAND_BYTES)
        self._background: set[int] = set()  # processes that earlier commands left

    def pass_pipes(self) -> None:
        """Give the pipes their numbers, in the process that becomes the shell."""
        os.dup2(self._commands_read, COMMANDS_FD)
        os.dup2(self._status_write, STATUS_FD)

    def started(self, started: Started) -> None:
        """Note the shell's process and close its ends of the pipes, in the holder."""
        self.pid = started.pid
        self.pidfd = os.pidfd_open(started.pid)
        os.close(self._commands_read)
        os.close(self._status_write)

    def send(self, command: bytes) -> None:
        """Give the shell a command."""
        self._background = set(linux.children_of(self.pid))
        os.write(self._commands, command + b"\0")

    def read_status(self) -> int | None:
        """Return the exit code that the shell reported; None if it reported anything else."""
        try:
            said = os.read(self.status, MAX_STATUS_BYTES)
        except BlockingIOError:
            return None
        code, end, rest = said.partition(b"\0")
        if not end or rest or not code.isdigit():
            return None
        return int(code) & 0xFF

    def foreground(self) -> set[int]:
        """Return the processes that the running command started."""
        return linux.descendants_of(set(linux.children_of(self.pid)) - self._background)

    def close(self) -> None:
        """Close the holder's descriptors."""
        for descriptor in (self._commands, self.status, self.pidfd):
            os.close(descriptor)
