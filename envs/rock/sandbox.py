"""The sandbox as its users see it: async, one workspace, commands in processes of their own, shells that live on where they are wanted."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Mapping
from typing import NamedTuple

from envs.rock import launcher
from envs.rock.commands import REPLY_GRACE, Job, Output, Session, memory_file, unspeakable, within
from envs.rock.config import CommandResult, SandboxConfig, SandboxStatus, check_environment
from envs.rock.errors import SandboxClosedError, SandboxError, SandboxFileError, SandboxStartError
from envs.rock.host.holder import parse, receive, send
from envs.rock.host.linux import FIRST_PASSED_FD
from envs.rock.tiers import probe

WORKSPACE = "/workspace"
SNAPSHOT_SECONDS = 300.0

_FILE_REASONS = {"ENOENT": "missing", "EXDEV": "outside", "ELOOP": "outside", "EINVAL": "not_regular", "ENXIO": "not_regular",
                 "EISDIR": "not_regular", "ENOTDIR": "missing", "ENOSPC": "no_space", "EDQUOT": "no_space", "EFBIG": "no_space"}


class Sandbox:
    """A place to run shell commands. Use it as an async context manager, from the event loop that started it.

    Every `execute` is a fresh bash in /workspace: files stay, working directory and variables do not. Neither do processes, unless a
    session or a background job runs beside it: then what it left behind stays, as in a container, until those have ended.
    """

    def __init__(self, config: SandboxConfig = SandboxConfig(), snapshot: "Snapshot | None" = None):
        """snapshot: the files to start from, copy-on-write where the kernel can; an empty workspace without."""
        self.config, self._snapshot = config, snapshot
        self.tier: str | None = None
        self.guarantees: frozenset[str] = frozenset()
        self.workspace = WORKSPACE  # in the landlock tier the real path, since nothing can be mounted there
        self._channel = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._replies: dict[int, asyncio.Future] = {}
        self._gone: asyncio.Future | None = None
        self._last_id = 0
        self._turn = asyncio.Lock()
        self._outputs: list[Output] = []

    async def __aenter__(self) -> "Sandbox":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Make the sandbox. IsolationError where this machine cannot isolate as the config asks."""
        if self._channel is not None:
            raise SandboxError("this sandbox is started already")
        report = await asyncio.to_thread(probe, self.config.isolation, self.config.tier)
        report.require(self.config.isolation)
        if self._snapshot and self._snapshot.tier != report.tier:
            raise SandboxStartError(f"the snapshot is of tier {self._snapshot.tier}, and this sandbox would be of tier {report.tier}")
        self._loop = asyncio.get_running_loop()
        async with launcher.start_gate:
            self._channel = launcher.create(launcher.spec(self.config, report.tier, self._snapshot and self._snapshot.path))
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
        self.tier, self.guarantees, self.workspace, self._slot = report.tier, report.guarantees, reply["workspace"], reply["slot"]

    async def stop(self) -> None:
        """End every process and remove every trace. Stopping twice is fine."""
        if self._channel is None or self._channel.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._channel.shutdown(1)  # SHUT_WR: the holder reads the end, and closes when nothing is left
        try:
            await within(asyncio.shield(self._gone), REPLY_GRACE, "the sandbox did not end")
        finally:
            self._disconnect()

    async def execute(self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None) -> CommandResult:
        """Run `bash -c command` in the workspace, without input, and wait for its end.

        At the time limit, and also at its normal end, every process that it started is dead, daemons included (but see above).
        """
        if refusal := unspeakable(command):
            return CommandResult("", refusal, 126, False, False, 0.0)
        async with self._turn:  # one after the other
            return await self._to_its_end(await self.spawn(command, timeout, env))

    async def spawn(self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None) -> Job:
        """Start `bash -c command` in the background. What it writes is kept up to max_output_bytes a stream, and told by `Job.wait`."""
        if refusal := unspeakable(command):
            raise ValueError(refusal.strip())
        return self._start({"op": "run", "env": self._environment(env)}, [command.encode(errors="replace")], timeout)

    async def create_session(self, env: Mapping[str, str] | None = None) -> Session:
        """A bash that keeps its state between commands."""
        outputs = [self._output() for _ in range(2)]
        request = {"op": "session", "env": self._environment(env)}
        reply = await self._request(request, tuple(output.write_end for output in outputs), REPLY_GRACE)
        for output in outputs:
            output.close_write_end()
        if "error" in reply:
            for output in outputs:
                output.close()
            raise SandboxStartError(reply["error"])
        session = Session(self, reply["session"], outputs)
        for output in outputs:
            output.on_flood = session._flooded
        return session

    async def snapshot(self) -> "Snapshot":
        """Keep all files as they are now, /tmp included. SandboxError while a command runs; an idle session is no obstacle."""
        self._check_open()
        place = await asyncio.to_thread(launcher.ask, {"op": "make_snapshot", "of": self._slot})
        if "error" in place:
            raise SandboxError(place["error"])
        snapshot = Snapshot(place["path"], self.tier)
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

    async def restore(self, snapshot: "Snapshot") -> None:
        """Back to these files. Every process, session and job ends."""
        await self.stop()
        last_id = self._last_id
        self.__init__(self.config, snapshot)
        self._last_id = last_id  # sessions and jobs of before must not be taken for later ones
        await self.start()

    async def get_status(self) -> SandboxStatus:
        """What the sandbox uses at this moment."""
        reply = await self._request({"op": "status"}, (), REPLY_GRACE)
        return SandboxStatus(**{name: reply.get(name) for name in SandboxStatus._fields})

    def is_alive(self) -> bool:
        """Whether it was started and neither it nor its process has ended."""
        return self._channel is not None and self._channel.fileno() >= 0 and not self._gone.done()

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        check_environment(env or {})
        return {"PATH": "/usr/bin:/bin", "HOME": WORKSPACE, "LANG": "C.UTF-8", **self.config.env, **(env or {})}

    async def verify(self, script: str, timeout: float | None = None, files: Mapping[str, bytes] | None = None) -> CommandResult:
        """Kill every process of the agent, then run a bash script that no process of the agent can ever read.

        The script runs in the workspace with a clean environment (nothing from config.env), an empty /tmp and fresh namespaces. Where
        `guarantees` has "verifier", not even programs that the script itself runs can read it; `files` lie read-only in the directory
        $VERIFIER_FILES for the script, and for what it runs. Prefer builtins and absolute paths; start Python with -I, or it imports the agent's modules.
        """
        files = files or {}
        if bad := [name for name in files if not name or "/" in name or name.startswith(".") or "\0" in name]:
            raise ValueError(f"verifier files are plain names, not {bad[0]!r}")
        # The script's own descriptor is closed first: what it runs would inherit it.
        contents = [f"exec {FIRST_PASSED_FD}<&-; {script}".encode(), b"".join(files.values())]
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1",
                       "PYTHONDONTWRITEBYTECODE": "1"}
        sizes = [(name, len(content)) for name, content in files.items()]
        async with self._turn:
            return await self._to_its_end(self._start({"op": "verify", "files": sizes, "env": environment}, contents, timeout))

    async def kill_all(self) -> None:
        """Kill every process of the sandbox and wait until they are gone; files stay. A running execute returns with "killed"."""
        await self._request({"op": "kill"}, (), REPLY_GRACE)

    async def write_file(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        """Write a file below the workspace, with its directories. Links that leave the workspace are refused."""
        data = content.encode() if isinstance(content, str) else content
        descriptor = await self._open(path, write=True, mode=mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view):]
        except OSError as error:
            raise _file_error(errno.errorcode.get(error.errno, ""), f"{path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    async def upload(self, files: Mapping[str, bytes | str | tuple[bytes | str, int]]) -> None:
        """Write many files: path -> content, or (content, mode)."""
        for path, value in files.items():
            content, mode = value if isinstance(value, tuple) else (value, 0o644)
            await self.write_file(path, content, mode)

    async def read_file(self, path: str, limit: int = 1 << 20) -> bytes:
        """The content of a regular file below the workspace. Refused: absolute links and links that leave it, and files
        above `limit` bytes."""
        descriptor = await self._open(path, write=False, mode=0)
        try:
            if os.fstat(descriptor).st_size > limit:
                raise SandboxFileError("too_large", f"{path} has {os.fstat(descriptor).st_size} bytes, the limit is {limit}")
            data = b""
            while len(data) <= limit and (piece := os.read(descriptor, limit + 1 - len(data))):
                data += piece
        finally:
            os.close(descriptor)
        if len(data) > limit:
            raise SandboxFileError("too_large", f"{path} grew beyond the limit of {limit} bytes while it was read")
        return data

    async def _open(self, path: str, write: bool, mode: int) -> int:
        relative = self._relative(path)
        reply = await self._request({"op": "open", "path": relative, "write": write, "mode": mode}, (), REPLY_GRACE)
        if "error" in reply:
            raise _file_error(reply["errno"], f"{path}: {reply['error']}")
        return reply["descriptors"][0]

    def _relative(self, path: str) -> str:
        """Below the workspace, as the holder opens it; the kernel checks again what links make of it."""
        for root in (self.workspace, WORKSPACE):
            if path.startswith(root + "/"):
                path = path[len(root) + 1:]
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or not parts or "\0" in path:
            raise SandboxFileError("outside", f"{path!r} is not a file below {WORKSPACE}")
        return "/".join(parts)

    def _start(self, request: dict, contents: list[bytes], timeout: float | None) -> Job:
        timeout = self.config.timeout if timeout is None else timeout
        self._check_open()
        with contextlib.ExitStack() as cleanup:
            inputs = [memory_file(content, cleanup) for content in contents]
            outputs = [self._output() for _ in range(2)]
            identity, reply = self._send(request | {"timeout": timeout}, (*(output.write_end for output in outputs), *inputs))
        for output in outputs:
            output.close_write_end()
            output.on_flood = lambda: self._end_unheard(identity)
        return Job(self, identity, reply, outputs, timeout)

    async def _to_its_end(self, job: Job) -> CommandResult:
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
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be waiting: that is no error of its own
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
            raise SandboxClosedError("the sandbox is not running: it was not started, was stopped, or its process died")
        if asyncio.get_running_loop() is not self._loop:
            raise SandboxError("a sandbox is used from the event loop that started it; from elsewhere use envs.rock.sync.run")

    def _receive(self) -> None:
        """The event loop calls this when the holder said something."""
        try:
            data, descriptors = receive(self._channel)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        reply = parse(data) | {"descriptors": descriptors}
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
                future.set_exception(SandboxClosedError("the sandbox ended in the middle of a request"))


class Snapshot(NamedTuple):
    """The files of a sandbox at one moment. It lives until `delete` or until this process ends, whatever becomes of the sandbox.

    Any number of sandboxes start from it at once: `Sandbox(config, snapshot)`. They share a user id on the host, and nothing else.
    """

    path: str
    tier: str

    async def delete(self) -> None:
        """No sandbox starts from it any more; those that did keep its files until they end."""
        await asyncio.to_thread(launcher.ask, {"op": "forget_snapshot", "path": self.path})


def _file_error(code: str, message: str) -> SandboxFileError:
    return SandboxFileError(_FILE_REASONS.get(code, "denied"), message)
