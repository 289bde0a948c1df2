"""Standard streams that outlast their reader: what only informs must not end a run."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
from typing import Any, TextIO, cast

GONE = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO)  # the reader will not come back


class LastingStream:
    """A text stream whose failures to write are said once, on another stream, and go no further.

    Characters that its encoding lacks are written as question marks. A reader that is gone for good
    is replaced by /dev/null; a full disk is tried again at the next write.

    Args:
      stream: that is written to.
      others: gets the warning, where it can.
    """

    def __init__(self, stream: TextIO, others: TextIO) -> None:
        self._stream = stream
        self._others = others
        self._has_warned = False
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not a real file
            cast(Any, stream).reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write text, or lose it where the stream fails."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._outlast(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream where it can be."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._outlast(error)

    def finish(self) -> None:
        """Flush for the last time, so that the interpreter does not fail at it when it ends."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _outlast(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in GONE:
            self._discard()
        if self._has_warned:
            return
        self._has_warned = True
        with contextlib.suppress(OSError, ValueError):
            name = getattr(self._stream, "name", "a stream")
            print(f"warning: {name} cannot be written ({error}); going on", file=self._others)

    def _discard(self) -> None:
        """Send what is still written to nowhere."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlast_readers() -> None:
    """Make this process's standard output and error lasting ones."""
    # Python has None for a stream that was closed before it started.
    out = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    err = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    lasting_out, lasting_err = LastingStream(out, err), LastingStream(err, out)
    sys.stdout, sys.stderr = cast(TextIO, lasting_out), cast(TextIO, lasting_err)
    atexit.register(lasting_err.finish)
    atexit.register(lasting_out.finish)
