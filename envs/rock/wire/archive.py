"""Trees of files as tar archives, written and read in bounded memory by one thread.

A tree goes through a `Sink`, which takes its members one by one, directories before what is in
them. What makes the calls is a directory (envs.rock.directory) or an archive; what takes them
likewise. So every copy of a tree keeps the same: directories, empty ones too, regular files,
symbolic links, hard links between members, modes (no setuid bits), and times. FIFOs, sockets and
devices are named, never made.
"""

import tarfile
from collections.abc import Callable
from typing import NamedTuple, Protocol

from envs.rock.errors import SandboxFileError

BLOCK_BYTES = tarfile.BLOCKSIZE
PIECE_BYTES = 1 << 18
MAX_NAME_BYTES = 64 << 10  # of an extended header
MAX_SKIPPED = 10_000  # paths that a Transfer names
MODE_BITS = 0o1777  # that are kept
_NANOSECONDS = 1_000_000_000
_SPARSE_KEY = "GNU.sparse."
_HEADERS_ONLY = (tarfile.XGLTYPE,)  # no member, and nothing about the next one

Read = Callable[[int], bytes]  # up to so many bytes; b"" at the end


class Transfer(NamedTuple):
    """What a copy moved.

    Attributes:
      files: number of regular files written, hard links included.
      bytes: their size in total.
      skipped: paths of what was not copied: FIFOs, sockets and devices; in a download links too.
    """

    files: int
    bytes: int
    skipped: tuple[str, ...]


class Sink(Protocol):
    """What takes the members of a tree. Paths are relative, without "." and ".."."""

    def directory(self, path: str, mode: int, modified: int) -> None:
        """Take a directory; `modified` is in nanoseconds."""

    def file(self, path: str, mode: int, modified: int, size: int, read: Read) -> None:
        """Take a regular file, whose `size` bytes `read` returns."""

    def link(self, path: str, target: str, modified: int) -> None:
        """Take a symbolic link."""

    def hard_link(self, path: str, first: str) -> None:
        """Take another name of a file that was taken before."""

    def special(self, path: str) -> None:
        """Take note of something that is not copied."""


class TarWriter:
    """A sink that writes a tar archive in pax format.

    Attributes:
      files: number of regular files and hard links so far.
      bytes: their size in total.
      skipped: paths of what is not copied.

    Args:
      write: takes the archive's bytes.
      below: a directory that the names are put below, "" for none.
      names_specials: whether what is not copied gets a member, a FIFO, that names it.
    """

    def __init__(
        self, write: Callable[[bytes], object], below: str = "", names_specials: bool = True
    ):
        self.files = 0
        self.bytes = 0
        self.skipped: list[str] = []
        self._write = write
        self._prefix = f"{below}/" if below else ""
        self._names_specials = names_specials

    def directory(self, path: str, mode: int, modified: int) -> None:
        self._header(path, tarfile.DIRTYPE, mode, modified)

    def file(self, path: str, mode: int, modified: int, size: int, read: Read) -> None:
        self._header(path, tarfile.REGTYPE, mode, modified, size)
        left = size
        while left:
            piece = read(min(left, PIECE_BYTES))
            self._write(piece)
            left -= len(piece)
        self._write(b"\0" * _padding(size))
        self.files += 1
        self.bytes += size

    def link(self, path: str, target: str, modified: int) -> None:
        self._header(path, tarfile.SYMTYPE, 0o777, modified, target=target)

    def hard_link(self, path: str, first: str) -> None:
        self._header(path, tarfile.LNKTYPE, 0o644, 0, target=self._prefix + first)
        self.files += 1

    def special(self, path: str) -> None:
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append(path)
        if self._names_specials:
            self._header(path, tarfile.FIFOTYPE, 0o644, 0)

    def root(self, mode: int) -> None:
        """Write the directory that the names are put below."""
        path, self._prefix = self._prefix.rstrip("/"), ""
        self._header(path, tarfile.DIRTYPE, mode, 0)

    def end(self) -> None:
        """Write the end of the archive."""
        self._write(b"\0" * (2 * BLOCK_BYTES))

    def _header(
        self, path: str, kind: bytes, mode: int, modified: int, size: int = 0, target: str = ""
    ) -> None:
        member = tarfile.TarInfo(self._prefix + path)
        member.type = kind
        member.mode = mode & MODE_BITS
        member.size = size
        member.linkname = target
        member.mtime = modified // _NANOSECONDS
        if modified % _NANOSECONDS or modified < 0:
            sign = "-" if modified < 0 else ""
            seconds, nanoseconds = divmod(abs(modified), _NANOSECONDS)
            member.pax_headers = {"mtime": f"{sign}{seconds}.{nanoseconds:09d}"}
        self._write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))


def read_archive(read: Read, sink: Sink) -> None:
    """Give the members of a tar archive (ustar, GNU or pax, not compressed) to a sink.

    Args:
      read: returns the archive's bytes.
      sink: takes the members. A sparse file is a special one.

    Raises:
      SandboxFileError: a name is absolute or holds "..".
      ValueError: it is not a tar archive. What was taken so far stays.
    """
    blocks = _Blocks(read)
    extended: dict[str, str] = {}  # what extended headers said about the next member
    while True:
        header = blocks.take(BLOCK_BYTES)
        if not header.strip(b"\0"):
            break
        member = _parse_header(header)
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            key = "path" if member.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            text = blocks.take_padded(member.size, MAX_NAME_BYTES).rstrip(b"\0")
            extended[key] = text.decode("utf-8", "surrogateescape")
            continue
        if member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _parse_pax(blocks.take_padded(member.size, MAX_NAME_BYTES))
            continue
        if member.type not in _HEADERS_ONLY:
            _take_member(member, extended, blocks, sink)
            extended = {}
        else:
            blocks.skip(member.size + _padding(member.size))
    while read(PIECE_BYTES):  # padding to a whole record
        pass


def _take_member(
    member: tarfile.TarInfo, extended: dict[str, str], blocks: "_Blocks", sink: Sink
) -> None:
    path = clean_name(extended.get("path", member.name))
    modified = _nanoseconds(extended.get("mtime", ""), int(member.mtime))
    size = member.size
    if extended.get("size", "").isdecimal():
        size = int(extended["size"])
    target = extended.get("linkpath", member.linkname)
    is_sparse = member.issparse() or any(key.startswith(_SPARSE_KEY) for key in extended)
    if member.isdir():
        if path:
            sink.directory(path, member.mode & MODE_BITS, modified)
    elif not path:
        raise SandboxFileError("outside", "the archive holds a file without a name")
    elif member.issym():
        sink.link(path, target, modified)
    elif member.islnk():
        sink.hard_link(path, clean_name(target))
    elif member.isreg() and not is_sparse:
        content = _Content(blocks, size)
        sink.file(path, member.mode & MODE_BITS, modified, size, content.read)
        content.skip()
        blocks.skip(_padding(size))
        return
    else:
        sink.special(path)
    blocks.skip(size + _padding(size))


def clean_name(name: str) -> str:
    """Return a member's name without "." and empty parts; "" is the archive's own directory.

    Raises:
      SandboxFileError: the name leaves the directory.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or name.startswith("/") or "\0" in name:
        raise SandboxFileError(
            "outside", f"the archive holds {name[:200]!r}, which leaves its directory"
        )
    return "/".join(parts)


def _nanoseconds(text: str, seconds: int) -> int:
    """Return a time of a pax header, such as "12.5", or else whole seconds."""
    whole, _, fraction = text.partition(".")
    digits = whole.removeprefix("-")
    if not (digits.isdecimal() and len(digits) < 20 and (fraction.isdecimal() or not fraction)):
        return seconds * _NANOSECONDS
    nanoseconds = int(fraction[:9].ljust(9, "0"))
    if whole.startswith("-"):  # a fraction goes further back
        nanoseconds = -nanoseconds
    return int(whole) * _NANOSECONDS + nanoseconds


def _padding(size: int) -> int:
    """Return the number of bytes that fill `size` up to whole blocks."""
    return -size % BLOCK_BYTES


def _parse_header(header: bytes) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(f"this is not a tar archive: {error}") from None
    if member.size < 0:
        raise ValueError("this is not a tar archive: a size is negative")
    return member


def _parse_pax(content: bytes) -> dict[str, str]:
    r"""Parse the records of a pax header, each of the form "LENGTH KEY=VALUE\n"."""
    found = {}
    while content.strip(b"\0"):
        digits, _, rest = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        if not len(digits) < length <= len(content):
            raise ValueError("this is not a tar archive: an extended header is malformed")
        record = rest[: length - len(digits) - 2]
        key, _, value = record.partition(b"=")
        found[key.decode(errors="replace")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return found


class _Blocks:
    """Reads given numbers of bytes."""

    def __init__(self, read: Read):
        self._read = read

    def piece(self, size: int) -> bytes:
        """Return at least one byte and at most `size`."""
        piece = self._read(min(size, PIECE_BYTES))
        if not piece:
            raise ValueError("the archive ends in the middle of a file")
        return piece

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        data = bytearray()
        while len(data) < size:
            data += self.piece(size - len(data))
        return bytes(data)

    def take_padded(self, size: int, limit: int) -> bytes:
        """Return the next `size` bytes, at most `limit`, and drop the padding after them."""
        if size > limit:
            raise ValueError(
                f"an extended header of the archive has {size} bytes, more than {limit}"
            )
        return self.take(size + _padding(size))[:size]

    def skip(self, size: int) -> None:
        """Drop the next `size` bytes."""
        while size:
            size -= len(self.piece(size))


class _Content:
    """The content of one member."""

    def __init__(self, blocks: _Blocks, size: int):
        self._blocks = blocks
        self._left = size

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; b"" at the end of the member."""
        if not self._left or not size:
            return b""
        piece = self._blocks.piece(min(size, self._left))
        self._left -= len(piece)
        return piece

    def skip(self) -> None:
        """Drop what a sink did not read."""
        self._blocks.skip(self._left)
        self._left = 0
