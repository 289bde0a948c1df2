"""Copies of a sandbox's files, made inside its holder: what a snapshot is, and how a tier without overlays starts from one."""

import errno
import os
import stat

MAX_DEPTH = 64  # two descriptors a level
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def copy_tree(source: int, target: int, owner: tuple[int, int] | None = None, depth: int = 0) -> None:
    """Copy the directories, regular files and links below one directory into another, with modes and times; links are not followed.

    What is neither of the three is left out, and so are setuid bits and hard links' identity. Nothing may be written below `source` meanwhile.

    Args:
      source, target: descriptors of directories.
      owner: (uid, gid) of the copies; None: whoever copies.
    Raises: OSError, also for a tree that is deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise OSError(errno.ELOOP, f"directories lie more than {MAX_DEPTH} levels deep")
    with os.scandir(source) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                _copy_directory(source, target, entry.name, status, owner, depth)
            elif stat.S_ISREG(status.st_mode):
                _copy_file(source, target, entry.name, status, owner)
            elif stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(entry.name, dir_fd=source), entry.name, dir_fd=target)
                if owner:
                    os.chown(entry.name, *owner, dir_fd=target, follow_symlinks=False)


def _copy_directory(source: int, target: int, name: str, status: os.stat_result, owner: tuple[int, int] | None, depth: int) -> None:
    os.mkdir(name, 0o700, dir_fd=target)
    inner_source = os.open(name, _READ | os.O_DIRECTORY, dir_fd=source)
    inner_target = os.open(name, _READ | os.O_DIRECTORY, dir_fd=target)
    try:
        copy_tree(inner_source, inner_target, owner, depth + 1)
        _finish(inner_target, status, owner)
    finally:
        os.close(inner_source)
        os.close(inner_target)


def _copy_file(source: int, target: int, name: str, status: os.stat_result, owner: tuple[int, int] | None) -> None:
    reading = os.open(name, _READ, dir_fd=source)
    writing = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
    try:
        while os.sendfile(writing, reading, None, 1 << 24):
            pass
        _finish(writing, status, owner)
    finally:
        os.close(reading)
        os.close(writing)


def _finish(descriptor: int, status: os.stat_result, owner: tuple[int, int] | None) -> None:
    if owner:
        os.fchown(descriptor, *owner)
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & 0o1777)
    os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))
