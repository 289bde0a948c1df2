"""One run at a time in a workdir: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import socket
import sys
from types import TracebackType

from rome.train.workdir import ConfigError

LOCK = "lock"  # file in the workdir; it stays there, and its content names the last owner
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some network file systems


class Ownership:
    """The lock of a workdir, held until `close` or the end of the process, however it ends.

    Args:
      workdir: made where it does not exist.

    Raises:
      ConfigError: another process holds the lock; the message names its host and process id.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / LOCK
        # Not inherited by programs that are started: an engine that outlives us holds no lock.
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._handle, 200).decode(errors="replace").strip()
            self.close()
            raise ConfigError(
                f"{workdir} belongs to a run that is still going on: {owner or 'it just started'}."
                " Stop that one first, or give another --workdir."
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                self.close()
                raise
            print(
                f"warning: {path} cannot be locked ({error.strerror}): take care that no second"
                " run uses this workdir",
                file=sys.stderr,
            )
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """Give the workdir free; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
