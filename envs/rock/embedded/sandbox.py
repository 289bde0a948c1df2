"""The embedded backend: sandboxes made by the kernel of this machine, without a daemon.

Each sandbox has a holder (host/holder.py), a descendant of this process that ends with it at the
latest. The tier is "namespaces", or "landlock" where the machine refuses namespaces and the config
allows the weaker tier.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from envs.rock.backend import (
    Backend,
    Snapshot,
    check_verifier_files,
    reason_not_executable,
    refused_result,
)
from envs.rock.config import Address, CommandResult, Denial, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.directory import DirectoryWriter
from envs.rock.embedded import zygote_client
from envs.rock.embedded.channel import HolderChannel, not_running, raise_error
from envs.rock.embedded.commands import EmbeddedJob, EmbeddedSession, start_job, start_session
from envs.rock.embedded.files import file_error, file_error_of, list_directory, write_all
from envs.rock.embedded.probe import probe
from envs.rock.errors import (
    IsolationError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
)
from envs.rock.host.linux import FIRST_PASSED_FD, set_filesystem_ids
from envs.rock.tiers import TierReport
from envs.rock.transfer import PIECE_BYTES, Transfer, pack_directory, unpack_directory
from envs.rock.wire.forwarding import Connections

SNAPSHOT_SECONDS = 300.0
_VERIFIER_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "PYTHONSAFEPATH": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


class EmbeddedSnapshot(Snapshot):
    """A directory of files that lives until `delete` or until this process ends.

    The sandboxes that start from it share a user id on the host, and nothing else.
    """

    def __init__(self, path: str, tier: str | None):
        self.path = path
        self.tier = tier

    async def delete(self) -> None:
        # Shielded: a call that is cancelled before its thread begins would never be made.
        request = {"op": "forget_snapshot", "path": self.path}
        await asyncio.shield(asyncio.to_thread(zygote_client.ask, request))


class EmbeddedBackend(Backend):
    """A sandbox of this machine's kernel. See Backend."""

    def __init__(self, config: SandboxConfig, snapshot: Snapshot | None = None):
        super().__init__(config, snapshot)
        self._snapshot = _require_embedded(snapshot)
        self._channel: HolderChannel | None = None
        self._slot = -1  # the number of its directory and user id, as the zygote counts them
        self._turn = asyncio.Lock()  # of execute and verify: one after the other
        self._cancelled: EmbeddedJob | None = None  # of a call that was, perhaps not dead yet
        self._connections = self._make_connections()

    # -- start and end

    async def start(self) -> None:
        if self._channel is not None:
            raise SandboxError("this sandbox is started already")
        report = await asyncio.to_thread(probe, self.config.isolation, self.config.tier)
        report.require(self.config.isolation)
        self._check_network(report)
        image = None if self._snapshot else self.config.image
        if image:
            await _require_image(image)
        self._check_snapshot(report)
        async with zygote_client.start_gate:
            ready = await self._start_holder(report)
        self.tier = report.tier
        self.guarantees = report.guarantees
        self.workspace = ready["workspace"]
        self._slot = ready["slot"]
        if image:
            await self._load_image(image)

    async def stop(self) -> None:
        if self._channel is None:
            return
        try:
            await self._channel.shut_down(self._kill_holder)
        finally:
            self._connections.close()

    def is_alive(self) -> bool:
        return self._channel is not None and self._channel.alive

    async def get_status(self) -> SandboxStatus:
        reply = await self._open_channel().request({"op": "status"})
        raise_error(reply, SandboxError, "no status: ")
        denials = reply["network_denials"]
        if denials is not None:
            denials += len(self._connections.denials)
        return SandboxStatus(
            memory_bytes=reply.get("memory_bytes"),
            pids=reply.get("pids"),
            cpu_seconds=reply["cpu_seconds"],
            disk_bytes=reply["disk_bytes"],
            inodes=reply["inodes"],
            commands=reply["commands"],
            sessions=reply["sessions"],
            network_denials=denials,
        )

    async def denials(self) -> list[Denial]:
        reply = await self._open_channel().request({"op": "denials"})
        raise_error(reply, SandboxError, "no denials: ")
        seen_inside = [
            Denial(time, protocol, destination, port, self.config.label)
            for time, protocol, destination, port in reply["denials"]
        ]
        return sorted(seen_inside + self._connections.denials)

    # -- commands

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        if refusal := reason_not_executable(command):
            return refused_result(refusal)
        async with self._turn:
            await self._wait_for_cancelled()
            return await self._end_of(self._start_command(command, timeout, env))

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> EmbeddedJob:
        if refusal := reason_not_executable(command):
            raise ValueError(refusal.strip())
        return self._start_command(command, timeout, env)

    async def create_session(self, env: Mapping[str, str] | None = None) -> EmbeddedSession:
        channel = self._open_channel()
        return await start_session(channel, self._environment(env), self.config.timeout)

    async def kill_all(self) -> None:
        reply = await self._open_channel().request({"op": "kill"})
        raise_error(reply, SandboxError)

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        files = files or {}
        check_verifier_files(files)
        # The script's own descriptor is closed first: programs that it runs would inherit it.
        text = f"exec {FIRST_PASSED_FD}<&-; {script}".encode()
        request = {
            "op": "verify",
            "files": [(name, len(content)) for name, content in files.items()],
            "env": _VERIFIER_ENVIRONMENT,
            "keep": keep,
        }
        contents = [text, b"".join(files.values())]
        async with self._turn:
            await self._wait_for_cancelled()
            job = start_job(self._open_channel(), request, contents, self._timeout(timeout))
            return await self._end_of(job)

    async def expose_port(self, port: int) -> Address:
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        if self.tier == "landlock":
            raise SandboxError(
                "the landlock tier has no network of its own, so nothing can listen in it; the"
                " namespaces tier has one"
            )
        self._open_channel()
        return await self._connections.expose(port)

    # -- copies of the files

    async def snapshot(self) -> EmbeddedSnapshot:
        making = asyncio.ensure_future(self._make_snapshot(self._open_channel()))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            # The holder is still writing. What it makes is deleted when it has ended.
            _unwanted.add(making)
            making.add_done_callback(_delete_unwanted)
            raise

    async def _make_snapshot(self, channel: HolderChannel) -> EmbeddedSnapshot:
        place = await asyncio.to_thread(
            zygote_client.ask, {"op": "make_snapshot", "of": self._slot}
        )
        if "error" in place:
            raise SandboxError(place["error"])
        snapshot = EmbeddedSnapshot(place["path"], self.tier)
        directory = os.open(snapshot.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            reply = await channel.request({"op": "snapshot"}, (directory,), SNAPSHOT_SECONDS)
            raise_error(reply, SandboxError, "no snapshot: ")
        except BaseException:
            await snapshot.delete()
            raise
        finally:
            os.close(directory)
        return snapshot

    async def restore(self, snapshot: Snapshot) -> None:
        files = _require_embedded(snapshot)
        await self.stop()
        self._snapshot = files
        self._channel = None
        self._turn = asyncio.Lock()
        self._connections = self._make_connections()
        await self.start()

    async def commit(self, image: str) -> None:
        from envs.rock.images import local  # here: it imports much, and few sandboxes need it

        await local.commit(self, image)

    # -- files

    async def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        descriptor = await self._open(self._relative_file(path), "read")
        try:
            while piece := os.read(descriptor, PIECE_BYTES):
                yield piece
        finally:
            os.close(descriptor)

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        descriptor = await self._open(self._relative_file(path), "write", mode)
        try:
            async for piece in pieces:
                write_all(descriptor, piece)
        except OSError as error:
            raise file_error(error, path) from error
        finally:
            os.close(descriptor)

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        descriptor = await self._open(self._relative(path) or ".", "list")
        try:
            return await asyncio.to_thread(list_directory, descriptor)
        except OSError as error:
            raise file_error(error, path) from error
        finally:
            os.close(descriptor)

    async def pack(self, path: str = ".") -> AsyncGenerator[bytes, None]:
        relative = self._relative(path)
        root = await self._open(relative or ".", "list")
        loop = asyncio.get_running_loop()

        def open_denied(inner: str, is_directory: bool) -> int:
            """Let the holder open what this process may not."""
            purpose = "list" if is_directory else "read"
            opening = self._open(f"{relative}/{inner}" if relative else inner, purpose)
            return asyncio.run_coroutine_threadsafe(opening, loop).result()

        try:
            async with contextlib.aclosing(pack_directory(root, open_denied)) as pieces:
                async for piece in pieces:
                    yield piece
        except OSError as error:
            raise file_error(error, error.filename or path) from error
        finally:
            os.close(root)

    async def unpack(self, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        root = await self._open(".", "list")
        try:
            owner = os.fstat(root)

            def become_owner() -> None:
                # Of this thread only, which ends with its work.
                if os.geteuid() == 0:
                    set_filesystem_ids(owner.st_uid, owner.st_gid)

            writer = DirectoryWriter(root, self._relative(path))
            return await unpack_directory(writer, pieces, become_owner)
        except OSError as error:
            raise file_error(error, error.filename or path) from error
        finally:
            os.close(root)

    # -- steps of the above

    async def _end_of(self, job: EmbeddedJob) -> CommandResult:
        try:
            return await job.wait_or_kill()
        except asyncio.CancelledError:
            self._cancelled = job
            raise

    async def _wait_for_cancelled(self) -> None:
        """Wait until nothing is left of a call that was cancelled.

        What it started would live on beside the next command.
        """
        if self._cancelled is not None:
            with contextlib.suppress(SandboxError):
                await self._cancelled.wait()
            self._cancelled = None

    async def _kill_holder(self) -> None:
        """Let the zygote kill a holder that does not end by itself."""
        await asyncio.to_thread(zygote_client.ask, {"op": "kill_holder", "of": self._slot})

    def _make_connections(self) -> Connections:
        doors = self.config.opened_doors()
        return Connections(self._connect_inside, self.config.label, doors)

    def _check_network(self, report: TierReport) -> None:
        asked = [*self.config.egress, *self.config.doors]
        if asked and report.tier == "landlock":
            raise IsolationError(
                f"egress and doors ({', '.join(asked)}): the landlock tier refuses all sockets of"
                " a network, since it cannot tell one address from another; leave both empty, or"
                " use a machine that gives the namespaces tier"
            )

    def _check_snapshot(self, report: TierReport) -> None:
        if self._snapshot and self._snapshot.tier != report.tier:
            raise SandboxStartError(
                f"the snapshot is of tier {self._snapshot.tier}, and this sandbox would be of tier"
                f" {report.tier}"
            )

    async def _start_holder(self, report: TierReport) -> dict:
        """Start the holder; return its first message, with the workspace and the slot."""
        assert report.tier is not None
        snapshot = self._snapshot.path if self._snapshot else None
        connection = zygote_client.create(zygote_client.spec(self.config, report.tier, snapshot))
        channel = HolderChannel(
            connection, self.config.max_output_bytes, self._connections.relay_outbound
        )
        self._channel = channel
        try:
            ready = await channel.wait_ready(self.config.start_timeout)
            if "error" in ready:
                raise SandboxStartError(ready["error"])
            if "memory" in report.guarantees and not ready["cgroups"]:
                raise SandboxStartError("the sandbox started without its cgroups")
        except BaseException:
            self._connections.close()
            channel.close()
            raise
        return ready

    async def _load_image(self, image: str) -> None:
        from envs.rock.images import local

        try:
            await local.load(self, image)
        except BaseException as error:
            await asyncio.shield(self.stop())
            if isinstance(error, SandboxFileError):
                raise SandboxStartError(
                    f"the files of image {image} do not fit in: {error}"
                ) from error
            raise

    def _start_command(
        self, command: str, timeout: float | None, env: Mapping[str, str] | None
    ) -> EmbeddedJob:
        request = {"op": "run", "env": self._environment(env)}
        text = command.encode(errors="replace")
        return start_job(self._open_channel(), request, [text], self._timeout(timeout))

    async def _open(self, path: str, purpose: str, mode: int = 0) -> int:
        """Return a descriptor that the holder opened, to "read", "write" or "list"."""
        request = {"op": "open", "path": path, "purpose": purpose, "mode": mode}
        reply = await self._open_channel().request(request)
        if "error" in reply:
            raise file_error_of(reply["errno"], f"{path}: {reply['error']}")
        return reply["descriptors"][0]

    async def _connect_inside(self, port: int) -> socket.socket:
        """Connect to a port of the sandbox; the holder does it, being in the same network."""
        reply = await self._open_channel().request({"op": "connect", "port": port})
        if "error" in reply:
            raise SandboxError(reply["error"])
        return socket.socket(fileno=reply["descriptors"][0])

    def _open_channel(self) -> HolderChannel:
        """Return the channel, or raise if the sandbox does not run."""
        if self._channel is None:
            raise not_running()
        self._channel.check_open()
        return self._channel


_unwanted: set[asyncio.Future] = set()  # nobody else may refer to them


def _delete_unwanted(made: asyncio.Future) -> None:
    """Delete a snapshot whose caller was cancelled while it was made."""
    _unwanted.discard(made)
    if made.cancelled() or made.exception():
        return
    deleting = asyncio.ensure_future(made.result().delete())
    _unwanted.add(deleting)
    deleting.add_done_callback(_forget)


def _forget(deleting: asyncio.Future) -> None:
    _unwanted.discard(deleting)
    if not deleting.cancelled():
        deleting.exception()  # seen: the process that kept the snapshot is gone, and it too


def _require_embedded(snapshot: Snapshot | None) -> EmbeddedSnapshot | None:
    if snapshot is None or isinstance(snapshot, EmbeddedSnapshot):
        return snapshot
    raise SandboxError(
        f"an embedded sandbox starts from an EmbeddedSnapshot, not from {type(snapshot).__name__}"
    )


async def _require_image(image: str) -> None:
    from envs.rock.images import local

    await asyncio.to_thread(local.require, image)
