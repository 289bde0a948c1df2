"""Files of a Docker sandbox on their way: tars out of a container and into one, images that carry
them, and the streams they travel in.
"""

import asyncio
import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import AsyncIterator, Mapping
from typing import IO

from docker import APIClient

from envs.rock.backend import Snapshot
from envs.rock.docker import scripts
from envs.rock.docker.container import CALL_SECONDS, STDOUT, Container, Exec
from envs.rock.errors import SandboxError, SandboxStartError
from envs.rock.transfer import PIECE_BYTES

SNAPSHOT_SECONDS = 300.0
COMMITTED = "rock.committed"  # the label of an image with files in scripts.COMMITTED_FILES


class DockerSnapshot(Snapshot):
    """A tar in a file without a name: it goes with the last sandbox that reads it, or with this
    process.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file

    async def delete(self) -> None:
        self.file.close()


async def pack(container: Container, directories: str) -> DockerSnapshot:
    """What is in these directories of the root.

    SandboxError where it cannot be read, or is more than the sandbox may have.
    """
    config = container.config
    limit = (
        (config.disk_mb << 20) + 4096 * config.inodes + (1 << 20)
    )  # sparse files come out short, and each file has a header
    snapshot = DockerSnapshot(tempfile.TemporaryFile(prefix="rock-"))
    try:
        async with asyncio.timeout(SNAPSHOT_SECONDS):
            with contextlib.closing(
                await container.enter(scripts.pack(container.tools, directories))
            ) as exec_:
                async for piece in within(exec_.frames()):
                    await asyncio.to_thread(snapshot.file.write, piece)
                    if snapshot.file.tell() > limit:
                        await exec_.give_up()
                        raise SandboxError(
                            f"no snapshot: the files have more than {limit} bytes when they are"
                            " read, holes included"
                        )
                if (code := await exec_.exit_code()) > 1:  # 1: a file changed meanwhile
                    raise SandboxError(f"no snapshot: tar ended with {code}")
        await asyncio.to_thread(snapshot.file.flush)
    except TimeoutError:
        await snapshot.delete()
        raise SandboxError(f"no snapshot within {SNAPSHOT_SECONDS:.0f} s") from None
    except BaseException:
        await snapshot.delete()
        raise
    return snapshot


async def unpack(container: Container, file: IO[bytes]) -> None:
    """A tar of paths below the root, as the agent's user.

    SandboxStartError where that cannot be done.
    """
    try:
        descriptor = os.dup(file.fileno())
    except ValueError:
        raise SandboxStartError("the snapshot was deleted") from None
    try:
        async with asyncio.timeout(SNAPSHOT_SECONDS):
            with contextlib.closing(await container.enter(scripts.UNPACK, stdin=True)) as exec_:
                over, offset = asyncio.create_task(exhaust(exec_)), 0
                while (
                    piece := await asyncio.to_thread(os.pread, descriptor, PIECE_BYTES, offset)
                ) and await either(exec_.send(piece, more=True), over):
                    offset += len(piece)
                await either(exec_.send(b""), over)
                said, code = await over, await exec_.exit_code()
    except TimeoutError:
        raise SandboxStartError(
            f"the files were not unpacked within {SNAPSHOT_SECONDS:.0f} s"
        ) from None
    finally:
        os.close(descriptor)
    if code:
        raise SandboxStartError(
            f"the files do not fit in or cannot be made (tar ended with {code}):"
            f" {said.decode(errors='replace').strip()[-300:]}"
        )


def commit(client: APIClient, image: str, files: IO[bytes], repository: str, tag: str) -> None:
    """In a thread: a container that never runs takes the files, and is committed."""
    with tempfile.TemporaryFile(prefix="rock-") as wrapped:
        with tarfile.open(fileobj=wrapped, mode="w") as tar:
            member = tarfile.TarInfo(scripts.COMMITTED_FILES.lstrip("/"))
            member.size, member.mode = os.fstat(files.fileno()).st_size, 0o644
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
    """As the keeper's, so that neither the script nor what it runs can change them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    code, said = await container.ask(
        f"cd {scripts.PLACE} && umask 022 && mkdir files && exec tar -xf - -C files 2>&1",
        user=scripts.KEEPER,
        stdin=buffer.getvalue(),
    )
    if code:
        raise SandboxStartError(
            f"the verifier's files could not be put in place: {said.strip()[-300:]}"
        )


async def exhaust(exec_: Exec) -> bytes:
    """Read it to its end; the first KiB of what it said."""
    said = b""
    async for _, piece in exec_.frames():
        said += piece[: 1024 - len(said)]
    return said


async def either(sending, over: asyncio.Task) -> bool:
    """Send on, unless the receiver has ended. Whether it was sent."""
    task = asyncio.ensure_future(sending)
    await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        return False
    return True


async def within(frames: AsyncIterator[tuple[int, bytes]]) -> AsyncIterator[bytes]:
    """The stdout of what must say something, or end, every CALL_SECONDS."""
    while True:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                number, piece = await anext(frames)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise SandboxError(
                f"a script in the sandbox said nothing for {CALL_SECONDS:.0f} s"
            ) from None
        if number == STDOUT:
            yield piece
