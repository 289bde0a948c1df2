"""Images from Dockerfiles, built once.

The tag is a digest of the Dockerfile, its context and its build arguments. Base images count by
their names: name one by digest (FROM debian@sha256:...) where it must not change.

A build runs as root in the engine's ordinary build container, with a memory limit, and without a
network unless that is asked for. The engine itself pulls a base image that it lacks in any case.
The engine's classic builder is used, which knows neither RUN --mount nor here-documents.
"""

import asyncio
import collections
import contextlib
import hashlib
import os
import pathlib
import socket
import stat
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

import docker
import requests

from envs.rock.docker.engine import Engine, engine
from envs.rock.errors import ImageError, SandboxClosedError

REPOSITORY = "rock/env"
TAG_CHARACTERS = 32
MAX_CONTEXT_BYTES = 1 << 30
MAX_LOG_CHARACTERS = 32 << 10  # of the end of a build's log, in an error
MAX_ERROR_CHARACTERS = 500
HASHED_BYTES = 1 << 18
_locks: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)


async def build(
    context: str | os.PathLike,
    *,
    dockerfile: str = "Dockerfile",
    args: Mapping[str, str] | None = None,
    network: bool = False,
    memory_mb: int = 2048,
    timeout: float = 600.0,
) -> str:
    """Build an image and return its name, for SandboxConfig.image; at once if it is built already.

    Args:
      context: the directory that the Dockerfile may copy from, except what its .dockerignore names.
      dockerfile: its path below the context.
      args: values for the Dockerfile's ARG lines. They can be read from the image: no secrets.
      network: whether RUN lines reach the network (the engine's default one).
      memory_mb: limit of the build's memory, without swap.
      timeout: seconds; then the engine is told to give up the build.

    Raises:
      ImageError: what was wrong, with the end of the log.
      SandboxStartError: no engine answers.
    """
    deadline = time.monotonic() + timeout
    host = await asyncio.to_thread(engine)
    with tempfile.TemporaryFile(prefix="rock-context-") as file:
        digest = await asyncio.to_thread(_pack, pathlib.Path(context), dockerfile, file)
        name = f"{REPOSITORY}:{_tag(digest, dockerfile, args or {})}"
        if await _exists(host, name):
            return name
        memory = memory_mb << 20
        options = {
            "tag": name,
            "dockerfile": dockerfile,
            "buildargs": dict(args or {}),
            "network_mode": None if network else "none",
            "container_limits": {"memory": memory, "memswap": memory},
        }
        builder = _Builder(host, file, options, deadline)
        building = asyncio.ensure_future(asyncio.to_thread(builder.run))
        try:
            await asyncio.wait_for(asyncio.shield(building), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise ImageError(
                f"{name} was not built from {context} within {timeout:g} s", builder.log()
            ) from None
        finally:
            await _end(builder, building)
    return name


async def _exists(host: Engine, name: str) -> bool:
    try:
        await host.call(host.client.inspect_image, name)
    except SandboxClosedError:
        return False
    return True


async def _end(builder: "_Builder", building: asyncio.Future[None]) -> None:
    """Wait until the build's thread has ended, which uses the file of the context until then.

    A build that runs is given up. That is repeated, since its request may not have been sent yet.
    """
    while not building.done():
        builder.give_up()
        await asyncio.wait({building}, timeout=0.1)
    if not building.cancelled():
        building.exception()  # mark it as seen


def _tag(digest: str, dockerfile: str, args: Mapping[str, str]) -> str:
    identity = repr((digest, dockerfile, sorted(args.items())))
    return hashlib.sha256(identity.encode()).hexdigest()[:TAG_CHARACTERS]


def _pack(context: pathlib.Path, dockerfile: str, file: IO[bytes]) -> str:
    """Write the context as a tar and return the tar's digest.

    Times and owners are left out, so that equal contexts are equal bytes.
    """
    if not (context / dockerfile).is_file():
        raise ImageError(f"there is no {dockerfile} in {context}")
    names = docker.utils.exclude_paths(str(context), _ignored(context), dockerfile=dockerfile)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(name for name in names if name):
            _add(tar, context / name, name)
            if file.tell() > MAX_CONTEXT_BYTES:
                raise ImageError(
                    f"the context {context} has more than {MAX_CONTEXT_BYTES} bytes; name in"
                    " .dockerignore what the build does not need"
                )
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(HASHED_BYTES):
        digest.update(piece)
    file.seek(0)
    return digest.hexdigest()


def _ignored(context: pathlib.Path) -> list[str]:
    """Return the patterns of .dockerignore."""
    try:
        lines = (context / ".dockerignore").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _add(tar: tarfile.TarFile, path: pathlib.Path, name: str) -> None:
    """Add a file, directory or link; a link stays one, so nothing outside the context gets in."""
    member = tarfile.TarInfo(name)
    status = os.lstat(path)
    member.mode = 0o755 if status.st_mode & 0o100 else 0o644
    if stat.S_ISLNK(status.st_mode):
        member.type = tarfile.SYMTYPE
        member.linkname = os.readlink(path)
        tar.addfile(member)
    elif stat.S_ISDIR(status.st_mode):
        member.type = tarfile.DIRTYPE
        member.mode = 0o755
        tar.addfile(member)
    elif stat.S_ISREG(status.st_mode):
        with open(path, "rb") as content:
            member.size = os.fstat(content.fileno()).st_size
            tar.addfile(member, content)
    else:
        raise ImageError(
            f"{path} is neither a file nor a directory nor a link; name it in .dockerignore"
        )


class _Builder:
    """One build, in a thread, over a connection of its own.

    The engine gives the build up when that connection is shut down.
    """

    def __init__(self, host: Engine, file: IO[bytes], options: dict, deadline: float):
        """Prepare a build.

        Args:
          host: the engine.
          file: the tar of the context.
          options: for the SDK's build, "tag" among them.
          deadline: on the monotonic clock.
        """
        self._engine = host
        self._file = file
        self._options = options
        self._tag = options["tag"]
        self._deadline = deadline
        self._socket: socket.socket | None = None
        self._given_up = False
        self._log: collections.deque[str] = collections.deque()
        self._log_size = 0

    def run(self) -> None:
        """Build the image, unless it exists by the time that other builds of it have ended."""
        lock = _locks[self._tag]
        if not lock.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            raise ImageError(
                f"{self._tag} is being built by another caller, and was not ready in time"
            )
        try:
            with contextlib.suppress(docker.errors.ImageNotFound):
                self._engine.client.inspect_image(self._tag)
                return
            if not self._given_up:
                self._build()
        finally:
            lock.release()

    def give_up(self) -> None:
        """Let the engine give up the build."""
        self._given_up = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def log(self) -> str:
        """Return the end of what the build has written."""
        return "".join(list(self._log))[-MAX_LOG_CHARACTERS:]

    def _build(self) -> None:
        seconds = max(1.0, self._deadline - time.monotonic())
        client = _Client(self._engine.host, seconds, self._remember_socket)
        try:
            self._follow(client)
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            explanation = getattr(error, "explanation", None) or error
            raise ImageError(
                f"the build of {self._tag} failed: {explanation}", self.log()
            ) from error
        finally:
            client.close()
        if self._given_up:
            raise ImageError(f"the build of {self._tag} was given up", self.log())

    def _follow(self, client: "_Client") -> None:
        events = client.build(
            fileobj=self._file,
            custom_context=True,
            rm=True,
            forcerm=True,
            decode=True,
            **self._options,
        )
        for event in events:
            self._write(event.get("stream", "") or event.get("status", ""))
            if "error" in event:
                self._write(event["error"])
                words = event["error"].strip()[-MAX_ERROR_CHARACTERS:]
                raise ImageError(f"the build of {self._tag} failed: {words}", self.log())

    def _remember_socket(self, response: requests.Response) -> None:
        raw: Any = response.raw
        self._socket = raw._fp.fp.raw._sock

    def _write(self, text: str) -> None:
        kept = text[-MAX_LOG_CHARACTERS:]
        self._log.append(kept)
        self._log_size += len(kept)
        while self._log_size - len(self._log[0]) > MAX_LOG_CHARACTERS:
            self._log_size -= len(self._log.popleft())


class _Client(docker.APIClient):
    """The SDK's client, which shows each response; the SDK keeps its connection to itself."""

    def __init__(self, host: str, seconds: float, on_response: Callable[[requests.Response], None]):
        super().__init__(host, version="auto", timeout=seconds)
        self._on_response = on_response

    def post(
        self, url: str, data: object = None, json: object = None, **options: object
    ) -> requests.Response:
        response = super().post(url, data=data, json=json, **options)
        self._on_response(response)
        return response
