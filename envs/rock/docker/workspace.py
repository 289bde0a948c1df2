"""Files of a running Docker sandbox's workspace: read, written and listed by scripts in it."""

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator

from envs.rock.backend import MAX_LISTED
from envs.rock.config import FileEntry
from envs.rock.docker import scripts
from envs.rock.docker.activity import Activity
from envs.rock.docker.capture import KILLED
from envs.rock.docker.container import Container
from envs.rock.docker.engine import CALL_SECONDS
from envs.rock.docker.files import FILE_CHANGED, exhaust, send_unless_ended, stdout_of, unpack
from envs.rock.docker.streams import Exec
from envs.rock.errors import (
    AgentFault,
    SandboxClosedError,
    SandboxFileError,
    SandboxStartError,
)
from envs.rock.piping import consume
from envs.rock.wire.archive import Read, TarWriter, Transfer, read_archive

MAX_LISTING_BYTES = 64 << 20
_KINDS = {"f": "file", "d": "directory", "l": "link"}


class Workspace:
    """The file operations of one container.

    Each takes a path relative to the workspace, and the path as the caller wrote it for messages.
    """

    def __init__(self, container: Container, activity: Activity):
        self._container = container
        self._activity = activity

    async def read(self, relative: str, path: str) -> AsyncGenerator[bytes, None]:
        """Yield a file's content."""
        script = scripts.in_workspace(scripts.READ)
        async with self._activity.transfer(script, scripts.spelled(relative)) as exec_:
            async for piece in stdout_of(exec_.frames()):
                yield piece
            code = await exec_.exit_code()
        self._check_code(code, path)

    async def write(
        self, relative: str, path: str, pieces: AsyncIterator[bytes], mode: int
    ) -> None:
        """Write a file and create its directories."""
        script = scripts.in_workspace(scripts.WRITE)
        permissions = f"{mode & 0o7777:o}"
        spelled = scripts.spelled(relative)
        async with self._activity.transfer(script, spelled, permissions, stdin=True) as exec_:
            code = await _send_file(exec_, path, pieces)
        self._check_code(code, path)

    async def list_all(self, relative: str, path: str) -> list[FileEntry]:
        """Return everything below a directory."""
        listing = bytearray()
        script = scripts.in_workspace(scripts.list_files(self._container.tools))
        async with self._activity.transfer(script, scripts.spelled(relative)) as exec_:
            async for piece in stdout_of(exec_.frames()):
                listing += piece
                if listing.count(b"\0") > MAX_LISTED or len(listing) > MAX_LISTING_BYTES:
                    raise SandboxFileError("too_large", f"there are more than {MAX_LISTED} files")
            code = await exec_.exit_code()
        if code in scripts.REASONS:
            # Other codes are find's own, which complains of files that vanished meanwhile.
            self._check_code(code, path)
        return [_parse_entry(record) for record in bytes(listing).split(b"\0")[:-1]]

    async def pack(self, relative: str, path: str) -> AsyncGenerator[bytes, None]:
        """Yield everything below a directory as a tar archive."""
        script = scripts.in_workspace(scripts.pack_tree(self._container.tools))
        async with self._activity.transfer(script, scripts.spelled(relative)) as exec_:
            async for piece in stdout_of(exec_.frames()):
                yield piece
            code = await exec_.exit_code()
        if code != FILE_CHANGED:
            self._check_code(code, path)

    async def unpack(self, relative: str, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        """Make what a tar archive holds; the container's tar gets only what was checked."""
        below = f"workspace/{relative}".rstrip("/")
        with tempfile.TemporaryFile(prefix="rock-") as file:

            def check(read: Read) -> Transfer:
                tar = TarWriter(file.write, below, names_specials=False)
                read_archive(read, tar)
                if not file.tell() and relative:  # a tree without members
                    tar.root(0o755)
                tar.end()
                file.flush()
                return Transfer(tar.files, tar.bytes, tuple(tar.skipped))

            transfer = await consume(check, pieces)
            try:
                await unpack(self._container, file)
            except SandboxStartError as error:
                raise SandboxFileError("no_space", f"{path}: {error}") from error
        return transfer

    def _check_code(self, code: int, path: str) -> None:
        if code == KILLED and not self._container.alive:
            raise SandboxClosedError("the sandbox ended")
        if code:
            reason = scripts.REASONS.get(code, "denied")
            raise SandboxFileError(reason, f"{path}: {reason.replace('_', ' ')} (exit code {code})")


async def _send_file(exec_: Exec, path: str, pieces: AsyncIterator[bytes]) -> int:
    """Send a file's content to the script that writes it; return the script's exit code."""
    reading = asyncio.create_task(exhaust(exec_))
    try:
        async for piece in pieces:
            if not await send_unless_ended(exec_.send(piece, more=True), reading):
                break
        else:
            await send_unless_ended(exec_.send(b""), reading)
        async with asyncio.timeout(CALL_SECONDS):
            await reading
            return await exec_.exit_code()
    except TimeoutError:
        raise AgentFault(
            f"{path} was not written within {CALL_SECONDS:.0f} s after its last byte"
        ) from None
    finally:
        reading.cancel()


def _parse_entry(record: bytes) -> FileEntry:
    kind, size, mode, name = os.fsdecode(record).split(" ", 3)
    permissions = int(mode, 8) & 0o7777
    return FileEntry(name, _KINDS.get(kind, "special"), int(size), permissions)
