"""A persistent shell in a sandbox: bash reads commands from one pipe and says how each ended on
another.

Both pipes are closed while a command runs, so nothing that it starts can forge an exit code; what
the shell itself is made to do is the shell's own affair, and its end is seen by its pidfd.
"""

import fcntl
import os

from . import linux
from .process import Started

COMMANDS_FD, STATUS_FD = linux.FIRST_PASSED_FD, linux.FIRST_PASSED_FD + 1
COMMAND_BYTES = 1 << 17  # what the pipe of commands holds
LOOP = (
    f'while IFS= read -r -d "" -u {COMMANDS_FD} ROCK_COMMAND; do '
    f'eval "$ROCK_COMMAND" {COMMANDS_FD}<&- {STATUS_FD}>&-; printf "%d\\0" "$?" >&{STATUS_FD}; done'
)


class Session:
    """One shell. Its owner polls `status` while a command runs, and `pidfd` always."""

    def __init__(self, name: int):
        self.name = name
        self._commands_read, self._commands = os.pipe()
        self.status, self._status_write = os.pipe()
        os.set_blocking(self._commands, False)
        os.set_blocking(self.status, False)
        fcntl.fcntl(self._commands, fcntl.F_SETPIPE_SZ, COMMAND_BYTES)
        self.pid, self.pidfd = 0, -1
        self._older: set[int] = set()

    def pass_pipes(self) -> None:
        """In the process that becomes the shell."""
        for source, target in ((self._commands_read, COMMANDS_FD), (self._status_write, STATUS_FD)):
            os.dup2(source, target)

    def started(self, started: Started) -> None:
        """In the holder, once there is a shell."""
        self.pid, self.pidfd = started.pid, os.pidfd_open(started.pid)
        for descriptor in (self._commands_read, self._status_write):
            os.close(descriptor)

    def send(self, command: bytes) -> None:
        self._older = set(linux.children_of(self.pid))  # background jobs of earlier commands
        os.write(self._commands, command + b"\0")

    def read_status(self) -> int | None:
        """The exit code that the shell reported; None if it said anything else."""
        try:
            said = os.read(self.status, 64)
        except BlockingIOError:
            return None
        code, end, rest = said.partition(b"\0")
        return int(code) & 0xFF if end and not rest and code.isdigit() else None

    def foreground(self) -> set[int]:
        """The processes that the running command started."""
        return linux.descendants_of(set(linux.children_of(self.pid)) - self._older)

    def close(self) -> None:
        for descriptor in (self._commands, self.status, self.pidfd):
            os.close(descriptor)
