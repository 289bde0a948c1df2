"""The remote backend: the same Sandbox over HTTP to a ROCK admin (service/), which finds it a place
on one of its workers.

What takes long is asked for by a key and waited for in rounds, so a connection that breaks costs a
round and never runs a command twice.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from envs.rock.backend import (
    Backend,
    Job,
    Session,
    Snapshot,
    check_verifier_files,
    reason_not_executable,
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
from envs.rock.remote.connection import Line
from envs.rock.wire.api import (
    GRACE,
    Disconnected,
    config_to_json,
    entries_from_json,
    result_from_json,
    status_from_json,
)
from envs.rock.wire.client import Client, StreamPipe, join

ROUND_SECONDS = 20.0  # one request waits at most so long
RETRY_SECONDS = 0.2
STOP_SECONDS = 60.0
ABANDON_SECONDS = 10.0  # what is not ended by then is cleared over there for want of use
# a request that may have been lost is sent again only while its end would still be known
# (worker.KEPT_SECONDS)
RESEND_SECONDS = 10.0


class RemoteBackend(Backend):
    """See Sandbox. It is cleared some minutes after this process was last heard of."""

    def __init__(self, config: SandboxConfig, snapshot: Snapshot | None = None):
        super().__init__(config, snapshot)
        self._snapshot = snapshot
        if snapshot is not None and not isinstance(snapshot, RemoteSnapshot):
            raise SandboxError(
                f"a remote sandbox starts from a RemoteSnapshot, not from {type(snapshot).__name__}"
            )
        self._client: Client | None = None  # of the line, which all at the same admin share
        self._line: Line | None = None
        self._ending: asyncio.Task | None = None
        self._alive = False
        self._background: set[asyncio.Task] = set()
        self._doors: list[asyncio.Server] = []

    async def start(self) -> None:
        self._open()
        request: dict[str, Any] = {
            "config": config_to_json(self.config),
            "key": secrets.token_hex(16),
            "wait": ROUND_SECONDS,
        }
        if self._snapshot:
            request["snapshot"] = self._snapshot.id
        deadline = _now() + self.config.start_timeout + GRACE
        try:
            answer = await self._persist(lambda: self._client.call("start", request), deadline)
            while answer.get("state") in ("queued", "starting"):
                self.id = answer["sandbox"]
                if _now() > deadline:
                    raise SandboxStartError(
                        f"no sandbox within {self.config.start_timeout:.0f} s; the admin says it is"
                        f" {answer['state']}"
                    )
                answer = await self._persist(
                    lambda: self._client.call(
                        "get_status", {"sandbox": self.id, "wait": ROUND_SECONDS}
                    ),
                    deadline,
                )
            self._take(answer)
        except BaseException as error:
            await self._abandon(
                request,
                refused=isinstance(error, SandboxError) and not isinstance(error, Disconnected),
            )
            raise

    async def attach(self, sandbox: str) -> None:
        if self._client is not None:
            raise SandboxError("this sandbox is started already")
        self._open()
        try:
            self._take(await self._client.call("get_status", {"sandbox": sandbox}))
        except BaseException:
            await self._disconnect()
            self._client = None
            raise

    async def stop(self) -> None:
        if self._client is None or (self._ending and self._ending.done()):
            return
        self._ending = self._ending or asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)  # two who stop it at once both wait for the one end

    async def _end(self) -> None:
        try:
            if self._alive:
                await self._persist(
                    lambda: self._client.call("stop", {"sandbox": self.id}), _now() + STOP_SECONDS
                )
        finally:
            await self._disconnect()

    def is_alive(self) -> bool:
        return self._alive

    async def get_status(self) -> SandboxStatus:
        return status_from_json(await self._ask("get_sandbox_statistics"))

    async def denials(self) -> list[Denial]:
        answer = await self._ask("denials")
        try:
            return [Denial(*fields) for fields in answer["denials"]]
        except (KeyError, TypeError) as error:
            raise SandboxError("the answer about denials makes no sense") from error

    # -- commands

    async def execute(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        if refusal := reason_not_executable(command):
            return CommandResult("", refusal, 126, False, False, 0.0)
        return result_from_json(
            await self._run("execute", self._command(command, timeout, env), self._seconds(timeout))
        )

    async def spawn(
        self, command: str, timeout: float | None = None, env: Mapping[str, str] | None = None
    ) -> "RemoteJob":
        if refusal := reason_not_executable(command):
            raise ValueError(refusal.strip())
        answer = await self._run("spawn", self._command(command, timeout, env), GRACE)
        return RemoteJob(self, answer["job"], self._seconds(timeout))

    async def create_session(self, env: Mapping[str, str] | None = None) -> "RemoteSession":
        return RemoteSession(
            self,
            (await self._run("create_session", {"env": self._variables(env)}, GRACE))["session"],
        )

    async def kill_all(self) -> None:
        await self._ask("kill_all")

    async def verify(
        self,
        script: str,
        timeout: float | None = None,
        files: Mapping[str, bytes] | None = None,
        keep: bool = False,
    ) -> CommandResult:
        check_verifier_files(files or {})
        request = {"script": script, "timeout": self._seconds(timeout), "keep": keep}
        return result_from_json(await self._run("verify", request, self._seconds(timeout), files))

    def _command(
        self, command: str, timeout: float | None, env: Mapping[str, str] | None
    ) -> dict[str, Any]:
        return {
            "command": command.encode(errors="replace").decode(),
            "timeout": self._seconds(timeout),
            "env": self._variables(env),
        }

    def _variables(self, env: Mapping[str, str] | None) -> dict[str, str]:
        """Ours alone: PATH and HOME are the worker's to say."""
        check_environment(env or {})
        return {**self.config.env, **(env or {})}

    def _seconds(self, timeout: float | None) -> float:
        return self.config.timeout if timeout is None else timeout

    async def expose_port(self, port: int) -> Address:
        if not 0 < port < 1 << 16:
            raise ValueError(f"port {port} is not between 1 and 65535")
        self._check_open()

        async def pass_through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                inner = await self._client.connect({"sandbox": self.id, "port": port})
            except SandboxError:  # nobody listens there: the caller sees the end
                writer.close()
                return
            await join(StreamPipe(reader, writer), inner)

        door = await asyncio.start_server(pass_through, "127.0.0.1", 0)
        self._doors.append(door)
        return Address(*door.sockets[0].getsockname())

    # -- copies of its files

    async def snapshot(self) -> "RemoteSnapshot":
        return RemoteSnapshot(
            (await self._run("snapshot", {}, 300.0))["snapshot"], self.config.url, self.config.token
        )

    async def restore(self, snapshot: Snapshot) -> None:
        answer = await self._run("restore", {"snapshot": snapshot.id}, 300.0)
        self.tier, self.guarantees, self.workspace = (
            answer["tier"],
            frozenset(answer["guarantees"]),
            answer["workspace"],
        )

    async def commit(self, image: str) -> None:
        await self._ask("commit", name=image)

    # -- files

    async def read_stream(self, path: str) -> AsyncGenerator[bytes, None]:
        relative = self._relative_file(path)
        self._check_open()
        async with contextlib.aclosing(
            self._client.read("read_file", {"sandbox": self.id, "path": relative})
        ) as pieces:
            async for piece in pieces:
                yield piece

    async def write_stream(
        self, path: str, pieces: AsyncIterator[bytes], mode: int = 0o644
    ) -> None:
        relative = self._relative_file(path)
        self._check_open()
        await self._client.write(
            "write_file", {"sandbox": self.id, "path": relative, "mode": mode}, pieces
        )

    async def list_files(self, path: str = ".") -> list[FileEntry]:
        return entries_from_json(await self._ask("list_files", path=self._relative(path) or "."))

    # -- the wire

    def _open(self) -> None:
        if self._client is not None:
            raise SandboxError("this sandbox is started already")
        self._line = Line.take(self.config.url, self.config.token)
        self._client = self._line.client

    def _take(self, answer: Mapping[str, Any]) -> None:
        try:
            self.id, self.tier, self.workspace = (
                str(answer["sandbox"]),
                str(answer["tier"]),
                str(answer["workspace"]),
            )
            self.guarantees = frozenset(map(str, answer["guarantees"]))
        except (KeyError, TypeError) as error:
            raise SandboxStartError(
                f"the admin's answer to a start makes no sense; is {self.config.url} a ROCK admin?"
            ) from error
        self._alive = True
        self._line.keep_alive(self.id, self._lose)

    def _lose(self) -> None:
        self._alive = False

    def _keep(self, work: Awaitable[Any]) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # nobody may be waiting: that is no error of its own
        return task

    async def _abandon(self, request: Mapping[str, Any], refused: bool) -> None:
        """A start that failed or was given up.

        Its key tells which sandbox it is, or would be, where no answer ever came; one that was
        refused is none.
        """

        async def end() -> None:
            name = self.id or (await self._client.call("start", {**request, "wait": 0}))["sandbox"]
            await self._client.call("stop", {"sandbox": name})

        try:
            if not refused or self.id:
                with contextlib.suppress(SandboxError, TimeoutError, KeyError):
                    await asyncio.wait_for(end(), ABANDON_SECONDS)
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        self._alive = False
        for door in self._doors:
            door.close()
        background = list(self._background)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if self._line:
            line, self._line = self._line, None
            line.let_go(self.id or "")
            await line.release()

    def _check_open(self) -> None:
        if not self._alive:
            raise SandboxClosedError(
                "the sandbox is not running: it was not started, was stopped, or was lost"
            )

    async def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """A request that is answered at once."""
        self._check_open()
        with self._noticing():
            return await self._client.call(op, {"sandbox": self.id, **arguments})

    async def _run(
        self,
        op: str,
        arguments: Mapping[str, Any],
        seconds: float,
        files: Mapping[str, bytes] | None = None,
    ) -> dict[str, Any]:
        """A request that takes up to `seconds`. Cancelled, it is given up over there too."""
        self._check_open()
        call, sent, arrived = secrets.token_hex(8), _now(), False
        deadline = sent + seconds + GRACE
        awaited = {"sandbox": self.id, "call": call, "wait": ROUND_SECONDS}
        try:
            with self._noticing():
                while _now() < deadline:
                    try:
                        answer = await (
                            self._client.call("wait", awaited)
                            if arrived
                            else self._client.call(op, {**arguments, **awaited}, files)
                        )
                    except Disconnected as error:
                        if (
                            not arrived
                            and not (arrived := await self._has_arrived(awaited, deadline))
                            and _now() > sent + RESEND_SECONDS
                        ):
                            raise SandboxError(
                                f"the connection broke under {op}, and whether it was carried out"
                                f" is not known: {error}"
                            ) from error
                        await asyncio.sleep(RETRY_SECONDS)
                        continue
                    if answer is not None:
                        return answer
                    arrived = True
        except asyncio.CancelledError:
            self._keep(self._client.call("cancel", {"sandbox": self.id, "call": call}))
            raise
        raise SandboxError(f"no answer to {op} within {seconds + GRACE:.0f} s")

    async def _has_arrived(self, awaited: Mapping[str, Any], deadline: float) -> bool:
        """After a broken connection: whether that call is known there."""
        try:
            await self._persist(lambda: self._client.call("wait", {**awaited, "wait": 0}), deadline)
        except SandboxError as error:
            if getattr(error, "code", "") != "not_found":
                raise
            return False
        return True

    async def _persist(self, ask: Callable[[], Awaitable[Any]], deadline: float) -> Any:
        """A request that may be carried out twice, until it is answered."""
        while True:
            try:
                return await ask()
            except Disconnected:
                if _now() > deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    @contextlib.contextmanager
    def _noticing(self) -> Any:
        try:
            yield
        except SandboxClosedError as error:
            if getattr(error, "code", "") in ("ended", "worker_lost", "unknown_sandbox"):
                self._alive = False
            raise


class RemoteJob(Job):
    def __init__(self, sandbox: RemoteBackend, name: str, timeout: float):
        self._sandbox, self._name, self._timeout = sandbox, name, timeout
        self._end = sandbox._keep(self._await_end())

    async def _await_end(self) -> CommandResult:
        sandbox, deadline = self._sandbox, _now() + self._timeout + GRACE
        request = {"sandbox": sandbox.id, "job": self._name, "wait": ROUND_SECONDS}
        while (
            answer := await sandbox._persist(
                lambda: sandbox._client.call("wait", request), deadline
            )
        ) is None:
            if _now() > deadline:
                raise SandboxError(f"no answer to a command within {self._timeout + GRACE:.0f} s")
        return result_from_json(answer)

    @property
    def running(self) -> bool:
        return not self._end.done()

    async def wait(self) -> CommandResult:
        await asyncio.wait([self._end])
        if self._end.cancelled():
            raise SandboxClosedError("the sandbox was stopped before its job ended")
        return self._end.result()

    async def interrupt(self) -> None:
        await self._sandbox._ask("interrupt", job=self._name)

    async def kill(self) -> CommandResult:
        if self.running:
            await self._sandbox._ask("kill", job=self._name)
        return await self.wait()


class RemoteSession(Session):
    def __init__(self, sandbox: RemoteBackend, name: str):
        self._sandbox, self._name = sandbox, name
        self._turn = asyncio.Lock()

    async def run(self, command: str, timeout: float | None = None) -> CommandResult:
        if refusal := reason_not_executable(command):
            return CommandResult("", refusal, 126, False, False, 0.0)
        seconds = self._sandbox._seconds(timeout)
        async with self._turn:
            if self.ended:
                raise SandboxClosedError("the session's shell has ended; create another session")
            try:
                answer = await self._sandbox._run(
                    "run_in_session",
                    {
                        "session": self._name,
                        "command": command.encode(errors="replace").decode(),
                        "timeout": seconds,
                    },
                    seconds,
                )
            except SandboxClosedError:
                self.ended = True
                raise
            self.ended = bool(answer.get("session_ended"))
            return result_from_json(answer)

    async def interrupt(self) -> None:
        if not self.ended:
            await self._sandbox._ask("interrupt", session=self._name)

    async def close(self) -> None:
        if not self.ended:
            self.ended = True
            with contextlib.suppress(SandboxClosedError):
                await self._sandbox._ask("close_session", session=self._name)


class RemoteSnapshot(Snapshot):
    """It lives where it was made, until `delete`, or a day after it was last used."""

    def __init__(self, name: str, url: str, token: str):
        self.id, self._url, self._token = name, url, token

    async def delete(self) -> None:
        line = Line.take(self._url, self._token)
        try:
            await line.client.call("delete_snapshot", {"snapshot": self.id})
        finally:
            await line.release()


def _now() -> float:
    return asyncio.get_running_loop().time()
