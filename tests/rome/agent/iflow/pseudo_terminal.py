"""A program in a real pseudo-terminal, and what its screen shows, by the emulator pyte."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

from tests.paths import ROOT


class PseudoTerminal:
    """Runs a command with a terminal of its own.

    Args:
      arguments: of the Python interpreter.
      columns, rows: of the window.
      term: value of TERM.
      directory: where it runs.
    """

    def __init__(self, arguments, *, directory, columns=80, rows=24, term="xterm-256color"):
        import pyte

        self.screen = pyte.HistoryScreen(columns, rows, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.output = b""
        self._master, slave = pty.openpty()
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, size)
        environment = {
            **os.environ,
            "TERM": term,
            "PYTHONPATH": str(ROOT),
            "COLORTERM": "truecolor",
            "COLUMNS": str(columns),
            "LINES": str(rows),
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env=environment,
            preexec_fn=lambda: _own_terminal(slave),
        )
        os.close(slave)
        # where the program asks where the cursor is
        self.screen.write_process_input = lambda data: os.write(self._master, data.encode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)

    def read(self, seconds=0.1):
        """Take what the program writes within some time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._master], [], [], left)
            if not ready:
                return
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # the program has ended
                return
            self.output += data
            self._stream.feed(data)

    def type(self, text):
        """Press keys."""
        os.write(self._master, text.encode())

    def enter(self, text):
        """Type a line. Keys that come in one piece with the Enter would be taken as pasted."""
        self.type(text)
        self.read(0.15)
        self.type("\r")

    @property
    def text(self):
        """What was scrolled away, and what the screen shows."""
        lines = [
            "".join(row[x].data for x in range(self.screen.columns)).rstrip()
            for row in self.screen.history.top
        ]
        return "\n".join([*lines, *self.shown])

    @property
    def shown(self):
        """The lines of the screen."""
        return [line.rstrip() for line in self.screen.display]

    def wait_for(self, *texts, seconds=20):
        """Wait until the screen shows all texts; return it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read()
            if all(text in self.text for text in texts):
                return self.text
        missing = [text for text in texts if text not in self.text]
        raise AssertionError(f"{missing} not shown within {seconds} s:\n{self.text}")

    def wait_end(self, seconds=10):
        """Wait until the program has ended; return its status."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        self.read(0.2)
        return self.process.poll()


def _own_terminal(slave):
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
