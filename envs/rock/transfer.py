"""Files and directories on their way into a sandbox and out of it, streamed in bounded memory."""

import asyncio
import contextlib
import os
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Protocol

from envs.rock.backend import relative_path
from envs.rock.directory import DirectoryWriter, walk
from envs.rock.errors import SandboxError, SandboxFileError
from envs.rock.piping import consume, produce
from envs.rock.wire.archive import PIECE_BYTES, Read, TarWriter, Transfer, read_archive

Content = bytes | str | AsyncIterator[bytes]


class FileStreams(Protocol):
    """The methods of a sandbox, or of a backend, that move files."""

    def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """See Sandbox.read_stream."""

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        """See Sandbox.write_stream."""

    def pack(self, path: str = ".") -> AsyncGenerator[bytes, None]:
        """See Sandbox.pack."""

    async def unpack(self, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        """See Sandbox.unpack."""


async def upload(sandbox: FileStreams, source: pathlib.Path, target: str) -> Transfer:
    """Copy a file or a directory of this host into the workspace. See Sandbox.upload."""
    if source.is_file():
        return Transfer(1, await _upload_file(sandbox, source, target), ())
    root = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        async with contextlib.aclosing(pack_directory(root)) as pieces:
            return await sandbox.unpack(target, pieces)
    finally:
        os.close(root)


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
    async with contextlib.aclosing(sandbox.pack(source)) as pieces:
        first = await anext(pieces, b"")  # an error must not leave an empty directory here
        target.mkdir()
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
        writer = DirectoryWriter(root, replaces=False, only_files=True, limit=limit)
        try:
            return await unpack_directory(writer, _with_first(first, pieces))
        except ValueError as error:
            raise SandboxError(f"what the sandbox sends is not its files: {error}") from error
        except (FileExistsError, NotADirectoryError) as error:
            raise SandboxFileError(
                "outside",
                f"the sandbox sends {error.filename!r} twice, or below what is no directory",
            ) from error
        finally:
            os.close(root)


async def _with_first(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece


def pack_directory(
    root: int, open_denied: Callable[[str, bool], int] | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield everything below an open directory as a tar archive; see directory.walk."""

    def work(write: Callable[[bytes], object]) -> None:
        tar = TarWriter(write)
        walk(root, tar, open_denied)
        tar.end()

    return produce(work)


async def unpack_directory(
    writer: DirectoryWriter,
    pieces: AsyncIterator[bytes],
    prepare: Callable[[], None] | None = None,
) -> Transfer:
    """Make the members of a tar archive in a directory; errors as of archive.read_archive.

    Args:
      writer: makes them.
      pieces: the archive.
      prepare: called first, in the thread that does the work.
    """

    def work(read: Read) -> Transfer:
        if prepare is not None:
            prepare()
        read_archive(read, writer)
        writer.finish()
        return Transfer(writer.files, writer.bytes, tuple(writer.skipped))

    return await consume(work, pieces)


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
