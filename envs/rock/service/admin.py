"""The admin: gives sandboxes to users, knows where each one runs, and passes requests on to it.

Every request goes through the admin to the worker that has the sandbox. Callers know one address,
users' tokens never reach a worker, workers need not be reachable for callers, and the admin sees
which sandboxes are idle. The price is one hop in the data centre's network (about a millisecond),
and none to the worker in the admin's own process.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from envs.rock.errors import SandboxError
from envs.rock.images.hub import EnvHub
from envs.rock.service import fleet, gauges
from envs.rock.service.fleet import Link, Member, Resources, check_reachable
from envs.rock.service.held import Call
from envs.rock.service.metrics import Metrics
from envs.rock.service.provisioning import Provisioner
from envs.rock.service.records import ENDED, Record, StartRequest
from envs.rock.service.snapshots import Snapshots
from envs.rock.service.templates import POOL_USER, Templates
from envs.rock.wire.client import Client, Pipe
from envs.rock.wire.errors import Disconnected, Refusal
from envs.rock.wire.operations import IN_SANDBOX

log = logging.getLogger("rock.admin")
SWEEP_SECONDS = 1.0
COMMIT_KEPT_SECONDS = 90.0  # that a commit is known which nobody asks for
COLLECT_SECONDS = 3600.0  # between two removals of unnamed blobs from the hub
REMEMBERED_SECONDS = 600.0  # that an ended sandbox is known, so that callers learn why it ended
MAX_REMEMBERED = 20_000  # ended sandboxes


class Admin:
    """The service behind an admin's HTTP server (see server.Service).

    Use it in one event loop: `start` it there, and `close` it.

    Args:
      hub: environments and images by name.
      worker_token: what the admin shows to workers that register over HTTP.
      metrics: where events are counted.
      auto_clear_seconds: idle time after which a sandbox is removed, if its caller names none.
    """

    def __init__(
        self,
        hub: EnvHub,
        worker_token: str,
        metrics: Metrics,
        auto_clear_seconds: float,
    ):
        self.hub = hub
        self.metrics = metrics
        self.templates = Templates(hub, self._start_ready)
        self.snapshots = Snapshots()
        self._provisioner = Provisioner(
            hub, self.metrics, auto_clear_seconds, self.templates.ended, self.snapshots.lose
        )
        self._records = self._provisioner.records
        self._members = self._provisioner.members
        self._background = self._provisioner.background
        self._worker_token = worker_token
        self._auto_clear = auto_clear_seconds
        self._by_key: dict[tuple[str, str], Record] = {}  # (user, key of the start) -> record
        self._commits: dict[tuple[str, str], Call] = {}  # by user and key
        self._sweeper: asyncio.Task[None] | None = None
        self._collected = time.monotonic()
        self._operations: dict[str, Callable[..., Awaitable[dict[str, Any] | None]]] = {
            "start": self._start,
            "start_async": self._start_async,
            "get_status": self._get_status,
            "is_alive": self._is_alive,
            "stop": self._stop,
            "fork": self._fork,
            "commit": self._commit,
            "keep_alive": self._keep_alive,
            "delete_snapshot": self.snapshots.delete,
            "worker/register": self._register,
            "worker/heartbeat": self._heartbeat,
            **hub.operations(),
            "template/register": self.templates.register,
            "template/list": self.templates.list_all,
            "template/delete": self._delete_template,
        }
        gauges.describe(
            self.metrics,
            self._records,
            self._provisioner.queue,
            self._members,
            self.snapshots,
            self.templates,
        )

    async def start(self) -> None:
        """Start the periodic work: idle sandboxes, lost workers, templates."""
        self._sweeper = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        """End every sandbox."""
        if self._sweeper:
            self._sweeper.cancel()
        self.templates.clear()
        await self._provisioner.close()
        self.hub.close()

    def add_worker(
        self,
        name: str,
        link: Link,
        kinds: list[str],
        resources: Resources,
        incarnation: str,
        find_ended: Callable[[], list[str]] | None = None,
    ) -> None:
        """Use a worker from now on; an earlier one of the same name counts as lost.

        Args:
          name: unique among the workers.
          link: how to reach it.
          kinds: what it can make, as "backend:isolation".
          resources: what it gives out.
          incarnation: identifies the worker's process.
          find_ended: see fleet.Member; only for a worker in this process.
        """
        self._provisioner.add_worker(name, link, kinds, resources, incarnation, find_ended)

    def lose_worker(self, name: str, reason: str) -> None:
        """Count a worker as lost at once, where its end is known before heartbeats are missed."""
        member = self._members.get(name)
        if member:
            self._provisioner.drop_worker(member, reason)

    # -- the service

    async def call(
        self,
        op: str,
        arguments: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        """Carry out an operation, or pass it on to the worker that has the sandbox."""
        if op not in IN_SANDBOX:
            return await self._operations[op](arguments, user)
        if op == "restore":
            self.snapshots.find(arguments["snapshot"], user)
        if op != "snapshot":
            return await self._pass_on(op, arguments, files, user)
        self.snapshots.check_room(user)
        # shielded: a caller that leaves must not leave an unknown snapshot behind
        snapshot = self._background.start(self._pass_on(op, arguments, files, user))
        return await asyncio.shield(snapshot)

    async def _pass_on(
        self, op: str, arguments: dict[str, Any], files: Mapping[str, bytes] | None, user: str
    ) -> dict[str, Any] | None:
        async with self._using(arguments["sandbox"], user) as record:
            member = record.placed_on
            answer = await member.link.call(op, arguments, files)
            if op in ("snapshot", "wait") and answer and "snapshot" in answer:
                self.snapshots.add(answer["snapshot"], user, member)
            return answer

    async def read(
        self, op: str, arguments: dict[str, Any], user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of a file, of an archive, or of a blob in the hub."""
        if op == "hub/fetch":
            source = self.hub.fetch(arguments["digest"])
        else:
            source = self._read_in_sandbox(op, arguments, user)
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                yield piece

    async def _read_in_sandbox(
        self, op: str, arguments: dict[str, Any], user: str
    ) -> AsyncGenerator[bytes, None]:
        async with (
            self._using(arguments["sandbox"], user) as record,
            contextlib.aclosing(record.placed_on.link.read(op, arguments)) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        """Store a blob in the hub, or write a file or an archive into a sandbox."""
        if op == "hub/store":
            digest, size = await self.hub.store(pieces)
            return {"digest": digest, "bytes": size}
        async with self._using(arguments["sandbox"], user) as record:
            return await record.placed_on.link.write(op, arguments, pieces)

    async def connect(self, arguments: dict[str, Any], user: str = "") -> Pipe:
        """Open a connection to a port in a sandbox."""
        async with self._using(arguments["sandbox"], user) as record:
            return await record.placed_on.link.connect(arguments)

    @contextlib.asynccontextmanager
    async def _using(self, name: str, user: str) -> AsyncIterator[Record]:
        """Hold a running sandbox of a user for a request: meanwhile it does not count as idle.

        If the worker does not answer, find out whether it is lost, and report that instead.
        """
        record = self._owned_record(name, user)
        if record.state in ENDED:
            raise record.failure()
        if record.state != "running":
            raise Refusal("sandbox", f"the sandbox is {record.state}; wait until it runs")
        member = record.placed_on
        record.busy += 1
        try:
            yield record
        except Disconnected as error:
            await self._provisioner.ping(member)
            if record.state in ENDED:
                raise record.failure() from error
            raise Refusal("no_answer", f"worker {member.name} did not answer: {error}") from error
        finally:
            record.busy -= 1
            record.used = time.monotonic()

    def _owned_record(self, name: str, user: str) -> Record:
        """Look up a sandbox of `user`. Another user's sandbox is reported as unknown."""
        record = self._records.get(name)
        if record is None or record.user != user:
            raise Refusal("unknown_sandbox", f"there is no sandbox {name[:80]!r} of {user}'s")
        return record

    # -- starting

    async def start_sandbox(self, arguments: dict[str, Any], user: str) -> Record:
        """Start a sandbox, or find the one of the same key.

        Args:
          arguments: members of a start request. Without `wait` the call lasts until the sandbox
            runs or has failed, and a caller that leaves ends a sandbox that has no key.
          user: whose it is.

        Raises:
          SandboxError, ValueError: it cannot be started, or has failed.
        """
        key = arguments.get("key")
        record = self._by_key.get((user, key)) if key else None
        if record is None:
            record = self._take_ready(arguments, user)
            if record is None:
                request = self._start_request(arguments, user)
                record = self._provisioner.admit(request, user, arguments)
            self._remember_key(record, user, key)
        await self._await_start(record, arguments.get("wait"))
        return record

    async def _start(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = await self.start_sandbox(arguments, user)
        return record.describe()

    async def _start_async(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        return await self._start(arguments | {"wait": 0.0}, user)

    async def _await_start(self, record: Record, wait: float | None) -> None:
        """Wait until a sandbox runs, up to `wait` seconds; raise its error if it has ended."""
        try:
            await record.wait_until_decided(wait)
        except asyncio.CancelledError:
            if wait is None and record.key is None:  # no request can name it any more
                self._provisioner.stop_later(record, "its caller left")
            raise
        if record.state in ENDED:
            raise record.failure()

    async def _await_and_describe(self, record: Record, wait: float | None) -> dict[str, Any]:
        await self._await_start(record, wait)
        return record.describe()

    def _start_request(self, arguments: Mapping[str, Any], user: str) -> StartRequest:
        request = self.templates.resolve(arguments.get("config", {}))
        name = arguments.get("snapshot")
        if name:
            member = self.snapshots.find(name, user).member
            request = request._replace(snapshot=name, pinned=member)
        return request

    def _take_ready(self, arguments: Mapping[str, Any], user: str) -> Record | None:
        """Give the caller a sandbox that was kept ready, if there is one for the request."""
        if "snapshot" in arguments:
            return None
        record = self.templates.take(arguments.get("config", {}))
        if record is not None:
            record.hand_over(user, arguments, self._auto_clear)
            self._provisioner.count_start("ready")
        return record

    def _start_ready(self, request: StartRequest) -> Record:
        return self._provisioner.admit(request, POOL_USER, {})

    def _remember_key(self, record: Record, user: str, key: str | None) -> None:
        if key:
            record.key = (user, key)
            self._by_key[record.key] = record

    # -- other operations of the admin itself

    async def _get_status(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = self._owned_record(arguments["sandbox"], user)
        return await self._await_and_describe(record, arguments.get("wait", 0.0))

    async def _is_alive(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = self._records.get(arguments["sandbox"])
        state = record.state if record and record.user == user else "unknown"
        return {"is_alive": state == "running", "state": state}

    async def _stop(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = self._records.get(arguments["sandbox"])
        if record is not None and record.user == user:
            await self._provisioner.stop(record, "the sandbox was stopped")
        return {}

    async def _fork(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Start a copy of a sandbox; requests with the same key get the same copy."""
        key = arguments.get("key")
        record = self._by_key.get((user, key)) if key else None
        if record is None:
            original = self._owned_record(arguments["sandbox"], user)
            making = self._background.start(self._make_fork(original, user, key))
            try:
                record = await asyncio.shield(making)
            except asyncio.CancelledError:
                if key is None:  # no request can name it any more
                    making.add_done_callback(self._stop_abandoned_fork)
                raise
        return await self._await_and_describe(record, arguments.get("wait"))

    def _stop_abandoned_fork(self, making: asyncio.Task[Record]) -> None:
        if not making.cancelled() and not making.exception():
            self._provisioner.stop_later(making.result(), "its caller left")

    async def _make_fork(self, original: Record, user: str, key: str | None) -> Record:
        async with self._using(original.name, user):
            member = original.placed_on
            call = f"fork-{secrets.token_hex(8)}"
            answer = await member.finish("snapshot", {"sandbox": original.name}, call)
        snapshot = answer["snapshot"]
        self.snapshots.add(snapshot, user, member)
        request = original.request._replace(snapshot=snapshot, pinned=member, environment=None)
        settings = {
            "experiment": original.experiment,
            "auto_clear_seconds": original.auto_clear,
        }
        record = self._provisioner.admit(request, user, settings)
        record.own_snapshot = snapshot
        self._remember_key(record, user, key)
        self._background.start(self._delete_snapshot_when_started(record, snapshot))
        return record

    async def _delete_snapshot_when_started(self, record: Record, snapshot: str) -> None:
        await record.wait_until_decided(None)
        await self.snapshots.delete({"snapshot": snapshot}, record.user)

    async def _commit(self, arguments: dict[str, Any], user: str) -> dict[str, Any] | None:
        """Save a sandbox's workspace; requests with the same key join the first.

        One that failed is done again.
        """
        call = arguments.get("call")
        if call is None:
            return await self._save(arguments, user)
        key = (user, call)
        self._commits = {
            name: commit
            for name, commit in self._commits.items()
            if commit.idle_seconds(time.monotonic()) < COMMIT_KEPT_SECONDS
        }
        earlier = self._commits.get(key)
        if earlier is None or (earlier.task.done() and not earlier.succeeded):
            self._commits[key] = Call(self._save(arguments, user))
        return await self._commits[key].wait(arguments.get("wait", 0.0))

    async def _save(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        async with self._using(arguments["sandbox"], user) as record:
            workspace = {"sandbox": record.name, "path": "."}
            pieces = record.placed_on.link.read("download", workspace)
            digest, size = await self.hub.store(pieces)
        name = arguments["name"]
        tags = tuple(arguments.get("tags", ()))
        entry = self.hub.register(name, "environment", digest, user, tags=tags)
        return {"digest": entry.digest, "name": entry.name, "bytes": size}

    async def _keep_alive(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Count sandboxes and snapshots as used; return the names that the user does not have."""
        now = time.monotonic()
        unknown = []
        for name in arguments["ids"]:
            record = self._records.get(name)
            if record is not None and record.user == user and record.state not in ENDED:
                record.used = now
            elif not self.snapshots.keep_alive(name, user):
                unknown.append(name)
        return {"unknown": unknown}

    async def _delete_template(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        for record in self.templates.delete(arguments["name"], user):
            await self._provisioner.stop(record, "its template was deleted")
        return {}

    # -- requests of workers

    async def _register(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        name = arguments["name"]
        incarnation = arguments["incarnation"]
        known = self._members.get(name)
        if known is None or known.incarnation != incarnation:
            url = arguments["url"]
            link = Client(url, self._worker_token)
            try:
                await check_reachable(link, url, incarnation)
            except SandboxError as error:
                await link.close()
                self._provisioner.refused[name] = str(error)
                raise
            self._provisioner.refused.pop(name, None)
            resources = Resources(*(arguments[field] for field in Resources._fields))
            self.add_worker(name, link, arguments["kinds"], resources, incarnation)
        return {}

    async def _heartbeat(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        member = self._provisioner.worker_of(arguments["incarnation"])
        if member is None:
            raise Refusal(
                "not_found",
                "this worker is not known here, or was given up: end all sandboxes and register"
                " again",
            )
        member.seen = time.monotonic()
        self._provisioner.note_ended(arguments.get("ended", []), member)
        held = arguments.get("held", [])
        forgotten = [name for name in held if self._provisioner.is_forgotten(name, member)]
        return {"forgotten": forgotten}

    # -- periodic work

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self._sweep(time.monotonic())
            except Exception as error:
                log.error("a sweep failed", exc_info=error)

    def _sweep(self, now: float) -> None:
        for member in list(self._members.values()):
            self._check_worker(member, now)
        for record in list(self._records.values()):
            self._stop_if_due(record, now)
        self._forget_ended(now)
        for name, user in self.snapshots.unused(now):
            self._background.start(self.snapshots.delete({"snapshot": name}, user))
        self.templates.refill(now)
        if now - self._collected > COLLECT_SECONDS:
            self._collected = now
            self._background.start(asyncio.to_thread(self.hub.collect))

    def _check_worker(self, member: Member, now: float) -> None:
        silent = now - member.seen
        if member.find_ended is not None:
            self._provisioner.note_ended(member.find_ended(), member)
        elif silent > fleet.DEAD_SECONDS:
            self._provisioner.drop_worker(member, f"no sign of it for {silent:.0f} s")

    def _stop_if_due(self, record: Record, now: float) -> None:
        if record.state != "running":
            return
        is_idle = not record.busy and now - record.used > record.auto_clear
        if is_idle and record.user != POOL_USER:
            self.metrics.count(
                "rock_auto_cleared_total", "Sandboxes removed because they were idle."
            )
            reason = f"the sandbox was removed after {record.auto_clear:g} s without use"
            self._provisioner.stop_later(record, reason)

    def _forget_ended(self, now: float) -> None:
        ended = [
            record
            for record in self._records.values()
            if record.state in ENDED and not record.holds_place
        ]
        surplus = len(ended) - MAX_REMEMBERED
        for number, record in enumerate(ended):
            if now - record.ended > REMEMBERED_SECONDS or number < surplus:
                self._provisioner.forget(record)
                if record.key:
                    self._by_key.pop(record.key, None)
