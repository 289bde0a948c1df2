"""Copies of a sandbox's files, made in its holder.

A snapshot is such a copy; tiers without overlays also start from one.
"""

import errno
import os
import stat

MAX_DEPTH = 64  # levels of directories; each takes two descriptors
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
# Errors of opening what has become something else: nothing, a link, a file, a socket.
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL, errno.ENXIO)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def copy_tree(source: int, target: int, owner: tuple[int, int] | None = None) -> None:
    """Copy the directories, regular files and links below one directory into another.

    Modes and times are copied, setuid bits are not; other kinds of files are left out. Symbolic
    links are copied, not followed. Holes stay holes and hard links stay links: otherwise a huge
    sparse file, or many names of one file, would fill the host's disk.

    Whoever writes below `source` meanwhile makes no error: a file that is removed or replaced is
    left out, and one that is written is copied as far as it is there.

    Args:
      source: descriptor of the directory to copy from.
      target: descriptor of the directory to copy into.
      owner: (uid, gid) of the copies; None for those of this process.

    Raises:
      OSError: also for a tree that is deeper than MAX_DEPTH.
    """
    _Copy(target, owner).copy_directory(source, target, "")


class _Copy:
    def __init__(self, root: int, owner: tuple[int, int] | None):
        self._root = root
        self._owner = owner
        # (device, inode) of a file with several names -> the path of its copy
        self._linked: dict[tuple[int, int], str] = {}

    def copy_directory(self, source: int, target: int, path: str) -> None:
        if path.count("/") > MAX_DEPTH:
            raise OSError(errno.ELOOP, f"directories lie more than {MAX_DEPTH} levels deep")
        copied = set()
        with os.scandir(source) as entries:
            for entry in entries:
                status = _status_of(entry)
                # One that is made again while we read may be listed twice.
                if status is None or entry.name in copied:
                    continue
                copied.add(entry.name)
                if stat.S_ISDIR(status.st_mode):
                    self._copy_inner_directory(source, target, entry.name, status, path)
                elif stat.S_ISREG(status.st_mode):
                    self._copy_file(source, target, entry.name, status, path)
                elif stat.S_ISLNK(status.st_mode):
                    self._copy_link(source, target, entry.name, status)

    def _copy_inner_directory(
        self, source: int, target: int, name: str, status: os.stat_result, path: str
    ) -> None:
        inner_source = _open_source(name, _READ | os.O_DIRECTORY, source)
        if inner_source is None:
            return
        try:
            os.mkdir(name, 0o700, dir_fd=target)
            inner_target = os.open(name, _READ | os.O_DIRECTORY, dir_fd=target)
            try:
                self.copy_directory(inner_source, inner_target, f"{path}{name}/")
                self._finish(inner_target, status)
            finally:
                os.close(inner_target)
        finally:
            os.close(inner_source)

    def _copy_link(self, source: int, target: int, name: str, status: os.stat_result) -> None:
        try:
            leads_to = os.readlink(name, dir_fd=source)
        except OSError as error:
            if error.errno in _GONE:
                return
            raise
        os.symlink(leads_to, name, dir_fd=target)
        if self._owner:
            os.chown(name, *self._owner, dir_fd=target, follow_symlinks=False)
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)

    def _copy_file(
        self, source: int, target: int, name: str, status: os.stat_result, path: str
    ) -> None:
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and identity in self._linked:
            first = self._linked[identity]
            os.link(first, name, src_dir_fd=self._root, dst_dir_fd=target, follow_symlinks=False)
            return
        reading = _open_source(name, _READ, source)
        if reading is None:
            return
        try:
            if not stat.S_ISREG(os.fstat(reading).st_mode):  # replaced meanwhile
                return
            writing = os.open(name, _CREATE, 0o600, dir_fd=target)
            try:
                _copy_data(reading, writing)
                self._finish(writing, status)
            finally:
                os.close(writing)
        finally:
            os.close(reading)
        if status.st_nlink > 1:
            self._linked[identity] = path + name

    def _finish(self, descriptor: int, status: os.stat_result) -> None:
        if self._owner:
            os.fchown(descriptor, *self._owner)
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & 0o1777)
        os.utime(descriptor, ns=(status.st_atime_ns, status.st_mtime_ns))


def _status_of(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return an entry's status, None if it was removed meanwhile."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def _open_source(name: str, flags: int, directory: int) -> int | None:
    """Open what is to be copied, None if it was removed or replaced meanwhile."""
    try:
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise


def _copy_data(reading: int, writing: int) -> None:
    """Copy a file's data but not its holes."""
    size = os.fstat(reading).st_size
    os.ftruncate(writing, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(reading, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only holes up to the end
                return
            raise
        end = os.lseek(reading, start, os.SEEK_HOLE)
        os.lseek(reading, start, os.SEEK_SET)
        os.lseek(writing, start, os.SEEK_SET)
        left = end - start
        while left and (sent := os.sendfile(writing, reading, None, left)):
            left -= sent
