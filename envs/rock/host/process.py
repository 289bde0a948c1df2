"""One command's first process: forked from the holder, put into its limits, and turned into the
command.
"""

import os
import signal
from collections.abc import Callable

# Python ignores these for itself, and a new program would inherit that: `yes | head` would never
# end.
RESTORED_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
COULD_NOT_START = 125


class Started:
    """failure: why the program was not executed; "" when it was."""

    def __init__(self, pid: int, failure: str):
        self.pid, self.failure = pid, failure


def start(become: Callable[[], None], cgroup_entries: list[int], out: int, err: int) -> Started:
    """Fork a process with no input, output to `out` and `err`, in its cgroups and a session of its
    own, that calls `become`.

    Args:
      become: fences the process and executes the program; an exception in it is the returned
        failure.
      cgroup_entries: descriptors of cgroup.procs files.
    """
    failure_read, failure_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for entry in cgroup_entries:
                os.write(entry, b"0")
            os.setsid()
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(err, 2)
            for number in RESTORED_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            become()
        except BaseException as error:
            os.write(failure_write, str(error).encode()[:2000])
        finally:
            os._exit(COULD_NOT_START)
    os.close(failure_write)
    with open(failure_read, "rb") as failure:  # the pipe closes when the new program starts
        return Started(pid, failure.read().decode(errors="replace"))
