"""A directory of a sandbox as a tar archive, streamed both ways in bounded memory.

Only regular files are packed; empty directories are left out.
"""

import contextlib
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator

from envs.rock.config import FileEntry
from envs.rock.errors import SandboxFileError
from envs.rock.transfer import PIECE_BYTES, FileStreams, Transfer

BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 64 << 10  # of an extended header
MAX_SKIPPED = 10_000  # paths that a Transfer names
_EXTENDED_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE)  # both describe the next member
_UNNAMED_TYPES = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)  # headers that are no member


async def pack(sandbox: FileStreams, path: str) -> AsyncGenerator[bytes, None]:
    """Yield a tar archive of the files below a directory of the workspace.

    A file that changes its length meanwhile is cut, or padded with zeros, to the length that it had
    when the directory was listed. A file that is removed or replaced meanwhile is left out.
    """
    for entry in await sandbox.list_files(path):
        if entry.kind != "file":
            continue
        async with contextlib.aclosing(sandbox.read_stream(f"{path}/{entry.path}")) as pieces:
            try:
                piece = await anext(pieces, b"")
            except SandboxFileError as error:
                if error.reason in ("missing", "not_regular", "outside"):
                    continue
                raise
            yield _header(entry)
            left = entry.size
            while piece and left:
                yield piece[:left]
                left -= len(piece[:left])
                piece = await anext(pieces, b"")
        left += _padding(entry.size)
        while left:
            yield b"\0" * min(left, PIECE_BYTES)
            left -= min(left, PIECE_BYTES)
    yield b"\0" * (2 * BLOCK_BYTES)


def _header(entry: FileEntry) -> bytes:
    header = tarfile.TarInfo(entry.path)
    header.size = entry.size
    header.mode = entry.mode & 0o777
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> int:
    """Return the number of bytes that fill `size` up to whole blocks."""
    return -size % BLOCK_BYTES


async def unpack(sandbox: FileStreams, target: str, pieces: AsyncIterator[bytes]) -> Transfer:
    """Write the regular files of a tar archive below the directory `target` of the workspace.

    Links, devices and the like are skipped, and named in the result.

    Args:
      sandbox: where the files are written.
      target: the directory, relative to the workspace.
      pieces: the archive (ustar, GNU or pax, not compressed), cut anywhere.

    Raises:
      SandboxFileError: a name is absolute or holds "..".
      ValueError: `pieces` are not a tar archive. What was written so far stays.
    """
    blocks = _Blocks(pieces)
    files = size = 0
    skipped: list[str] = []
    extended: dict[str, str] = {}  # what extended headers said about the next member
    while True:
        header = await blocks.take(BLOCK_BYTES)
        if not header.strip(b"\0"):
            break
        member = _parse_header(header)
        if member.type in _EXTENDED_TYPES:
            extended |= await _read_extended(blocks, member)
            continue
        name = extended.get("path", member.name)
        length = member.size
        if extended.get("size", "").isdecimal():
            length = int(extended["size"])
        if member.isreg() and not member.issparse():
            _check_name(name)
            content = blocks.pieces(length)
            await sandbox.write_stream(f"{target}/{name}", content, member.mode & 0o777)
            await blocks.skip(_padding(length))
            files += 1
            size += length
        else:
            is_named = not member.isdir() and member.type not in _UNNAMED_TYPES
            if is_named and len(skipped) < MAX_SKIPPED:
                skipped.append(name)
            await blocks.skip(length + _padding(length))
        if member.type != tarfile.GNUTYPE_LONGLINK:
            extended = {}
    async for _ in pieces:  # padding to a whole record
        pass
    return Transfer(files, size, tuple(skipped))


def _parse_header(header: bytes) -> tarfile.TarInfo:
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ValueError(f"this is not a tar archive: {error}") from None
    if member.size < 0:
        raise ValueError("this is not a tar archive: a size is negative")
    return member


def _check_name(name: str) -> None:
    if ".." in name.split("/") or name.startswith("/"):
        raise SandboxFileError(
            "outside", f"the archive holds {name[:200]!r}, which leaves its directory"
        )


async def _read_extended(blocks: "_Blocks", member: tarfile.TarInfo) -> dict[str, str]:
    content = await blocks.take_padded(member.size, MAX_NAME_BYTES)
    if member.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    return _parse_pax(content)


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
    """Reads given numbers of bytes from a stream of pieces of any size."""

    def __init__(self, source: AsyncIterator[bytes]):
        self._source = source
        self._data = b""

    async def pieces(self, size: int) -> AsyncIterator[bytes]:
        """Yield the next `size` bytes, in pieces."""
        while size:
            if not self._data:
                self._data = await anext(self._source, b"")
                if not self._data:
                    raise ValueError("the archive ends in the middle of a file")
            piece = self._data[:size]
            self._data = self._data[size:]
            size -= len(piece)
            yield piece

    async def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        return b"".join([piece async for piece in self.pieces(size)])

    async def take_padded(self, size: int, limit: int) -> bytes:
        """Return the next `size` bytes, at most `limit`, and drop the padding after them."""
        if size > limit:
            raise ValueError(
                f"an extended header of the archive has {size} bytes, more than {limit}"
            )
        content = await self.take(size + _padding(size))
        return content[:size]

    async def skip(self, size: int) -> None:
        """Drop the next `size` bytes."""
        async for _ in self.pieces(size):
            pass
