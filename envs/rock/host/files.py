"""Files of the workspace, opened by the holder for the manager. No link leads out of it."""

import errno
import os
import stat

from . import linux

# NONBLOCK: opening a FIFO must not block the holder.
_FLAGS = os.O_NONBLOCK | os.O_NOCTTY


def open_for(purpose: str, root: int, path: str, mode: int) -> int:
    """Open a file or a directory below a directory.

    Args:
      purpose: "read" or "write" a regular file, or "list" a directory. "write" creates the file and
        its directories, and empties an existing file.
      root: descriptor of the workspace.
      path: relative to it.
      mode: permissions of a file to write.

    Raises:
      OSError: also for what is not a regular file.
    """
    if purpose == "list":
        return linux.open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    if purpose == "read":
        return _open_regular(root, path, _FLAGS | os.O_RDONLY, 0)
    _make_parents(root, path)
    descriptor = _open_regular(root, path, _FLAGS | os.O_WRONLY | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, 0)
    os.fchmod(descriptor, mode)
    return descriptor


def _open_regular(root: int, path: str, flags: int, mode: int) -> int:
    descriptor = linux.open_beneath(root, path, flags, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is not a regular file")
    return descriptor


def _make_parents(root: int, path: str) -> None:
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        _make_directory(root, "/".join(parts[:depth]))


def _make_directory(root: int, path: str) -> None:
    parent, _, name = path.rpartition("/")
    directory = linux.open_beneath(root, parent or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        os.mkdir(name, 0o755, dir_fd=directory)
    except FileExistsError:
        return  # if it is not a directory, opening the file in it fails
    finally:
        os.close(directory)
