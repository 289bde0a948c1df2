"""The backend of remote sandboxes: a ROCK admin places each on one of its workers."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from envs.rock.backend import (
    Backend,
    Snapshot,
    check_verifier_files,
    reason_not_executable,
    refused_result,
)
from envs.rock.config import (
    Address,
    CommandResult,
    Denial,
    FileEntry,
    SandboxConfig,
    SandboxStatus,
    check_environment,
)
from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError
from envs.rock.remote.calls import ROUND_SECONDS, Calls, now, retry_until
from envs.rock.remote.connection import AdminConnection
from envs.rock.remote.doors import RemoteDoors
from envs.rock.remote.jobs import RemoteJob, RemoteSession
from envs.rock.wire.archive import Transfer
from envs.rock.wire.client import (
    CONNECT_SECONDS,
    Client,
    StreamPipe,
    relay,
    retry_for,
)
from envs.rock.wire.codec import (
    config_to_json,
    entries_from_json,
    result_from_json,
    status_from_json,
)
from envs.rock.wire.errors import Disconnected
from envs.rock.wire.operations import GRACE_SECONDS

STOP_SECONDS = 60.0
ABANDON_SECONDS = 10.0  # to end a failed start; the admin clears it later otherwise
SNAPSHOT_SECONDS = 300.0


class RemoteBackend(Backend):
    """A sandbox on a worker of a ROCK admin.

    The admin removes it some minutes after it last heard of this process.
    """

    def __init__(self, config: SandboxConfig, snapshot: Snapshot | None = None):
        super().__init__(config, snapshot)
        if snapshot is not None and not isinstance(snapshot, RemoteSnapshot):
            raise SandboxError(
                f"a remote sandbox starts from a RemoteSnapshot, not from {type(snapshot).__name__}"
            )
        self._snapshot = snapshot
        self._client: Client | None = None  # set once it was started or attached
        self._connection: AdminConnection | None = None
        self._calls: Calls | None = None
        self._ending: asyncio.Task[None] | None = None
        self._exposed_ports: list[asyncio.Server] = []
        self._doors: RemoteDoors | None = None

    # -- start and end

    async def start(self) -> None:
        client = self._connect()
        request: dict[str, Any] = {
            "config": config_to_json(self.config),
            "key": secrets.token_hex(16),
            "wait": ROUND_SECONDS,
        }
        if self._snapshot:
            request["snapshot"] = self._snapshot.id
        try:
            self._begin(client, await self._request_start(client, request))
        except BaseException as error:
            is_refused = isinstance(error, SandboxError) and not isinstance(error, Disconnected)
            await self._abandon(client, request, is_refused)
            raise

    async def _request_start(self, client: Client, request: dict[str, Any]) -> dict[str, Any]:
        deadline = now() + self.config.start_timeout + GRACE_SECONDS
        answer = await retry_until(deadline, lambda: client.ask("start", request))
        while answer.get("state") in ("queued", "starting"):
            sandbox: str = answer["sandbox"]
            self.id = sandbox
            if now() > deadline:
                raise SandboxStartError(
                    f"no sandbox within {self.config.start_timeout:.0f} s; the admin says it is"
                    f" {answer['state']}"
                )
            answer = await _await_status(client, sandbox, deadline)
        return answer

    async def attach(self, sandbox: str) -> None:
        client = self._connect()
        try:
            request = {"sandbox": sandbox}
            answer = await retry_until(
                now() + GRACE_SECONDS, lambda: client.ask("get_status", request)
            )
            self._begin(client, answer)
        except BaseException:
            await self._disconnect()
            self._client = None
            raise

    def _connect(self) -> Client:
        if self._client is not None:
            raise SandboxError("this sandbox is started already")
        self._connection = AdminConnection.acquire(self.config.url, self.config.token)
        self._client = self._connection.client
        return self._client

    def _begin(self, client: Client, answer: Mapping[str, Any]) -> None:
        """Take over a sandbox that runs; `answer` is the admin's description of it."""
        try:
            self.id = str(answer["sandbox"])
            self._note_description(answer)
        except (KeyError, TypeError) as error:
            raise SandboxStartError(
                f"the admin's answer to a start is malformed; is {self.config.url} a ROCK admin?"
            ) from error
        self._calls = Calls(client, self.id)
        if self._connection:
            self._connection.keep_alive(self.id, self._calls.mark_ended)
        if self.config.doors:
            self._doors = RemoteDoors(self._calls, self.config.opened_doors())

    def _note_description(self, answer: Mapping[str, Any]) -> None:
        self.tier = str(answer["tier"])
        self.workspace = str(answer["workspace"])
        self.guarantees = frozenset(map(str, answer["guarantees"]))

    async def _abandon(self, client: Client, request: Mapping[str, Any], is_refused: bool) -> None:
        """Clean up after a start that failed or was given up.

        If no answer ever came, the request's key still tells which sandbox it is, or would be. A
        refused request has none.
        """
        try:
            if self.id or not is_refused:
                with contextlib.suppress(SandboxError, TimeoutError, KeyError):
                    await asyncio.wait_for(self._stop_abandoned(client, request), ABANDON_SECONDS)
        finally:
            await self._disconnect()

    async def _stop_abandoned(self, client: Client, request: Mapping[str, Any]) -> None:
        sandbox = self.id
        if not sandbox:
            again = {**request, "wait": 0}
            deadline = now() + ABANDON_SECONDS
            answer = await retry_until(deadline, lambda: client.ask("start", again))
            sandbox = answer["sandbox"]
        stop = {"sandbox": sandbox}
        await retry_until(now() + ABANDON_SECONDS, lambda: client.call("stop", stop))

    async def stop(self) -> None:
        if self._client is None or (self._ending and self._ending.done()):
            return
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(self._client))
        await asyncio.shield(self._ending)  # simultaneous calls all wait for the same end

    async def _end(self, client: Client) -> None:
        request = {"sandbox": self.id}
        try:
            if self.is_alive():
                await retry_until(now() + STOP_SECONDS, lambda: client.call("stop", request))
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        for server in self._exposed_ports:
            server.close()
        if self._doors:
            self._doors.close()
        if self._calls:
            await self._calls.close()
        if self._connection:
            connection = self._connection
            self._connection = None
            connection.forget(self.id or "")
            await connection.release()

    def is_alive(self) -> bool:
        return self._calls is not None and self._calls.alive

    def _running(self) -> Calls:
        if self._calls is None:
            raise SandboxClosedError("the sandbox is not running: it was not started")
        self._calls.check_alive()
        return self._calls

    async def get_status(self) -> SandboxStatus:
        return status_from_json(await self._running().ask("get_sandbox_statistics"))

    async def denials(self) -> list[Denial]:
        answer = await self._running().ask("denials")
        try:
            return [Denial(*fields) for fields in answer["denials"]]
        except (KeyError, TypeError) as error:
            raise SandboxError("the answer to denials is malformed") from error

    # -- commands

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        reason = reason_not_executable(command)
        if reason:
            return refused_result(reason)
        request = self._command(command, timeout, env)
        return result_from_json(await self._running().run("execute", request, request["timeout"]))

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> RemoteJob:
        reason = reason_not_executable(command)
        if reason:
            raise ValueError(reason.strip())
        calls = self._running()
        request = self._command(command, timeout, env)
        answer = await calls.run("spawn", request, GRACE_SECONDS)
        return RemoteJob(calls, answer["job"], request["timeout"])

    async def create_session(self, env: Mapping[str, str] | None = None) -> RemoteSession:
        calls = self._running()
        request = {"env": self._variables(env)}
        answer = await calls.run("create_session", request, GRACE_SECONDS)
        return RemoteSession(calls, answer["session"], self.config.timeout)

    async def kill_all(self) -> None:
        await self._running().change("kill_all")

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        check_verifier_files(files or {})
        seconds = self._timeout(timeout)
        request = {"script": script, "timeout": seconds, "keep": keep}
        return result_from_json(await self._running().run("verify", request, seconds, files))

    def _command(
        self, command: str, timeout: float | None, env: Mapping[str, str] | None
    ) -> dict[str, Any]:
        return {
            "command": command.encode(errors="replace").decode(),
            "timeout": self._timeout(timeout),
            "env": self._variables(env),
        }

    def _variables(self, env: Mapping[str, str] | None) -> dict[str, str]:
        """Return the caller's variables only: the worker sets PATH and HOME."""
        check_environment(env or {})
        return {**self.config.env, **(env or {})}

    async def expose_port(self, port: int) -> Address:
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        calls = self._running()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                request = {"sandbox": calls.sandbox, "port": port}
                inner = await retry_for(CONNECT_SECONDS, lambda: calls.client.connect(request))
            except SandboxError:  # nothing listens there: the caller sees the connection end
                writer.close()
                return
            await relay(StreamPipe(reader, writer), inner)

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self._exposed_ports.append(server)
        return Address(*server.sockets[0].getsockname())

    # -- copies of its files

    async def snapshot(self) -> "RemoteSnapshot":
        answer = await self._running().run("snapshot", {}, SNAPSHOT_SECONDS)
        return RemoteSnapshot(answer["snapshot"], self.config.url, self.config.token)

    async def restore(self, snapshot: Snapshot) -> None:
        if not isinstance(snapshot, RemoteSnapshot):
            raise SandboxError(
                f"a remote sandbox restores a RemoteSnapshot, not {type(snapshot).__name__}"
            )
        request = {"snapshot": snapshot.id}
        self._note_description(await self._running().run("restore", request, SNAPSHOT_SECONDS))

    async def commit(self, image: str) -> None:
        await self._running().run("commit", {"name": image}, SNAPSHOT_SECONDS)

    # -- files

    async def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        relative = self._relative_file(path)
        source = self._running().read("read_file", path=relative)
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                yield piece

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        relative = self._relative_file(path)
        await self._running().write("write_file", pieces, path=relative, mode=mode)

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        answer = await self._running().ask("list_files", path=self._relative(path) or ".")
        return entries_from_json(answer)

    async def pack(self, path: str = ".") -> AsyncGenerator[bytes, None]:
        source = self._running().read_archive("download", path=self._relative(path) or ".")
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                yield piece

    async def unpack(self, path: str, pieces: AsyncIterator[bytes]) -> Transfer:
        relative = self._relative(path) or "."
        answer = await self._running().write("upload", pieces, path=relative)
        try:
            files, size = int(answer["files"]), int(answer["bytes"])
            return Transfer(files, size, tuple(map(str, answer["skipped"])))
        except (KeyError, TypeError, ValueError) as error:
            raise SandboxError("the answer to upload is malformed") from error


class RemoteSnapshot(Snapshot):
    """A snapshot on the worker where it was made.

    It is kept until `delete`, or until a day after its last use.
    """

    def __init__(self, name: str, url: str, token: str):
        self.id = name
        self._url = url
        self._token = token

    async def delete(self) -> None:
        connection = AdminConnection.acquire(self._url, self._token)
        try:
            request = {"snapshot": self.id}
            await retry_until(
                now() + GRACE_SECONDS,
                lambda: connection.client.call("delete_snapshot", request),
            )
        finally:
            await connection.release()


async def _await_status(client: Client, sandbox: str, deadline: float) -> dict[str, Any]:
    """Return a sandbox's state when it has changed, or after one round."""
    request = {"sandbox": sandbox, "wait": ROUND_SECONDS}
    return await retry_until(deadline, lambda: client.ask("get_status", request))
