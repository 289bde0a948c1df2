"""A directory of this host as the source or the target of a tree's members (see wire.archive).

Whoever else writes in the directory meanwhile, an agent for example, can lead neither of them out
of it: everything is opened beneath it, and no link is followed where something is made.
"""

import errno
import os
import stat
from collections.abc import Callable

from envs.rock.backend import MAX_LISTED
from envs.rock.errors import SandboxFileError
from envs.rock.host.linux import open_beneath
from envs.rock.wire.archive import MAX_SKIPPED, MODE_BITS, PIECE_BYTES, Read, Sink

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Errors of opening what was removed or became something else since it was listed.
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EXDEV)


def walk(root: int, sink: Sink, open_denied: Callable[[str, bool], int] | None = None) -> None:
    """Give everything below an open directory to a sink, directories first.

    What is removed or replaced meanwhile is left out.

    Args:
      root: the directory's descriptor.
      sink: takes the members.
      open_denied: opens a file or a directory (True) that this process may not open, by its path.

    Raises:
      OSError: something cannot be opened or read.
      SandboxFileError: "too_large": there are more than MAX_LISTED files.
    """
    _Walk(root, sink, open_denied).run()


class _Walk:
    def __init__(self, root: int, sink: Sink, open_denied: Callable[[str, bool], int] | None):
        self._root = root
        self._sink = sink
        self._open_denied = open_denied
        self._count = 0
        self._linked: dict[tuple[int, int], str] = {}  # (device, inode) -> the first path

    def run(self) -> None:
        pending = [""]
        while pending:
            path = pending.pop()
            directory = self._open(path, True)
            if directory is None:
                continue
            try:
                with os.scandir(directory) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
                    inner = [name for entry in listed if (name := self._take(path, entry))]
            finally:
                os.close(directory)
            pending += reversed(inner)

    def _take(self, path: str, entry: os.DirEntry[str]) -> str | None:
        """Give an entry to the sink; return its path if there is more below it."""
        self._count += 1
        if self._count > MAX_LISTED:
            raise SandboxFileError("too_large", f"there are more than {MAX_LISTED} files")
        name = f"{path}{entry.name}"
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(status.st_mode):
            self._sink.directory(name, status.st_mode & MODE_BITS, status.st_mtime_ns)
            return f"{name}/"
        if stat.S_ISREG(status.st_mode):
            self._take_file(name, status)
        elif stat.S_ISLNK(status.st_mode):
            self._take_link(path, entry.name, status)
        else:
            self._sink.special(name)
        return None

    def _take_file(self, name: str, status: os.stat_result) -> None:
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and identity in self._linked:
            self._sink.hard_link(name, self._linked[identity])
            return
        descriptor = self._open(name, False)
        if descriptor is None:
            return
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return
            if status.st_nlink > 1:
                self._linked[(status.st_dev, status.st_ino)] = name
            mode = status.st_mode & MODE_BITS
            read = _reader(descriptor, status.st_size)
            self._sink.file(name, mode, status.st_mtime_ns, status.st_size, read)
        finally:
            os.close(descriptor)

    def _take_link(self, path: str, name: str, status: os.stat_result) -> None:
        directory = self._open(path, True)
        if directory is None:
            return
        try:
            target = os.readlink(name, dir_fd=directory)
        except OSError as error:
            if error.errno in (*_GONE, errno.EINVAL):
                return
            raise
        finally:
            os.close(directory)
        self._sink.link(f"{path}{name}", target, status.st_mtime_ns)

    def _open(self, path: str, is_directory: bool) -> int | None:
        """Open a file or a directory beneath the root; None if it is not there any more."""
        flags = _READ | os.O_DIRECTORY if is_directory else _READ
        place = path.rstrip("/") or "."
        try:
            try:
                return open_beneath(self._root, place, flags)
            except PermissionError:
                if self._open_denied is None:
                    raise
                return self._open_denied(place, is_directory)
        except OSError as error:
            if error.errno in _GONE and path:
                return None
            raise


def _reader(descriptor: int, size: int) -> Read:
    """Return a function that reads a file, cut or padded with zeros to a size."""
    left = size

    def read(wanted: int) -> bytes:
        nonlocal left
        piece = os.read(descriptor, min(wanted, left))
        if not piece:
            piece = b"\0" * min(wanted, left)
        left -= len(piece)
        return piece

    return read


class DirectoryWriter:
    """A sink that makes the members in a directory.

    Attributes:
      files: number of regular files that were made, hard links included.
      bytes: their size in total.
      skipped: paths of what was not made.

    Args:
      root: descriptor of the directory.
      below: where in it, a relative path; it is made.
      replaces: whether what is there already gives way; otherwise it is an error.
      only_files: make no links, and no modes but 755 and 644.
      limit: bytes in total; None for any number.
    """

    def __init__(
        self,
        root: int,
        below: str = "",
        *,
        replaces: bool = True,
        only_files: bool = False,
        limit: int | None = None,
    ):
        self.files = 0
        self.bytes = 0
        self.skipped: list[str] = []
        self._root = root
        self._prefix = f"{below}/" if below not in ("", ".") else ""
        self._replaces = replaces
        self._only_files = only_files
        self._limit = limit
        self._made: dict[str, tuple[int, int]] = {}  # directory -> mode and time, for the end
        self._parent = ""
        self._parent_fd = -1

    def directory(self, path: str, mode: int, modified: int) -> None:
        full = self._prefix + path
        parent, name = self._enter(full)
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if not self._replaces or not stat.S_ISDIR(status.st_mode):
                raise
        self._made[full] = (0o755 if self._only_files else mode, modified)

    def file(self, path: str, mode: int, modified: int, size: int, read: Read) -> None:
        if self._limit is not None and self.bytes + size > self._limit:
            left = self._limit - self.bytes
            raise SandboxFileError(
                "too_large", f"{path} exceeds what is left of the limit, {left} bytes"
            )
        parent, name = self._enter(self._prefix + path)
        descriptor = self._make_room(
            lambda: os.open(name, _CREATE, 0o600, dir_fd=parent), name, parent
        )
        try:
            _write(descriptor, size, read)
            if self._only_files:
                mode = 0o755 if mode & 0o100 else 0o644
            os.fchmod(descriptor, mode)
            os.utime(descriptor, ns=(modified, modified))
        finally:
            os.close(descriptor)
        self.files += 1
        self.bytes += size

    def link(self, path: str, target: str, modified: int) -> None:
        if self._only_files:
            self.special(path)
            return
        parent, name = self._enter(self._prefix + path)
        self._make_room(lambda: os.symlink(target, name, dir_fd=parent), name, parent)
        os.utime(name, ns=(modified, modified), dir_fd=parent, follow_symlinks=False)

    def hard_link(self, path: str, first: str) -> None:
        source_parent, _, source_name = (self._prefix + first).rpartition("/")
        try:
            source = open_beneath(self._root, source_parent or ".", os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            self.special(path)
            return
        try:
            status = os.stat(source_name, dir_fd=source, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                self.special(path)
                return
            parent, name = self._enter(self._prefix + path)
            self._make_room(
                lambda: os.link(
                    source_name,
                    name,
                    src_dir_fd=source,
                    dst_dir_fd=parent,
                    follow_symlinks=False,
                ),
                name,
                parent,
            )
            self.files += 1
        except FileNotFoundError:
            self.special(path)
        finally:
            os.close(source)

    def special(self, path: str) -> None:
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append(path)

    def finish(self) -> None:
        """Give the directories their modes and times, which what was made in them has changed."""
        self._leave()
        if self._prefix:  # also for a tree without members
            self._make_parents(self._prefix.rstrip("/"))
        for path, (mode, modified) in reversed(self._made.items()):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            descriptor = open_beneath(self._root, path, flags)
            try:
                os.fchmod(descriptor, mode)
                os.utime(descriptor, ns=(modified, modified))
            finally:
                os.close(descriptor)

    def _make_room(self, make: Callable[[], int | None], name: str, parent: int) -> int:
        """Call `make`; if something is there, remove it and try again."""
        try:
            return make() or 0
        except FileExistsError:
            if not self._replaces:
                raise
            os.unlink(name, dir_fd=parent)
        return make() or 0

    def _enter(self, path: str) -> tuple[int, str]:
        """Return the open directory in which a path lies, made if it is missing, and the name."""
        parent, _, name = path.rpartition("/")
        if self._parent_fd < 0 or parent != self._parent:
            self._leave()
            try:
                self._parent_fd = self._open_directory(parent)
            except FileNotFoundError:
                self._make_parents(parent)
                self._parent_fd = self._open_directory(parent)
            self._parent = parent
        return self._parent_fd, name

    def _leave(self) -> None:
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
            self._parent_fd = -1

    def _open_directory(self, path: str) -> int:
        return open_beneath(self._root, path or ".", os.O_RDONLY | os.O_DIRECTORY)

    def _make_parents(self, path: str) -> None:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            above = self._open_directory("/".join(parts[: depth - 1]))
            try:
                os.mkdir(parts[depth - 1], 0o755, dir_fd=above)
            except FileExistsError:
                continue  # if it is not a directory, opening it fails
            finally:
                os.close(above)


def _write(descriptor: int, size: int, read: Read) -> None:
    """Write a file's content; where it is all zeros, leave holes."""
    os.ftruncate(descriptor, size)
    position = 0
    while position < size:
        piece = read(min(size - position, PIECE_BYTES))
        if piece.strip(b"\0"):
            written = 0
            while written < len(piece):
                written += os.pwrite(descriptor, piece[written:], position + written)
        position += len(piece)
