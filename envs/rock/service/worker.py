"""A worker: the sandboxes of one machine, and the operations on them.

The admin decides whether there is room for one more.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from envs.rock.backend import Snapshot
from envs.rock.docker.probe import probe_docker
from envs.rock.embedded.probe import probe
from envs.rock.errors import SandboxClosedError, SandboxError
from envs.rock.sandbox import Sandbox
from envs.rock.service.held import Call, HeldSandbox
from envs.rock.wire.client import Pipe, StreamPipe
from envs.rock.wire.codec import config_from_json, result_to_json
from envs.rock.wire.door_queue import DoorQueue
from envs.rock.wire.errors import Refusal

log = logging.getLogger("rock.worker")
# Without a key these end when their caller leaves; all other operations are finished.
ENDED_WITH_CALLER = ("execute", "run_in_session", "verify")
_Operation = Callable[[HeldSandbox, dict[str, Any]], Awaitable[dict[str, Any]]]


class Worker:
    """The service behind a worker's HTTP server (see server.Service).

    Use it in one event loop; `close` it there.

    Args:
      backends: kinds of sandboxes to make, "embedded" and "docker".
    """

    def __init__(self, backends: tuple[str, ...] = ("embedded",)):
        self.incarnation = _new_incarnation()
        self.backends = backends
        self._held: dict[str, HeldSandbox] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._finishing: set[asyncio.Future[dict[str, Any]]] = set()
        self._operations: dict[str, _Operation] = {
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
        """Return what this machine can make, as "backend:isolation"."""
        found = []
        for backend in self.backends:
            for isolation in ("required", "best_available"):
                try:
                    await _require(backend, isolation)
                    found.append(f"{backend}:{isolation}")
                except SandboxError as error:
                    log.warning("no %s:%s here: %s", backend, isolation, error)
        return found

    async def close(self) -> None:
        """End every sandbox and become a new, empty worker."""
        stops = [self._stop(name) for name in list(self._held)]
        await asyncio.gather(*stops, return_exceptions=True)
        snapshots = self._snapshots
        self._snapshots = {}
        deletions = [snapshot.delete() for snapshot in snapshots.values()]
        await asyncio.gather(*deletions, return_exceptions=True)
        self.incarnation = _new_incarnation()

    def held(self) -> list[str]:
        """Return the ids of all sandboxes."""
        return list(self._held)

    async def drop(self, names: Iterable[str]) -> None:
        """End sandboxes that the admin does not know any more."""
        stops = [self._stop(name) for name in names]
        for failure in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(failure, Exception):
                log.warning("a forgotten sandbox did not end: %s", failure)

    def ended(self) -> list[str]:
        """Return the sandboxes that have ended by themselves, and tidy up the others."""
        for held in self._held.values():
            held.tidy()
        return [name for name, held in self._held.items() if held.has_ended()]

    # -- the service

    async def call(
        self,
        op: str,
        arguments: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        """Carry out an operation; None: it has not finished within `wait`, ask again."""
        if op == "worker/ping":
            return {"incarnation": self.incarnation}
        if op == "worker/forget_snapshot":
            return await self._forget_snapshot(arguments["snapshot"])
        if op == "worker/stop":
            await self._stop(arguments["sandbox"])
            return {}
        if op == "worker/create":
            return await self._create(arguments)
        held = self._find(arguments)
        if op == "wait":
            return await self._wait(held, arguments)
        if op == "cancel":
            await self._give_up(held, arguments["call"])
            return {}
        if op == "verify":
            arguments = arguments | {"files": files or {}}
        key = arguments.get("call")
        if key is not None:
            work = self._operations[op]
            call = held.join(key, lambda: work(held, arguments))
            return await call.wait(arguments.get("wait", 0.0))
        if op in ENDED_WITH_CALLER:
            return await self._operations[op](held, arguments)
        finishing = asyncio.ensure_future(self._operations[op](held, arguments))
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)
        return await asyncio.shield(finishing)

    async def read(
        self, op: str, arguments: dict[str, Any], user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file, or of an archive of a directory."""
        sandbox = self._find(arguments).sandbox
        path = arguments["path"]
        is_file = op == "read_file"
        source = sandbox.read_stream(path) if is_file else sandbox.pack(path)
        left_out = arguments.get("offset", 0)
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                if len(piece) > left_out:
                    yield piece[left_out:]
                left_out -= min(left_out, len(piece))

    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        """Write a file, or the files of an archive.

        With a key the request may be repeated: after a success it is not carried out again, and one
        that is still under way is given up first.
        """
        held = self._find(arguments)
        key = arguments.get("call")
        if key is None:
            return await self._write(op, held.sandbox, arguments, pieces)
        written = await held.restart(key, lambda: self._write(op, held.sandbox, arguments, pieces))
        answer = await written.wait(None)
        assert answer is not None  # it has ended
        return answer

    async def _write(
        self, op: str, sandbox: Sandbox, arguments: dict[str, Any], pieces: AsyncIterator[bytes]
    ) -> dict[str, Any]:
        path = arguments["path"]
        if op == "upload":
            transfer = await sandbox.unpack(path, pieces)
            return transfer._asdict()
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for piece in pieces:
                size += len(piece)
                yield piece

        await sandbox.write_stream(path, counted(), arguments.get("mode", 0o644))
        return {"bytes": size}

    async def connect(self, arguments: dict[str, Any], user: str = "") -> Pipe:
        """Open a connection to a port in a sandbox, or await the next one from it at a door."""
        held = self._find(arguments)
        if ("door" in arguments) == ("port" in arguments):
            raise ValueError("connect needs `port` or `door`, and not both")
        if "door" in arguments:
            return held.door(arguments["door"]).accept()
        port = arguments["port"]
        if port not in held.ports:
            held.ports[port] = await held.sandbox.expose_port(port)
        try:
            reader, writer = await asyncio.open_connection(*held.ports[port])
        except OSError as error:
            del held.ports[port]
            raise SandboxClosedError(
                f"port {port} of the sandbox is not forwarded any more: {error.strerror}"
            ) from error
        return StreamPipe(reader, writer)

    # -- start and end of a sandbox

    async def _create(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Make a sandbox; the same `sandbox` again joins the creation that runs."""
        name = arguments["sandbox"]
        if name not in self._held:
            held = self._make_sandbox(arguments)
            self._held[name] = held
            held.calls["create"] = Call(self._start(name, held))
        held = self._held[name]
        create = held.calls.get("create")
        if create is None:
            return _describe(held.sandbox)
        seconds = arguments.get("wait", 0.0) if "call" in arguments else None
        return await create.wait(seconds)

    def _make_sandbox(self, arguments: dict[str, Any]) -> HeldSandbox:
        backend = arguments["backend"]
        if backend not in self.backends:
            raise ValueError(
                f"backend {backend!r} is not among this worker's: {', '.join(self.backends)}"
            )
        queues = {name: DoorQueue() for name in arguments["config"].get("doors", ())}
        doors = {name: queue.door for name, queue in queues.items()}
        config = config_from_json(arguments["config"], backend, doors)
        if "snapshot" not in arguments:
            return HeldSandbox(Sandbox(config), queues)
        name = arguments["snapshot"]
        if name not in self._snapshots:
            raise Refusal("start_failed", f"the snapshot {name} was deleted")
        return HeldSandbox(Sandbox(config, self._snapshots[name]), queues)

    async def _start(self, name: str, held: HeldSandbox) -> dict[str, Any]:
        try:
            await held.sandbox.start()
        except BaseException:
            self._held.pop(name, None)
            raise
        return _describe(held.sandbox)

    async def _stop(self, name: str) -> None:
        held = self._held.get(name)
        if held is None:
            return
        await held.cancel_all()  # a creation too: then there is nothing to stop
        try:
            await held.sandbox.stop()
        finally:
            self._held.pop(name, None)

    def _find(self, arguments: Mapping[str, Any]) -> HeldSandbox:
        name = arguments["sandbox"]
        if name not in self._held:
            raise SandboxClosedError(
                f"there is no sandbox {name!r}; it was stopped, cleared, or never here"
            )
        return self._held[name]

    # -- operations in a sandbox

    async def _execute(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        result = await held.sandbox.execute(
            arguments["command"], arguments.get("timeout"), arguments.get("env")
        )
        return result_to_json(result)

    async def _spawn(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        job = await held.sandbox.spawn(
            arguments["command"], arguments.get("timeout"), arguments.get("env")
        )
        return {"job": held.add_job(job)}

    async def _wait(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any] | None:
        seconds = arguments.get("wait", 0.0)
        if "call" in arguments:
            return await held.call(arguments["call"]).wait(seconds)
        end = held.job(arguments).end
        await asyncio.wait([end], timeout=seconds)
        if not end.done():
            return None
        return result_to_json(end.result())

    async def _give_up(self, held: HeldSandbox, key: str) -> None:
        """Cancel a call. What it has made already, the caller will never learn of: it is ended."""
        call = held.calls.get(key)
        held.cancel(key)
        if call is None or not call.succeeded:
            return
        made = call.task.result()
        session = held.sessions.pop(made.get("session", ""), None)
        if session:
            await session.close()
        if "job" in made:
            await held.job(made).job.kill()

    async def _interrupt(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        if "session" in arguments:
            await held.session(arguments).interrupt()
        else:
            await held.job(arguments).job.interrupt()
        return {}

    async def _kill(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        return result_to_json(await held.job(arguments).job.kill())

    async def _kill_all(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        await held.sandbox.kill_all()
        return {}

    async def _create_session(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        session = await held.sandbox.create_session(arguments.get("env"))
        return {"session": held.add_session(session)}

    async def _run_in_session(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        session = held.session(arguments)
        result = await session.run(arguments["command"], arguments.get("timeout"))
        return result_to_json(result) | {"session_ended": session.ended}

    async def _close_session(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        session = held.sessions.pop(arguments["session"], None)
        if session:
            await session.close()
        return {}

    async def _verify(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        result = await held.sandbox.verify(
            arguments["script"],
            arguments.get("timeout"),
            arguments["files"],
            arguments.get("keep", False),
        )
        return result_to_json(result)

    async def _list_files(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        entries = await held.sandbox.list_files(arguments["path"])
        return {"entries": [list(entry) for entry in entries]}

    async def _statistics(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        status = await held.sandbox.get_status()
        return status._asdict()

    async def _denials(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        denials = await held.sandbox.denials()
        return {"denials": [list(denial) for denial in denials]}

    async def _snapshot(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        name = f"sn-{secrets.token_hex(12)}"
        self._snapshots[name] = await held.sandbox.snapshot()
        return {"snapshot": name}

    async def _forget_snapshot(self, name: str) -> dict[str, Any]:
        snapshot = self._snapshots.pop(name, None)
        if snapshot:
            await snapshot.delete()
        return {}

    async def _restore(self, held: HeldSandbox, arguments: dict[str, Any]) -> dict[str, Any]:
        snapshot = self._snapshots.get(arguments["snapshot"])
        if snapshot is None:
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
        return _describe(held.sandbox)


def _new_incarnation() -> str:
    return secrets.token_hex(16)


async def _require(backend: str, isolation: str) -> None:
    """Raise IsolationError if a backend cannot isolate so on this machine."""
    if backend == "embedded":
        report = await asyncio.to_thread(probe, isolation)
    else:
        report = await asyncio.to_thread(probe_docker)
    report.require(isolation)


def _describe(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "tier": sandbox.tier,
        "guarantees": sorted(sandbox.guarantees),
        "workspace": sandbox.workspace,
    }
