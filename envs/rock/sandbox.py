"""`Sandbox`: an isolated workspace in which shell commands run, the same for every backend."""

import asyncio
import contextlib
import importlib
import os
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from envs.rock.backend import Backend, Job, Session, Snapshot
from envs.rock.config import Address, CommandResult, Denial, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.transfer import Content, Transfer, as_pieces, download, read_all, upload

# Imported when a config names them: the packages that docker and remote need are optional.
_BACKENDS = {
    "embedded": ("envs.rock.embedded.sandbox", "EmbeddedBackend"),
    "docker": ("envs.rock.docker.sandbox", "DockerBackend"),
    "remote": ("envs.rock.remote.sandbox", "RemoteBackend"),
}


class Sandbox:
    """An isolated workspace in which shell commands run.

    Use it as an async context manager, from one event loop:

        async with Sandbox(SandboxConfig(memory_mb=512)) as sandbox:
            result = await sandbox.execute("echo hi", timeout=30)
            print(result.stdout, result.exit_code)

    Every `execute` runs a fresh bash in /workspace: files stay, the working directory, variables
    and processes do not. While a session or a background job is open, processes that commands leave
    behind may live on, as in a container, until the last of those has ended.

    Every method can raise SandboxError, which is the infrastructure's fault and never the
    command's; SandboxClosedError means that the sandbox is not running. What a command does wrong
    is in its CommandResult.
    """

    def __init__(self, config: SandboxConfig | None = None, snapshot: Snapshot | None = None):
        """Prepare a sandbox; `start`, or entering the context, creates it.

        Args:
          config: limits, isolation and backend; the defaults of SandboxConfig without one.
          snapshot: files to start from, of a sandbox with the same backend. They are shared
            copy-on-write where the backend can. Without one the workspace starts with the image's
            files, or empty.

        Raises:
          SandboxError: the snapshot is of another backend.
        """
        self.config = config or SandboxConfig()
        self._backend = _make_backend(self.config, snapshot)

    async def __aenter__(self) -> "Sandbox":
        if not self.is_alive():  # a fork, or one that was attached to, is running already
            await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def id(self) -> str | None:
        """The sandbox's name at a remote admin or at the Docker engine; None for embedded ones."""
        return self._backend.id

    @property
    def tier(self) -> str | None:
        """The isolation tier: "namespaces", "landlock" or "docker"; None before the start."""
        return self._backend.tier

    @property
    def guarantees(self) -> frozenset[str]:
        """The names of `envs.rock.tiers.GUARANTEES` that this sandbox enforces."""
        return self._backend.guarantees

    @property
    def workspace(self) -> str:
        """The workspace's path for commands: /workspace, except in the landlock tier."""
        return self._backend.workspace

    # -- start and end

    async def start(self) -> None:
        """Create the sandbox.

        Raises:
          IsolationError: this machine cannot isolate as the config asks; says why and the remedy.
          SandboxStartError: it did not start within `config.start_timeout` seconds.
        """
        await self._backend.start()

    async def attach(self, sandbox: str) -> None:
        """Connect to a running remote sandbox by its `id` instead of starting one.

        Raises:
          SandboxError: the backend is not "remote", or this sandbox was started already.
        """
        await self._backend.attach(sandbox)

    async def stop(self) -> None:
        """End every process and remove all files. Stopping twice is allowed."""
        await self._backend.stop()

    def is_alive(self) -> bool:
        """Return whether the sandbox was started and is not known to have ended; never blocks."""
        return self._backend.is_alive()

    async def get_status(self) -> SandboxStatus:
        """Return the memory, processes, disk and commands of this moment."""
        return await self._backend.get_status()

    async def denials(self) -> list[Denial]:
        """Return attempts to reach what `config.egress` does not grant, oldest first.

        Only a limited number is recorded; `get_status().network_denials` counts all.
        """
        return await self._backend.denials()

    # -- commands

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        """Run `bash -c command` in the workspace, with empty input, and wait for its end.

        At the time limit and at its normal end, all processes that it started are killed, daemons
        included (except beside a session or job, see the class). Calls run one after the other.

        Args:
          command: text for bash, at most 100,000 bytes; a longer one gives exit code 126.
          timeout: seconds; None for `config.timeout`.
          env: variables in addition to those of the config.
        """
        return await self._backend.execute(command, timeout, env)

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> Job:
        """Start `bash -c command` in the background and return the job.

        At most `config.max_output_bytes` of each output stream are kept; `Job.wait` returns them.

        Raises:
          ValueError: the command is too long or contains a NUL character.
        """
        return await self._backend.spawn(command, timeout, env)

    async def create_session(self, env: Mapping[str, str] | None = None) -> Session:
        """Start a bash that keeps its state between commands."""
        return await self._backend.create_session(env)

    async def kill_all(self) -> None:
        """Kill every process of the sandbox and wait until they are gone; files stay.

        A running `execute` returns with "killed" among its `limits_hit`.
        """
        await self._backend.kill_all()

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        """Kill all processes, then run a bash script that the agent's processes can never read.

        The script runs in the workspace with a clean environment (nothing of `config.env`), an
        empty /tmp and fresh namespaces. Where `guarantees` has "verifier", even programs that the
        script runs cannot read it. Prefer builtins and absolute paths, and start Python with -I:
        otherwise it imports modules that the agent wrote.

        Args:
          script: text for bash.
          timeout: seconds; None for `config.timeout`.
          files: name -> content. They lie read-only in the directory $VERIFIER_FILES, readable
            for the script and for what it runs.
          keep: keep what the script writes in the workspace. Otherwise it is discarded where
            `guarantees` has "view".

        Raises:
          ValueError: a name of `files` is not a plain file name.
        """
        return await self._backend.verify(script, timeout, files, keep)

    async def expose_port(self, port: int) -> Address:
        """Forward a new loopback address of this host to 127.0.0.1:port in the sandbox.

        The address is valid as long as the sandbox lives.
        """
        return await self._backend.expose_port(port)

    # -- copies of the files

    async def snapshot(self) -> Snapshot:
        """Copy all files, /tmp included.

        Raises:
          SandboxError: a command is running. An idle session is allowed.
        """
        return await self._backend.snapshot()

    async def restore(self, snapshot: Snapshot) -> None:
        """Replace all files by those of a snapshot; every process, session and job ends."""
        await self._backend.restore(snapshot)

    async def fork(self) -> "Sandbox":
        """Start another sandbox with the same config and files; processes are not copied."""
        snapshot = await self.snapshot()
        copy = Sandbox(self.config, snapshot)
        try:
            try:
                await copy.start()
            finally:
                await snapshot.delete()
        except BaseException:
            await asyncio.shield(copy.stop())  # the caller never gets it
            raise
        return copy

    async def commit(self, image: str) -> None:
        """Save the files as an image that later sandboxes name in `SandboxConfig.image`."""
        await self._backend.commit(image)

    # -- files

    async def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield the content of a regular file below the workspace in pieces.

        Raises:
          SandboxFileError: the file is missing, not regular, or its path leaves the workspace
            (absolute links count as leaving).
        """
        async with contextlib.aclosing(self._backend.read_stream(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        """Write a file below the workspace and create its directories.

        Raises:
          SandboxFileError: no space is left, or the path leaves the workspace.
        """
        await self._backend.write_stream(path, pieces, mode)

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        """Return everything below a directory; links are listed but not followed.

        Raises:
          SandboxFileError: "too_large" for more than 100,000 entries.
        """
        return await self._backend.list_files(path)

    async def pack(self, path: str = ".") -> AsyncGenerator[bytes, None]:
        """Yield everything below a directory as a tar archive (pax, not compressed).

        It holds directories, empty ones too, regular files, symbolic links, hard links between the
        files below it, their modes without setuid bits, and their times. What is removed meanwhile
        is left out; a FIFO or socket is a member of type FIFO, which `unpack` names and skips.

        Raises:
          SandboxFileError: a file cannot be read, or there are more than 100,000.
        """
        async with contextlib.aclosing(self._backend.pack(path)) as pieces:
            async for piece in pieces:
                yield piece

    async def unpack(self, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        """Make what a tar archive holds in a directory of the workspace; see `pack`.

        What is there already gives way, except directories.

        Raises:
          SandboxFileError: a name leaves the directory, or no space is left.
          ValueError: it is not a tar archive.
        """
        return await self._backend.unpack(path, pieces)

    async def read_file(self, path: str, limit: int = 1 << 20) -> bytes:
        """Read a file into memory; SandboxFileError "too_large" above `limit` bytes."""
        return await read_all(self._backend, path, limit)

    async def write_file(self, path: str, content: Content, mode: int = 0o644) -> None:
        """Write a file from bytes, text or a stream of bytes. See write_stream."""
        await self._backend.write_stream(path, as_pieces(content), mode)

    async def write_files(self, files: Mapping[str, Content | tuple[Content, int]]) -> None:
        """Write many files: path -> content, or path -> (content, mode)."""
        for path, value in files.items():
            content, mode = value if isinstance(value, tuple) else (value, 0o644)
            await self.write_file(path, content, mode)

    async def upload(self, source: str | os.PathLike, target: str) -> Transfer:
        """Copy a file or a directory of this host to `target` in the workspace.

        A directory keeps what `pack` keeps; its links are copied as links, wherever they lead.
        """
        return await upload(self._backend, pathlib.Path(source), target)

    async def download(
        self, source: str, target: str | os.PathLike, limit: int = 1 << 30
    ) -> Transfer:
        """Copy a file or a directory of the workspace to `target` on this host.

        Only regular files, hard links between them, and directories are created, with their times
        and modes 755 and 644 at most: no symbolic link, device or setuid bit of an agent leaves the
        sandbox. What is left out is in `Transfer.skipped`. After an error, what was copied so far
        stays.

        Args:
          source: path in the workspace.
          target: path on this host, which must not exist.
          limit: bytes in total.
        """
        return await download(self._backend, source, pathlib.Path(target), limit, self.workspace)


def _make_backend(config: SandboxConfig, snapshot: Snapshot | None) -> Backend:
    module, name = _BACKENDS[config.backend]
    backend_class: type[Backend] = getattr(importlib.import_module(module), name)
    return backend_class(config, snapshot)
