"""Files and directories on their way into a sandbox and out of it, streamed in bounded memory."""

import asyncio
import contextlib
import os
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import NamedTuple, Protocol

from envs.rock.backend import check_listed_path, relative_path
from envs.rock.config import FileEntry
from envs.rock.errors import SandboxFileError

PIECE_BYTES = 1 << 18  # of a streamed file
Content = bytes | str | AsyncIterator[bytes]


class FileStreams(Protocol):
    """The three methods of a sandbox, or of a backend, that move files."""

    def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """See Sandbox.read_stream."""

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        """See Sandbox.write_stream."""

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        """See Sandbox.list_files."""


class Transfer(NamedTuple):
    """What an upload or a download moved.

    Attributes:
      files: number of files written.
      bytes: their size in total.
      skipped: paths of links, devices, sockets and FIFOs, which are neither followed nor copied.
    """

    files: int
    bytes: int
    skipped: tuple[str, ...]


async def upload(sandbox: FileStreams, source: pathlib.Path, target: str) -> Transfer:
    """Copy a file or a directory of this host into the workspace. See Sandbox.upload."""
    if source.is_file():
        return Transfer(1, await _upload_file(sandbox, source, target), ())
    files = 0
    size = 0
    skipped = []
    for path in _walk(source):
        relative = path.relative_to(source)
        if path.is_symlink() or not path.is_file():
            skipped.append(str(relative))
            continue
        size += await _upload_file(sandbox, path, f"{target}/{relative}")
        files += 1
    return Transfer(files, size, tuple(skipped))


async def download(
    sandbox: FileStreams, source: str, target: pathlib.Path, limit: int, workspace: str
) -> Transfer:
    """Copy a file or a directory of the workspace to this host. See Sandbox.download."""
    if relative_path(source, workspace):
        try:
            return Transfer(1, await _download_file(sandbox, source, target, limit), ())
        except SandboxFileError as error:
            if error.reason != "not_regular":
                raise
    entries = await sandbox.list_files(source)
    _check_tree(entries)
    target.mkdir()
    files = 0
    size = 0
    skipped = []
    for entry in entries:
        inner = target / entry.path
        if entry.kind == "directory":
            inner.mkdir()
        elif entry.kind == "file":
            mode = 0o755 if entry.mode & 0o100 else 0o644
            left = limit - size
            size += await _download_file(sandbox, f"{source}/{entry.path}", inner, left, mode)
            files += 1
        else:
            skipped.append(entry.path)
    return Transfer(files, size, tuple(skipped))


def _check_tree(entries: list[FileEntry]) -> None:
    """Raise SandboxFileError if entries are not a tree in which directories come first.

    Nothing is then made outside the target, and nothing twice.
    """
    kinds = {"": "directory"}
    for entry in entries:
        check_listed_path(entry.path)
        parent, _, _ = entry.path.rpartition("/")
        if kinds.get(parent) != "directory" or entry.path in kinds:
            raise SandboxFileError(
                "outside",
                f"a listing names {entry.path[:200]!r} twice, or without its directory; the files"
                " were moved while they were listed, or the listing is a lie",
            )
        kinds[entry.path] = entry.kind


async def read_all(sandbox: FileStreams, path: str, limit: int) -> bytes:
    """Read a file of the workspace into memory.

    Raises:
      SandboxFileError: "too_large" for a file of more than `limit` bytes, and as read_stream.
    """
    data = bytearray()
    async with contextlib.aclosing(sandbox.read_stream(path)) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) > limit:
                raise SandboxFileError(
                    "too_large", f"{path} has more than the limit of {limit} bytes"
                )
    return bytes(data)


async def as_pieces(content: Content) -> AsyncIterator[bytes]:
    """Yield content in pieces: bytes and text (as UTF-8) in one, a stream as it comes."""
    if isinstance(content, str):
        yield content.encode()
    elif isinstance(content, bytes):
        yield content
    else:
        async for piece in content:
            yield piece


def _walk(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield all files and links below a directory in a fixed order; directories are not yielded."""
    for parent, names, filenames in os.walk(directory, onerror=_raise):
        names.sort()
        links = [name for name in names if os.path.islink(os.path.join(parent, name))]
        for name in sorted(filenames) + links:
            yield pathlib.Path(parent, name)


async def _upload_file(sandbox: FileStreams, source: pathlib.Path, target: str) -> int:
    with open(source, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        await sandbox.write_stream(target, _read_pieces(file.read), mode)
        return file.tell()


async def _download_file(
    sandbox: FileStreams, source: str, target: pathlib.Path, limit: int, mode: int = 0o644
) -> int:
    size = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    async with contextlib.aclosing(sandbox.read_stream(source)) as pieces:
        # Read first: a file that cannot be read must not leave an empty one on this host.
        piece = await anext(pieces, b"")
        with open(os.open(target, flags, mode), "wb") as file:
            while piece:
                size += len(piece)
                if size > limit:
                    raise SandboxFileError(
                        "too_large", f"{source} exceeds what is left of the limit, {limit} bytes"
                    )
                await asyncio.to_thread(file.write, piece)
                piece = await anext(pieces, b"")
    return size


async def _read_pieces(read: Callable[[int], bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(read, PIECE_BYTES):
        yield piece


def _raise(error: OSError) -> None:
    raise error
