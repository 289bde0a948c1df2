"""Images from Dockerfiles, built once: the tag is a digest of the Dockerfile, its context and its
build arguments.

A build runs as root in the engine's ordinary build container, with a memory limit and without a
network unless that is asked for; a base image that the engine lacks is pulled by the engine itself
all the same. Base images count by their names: name one by digest (FROM debian@sha256:...) where it
must not change. The engine's classic builder is spoken to, which knows neither RUN --mount nor
here-documents.
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
from collections.abc import Mapping
from typing import IO

import docker
import requests

from envs.rock.docker.engine import Engine, engine
from envs.rock.errors import ImageError, SandboxClosedError

REPOSITORY = "rock/env"
MAX_CONTEXT_BYTES = 1 << 30
LOG_BYTES = 32 << 10  # of the end of a build's log, which an error carries
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
    """The image's name, for SandboxConfig.image: at once where it is there already, else when it is
    built.

    Args:
      context: the directory that the Dockerfile may copy from, less what its .dockerignore names.
      dockerfile: its path below the context.
      args: values for the Dockerfile's ARG lines. They can be read from the image: no secrets.
      network: whether RUN lines reach the network (the engine's default one).
      timeout: seconds; then the engine is told to give the build up.
    Raises:
      ImageError: what was wrong, with the end of the log. SandboxStartError where no engine
        answers.
    """
    deadline = time.monotonic() + timeout
    host = await asyncio.to_thread(engine)
    with tempfile.TemporaryFile(prefix="rock-context-") as file:
        digest = await asyncio.to_thread(_pack, pathlib.Path(context), dockerfile, file)
        name = f"{REPOSITORY}:{_name(digest, dockerfile, args or {})}"
        try:
            await host.call(host.client.inspect_image, name)
            return name
        except SandboxClosedError:
            pass  # it is to be made
        options = {
            "tag": name,
            "dockerfile": dockerfile,
            "buildargs": dict(args or {}),
            "network_mode": None if network else "none",
            "container_limits": {"memory": memory_mb << 20, "memswap": memory_mb << 20},
        }
        builder = _Builder(host.host, deadline)
        building = asyncio.ensure_future(asyncio.to_thread(builder.run, host, file, options))
        try:
            await asyncio.wait_for(asyncio.shield(building), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise ImageError(
                f"{name} was not built from {context} within {timeout:g} s", builder.log()
            ) from None
        finally:
            # the file is the thread's until it has ended; giving up ends it, but there may be
            # nothing to give up yet
            while not building.done():
                builder.give_up()
                await asyncio.wait({building}, timeout=0.1)
            building.cancelled() or building.exception()
    return name


def _name(digest: str, dockerfile: str, args: Mapping[str, str]) -> str:
    return hashlib.sha256(repr((digest, dockerfile, sorted(args.items()))).encode()).hexdigest()[
        :32
    ]


def _pack(context: pathlib.Path, dockerfile: str, file: IO[bytes]) -> str:
    """Write the context as a tar without times and owners, so that equal contexts are equal bytes;
    the digest of those.
    """
    if not (context / dockerfile).is_file():
        raise ImageError(f"there is no {dockerfile} in {context}")
    try:
        ignored = (context / ".dockerignore").read_text().splitlines()
    except FileNotFoundError:
        ignored = []
    names = docker.utils.exclude_paths(
        str(context),
        [line.strip() for line in ignored if line.strip() and not line.startswith("#")],
        dockerfile=dockerfile,
    )
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(name for name in names if name):
            _add(tar, context / name, name)
            if file.tell() > MAX_CONTEXT_BYTES:
                raise ImageError(
                    f"the context {context} has more than {MAX_CONTEXT_BYTES} bytes; name in"
                    " .dockerignore what the build does not need"
                )
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _add(tar: tarfile.TarFile, path: pathlib.Path, name: str) -> None:
    """A link stays a link: nothing outside the context gets in by one."""
    member, status = tarfile.TarInfo(name), os.lstat(path)
    member.mode = 0o755 if status.st_mode & 0o100 else 0o644
    if stat.S_ISLNK(status.st_mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif stat.S_ISDIR(status.st_mode):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
    elif not stat.S_ISREG(status.st_mode):
        raise ImageError(
            f"{path} is neither a file nor a directory nor a link; name it in .dockerignore"
        )
    else:
        with open(path, "rb") as content:
            member.size = os.fstat(content.fileno()).st_size
            tar.addfile(member, content)
        return
    tar.addfile(member)


class _Builder:
    """One build, in a thread, over a connection of its own: when that is shut the engine gives the
    build up.
    """

    def __init__(self, host: str, deadline: float):
        self._host, self._deadline = host, deadline
        self._socket: socket.socket | None = None
        self._given_up = False
        self._log: collections.deque[str] = collections.deque()
        self._log_size = 0

    def run(self, host: Engine, file: IO[bytes], options: dict) -> None:
        lock = _locks[options["tag"]]
        if not lock.acquire(timeout=max(0.0, self._deadline - time.monotonic())):
            raise ImageError(
                f"{options['tag']} is being built by another caller, and was not ready in time"
            )
        try:
            with contextlib.suppress(docker.errors.ImageNotFound):
                host.client.inspect_image(options["tag"])
                return
            if not self._given_up:
                self._build(file, options)
        finally:
            lock.release()

    def _build(self, file: IO[bytes], options: dict) -> None:
        client = _Client(
            self._host, version="auto", timeout=max(1.0, self._deadline - time.monotonic())
        )
        client.on_response = self._remember
        try:
            for event in client.build(
                fileobj=file, custom_context=True, rm=True, forcerm=True, decode=True, **options
            ):
                self._write(event.get("stream", "") or event.get("status", ""))
                if "error" in event:
                    self._write(event["error"])
                    raise ImageError(
                        f"the build of {options['tag']} failed: {event['error'].strip()[-500:]}",
                        self.log(),
                    )
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            raise ImageError(
                f"the build of {options['tag']} failed:"
                f" {getattr(error, 'explanation', None) or error}",
                self.log(),
            ) from error
        finally:
            client.close()
        if self._given_up:
            raise ImageError(f"the build of {options['tag']} was given up", self.log())

    def give_up(self) -> None:
        self._given_up = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def log(self) -> str:
        return "".join(list(self._log))[-LOG_BYTES:]

    def _remember(self, response: requests.Response) -> None:
        self._socket = response.raw._fp.fp.raw._sock

    def _write(self, text: str) -> None:
        self._log.append(text[-LOG_BYTES:])
        self._log_size += len(self._log[-1])
        while self._log_size - len(self._log[0]) > LOG_BYTES:
            self._log_size -= len(self._log.popleft())


class _Client(docker.APIClient):
    """It shows the response of a request, whose connection the SDK keeps to itself."""

    def on_response(self, response: requests.Response) -> None: ...

    def post(self, url: str, data=None, json=None, **options) -> requests.Response:
        response = super().post(url, data=data, json=json, **options)
        self.on_response(response)
        return response
