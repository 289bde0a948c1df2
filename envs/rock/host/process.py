"""The first process of one command, forked from the holder and turned into the command."""

import errno
import os
import signal
from collections.abc import Callable

from . import linux

# Python ignores these itself, and a new program would inherit that: `yes | head` would never end.
RESTORED_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
COULD_NOT_START = 125
MAX_FAILURE_BYTES = 2000
# Reasons of the machine: its table of open files is full, or someone removed the cgroup.
MACHINE_ERRORS = (errno.ENFILE, errno.ENODEV)


class Started:
    """A process that was forked for a command.

    Attributes:
      pid: its process id.
      failure: why the program was not executed; "" when it was.
      is_machines: whether nothing in the sandbox can have been the reason.
    """

    def __init__(self, pid: int, failure: str, is_machines: bool):
        self.pid = pid
        self.failure = failure
        self.is_machines = is_machines


def start(become: Callable[[], None], cgroup_entries: list[int], out: int, err: int) -> Started:
    """Fork a process that calls `become`, with empty input, in its cgroups and its own session.

    Args:
      become: limits the process and executes the program; an exception in it is the returned
        failure.
      cgroup_entries: descriptors of cgroup.procs files.
      out: descriptor of its standard output.
      err: descriptor of its standard error.
    """
    failure_read, failure_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _prepare(cgroup_entries, out, err)
            become()
        except BaseException as error:
            number = getattr(error, "errno", None) or 0
            said = f"{number} {error}".encode(errors="replace")
            os.write(failure_write, said[:MAX_FAILURE_BYTES])
        finally:
            os._exit(COULD_NOT_START)
    os.close(failure_write)
    try:
        said = linux.read_all(failure_read)  # the pipe closes when the new program starts
    finally:
        os.close(failure_read)
    number, _, text = said.decode(errors="replace").partition(" ")
    return Started(pid, text, number.isdecimal() and int(number) in MACHINE_ERRORS)


def _prepare(cgroup_entries: list[int], out: int, err: int) -> None:
    for entry in cgroup_entries:
        os.write(entry, b"0")
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for number in RESTORED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
