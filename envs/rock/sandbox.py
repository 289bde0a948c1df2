"""The sandbox as its users see it, whatever runs it: async, one workspace, commands in processes of
their own, shells that live on where wanted.

`Sandbox(SandboxConfig(backend=...))` makes the one that the config names, as pathlib.Path does. A
backend implements the abstract methods and says in `guarantees` what it enforces; what only
combines them is here, once for all.
"""

import abc
import asyncio
import contextlib
import importlib
import os
import pathlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NamedTuple

from envs.rock.config import (
    Address,
    CommandResult,
    Denial,
    FileEntry,
    SandboxConfig,
    SandboxStatus,
    check_environment,
)
from envs.rock.errors import SandboxError, SandboxFileError

WORKSPACE = "/workspace"
PIECE_BYTES = 1 << 18  # of a streamed file
MAX_LISTED = 100_000  # entries below a directory

_BACKENDS = {
    "embedded": "envs.rock.embedded.sandbox:EmbeddedSandbox",
    "docker": "envs.rock.docker.sandbox:DockerSandbox",
    "remote": "envs.rock.remote.sandbox:RemoteSandbox",
}
Content = bytes | str | AsyncIterator[bytes]


class Job(abc.ABC):
    """A command that was started.

    It ends by itself, at its time limit, or when it is killed; `wait` may be called again and
    again.
    """

    @property
    @abc.abstractmethod
    def running(self) -> bool: ...

    @abc.abstractmethod
    async def wait(self) -> CommandResult:
        """Its end. SandboxError if the sandbox ends first."""

    @abc.abstractmethod
    async def interrupt(self) -> None:
        """SIGINT, as by Ctrl-C, for all that it started and has not left its side."""

    @abc.abstractmethod
    async def kill(self) -> CommandResult:
        """SIGKILL, and its end."""


class Session(abc.ABC):
    """A bash that lives on between commands: its directory, variables, functions and background
    processes stay.

    Each `run` reports the exit code that the shell gave it. A command that ends the shell (`exit`)
    ends the session.
    """

    ended: bool = False

    @abc.abstractmethod
    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        """Give the shell a command and wait until it asks for the next one.

        What background processes write meanwhile counts as this command's output. At the time limit
        all that the command started is killed, and if that does not bring the shell back, the shell
        too. SandboxClosedError when the session has ended.
        """

    @abc.abstractmethod
    async def interrupt(self) -> None:
        """SIGINT, as by Ctrl-C, for what the running command started; nothing without one."""

    @abc.abstractmethod
    async def close(self) -> None:
        """End the shell and all below it."""

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Snapshot(abc.ABC):
    """The files of a sandbox at one moment, whatever becomes of the sandbox.

    Any number of sandboxes start from it at once: `Sandbox(config, snapshot)`.
    """

    @abc.abstractmethod
    async def delete(self) -> None:
        """No sandbox starts from it any more; those that did keep its files until they end."""


class Transfer(NamedTuple):
    """What an upload or a download moved."""

    files: int
    bytes: int
    skipped: tuple[
        str, ...
    ]  # links, devices, sockets and FIFOs, by path: they are never followed and never copied


class Sandbox(abc.ABC):
    """A place to run shell commands.

    Use it as an async context manager, from the event loop that started it.

    Every `execute` is a fresh bash in /workspace: files stay, working directory and variables do
    not. Neither do processes, unless a session or a background job runs beside it: then what it
    left behind stays, as in a container, until those have ended.
    """

    def __new__(
        cls, config: SandboxConfig = SandboxConfig(), snapshot: Snapshot | None = None
    ) -> "Sandbox":
        if cls is Sandbox:
            module, name = _BACKENDS[config.backend].split(":")
            cls = getattr(
                importlib.import_module(module), name
            )  # here, since docker's and remote's packages are not everybody's
        return super().__new__(cls)

    def __init__(self, config: SandboxConfig = SandboxConfig(), snapshot: Snapshot | None = None):
        """snapshot: the files to start from, copy-on-write where the backend can; an empty
        workspace without.
        """
        self.config, self._snapshot = config, snapshot
        self.id: str | None = None
        self.tier: str | None = None
        self.guarantees: frozenset[str] = frozenset()
        # in the landlock tier the real path, since nothing can be mounted there
        self.workspace = WORKSPACE

    async def __aenter__(self) -> "Sandbox":
        if not self.is_alive():  # a fork, and one that was attached to, run already
            await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # -- its life

    @abc.abstractmethod
    async def start(self) -> None:
        """Make the sandbox. IsolationError where this backend cannot isolate as the config asks."""

    async def attach(self, sandbox: str) -> None:
        """Take up one that runs already, by its `id`, instead of starting one."""
        raise SandboxError(
            f"a sandbox of the {self.config.backend} backend ends with the process that started it;"
            " there is none to attach to"
        )

    @abc.abstractmethod
    async def stop(self) -> None:
        """End every process and remove every trace. Stopping twice is fine."""

    @abc.abstractmethod
    def is_alive(self) -> bool:
        """Whether it was started and neither it nor what runs it has ended, as far as is known
        without asking.
        """

    @abc.abstractmethod
    async def get_status(self) -> SandboxStatus:
        """What the sandbox uses at this moment."""

    @abc.abstractmethod
    async def denials(self) -> list[Denial]:
        """Attempts to reach what the egress policy does not grant, oldest first; `get_status`
        counts also those too many to keep.
        """

    # -- commands

    @abc.abstractmethod
    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        """Run `bash -c command` in the workspace, without input, and wait for its end.

        At the time limit, and also at its normal end, every process that it started is dead,
        daemons included (but see above).
        """

    @abc.abstractmethod
    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> Job:
        """Start `bash -c command` in the background.

        What it writes is kept up to max_output_bytes a stream, and told by `Job.wait`.
        """

    @abc.abstractmethod
    async def create_session(self, env: Mapping[str, str] | None = None) -> Session:
        """A bash that keeps its state between commands."""

    @abc.abstractmethod
    async def kill_all(self) -> None:
        """Kill every process of the sandbox and wait until they are gone; files stay.

        A running execute returns with "killed".
        """

    @abc.abstractmethod
    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        """Kill every process of the agent, then run a bash script that no process of the agent can
        ever read.

        The script runs in the workspace with a clean environment (nothing from config.env), an
        empty /tmp and fresh namespaces. Where `guarantees` has "verifier", not even programs that
        the script itself runs can read it; `files` lie read-only in the directory $VERIFIER_FILES
        for the script, and for what it runs. What it writes in the workspace is gone afterwards
        where `guarantees` has "view", unless `keep`. Prefer builtins and absolute paths; start
        Python with -I, or it imports the agent's modules.
        """

    @abc.abstractmethod
    async def expose_port(self, port: int) -> Address:
        """An address on this host, loopback only, that leads to what listens on 127.0.0.1:port in
        the sandbox.

        It lives as long as the sandbox.
        """

    # -- copies of its files

    @abc.abstractmethod
    async def snapshot(self) -> Snapshot:
        """Keep all files as they are now, /tmp included.

        SandboxError while a command runs; an idle session is no obstacle.
        """

    @abc.abstractmethod
    async def restore(self, snapshot: Snapshot) -> None:
        """Back to these files. Every process, session and job ends."""

    async def fork(self) -> "Sandbox":
        """Another sandbox with the files that this one has now, started.

        Processes are not copied.
        """
        snapshot = await self.snapshot()
        try:
            copy = Sandbox(self.config, snapshot)
            await copy.start()
        finally:
            await snapshot.delete()
        return copy

    @abc.abstractmethod
    async def commit(self, image: str) -> None:
        """Keep the files as an image of that name, from which other sandboxes start by
        `SandboxConfig.image`, on other days too.
        """

    # -- files

    @abc.abstractmethod
    async def read_stream(self, path: str) -> AsyncIterator[bytes]:
        """The content of a regular file below the workspace, in pieces.

        Refused: absolute links and links that leave it. (An async generator.)
        """
        yield b""

    @abc.abstractmethod
    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        """Write a file below the workspace, with its directories.

        Links that leave the workspace are refused.
        """

    @abc.abstractmethod
    async def list_files(self, path: str = ".") -> list[FileEntry]:
        """All below a directory of the workspace, by paths relative to it; links are named, not
        followed.

        At most MAX_LISTED, else "too_large".
        """

    async def write_file(self, path: str, content: Content, mode: int = 0o644) -> None:
        """As write_stream, from memory or from a stream."""
        await self.write_stream(path, _pieces(content), mode)

    async def write_files(self, files: Mapping[str, Content | tuple[Content, int]]) -> None:
        """Write many files: path -> content, or (content, mode)."""
        for path, value in files.items():
            content, mode = value if isinstance(value, tuple) else (value, 0o644)
            await self.write_file(path, content, mode)

    async def read_file(self, path: str, limit: int = 1 << 20) -> bytes:
        """As read_stream, into memory. Files above `limit` bytes are refused."""
        data = bytearray()
        async with contextlib.aclosing(self.read_stream(path)) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > limit:
                    raise SandboxFileError(
                        "too_large", f"{path} has more than the limit of {limit} bytes"
                    )
        return bytes(data)

    async def upload(self, source: str | os.PathLike, target: str) -> Transfer:
        """Copy a file or a directory of this host into the workspace as `target`, streamed, with
        modes.

        Links are skipped.
        """
        source = pathlib.Path(source)
        if source.is_file():
            return Transfer(1, await self._upload_file(source, target), ())
        files = size = 0
        skipped = []
        for directory, names, filenames in os.walk(source, onerror=_raise):
            names.sort()
            for name in sorted(filenames) + [
                name for name in names if os.path.islink(os.path.join(directory, name))
            ]:
                path = pathlib.Path(directory, name)
                if path.is_symlink() or not path.is_file():
                    skipped.append(str(path.relative_to(source)))
                    continue
                size += await self._upload_file(path, f"{target}/{path.relative_to(source)}")
                files += 1
        return Transfer(files, size, tuple(skipped))

    async def download(
        self, source: str, target: str | os.PathLike, limit: int = 1 << 30
    ) -> Transfer:
        """Copy a file or a directory of the workspace to `target` on this host, which must not
        exist, streamed; at most `limit` bytes in all.

        Only regular files and directories are made, with no more than modes 755 and 644: no link,
        device or setuid bit of an agent's comes out. On an error what was copied so far stays.
        """
        target = pathlib.Path(target)
        if self._relative(source):
            try:
                return Transfer(1, await self._download_file(source, target, limit), ())
            except SandboxFileError as error:
                if error.reason != "not_regular":
                    raise
        entries = await self.list_files(source)
        target.mkdir()
        files = size = 0
        for entry in entries:  # a directory comes before what is in it
            if entry.kind == "directory":
                (target / entry.path).mkdir()
            elif entry.kind == "file":
                size += await self._download_file(
                    f"{source}/{entry.path}", target / entry.path, limit - size, entry.mode & 0o100
                )
                files += 1
        return Transfer(
            files,
            size,
            tuple(entry.path for entry in entries if entry.kind not in ("directory", "file")),
        )

    async def _upload_file(self, source: pathlib.Path, target: str) -> int:
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            await self.write_stream(target, _read_pieces(file.read), status.st_mode & 0o777)
            return file.tell()

    async def _download_file(
        self, source: str, target: pathlib.Path, limit: int, executable: int = 0
    ) -> int:
        size = 0
        async with contextlib.aclosing(self.read_stream(source)) as pieces:
            piece = await anext(pieces, b"")  # before there is a file here
            with open(
                os.open(
                    target,
                    os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW,
                    0o755 if executable else 0o644,
                ),
                "wb",
            ) as file:
                while piece:
                    size += len(piece)
                    if size > limit:
                        raise SandboxFileError(
                            "too_large",
                            f"{source} exceeds what is left of the limit, {limit} bytes",
                        )
                    await asyncio.to_thread(file.write, piece)
                    piece = await anext(pieces, b"")
        return size

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        """A command's variables."""
        check_environment(env or {})
        return {
            "PATH": "/usr/bin:/bin",
            "HOME": WORKSPACE,
            "LANG": "C.UTF-8",
            **self.config.env,
            **(env or {}),
        }

    def _relative(self, path: str) -> str:
        """Below the workspace, as a backend opens it: "" is the workspace.

        The kernel checks again what links make of it.
        """
        for root in (self.workspace, WORKSPACE):
            if path == root or path.startswith(root + "/"):
                path = path[len(root) + 1 :]
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or "\0" in path:
            raise SandboxFileError("outside", f"{path!r} is not below {WORKSPACE}")
        return "/".join(parts)

    def _relative_file(self, path: str) -> str:
        if relative := self._relative(path):
            return relative
        raise SandboxFileError("outside", f"{path!r} is not a file below {WORKSPACE}")


def check_verifier_files(files: Mapping[str, bytes]) -> None:
    if bad := [
        name for name in files if not name or "/" in name or name.startswith(".") or "\0" in name
    ]:
        raise ValueError(f"verifier files are plain names, not {bad[0]!r}")


async def _pieces(content: Content) -> AsyncIterator[bytes]:
    if isinstance(content, (bytes, str)):
        yield content.encode() if isinstance(content, str) else content
        return
    async for piece in content:
        yield piece


async def _read_pieces(read: Callable[[int], bytes]) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(read, PIECE_BYTES):
        yield piece


def _raise(error: OSError) -> None:
    raise error
