"""Ctrl-C and SIGTERM: a wish to stop at first, the end at once where it is repeated.

Only the standard library is imported here, so that a command can listen before all else.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from typing import Literal

ONE_WISH_SECONDS = 1.0  # make, a shell or a scheduler may deliver one Ctrl-C twice
STOPPED_STATUS = 130


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked this process to stop; a second signal interrupts it.

    Before `begin` and after `end` there is nothing to save, and any signal ends the process with
    one line. Signals within ONE_WISH_SECONDS of the one before are the same wish.

    Args:
      command: the module that runs, such as "launch.train"; it begins the line.
    """

    def __init__(self, command: str) -> None:
        self.made = False
        self._command = command
        self._heard_at = -ONE_WISH_SECONDS
        self._phase: Literal["before", "within", "after"] = "before"

    def listen(self) -> None:
        """Install the signal handlers."""
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def begin(self) -> None:
        """Take the next signal as a wish: from here on there is something to save."""
        self._phase = "within"

    def end(self) -> None:
        """End the process at the next signal: all is saved or lost."""
        self._phase = "after"

    def __call__(self) -> bool:
        return self.made

    def when_stopped(self) -> str:
        """Return the line that ends a run which a second signal interrupted."""
        return (
            f"{self._command}: left at once; to go on from the last checkpoint:\n"
            f"  {self.own_command()}"
        )

    def own_command(self) -> str:
        """Return the command line that started this process."""
        program = os.path.relpath(sys.executable)
        return shlex.join([program, "-m", self._command, *sys.argv[1:]])

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.made and now - self._heard_at <= ONE_WISH_SECONDS:
            return
        was_made = self.made
        self.made = True
        self._heard_at = now
        if self._phase == "before":
            _say(f"{self._command}: stopped before anything was started")
            os._exit(STOPPED_STATUS)
        if self._phase == "after":
            _say(self.when_stopped())
            os._exit(STOPPED_STATUS)
        if was_made:
            self.end()
            raise KeyboardInterrupt
        _say("stopping: the last whole step is saved (again: leave at once)")


def _say(text: str) -> None:
    """Print a line without a buffer: a handler may interrupt another write."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
