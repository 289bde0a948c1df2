"""A tree of a sandbox as a tar archive, streamed both ways in bounded memory.

Regular files only; empty directories do not travel.
"""

import contextlib
import tarfile
from collections.abc import AsyncIterator

from envs.rock.errors import SandboxFileError
from envs.rock.transfer import PIECE_BYTES, FileStreams, Transfer

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 64 << 10  # of an extended header
MAX_SKIPPED = 10_000


async def pack(sandbox: FileStreams, path: str) -> AsyncIterator[bytes]:
    """The files below a directory of the workspace.

    One that changes its length meanwhile is cut, or filled with zeros, to what it was at first.
    """
    for entry in await sandbox.list_files(path):
        if entry.kind != "file":
            continue
        async with contextlib.aclosing(sandbox.read_stream(f"{path}/{entry.path}")) as pieces:
            try:
                piece = await anext(pieces, b"")
            except SandboxFileError as error:
                if error.reason in (
                    "missing",
                    "not_regular",
                    "outside",
                ):  # it was removed or replaced
                    continue
                raise
            header = tarfile.TarInfo(entry.path)
            header.size, header.mode = entry.size, entry.mode & 0o777
            yield header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            left = entry.size
            while piece and left:
                yield piece[:left]
                left -= len(piece[:left])
                piece = await anext(pieces, b"")
        left += -entry.size % BLOCK
        while left:
            yield b"\0" * min(left, PIECE_BYTES)
            left -= min(left, PIECE_BYTES)
    yield b"\0" * (2 * BLOCK)


async def unpack(sandbox: FileStreams, target: str, pieces: AsyncIterator[bytes]) -> Transfer:
    """Write the regular files of an archive below `target`.

    Names that leave it are refused, whatever else is no file is skipped.

    Raises: ValueError for what is no tar archive (ustar, GNU or pax, not compressed); what was
    written so far stays.
    """
    blocks = _Blocks(pieces)
    files = size = 0
    skipped: list[str] = []
    extended: dict[str, str] = {}  # said by the header before, of the file that follows
    while True:
        header = await blocks.take(BLOCK)
        if not header.strip(b"\0"):
            break
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"this is no tar archive: {error}") from None
        if member.size < 0:
            raise ValueError("this is no tar archive: a size is negative")
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            content = await blocks.padded(member.size, MAX_NAME_BYTES)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                extended |= _pax(content)
            continue
        name = extended.get("path", member.name)
        length = int(extended["size"]) if extended.get("size", "").isdecimal() else member.size
        if member.isreg() and not member.issparse():
            if ".." in name.split("/") or name.startswith("/"):
                raise SandboxFileError(
                    "outside", f"the archive holds {name[:200]!r}, which leaves its directory"
                )
            await sandbox.write_stream(
                f"{target}/{name}", blocks.pieces(length), member.mode & 0o777
            )
            await blocks.skip(-length % BLOCK)
            files, size = files + 1, size + length
        else:
            if (
                not member.isdir()
                and len(skipped) < MAX_SKIPPED
                and member.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
            ):
                skipped.append(name)
            await blocks.skip(length + -length % BLOCK)
        if member.type != tarfile.GNUTYPE_LONGLINK:
            extended = {}
    async for _ in pieces:  # what pads it to a whole record
        pass
    return Transfer(files, size, tuple(skipped))


def _pax(content: bytes) -> dict[str, str]:
    """Records of "LENGTH KEY=VALUE\\n"."""
    found = {}
    while content.strip(b"\0"):
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:9]) <= len(content):
            raise ValueError("this is no tar archive: an extended header makes no sense")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        found[key.decode(errors="replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return found


class _Blocks:
    """Octets of a stream, by number."""

    def __init__(self, source: AsyncIterator[bytes]):
        self._source, self._data = source, b""

    async def pieces(self, size: int) -> AsyncIterator[bytes]:
        while size:
            if not self._data:
                self._data = await anext(self._source, b"")
                if not self._data:
                    raise ValueError("the archive ends in the middle of a file")
            piece, self._data = self._data[:size], self._data[size:]
            size -= len(piece)
            yield piece

    async def take(self, size: int) -> bytes:
        return b"".join([piece async for piece in self.pieces(size)])

    async def padded(self, size: int, limit: int) -> bytes:
        if size > limit:
            raise ValueError(
                f"an extended header of the archive has {size} bytes, more than {limit}"
            )
        return (await self.take(size + -size % BLOCK))[:size]

    async def skip(self, size: int) -> None:
        async for _ in self.pieces(size):
            pass
