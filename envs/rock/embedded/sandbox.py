"""The embedded backend: a sandbox whose holder (host/) runs on this machine, as a descendant of
this process, and ends with it at the latest.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Mapping

from envs.rock.config import Address, CommandResult, Denial, FileEntry, SandboxConfig, SandboxStatus
from envs.rock.embedded import zygote_client
from envs.rock.embedded.commands import (
    REPLY_GRACE,
    EmbeddedJob,
    EmbeddedSession,
    Output,
    memory_file,
    unspeakable,
    within,
)
from envs.rock.errors import (
    IsolationError,
    SandboxClosedError,
    SandboxError,
    SandboxFileError,
    SandboxStartError,
)
from envs.rock.host.holder import parse, receive, send
from envs.rock.host.linux import FIRST_PASSED_FD, open_beneath
from envs.rock.sandbox import MAX_LISTED, PIECE_BYTES, Sandbox, Snapshot, check_verifier_files
from envs.rock.tiers import probe
from envs.rock.wire.forwarding import Ways

SNAPSHOT_SECONDS = 300.0

_FILE_REASONS = {
    "ENOENT": "missing",
    "EXDEV": "outside",
    "ELOOP": "outside",
    "EINVAL": "not_regular",
    "ENXIO": "not_regular",
    "EISDIR": "not_regular",
    "ENOTDIR": "missing",
    "ENOSPC": "no_space",
    "EDQUOT": "no_space",
    "EFBIG": "no_space",
}


class EmbeddedSandbox(Sandbox):
    """See Sandbox.

    Tiers: namespaces, or landlock where the machine refuses those and the config allows it.
    """

    def __init__(self, config: SandboxConfig = SandboxConfig(), snapshot: Snapshot | None = None):
        super().__init__(config, snapshot)
        if snapshot is not None and not isinstance(snapshot, EmbeddedSnapshot):
            raise SandboxError(
                "an embedded sandbox starts from an EmbeddedSnapshot, not from"
                f" {type(snapshot).__name__}"
            )
        self._channel = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._replies: dict[int, asyncio.Future] = {}
        self._gone: asyncio.Future | None = None
        self._last_id = 0
        self._turn = asyncio.Lock()
        self._outputs: list[Output] = []
        self._ways = Ways(self._connect_inside, config.label)

    async def start(self) -> None:
        if self._channel is not None:
            raise SandboxError("this sandbox is started already")
        report = await asyncio.to_thread(probe, self.config.isolation, self.config.tier)
        report.require(self.config.isolation)
        if self.config.egress and report.tier == "landlock":
            raise IsolationError(
                f"egress={self.config.egress}: the landlock tier refuses all sockets of a network"
                " and can grant none; leave egress empty, or use a machine that gives the"
                " namespaces tier"
            )
        if image := self.config.image if not self._snapshot else None:
            from envs.rock.images import (
                local,
            )  # here, since few sandboxes have an image, and all wait for the imports

            await asyncio.to_thread(local.check, image)
        if self._snapshot and self._snapshot.tier != report.tier:
            raise SandboxStartError(
                f"the snapshot is of tier {self._snapshot.tier}, and this sandbox would be of tier"
                f" {report.tier}"
            )
        self._loop = asyncio.get_running_loop()
        async with zygote_client.start_gate:
            self._channel = zygote_client.create(
                zygote_client.spec(self.config, report.tier, self._snapshot and self._snapshot.path)
            )
            self._gone = self._loop.create_future()
            ready = self._replies[0] = self._loop.create_future()
            self._loop.add_reader(self._channel, self._receive)
            try:
                reply = await within(ready, self.config.start_timeout, "the sandbox did not start")
                if "error" in reply:
                    raise SandboxStartError(reply["error"])
                if report.guarantees & {"memory"} and not reply["cgroups"]:
                    raise SandboxStartError("the sandbox started without its cgroups")
            except BaseException:
                self._disconnect()
                raise
        self.tier, self.guarantees, self.workspace, self._slot = (
            report.tier,
            report.guarantees,
            reply["workspace"],
            reply["slot"],
        )
        if image:
            try:
                await local.bring(self, image)
            except BaseException as error:
                await asyncio.shield(self.stop())
                if isinstance(error, SandboxFileError):
                    raise SandboxStartError(
                        f"the files of image {image} do not fit in: {error}"
                    ) from error
                raise

    async def commit(self, image: str) -> None:
        from envs.rock.images import local

        await local.keep(self, image)

    async def stop(self) -> None:
        if self._channel is None or self._channel.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._channel.shutdown(
                1
            )  # SHUT_WR: the holder reads the end, and closes when nothing is left
        try:
            await within(asyncio.shield(self._gone), REPLY_GRACE, "the sandbox did not end")
        finally:
            self._disconnect()

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        if refusal := unspeakable(command):
            return CommandResult("", refusal, 126, False, False, 0.0)
        async with self._turn:  # one after the other
            return await self._to_its_end(await self.spawn(command, timeout, env))

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> EmbeddedJob:
        if refusal := unspeakable(command):
            raise ValueError(refusal.strip())
        return self._start(
            {"op": "run", "env": self._environment(env)},
            [command.encode(errors="replace")],
            timeout,
        )

    async def create_session(self, env: Mapping[str, str] | None = None) -> EmbeddedSession:
        outputs = [self._output() for _ in range(2)]
        request = {"op": "session", "env": self._environment(env)}
        reply = await self._request(
            request, tuple(output.write_end for output in outputs), REPLY_GRACE
        )
        for output in outputs:
            output.close_write_end()
        if "error" in reply:
            for output in outputs:
                output.close()
            raise SandboxStartError(reply["error"])
        session = EmbeddedSession(self, reply["session"], outputs)
        for output in outputs:
            output.on_flood = session._flooded
        return session

    async def snapshot(self) -> "EmbeddedSnapshot":
        self._check_open()
        place = await asyncio.to_thread(
            zygote_client.ask, {"op": "make_snapshot", "of": self._slot}
        )
        if "error" in place:
            raise SandboxError(place["error"])
        snapshot = EmbeddedSnapshot(place["path"], self.tier)
        directory = os.open(snapshot.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            reply = await self._request({"op": "snapshot"}, (directory,), SNAPSHOT_SECONDS)
            if "error" in reply:
                raise SandboxError(f"no snapshot: {reply['error']}")
        except BaseException:
            await snapshot.delete()
            raise
        finally:
            os.close(directory)
        return snapshot

    async def restore(self, snapshot: Snapshot) -> None:
        await self.stop()
        last_id = self._last_id
        self.__init__(self.config, snapshot)
        self._last_id = last_id  # sessions and jobs of before must not be taken for later ones
        await self.start()

    async def get_status(self) -> SandboxStatus:
        reply = await self._request({"op": "status"}, (), REPLY_GRACE)
        if reply["network_denials"] is not None:
            reply["network_denials"] += len(self._ways.denials)
        return SandboxStatus(**{name: reply.get(name) for name in SandboxStatus._fields})

    async def denials(self) -> list[Denial]:
        reply = await self._request({"op": "denials"}, (), REPLY_GRACE)
        return sorted(
            [Denial(*fields, self.config.label) for fields in reply["denials"]] + self._ways.denials
        )

    async def expose_port(self, port: int) -> Address:
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        if self.tier == "landlock":
            raise SandboxError(
                "the landlock tier has no network of its own, so nothing can listen in it; the"
                " namespaces tier has one"
            )
        self._check_open()
        return await self._ways.expose(port)

    async def _connect_inside(self, port: int) -> socket.socket:
        """The holder, which is in the sandbox's network, makes the connection."""
        reply = await self._request({"op": "connect", "port": port}, (), REPLY_GRACE)
        if "error" in reply:
            raise SandboxError(reply["error"])
        return socket.socket(fileno=reply["descriptors"][0])

    def is_alive(self) -> bool:
        return self._channel is not None and self._channel.fileno() >= 0 and not self._gone.done()

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        files = files or {}
        check_verifier_files(files)
        # The script's own descriptor is closed first: what it runs would inherit it.
        contents = [f"exec {FIRST_PASSED_FD}<&-; {script}".encode(), b"".join(files.values())]
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "LANG": "C.UTF-8",
            "PYTHONSAFEPATH": "1",
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        sizes = [(name, len(content)) for name, content in files.items()]
        async with self._turn:
            return await self._to_its_end(
                self._start(
                    {"op": "verify", "files": sizes, "env": environment, "keep": keep},
                    contents,
                    timeout,
                )
            )

    async def kill_all(self) -> None:
        await self._request({"op": "kill"}, (), REPLY_GRACE)

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        descriptor = await self._open(self._relative_file(path), "write", mode)
        try:
            async for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view) :]
        except OSError as error:
            raise _file_error(
                errno.errorcode.get(error.errno, ""), f"{path}: {error.strerror}"
            ) from error
        finally:
            os.close(descriptor)

    async def read_stream(self, path: str) -> AsyncIterator[bytes]:
        descriptor = await self._open(self._relative_file(path), "read")
        try:
            while piece := os.read(descriptor, PIECE_BYTES):
                yield piece
        finally:
            os.close(descriptor)

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        descriptor = await self._open(self._relative(path) or ".", "list")
        try:
            return await asyncio.to_thread(_list, descriptor)
        except OSError as error:
            raise _file_error(
                errno.errorcode.get(error.errno, ""), f"{path}: {error.strerror}"
            ) from error
        finally:
            os.close(descriptor)

    async def _open(self, path: str, purpose: str, mode: int = 0) -> int:
        reply = await self._request(
            {"op": "open", "path": path, "purpose": purpose, "mode": mode}, (), REPLY_GRACE
        )
        if "error" in reply:
            raise _file_error(reply["errno"], f"{path}: {reply['error']}")
        return reply["descriptors"][0]

    def _start(self, request: dict, contents: list[bytes], timeout: float | None) -> EmbeddedJob:
        timeout = self.config.timeout if timeout is None else timeout
        self._check_open()
        with contextlib.ExitStack() as cleanup:
            inputs = [memory_file(content, cleanup) for content in contents]
            outputs = [self._output() for _ in range(2)]
            identity, reply = self._send(
                request | {"timeout": timeout}, (*(output.write_end for output in outputs), *inputs)
            )
        for output in outputs:
            output.close_write_end()
            output.on_flood = lambda: self._end_unheard(identity)
        return EmbeddedJob(self, identity, reply, outputs, timeout)

    async def _to_its_end(self, job: EmbeddedJob) -> CommandResult:
        try:
            return await job.wait()
        except asyncio.CancelledError:
            self._end_unheard(job.identity)  # its caller gave up: the command must not run on
            raise

    def _output(self) -> Output:
        output = Output(self._loop, self.config.max_output_bytes)
        self._outputs = [one for one in self._outputs if not one.closed] + [output]
        return output

    def _end_unheard(self, identity: int) -> None:
        """Kill that command, without waiting for the answer."""
        with contextlib.suppress(SandboxClosedError):
            _, answer = self._send({"op": "end", "target": identity}, ())
            answer.cancel()

    def _send(self, request: dict, descriptors: tuple[int, ...]) -> tuple[int, asyncio.Future]:
        """(the request's number, its answer)."""
        self._check_open()
        self._last_id += 1
        identity = self._last_id
        answer = self._loop.create_future()
        answer.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # nobody may be waiting: that is no error of its own
        try:
            send(self._channel, request | {"id": identity}, descriptors)
        except OSError as error:
            raise SandboxClosedError(f"the sandbox's process is gone: {error}") from error
        self._replies[identity] = answer
        return identity, answer

    async def _request(self, request: dict, descriptors: tuple[int, ...], timeout: float) -> dict:
        _, answer = self._send(request, descriptors)
        return await within(answer, timeout, f"no answer to {request['op']}")

    def _check_open(self) -> None:
        if not self.is_alive():
            raise SandboxClosedError(
                "the sandbox is not running: it was not started, was stopped, or its process died"
            )
        if asyncio.get_running_loop() is not self._loop:
            raise SandboxError(
                "a sandbox is used from the event loop that started it; from elsewhere use"
                " envs.rock.sync.run"
            )

    def _receive(self) -> None:
        """The event loop calls this when the holder said something."""
        try:
            data, descriptors = receive(self._channel)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        reply = parse(data) | {"descriptors": descriptors}
        if "way" in reply:
            if descriptors:  # else this process had none left
                self._ways.let_out(*reply["way"], socket.socket(fileno=descriptors[0]))
            return
        waiting = self._replies.pop(reply.get("id"), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        if not data:
            self._loop.remove_reader(self._channel)
            self._end_waiting()

    def _disconnect(self) -> None:
        """Let go of the channel; whoever still waits for a reply is told."""
        self._ways.close()
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel)
            self._channel.close()
        self._end_waiting()
        for output in self._outputs:
            output.close()

    def _end_waiting(self) -> None:
        if not self._gone.done():
            self._gone.set_result(None)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(
                    SandboxClosedError("the sandbox ended in the middle of a request")
                )


class EmbeddedSnapshot(Snapshot):
    """It lives until `delete` or until this process ends.

    The sandboxes that start from it share a user id on the host, and nothing else.
    """

    def __init__(self, path: str, tier: str):
        self.path, self.tier = path, tier

    async def delete(self) -> None:
        await asyncio.to_thread(zygote_client.ask, {"op": "forget_snapshot", "path": self.path})


def _list(directory: int) -> list[FileEntry]:
    """Everything below a directory, never through a link: each directory is opened beneath the
    first one, whatever is moved meanwhile.
    """
    found, left = [], [""]
    while left:
        path = left.pop()
        with contextlib.ExitStack() as cleanup:
            descriptor = open_beneath(
                directory, path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            )
            cleanup.callback(os.close, descriptor)
            entries = cleanup.enter_context(os.scandir(descriptor))
            for entry in entries:
                if len(found) >= MAX_LISTED:
                    raise SandboxFileError("too_large", f"there are more than {MAX_LISTED} files")
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed meanwhile
                inner = f"{path}{entry.name}"
                kind = (
                    "directory"
                    if stat.S_ISDIR(status.st_mode)
                    else (
                        "file"
                        if stat.S_ISREG(status.st_mode)
                        else "link"
                        if stat.S_ISLNK(status.st_mode)
                        else "special"
                    )
                )
                found.append(FileEntry(inner, kind, status.st_size, stat.S_IMODE(status.st_mode)))
                if kind == "directory":
                    left.append(f"{inner}/")
    return found


def _file_error(code: str, message: str) -> SandboxFileError:
    return SandboxFileError(_FILE_REASONS.get(code, "denied"), message)
