"""Files of a Docker sandbox: tars out of a container and into one, and images that carry them."""

import asyncio
import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import IO, Any

from docker import APIClient

from envs.rock.backend import Snapshot
from envs.rock.docker import scripts
from envs.rock.docker.container import Container
from envs.rock.docker.engine import CALL_SECONDS
from envs.rock.docker.streams import STDOUT, Exec, Frames
from envs.rock.errors import AgentFault, SandboxStartError
from envs.rock.transfer import PIECE_BYTES

SNAPSHOT_SECONDS = 300.0
COMMITTED = "rock.committed"  # label of an image with files in scripts.COMMITTED_FILES
INODE_BYTES = 4096  # a tar needs for a file beyond its content, at most
MAX_ERROR_CHARACTERS = 300  # of what a script says, in an error
MAX_EXHAUSTED_BYTES = 1024
FILE_CHANGED = 1  # tar's exit code if a file changed while it was read


class DockerSnapshot(Snapshot):
    """A tar in a file without a name.

    It is gone with the last sandbox that reads it, or with this process.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file

    async def delete(self) -> None:
        self.file.close()


async def pack(container: Container, directories: str) -> DockerSnapshot:
    """Copy directories of a container's root.

    Args:
      container: the sandbox's.
      directories: names, separated by spaces.

    Raises:
      AgentFault: the files cannot be read, or are more than the sandbox may have.
    """
    config = container.config
    # Sparse files come out with their holes cut short, and each file has a header.
    limit = (config.disk_mb << 20) + INODE_BYTES * config.inodes + (1 << 20)
    with contextlib.ExitStack() as cleanup:
        file = cleanup.enter_context(tempfile.TemporaryFile(prefix="rock-"))
        try:
            async with asyncio.timeout(SNAPSHOT_SECONDS):
                await _pack_into(file, container, directories, limit)
        except TimeoutError:
            raise AgentFault(f"no snapshot within {SNAPSHOT_SECONDS:.0f} s") from None
        cleanup.pop_all()  # the file stays open for the snapshot
        return DockerSnapshot(file)


async def _pack_into(file: IO[bytes], container: Container, directories: str, limit: int) -> None:
    exec_ = await container.enter(scripts.pack(container.tools, directories))
    with contextlib.closing(exec_):
        async for piece in stdout_of(exec_.frames()):
            await asyncio.to_thread(file.write, piece)
            if file.tell() > limit:
                await container.abandon(exec_)
                raise AgentFault(
                    f"no snapshot: the files have more than {limit} bytes when they are read, holes"
                    " included"
                )
        code = await exec_.exit_code()
    if code not in (0, FILE_CHANGED):
        raise AgentFault(f"no snapshot: tar ended with {code}")
    await asyncio.to_thread(file.flush)


async def unpack(container: Container, file: IO[bytes]) -> None:
    """Write the files of a tar, whose paths are below the root, as the agent's user.

    Raises:
      SandboxStartError: the files do not fit or cannot be made.
    """
    try:
        descriptor = os.dup(file.fileno())
    except ValueError:
        raise SandboxStartError("the snapshot was deleted") from None
    try:
        async with asyncio.timeout(SNAPSHOT_SECONDS):
            code, said = await _unpack_from(descriptor, container)
    except TimeoutError:
        raise SandboxStartError(
            f"the files were not unpacked within {SNAPSHOT_SECONDS:.0f} s"
        ) from None
    finally:
        os.close(descriptor)
    if code:
        words = said.decode(errors="replace").strip()[-MAX_ERROR_CHARACTERS:]
        raise SandboxStartError(
            f"the files do not fit in or cannot be made (tar ended with {code}): {words}"
        )


async def _unpack_from(descriptor: int, container: Container) -> tuple[int, bytes]:
    exec_ = await container.enter(scripts.UNPACK, stdin=True)
    with contextlib.closing(exec_):
        reading = asyncio.create_task(exhaust(exec_))
        offset = 0
        while piece := await asyncio.to_thread(os.pread, descriptor, PIECE_BYTES, offset):
            if not await send_unless_ended(exec_.send(piece, more=True), reading):
                break
            offset += len(piece)
        await send_unless_ended(exec_.send(b""), reading)
        said = await reading
        return await exec_.exit_code(), said


def commit(client: APIClient, image: str, files: IO[bytes], repository: str, tag: str) -> None:
    """Save an image with these files in it; this blocks.

    A container that never runs takes the files and is committed.
    """
    with tempfile.TemporaryFile(prefix="rock-") as wrapped:
        with tarfile.open(fileobj=wrapped, mode="w") as tar:
            member = tarfile.TarInfo(scripts.COMMITTED_FILES.lstrip("/"))
            member.size = os.fstat(files.fileno()).st_size
            member.mode = 0o644
            files.seek(0)
            tar.addfile(member, files)
        wrapped.seek(0)
        made = client.create_container(image, ["sh"], network_disabled=True)["Id"]
        try:
            client.put_archive(made, "/", wrapped)
            client.commit(made, repository, tag, changes=[f"LABEL {COMMITTED}=1"])
        finally:
            client.remove_container(made, force=True)


async def put_verifier_files(container: Container, files: Mapping[str, bytes]) -> None:
    """Write a verifier's files as the keeper's, so that the agent's user cannot change them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            member.mode = 0o644
            tar.addfile(member, io.BytesIO(content))
    code, said = await container.ask(
        f"cd {scripts.PLACE} && umask 022 && mkdir files && exec tar -xf - -C files 2>&1",
        user=scripts.KEEPER,
        stdin=buffer.getvalue(),
    )
    if code:
        raise SandboxStartError(
            "the verifier's files could not be put in place:"
            f" {said.strip()[-MAX_ERROR_CHARACTERS:]}"
        )


async def exhaust(exec_: Exec) -> bytes:
    """Read a program's output to its end; return the first KiB."""
    said = b""
    async for _, piece in exec_.frames():
        said += piece[: MAX_EXHAUSTED_BYTES - len(said)]
    return said


async def send_unless_ended(
    sending: Coroutine[Any, Any, None], receiver: "asyncio.Task[bytes]"
) -> bool:
    """Send, unless the receiver has ended; return whether everything was sent."""
    task = asyncio.ensure_future(sending)
    await asyncio.wait({task, receiver}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        return False
    return True


async def stdout_of(frames: Frames) -> AsyncIterator[bytes]:
    """Yield a program's stdout.

    Raises:
      AgentFault: it neither wrote anything nor ended for CALL_SECONDS.
    """
    while True:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                number, piece = await anext(frames)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise AgentFault(
                f"a script in the sandbox wrote nothing for {CALL_SECONDS:.0f} s"
            ) from None
        if number == STDOUT:
            yield piece
