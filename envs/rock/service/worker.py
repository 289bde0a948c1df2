"""A worker: the sandboxes of one machine, and what is done in them.

Whether there is room for one more is for the admin to know.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from envs.rock.backend import Job, Session, Snapshot
from envs.rock.docker.probe import probe_docker
from envs.rock.embedded.probe import probe
from envs.rock.errors import SandboxClosedError, SandboxError
from envs.rock.sandbox import Sandbox
from envs.rock.service.fleet import DEAD_SECONDS, HEARTBEAT_SECONDS
from envs.rock.wire import archive
from envs.rock.wire.api import Disconnected, Refusal, config_from_json, result_to_json
from envs.rock.wire.client import Client, Pipe, StreamPipe

log = logging.getLogger("rock.worker")
LEFT_WITH_CALLER = (
    "execute",
    "run_in_session",
    "verify",
)  # without a key these end when their caller leaves; all else is finished
MAX_CALLS = 64  # of one sandbox, at once
KEPT_ENDS, KEPT_SECONDS = 16, 30.0  # of finished calls, for callers that lost the connection
KEPT_JOBS = 64  # that have ended, in one sandbox
FORSAKEN_SECONDS = 90.0  # a call that nobody asks for that long is given up


class _Call:
    """Something that runs, and that its caller asks for again and again."""

    def __init__(self, work: Awaitable[dict[str, Any]]):
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # nobody may be waiting
        self.waiting, self.asked = 0, time.monotonic()

    async def wait(self, seconds: float) -> dict[str, Any] | None:
        self.waiting += 1
        try:
            await asyncio.wait([self.task], timeout=seconds)
        finally:
            self.waiting -= 1
            self.asked = time.monotonic()
        if not self.task.done():
            return None
        if self.task.cancelled():
            raise SandboxError("the call was given up")
        return self.task.result()


class _Held:
    """One sandbox, and the names by which callers know what is in it."""

    def __init__(self, sandbox: Sandbox):
        self.sandbox = sandbox
        self.sessions: dict[str, Session] = {}
        self.jobs: dict[str, tuple[Job, asyncio.Task]] = {}
        self.calls: dict[str, _Call] = {}
        self.ports: dict[int, tuple[str, int]] = {}
        self.restoring = False
        self._named = 0

    def name(self, kind: str) -> str:
        self._named += 1
        return f"{kind}{self._named}"

    def session(self, arguments: Mapping[str, Any]) -> Session:
        try:
            return self.sessions[arguments["session"]]
        except KeyError:
            raise SandboxClosedError(
                f"there is no session {arguments.get('session')!r}; create another"
            ) from None

    def job(self, arguments: Mapping[str, Any]) -> tuple[Job, asyncio.Task]:
        try:
            return self.jobs[arguments["job"]]
        except KeyError:
            raise Refusal("not_found", f"there is no job {arguments.get('job')!r}") from None

    def tidy(self) -> None:
        """Forget the ends of calls and jobs that nobody will ask for, and give up what nobody asks
        for.
        """
        now = time.monotonic()
        ended = [name for name, call in self.calls.items() if call.task.done()]
        for number, name in enumerate(ended):
            if len(ended) - number > KEPT_ENDS or now - self.calls[name].asked > KEPT_SECONDS:
                del self.calls[name]
        for call in self.calls.values():
            if not call.waiting and now - call.asked > FORSAKEN_SECONDS:
                call.task.cancel()
        for name in [name for name, (_, task) in self.jobs.items() if task.done()][:-KEPT_JOBS]:
            del self.jobs[name]
        for name in [name for name, session in self.sessions.items() if session.ended]:
            del self.sessions[name]


class Worker:
    """See server.Service. Use it in one event loop; `close` it there."""

    def __init__(self, backends: tuple[str, ...] = ("embedded",)):
        self.incarnation = secrets.token_hex(16)
        self.backends = backends
        self._held: dict[str, _Held] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._finishing: set[asyncio.Future] = set()
        self._ops: dict[str, Callable[..., Awaitable[dict[str, Any] | None]]] = {
            "execute": self._execute,
            "spawn": self._spawn,
            "create_session": self._create_session,
            "run_in_session": self._run_in_session,
            "verify": self._verify,
            "snapshot": self._snapshot,
            "restore": self._restore,
            "interrupt": self._interrupt,
            "kill": self._kill,
            "kill_all": self._kill_all,
            "close_session": self._close_session,
            "list_files": self._list_files,
            "get_sandbox_statistics": self._statistics,
            "denials": self._denials,
        }

    async def kinds(self) -> list[str]:
        """What it can make, as "backend:isolation"."""
        found = []
        for backend in self.backends:
            for isolation in ("required", "best_available"):
                try:
                    (
                        await (
                            asyncio.to_thread(probe, isolation)
                            if backend == "embedded"
                            else asyncio.to_thread(probe_docker)
                        )
                    ).require(isolation)
                    found.append(f"{backend}:{isolation}")
                except SandboxError as error:
                    log.warning("no %s:%s here: %s", backend, isolation, error)
        return found

    async def close(self) -> None:
        """End every sandbox, and begin anew."""
        await asyncio.gather(
            *(self._stop(name) for name in list(self._held)), return_exceptions=True
        )
        snapshots, self._snapshots = self._snapshots, {}
        await asyncio.gather(
            *(snapshot.delete() for snapshot in snapshots.values()), return_exceptions=True
        )
        self.incarnation = secrets.token_hex(16)

    def held(self) -> list[str]:
        return list(self._held)

    async def drop(self, names: Iterable[str]) -> None:
        """End those of them that are here: nobody knows them any more."""
        for failure in await asyncio.gather(
            *(self._stop(name) for name in names), return_exceptions=True
        ):
            if isinstance(failure, Exception):
                log.warning("a forgotten sandbox did not end: %s", failure)

    def ended(self) -> list[str]:
        """Sandboxes that have ended by themselves. Also the moment to tidy up."""
        for held in self._held.values():
            held.tidy()
        return [
            name
            for name, held in self._held.items()
            if held.sandbox.tier is not None and not held.restoring and not held.sandbox.is_alive()
        ]

    # -- the service

    async def call(
        self,
        op: str,
        arguments: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        if op == "worker/ping":
            return {"incarnation": self.incarnation}
        if op == "worker/forget_snapshot":
            if snapshot := self._snapshots.pop(arguments["snapshot"], None):
                await snapshot.delete()
            return {}
        if op == "worker/stop":
            await self._stop(arguments["sandbox"])
            return {}
        if op == "worker/create":
            return await self._create(arguments)
        held = self._find(arguments)
        if op == "wait":
            return await self._wait(held, arguments)
        if op == "cancel":
            if call := held.calls.get(arguments["call"]):
                call.task.cancel()
            return {}
        if op == "verify":
            arguments = arguments | {"files": files or {}}
        key = arguments.get("call")
        if key is None and op in LEFT_WITH_CALLER:
            return await self._ops[op](held, arguments)
        if key is None:
            work = asyncio.ensure_future(self._ops[op](held, arguments))
            self._finishing.add(work)
            work.add_done_callback(self._finishing.discard)
            return await asyncio.shield(work)
        if key not in held.calls:
            self._make_room(held)
            held.calls[key] = _Call(self._ops[op](held, arguments))
        return await held.calls[key].wait(arguments.get("wait", 0.0))

    async def read(
        self, op: str, arguments: dict[str, Any], user: str = ""
    ) -> AsyncIterator[bytes]:
        sandbox = self._find(arguments).sandbox
        source = (
            sandbox.read_stream(arguments["path"])
            if op == "read_file"
            else archive.pack(sandbox, arguments["path"])
        )
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                yield piece

    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        sandbox, size = self._find(arguments).sandbox, 0
        if op == "upload":
            return (await archive.unpack(sandbox, arguments["path"], pieces))._asdict()

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for piece in pieces:
                size += len(piece)
                yield piece

        await sandbox.write_stream(arguments["path"], counted(), arguments.get("mode", 0o644))
        return {"bytes": size}

    async def connect(self, arguments: dict[str, Any], user: str = "") -> Pipe:
        held, port = self._find(arguments), arguments["port"]
        if port not in held.ports:
            held.ports[port] = tuple(await held.sandbox.expose_port(port))
        try:
            return StreamPipe(*await asyncio.open_connection(*held.ports[port]))
        except OSError as error:
            del held.ports[port]
            raise SandboxClosedError(
                f"the door to port {port} is closed: {error.strerror}"
            ) from error

    # -- a sandbox's life

    async def _create(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The same `sandbox` again joins the creation that runs."""
        name = arguments["sandbox"]
        if name not in self._held:
            if arguments["backend"] not in self.backends:
                raise ValueError(
                    f"backend {arguments['backend']!r} is not among this worker's:"
                    f" {', '.join(self.backends)}"
                )
            config = config_from_json(arguments["config"], arguments["backend"])
            snapshot = None
            if (
                "snapshot" in arguments
                and (snapshot := self._snapshots.get(arguments["snapshot"])) is None
            ):
                raise Refusal("start_failed", f"the snapshot {arguments['snapshot']} was deleted")
            held = self._held[name] = _Held(Sandbox(config, snapshot))
            held.calls["create"] = _Call(self._start(name, held))
        held = self._held[name]
        if (create := held.calls.get("create")) is None:
            return _described(held.sandbox)
        return await create.wait(arguments.get("wait", 0.0) if "call" in arguments else None)

    async def _start(self, name: str, held: _Held) -> dict[str, Any]:
        try:
            await held.sandbox.start()
        except BaseException:
            self._held.pop(name, None)
            raise
        return _described(held.sandbox)

    async def _stop(self, name: str) -> None:
        held = self._held.get(name)
        if held is None:
            return
        for call in held.calls.values():
            call.task.cancel()  # a creation too: then there is nothing to stop
        await asyncio.gather(*(call.task for call in held.calls.values()), return_exceptions=True)
        try:
            await held.sandbox.stop()
        finally:
            self._held.pop(name, None)

    def _find(self, arguments: Mapping[str, Any]) -> _Held:
        try:
            return self._held[arguments["sandbox"]]
        except KeyError:
            raise SandboxClosedError(
                f"there is no sandbox {arguments['sandbox']!r}; it was stopped, cleared, or never"
                " here"
            ) from None

    def _make_room(self, held: _Held) -> None:
        held.tidy()
        if sum(not call.task.done() for call in held.calls.values()) >= MAX_CALLS:
            raise Refusal("busy", f"{MAX_CALLS} calls of this sandbox are running")

    # -- what is done in it

    async def _execute(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        return result_to_json(
            await held.sandbox.execute(
                arguments["command"], arguments.get("timeout"), arguments.get("env")
            )
        )

    async def _spawn(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        job = await held.sandbox.spawn(
            arguments["command"], arguments.get("timeout"), arguments.get("env")
        )
        end = asyncio.ensure_future(job.wait())
        end.add_done_callback(lambda task: task.cancelled() or task.exception())
        name = held.name("job")
        held.jobs[name] = job, end
        return {"job": name}

    async def _wait(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any] | None:
        seconds = arguments.get("wait", 0.0)
        if "call" in arguments:
            if (call := held.calls.get(arguments["call"])) is None:
                raise Refusal("not_found", f"there is no call {arguments['call']!r}")
            return await call.wait(seconds)
        _, end = held.job(arguments)
        await asyncio.wait([end], timeout=seconds)
        return result_to_json(end.result()) if end.done() else None

    async def _interrupt(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        if "session" in arguments:
            await held.session(arguments).interrupt()
        else:
            await held.job(arguments)[0].interrupt()
        return {}

    async def _kill(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        return result_to_json(await held.job(arguments)[0].kill())

    async def _kill_all(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        await held.sandbox.kill_all()
        return {}

    async def _create_session(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        session = await held.sandbox.create_session(arguments.get("env"))
        name = held.name("session")
        held.sessions[name] = session
        return {"session": name}

    async def _run_in_session(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        session = held.session(arguments)
        result = await session.run(arguments["command"], arguments.get("timeout"))
        return result_to_json(result) | {"session_ended": session.ended}

    async def _close_session(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        if session := held.sessions.pop(arguments["session"], None):
            await session.close()
        return {}

    async def _verify(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        return result_to_json(
            await held.sandbox.verify(
                arguments["script"],
                arguments.get("timeout"),
                arguments["files"],
                arguments.get("keep", False),
            )
        )

    async def _list_files(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            "entries": [list(entry) for entry in await held.sandbox.list_files(arguments["path"])]
        }

    async def _statistics(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        return (await held.sandbox.get_status())._asdict()

    async def _denials(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"denials": [list(denial) for denial in await held.sandbox.denials()]}

    async def _snapshot(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        name = f"sn-{secrets.token_hex(12)}"
        self._snapshots[name] = await held.sandbox.snapshot()
        return {"snapshot": name}

    async def _restore(self, held: _Held, arguments: dict[str, Any]) -> dict[str, Any]:
        if (snapshot := self._snapshots.get(arguments["snapshot"])) is None:
            raise Refusal(
                "not_found",
                f"there is no snapshot {arguments['snapshot']!r} where this sandbox runs",
            )
        held.restoring = True
        try:
            await held.sandbox.restore(snapshot)
        finally:
            held.restoring = False
        held.ports.clear()
        return _described(held.sandbox)


async def report(worker: Worker, admin: Client, registration: Mapping[str, Any]) -> None:
    """Register with an admin and give signs of life, for ever.

    An admin that gave the worker up, or began anew, gets an empty one.

    An admin that is silent for DEAD_SECONDS is dead, or takes this worker for dead: then nobody
    will end the sandboxes but we.
    """
    known, heard = False, time.monotonic()
    while True:
        try:
            if known:
                answer = await admin.call(
                    "worker/heartbeat",
                    {
                        "incarnation": worker.incarnation,
                        "ended": worker.ended(),
                        "held": worker.held(),
                    },
                )
                await worker.drop(map(str, answer.get("forgotten", ())))
            else:
                await admin.call(
                    "worker/register", {**registration, "incarnation": worker.incarnation}
                )
                log.info("registered with %s", admin.url)
                known = True
            heard = time.monotonic()
        except Disconnected:
            log.warning("the admin at %s does not answer", admin.url)
            if known and time.monotonic() - heard > DEAD_SECONDS:
                await worker.close()
                known = False
        except SandboxError as error:
            code = getattr(error, "code", "")
            if code in ("unauthorized", "forbidden"):
                raise
            if code != "not_found":  # it is busy, say: the next sign of life may get through
                log.warning("the admin at %s refused a sign of life: %s", admin.url, error)
                await asyncio.sleep(HEARTBEAT_SECONDS)
                continue
            log.warning(
                "the admin does not know this worker (any more): it begins anew, without sandboxes"
            )
            await worker.close()
            known = False
        await asyncio.sleep(HEARTBEAT_SECONDS)


def _described(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "tier": sandbox.tier,
        "guarantees": sorted(sandbox.guarantees),
        "workspace": sandbox.workspace,
    }
