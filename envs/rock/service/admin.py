"""The admin: gives sandboxes out, fairly and where there is room, knows where each is, and passes
on what is done in them.

Requests go through the admin to the worker that has the sandbox. So callers know one address,
users' tokens never reach a worker, workers need not be reachable for callers, and the admin sees
what idles; the price is one hop on the machine room's network (about a millisecond), none to the
worker in its own process.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError
from envs.rock.service import fleet, gauges
from envs.rock.service.fair import FairQueue
from envs.rock.service.fleet import PING_SECONDS, Member, Resources
from envs.rock.service.hub import EnvHub
from envs.rock.service.metrics import Metrics
from envs.rock.service.records import AUTO_CLEAR_SECONDS, ENDED, WAITING, Plan, Record
from envs.rock.service.snapshots import Snapshots
from envs.rock.service.templates import POOL_USER, Templates
from envs.rock.wire.api import IN_SANDBOX, MAX_WAIT, Disconnected, Refusal
from envs.rock.wire.client import Client, Pipe, patiently

log = logging.getLogger("rock.admin")
SWEEP_SECONDS, COLLECT_SECONDS = 1.0, 3600.0
MAX_WAITING, MAX_WAITING_EACH = 50_000, 20_000  # starts in the queue, of all and of one user
REMEMBERED_SECONDS, MAX_REMEMBERED = 600.0, 20_000  # ended sandboxes, so that callers are told why
START_TRIES = 3  # where workers are lost under it


class Admin:
    """See server.Service. Use it in one event loop: `start` it there, and `close`."""

    def __init__(
        self,
        hub: EnvHub,
        worker_token: str,
        metrics: Metrics | None = None,
        auto_clear_seconds: float = AUTO_CLEAR_SECONDS,
    ):
        self.hub, self.metrics, self._worker_token, self._auto_clear = (
            hub,
            metrics or Metrics(),
            worker_token,
            auto_clear_seconds,
        )
        self.templates = Templates(hub, self._start_ready)
        self.members: dict[str, Member] = {}
        self.records: dict[str, Record] = {}
        self._keys: dict[tuple[str, str], Record] = {}
        self.snapshots = Snapshots()
        self.queue: FairQueue[Record] = FairQueue()
        self._tasks: set[asyncio.Task] = set()
        self._sweeper: asyncio.Task | None = None
        self._collected = time.monotonic()
        self._ops: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "start": self._start,
            "start_async": lambda arguments, user: self._start(arguments | {"wait": 0.0}, user),
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
            "template/list": self.templates.list,
            "template/delete": self._template_delete,
        }
        gauges.describe(self)

    async def start(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def close(self) -> None:
        """End every sandbox."""
        if self._sweeper:
            self._sweeper.cancel()
        self.templates.clear()
        await asyncio.gather(
            *(
                self._end(record, "stopped", Refusal("ended", "the admin was stopped"))
                for record in list(self.records.values())
            ),
            return_exceptions=True,
        )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self.members.values():
            await member.link.close()
        self.hub.close()

    def add_worker(
        self,
        name: str,
        link: Any,
        kinds: list[str],
        resources: Resources,
        incarnation: str,
        local: bool = False,
    ) -> None:
        """A worker that is there from now on; one of its name that was there is lost."""
        if old := self.members.get(name):
            self._bury(old, "its place was taken by a new process of that name")
        self.members[name] = Member(name, link, kinds, resources, incarnation, local)
        log.info(
            "worker %s is there: %s, %s", name, ", ".join(kinds) or "no backend works", resources
        )
        self._schedule()

    def lose_worker(self, name: str, why: str) -> None:
        """Whoever started it knows that it is gone, before it is missed here."""
        if member := self.members.get(name):
            self._bury(member, why)

    # -- the service

    async def call(
        self,
        op: str,
        arguments: dict[str, Any],
        files: Mapping[str, bytes] | None = None,
        user: str = "",
    ) -> dict[str, Any] | None:
        if op not in IN_SANDBOX:
            return await self._ops[op](arguments, user)
        if op == "restore":
            self.snapshots.find(arguments["snapshot"], user)
        if op == "snapshot":
            self.snapshots.check_room(user)
        work = self._pass_on(op, arguments, files, user)
        return await (
            asyncio.shield(self._background(work)) if op == "snapshot" else work
        )  # a caller that leaves must not leave one that nobody knows

    async def _pass_on(
        self, op: str, arguments: dict[str, Any], files: Mapping[str, bytes] | None, user: str
    ) -> dict[str, Any] | None:
        async with self._using(arguments["sandbox"], user) as record:
            answer = await record.member.link.call(op, arguments, files)
            if op in ("snapshot", "wait") and answer and "snapshot" in answer:
                self.snapshots.add(answer["snapshot"], user, record.member)
            return answer

    async def read(
        self, op: str, arguments: dict[str, Any], user: str = ""
    ) -> AsyncIterator[bytes]:
        if op == "hub/fetch":
            source = self.hub.fetch(arguments["digest"])
        else:
            source = self._read_in_sandbox(op, arguments, user)
        async with contextlib.aclosing(source) as pieces:
            async for piece in pieces:
                yield piece

    async def _read_in_sandbox(
        self, op: str, arguments: dict[str, Any], user: str
    ) -> AsyncIterator[bytes]:
        async with self._using(arguments["sandbox"], user) as record:
            async with contextlib.aclosing(record.member.link.read(op, arguments)) as pieces:
                async for piece in pieces:
                    yield piece

    async def write(
        self, op: str, arguments: dict[str, Any], pieces: AsyncIterator[bytes], user: str = ""
    ) -> dict[str, Any]:
        if op == "hub/store":
            digest, size = await self.hub.store(pieces)
            return {"digest": digest, "bytes": size}
        async with self._using(arguments["sandbox"], user) as record:
            return await record.member.link.write(op, arguments, pieces)

    async def connect(self, arguments: dict[str, Any], user: str = "") -> Pipe:
        async with self._using(arguments["sandbox"], user) as record:
            return await record.member.link.connect(arguments)

    @contextlib.asynccontextmanager
    async def _using(self, name: str, user: str) -> AsyncIterator[Record]:
        """The sandbox, if it runs and is the user's.

        It does not idle meanwhile, and if it was lost, that is found out and told.
        """
        record = self._mine(name, user)
        if record.state != "running":
            raise (
                record.error.with_traceback(None)
                if record.state in ENDED
                else Refusal("sandbox", f"the sandbox is {record.state}; wait until it runs")
            )
        record.busy += 1
        try:
            yield record
        except Disconnected as error:
            await self._ping(record.member)
            if record.state in ENDED:
                raise record.error from error
            raise Refusal("busy", f"worker {record.member.name} did not answer: {error}") from error
        finally:
            record.busy -= 1
            record.used = time.monotonic()

    # -- provisioning

    async def _start(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """`start` without `wait` holds its caller until the end of it; a caller that leaves then
        wants none.
        """
        key = arguments.get("key")
        record = self._keys.get((user, key)) if key else None
        if record is None:
            record = self._ready_made(arguments, user) or self.admit(
                self._plan(arguments, user), user, arguments
            )
            if key:
                record.key = (user, key)
                self._keys[record.key] = record
        return await self._told(record, arguments.get("wait"))

    async def _told(self, record: Record, wait: float | None) -> dict[str, Any]:
        try:
            await record.decided(wait)
        except asyncio.CancelledError:
            if wait is None and record.key is None:
                self._background(self._end(record, "stopped", Refusal("ended", "its caller left")))
            raise
        if record.state in ENDED:
            raise record.error.with_traceback(None)
        return record.describe()

    def _plan(self, arguments: Mapping[str, Any], user: str) -> Plan:
        """What is to be started. ValueError, IsolationError or Refusal where it cannot be had."""
        plan = self.templates.plan(arguments.get("config", {}))
        if name := arguments.get("snapshot"):
            plan = plan._replace(snapshot=name, pinned=self.snapshots.find(name, user).member)
        return plan

    def _ready_made(self, arguments: Mapping[str, Any], user: str) -> Record | None:
        """One that was kept ready, given to the caller."""
        if "snapshot" in arguments:
            return None
        record = self.templates.take(arguments.get("config", {}))
        if record is not None:
            record.hand_over(user, arguments, self._auto_clear)
            self.metrics.count("rock_starts_total", "Sandboxes given out, by way.", way="ready")
        return record

    def admit(self, plan: Plan, user: str, arguments: Mapping[str, Any]) -> Record:
        """Into the queue; Refusal if that is full, or no worker could ever take it."""
        able = [
            member
            for member in self.members.values()
            if plan.pinned in (None, member) and plan.kind in member.kinds
        ]
        if plan.pinned and not plan.pinned.alive:
            raise Refusal("start_failed", f"the snapshot was lost with worker {plan.pinned.name}")
        if self.members and not any(plan.need.within(member.total) for member in able):
            whom = (
                "no worker has " + plan.kind
                if not able
                else f"the largest worker that could has {max(member.total for member in able)}"
            )
            raise Refusal(
                "no_capacity", f"a sandbox of {plan.need} for {plan.kind} fits nowhere: {whom}"
            )
        if len(self.queue) >= MAX_WAITING or self.queue.waiting(user) >= MAX_WAITING_EACH:
            raise Refusal(
                "queue_full",
                f"{len(self.queue)} starts wait, {self.queue.waiting(user)} of them {user}'s; come"
                " again later",
            )
        record = Record(f"sb-{secrets.token_hex(12)}", user, plan, arguments, self._auto_clear)
        self.records[record.name] = record
        self.queue.add(record, user, record.experiment, plan.need.memory_mb)
        record.timer = asyncio.get_running_loop().call_later(
            plan.config.start_timeout, self._too_late, record
        )
        self._schedule()
        return record

    def _schedule(self) -> None:
        """Start what fits, in fair order.

        What does not fit yet holds the workers that could take it: a large one is not passed for
        ever by small ones.
        """
        held: set[Member] = set()
        chosen: Member | None = None
        members = list(self.members.values())

        def suits(record: Record) -> bool | None:
            nonlocal chosen
            if len(held) == len(members):
                return None
            able = {
                member
                for member in members
                if record.plan.pinned in (None, member) and record.plan.kind in member.kinds
            } - held
            chosen = fleet.emptiest(able, record.plan.need)
            if chosen is None:
                held.update(able)
            return chosen is not None

        while (record := self.queue.take(suits)) is not None:
            chosen.take(record.plan.need)
            record.holds_place = True
            record.member, record.state, record.left_queue = chosen, "starting", time.monotonic()
            self.metrics.observe(
                "rock_queue_seconds",
                "From the request to a place on a worker.",
                record.left_queue - record.created,
            )
            record.provisioning = self._background(self._provision(record, chosen))

    async def _provision(self, record: Record, member: Member) -> None:
        plan, record.tries = record.plan, record.tries + 1
        request = {
            "sandbox": record.name,
            "backend": plan.config.backend,
            "config": plan.wire,
            "call": "create",
            "wait": MAX_WAIT,
        }
        if plan.snapshot:
            request["snapshot"] = plan.snapshot
        try:
            while (info := await member.link.call("worker/create", request)) is None:
                pass  # its own time limit ends it
            if plan.environment:
                await member.link.write(
                    "upload",
                    {"sandbox": record.name, "path": "."},
                    self.hub.fetch(plan.environment),
                )
        except Disconnected as error:
            await self._ping(member)
            if (
                record.state == "starting" and record.member is member and member.alive
            ):  # it may be there, half made
                await self._end(
                    record,
                    "failed",
                    Refusal("start_failed", f"worker {member.name} did not answer: {error}"),
                )
        except Exception as error:
            if record.member is not member:  # lost meanwhile: it is started anew elsewhere
                return
            if not isinstance(error, SandboxError):
                log.error("a start failed", exc_info=error)
                error = Refusal("internal", "the service failed; its log says how")
            with contextlib.suppress(SandboxError):
                await member.link.call("worker/stop", {"sandbox": record.name})
            self._settle(
                record,
                "failed",
                (
                    error
                    if not isinstance(error, SandboxClosedError)
                    else SandboxStartError(str(error))
                ),
            )
        else:
            if record.state == "starting" and record.member is member:
                record.run(info)
                self.metrics.count("rock_starts_total", "Sandboxes given out, by way.", way="cold")
                self.metrics.observe(
                    "rock_start_seconds",
                    "From the request to a sandbox that runs.",
                    time.monotonic() - record.created,
                )

    def _too_late(self, record: Record) -> None:
        if record.state in WAITING:
            where = "in the queue" if record.state == "queued" else "while it was made"
            self._background(
                self._end(
                    record,
                    "failed",
                    Refusal(
                        "start_timeout",
                        f"no sandbox within {record.plan.config.start_timeout:g} s: the time ran"
                        f" out {where}",
                    ),
                )
            )

    async def _end(self, record: Record, state: str, error: Exception) -> None:
        """Whatever it is doing. Its place is free when nothing of it is left."""
        if record.state in ENDED:
            return
        if record.state == "queued":
            self.queue.remove(record, record.user, record.experiment)
            self._settle(record, state, error)
            return
        member, provisioning = record.member, record.provisioning
        record.end(state, error)
        if provisioning and not provisioning.done() and provisioning is not asyncio.current_task():
            provisioning.cancel()
            await asyncio.gather(provisioning, return_exceptions=True)
        try:
            if member.alive:
                await patiently(
                    lambda: member.link.call("worker/stop", {"sandbox": record.name}), PING_SECONDS
                )
        except SandboxError as failure:
            log.warning(
                "sandbox %s on worker %s did not end: %s",
                record.name,
                member.name,
                type(failure).__name__,
            )
            raise
        finally:
            self._free(record)

    def _settle(self, record: Record, state: str, error: Exception) -> None:
        """It has ended, and nothing of it runs."""
        if record.state not in ENDED:
            record.end(state, error)
        self._free(record)

    def _free(self, record: Record) -> None:
        if record.holds_place:
            record.holds_place = False
            record.member.give_back(record.plan.need)
        self.metrics.count("rock_ends_total", "Sandboxes that ended, by how.", how=record.state)
        self.templates.ended(record)
        self._schedule()

    # -- what callers ask of the admin itself

    def _mine(self, name: str, user: str) -> Record:
        """Others' sandboxes are as unknown as those that never were."""
        record = self.records.get(name)
        if record is None or record.user != user:
            raise Refusal("unknown_sandbox", f"there is no sandbox {name[:80]!r} of {user}'s")
        return record

    async def _get_status(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = self._mine(arguments["sandbox"], user)
        return await self._told(record, arguments.get("wait", 0.0))

    async def _is_alive(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = self.records.get(arguments["sandbox"])
        state = record.state if record and record.user == user else "unknown"
        return {"is_alive": state == "running", "state": state}

    async def _stop(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        record = self.records.get(arguments["sandbox"])
        if record is not None and record.user == user:
            await self._to_its_end(record, "the sandbox was stopped")
        return {}

    async def _to_its_end(self, record: Record, why: str) -> None:
        """Whoever asked may leave meanwhile: a place is free only when nothing of the sandbox is
        left.
        """
        await asyncio.shield(self._background(self._end(record, "stopped", Refusal("ended", why))))

    async def _fork(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Its key makes it one fork, however often it is asked for."""
        key = arguments.get("key")
        record = self._keys.get((user, key)) if key else None
        if record is None:
            making = self._background(
                self._make_fork(self._mine(arguments["sandbox"], user), user, key)
            )
            try:
                record = await asyncio.shield(making)
            except (
                asyncio.CancelledError
            ):  # its caller left: one without a key nobody can ask for any more
                if key is None:
                    making.add_done_callback(
                        lambda made: (
                            made.cancelled()
                            or made.exception()
                            or self._background(self._to_its_end(made.result(), "its caller left"))
                        )
                    )
                raise
        return await self._told(record, arguments.get("wait"))

    async def _make_fork(self, original: Record, user: str, key: str | None) -> Record:
        async with self._using(original.name, user):
            call = {
                "sandbox": original.name,
                "call": f"fork-{secrets.token_hex(8)}",
                "wait": MAX_WAIT,
            }
            while (answer := await original.member.link.call("snapshot", call)) is None:
                pass  # its own time limit ends it
        self.snapshots.add(answer["snapshot"], user, original.member)
        record = self.admit(
            original.plan._replace(
                snapshot=answer["snapshot"], pinned=original.member, environment=None
            ),
            user,
            {"experiment": original.experiment, "auto_clear_seconds": original.auto_clear},
        )
        record.own_snapshot = answer["snapshot"]
        if key:
            record.key = (user, key)
            self._keys[record.key] = record
        self._background(self._forget_when_started(record))
        return record

    async def _forget_when_started(self, record: Record) -> None:
        await record.decided(None)
        await self.snapshots.delete({"snapshot": record.own_snapshot}, record.user)

    async def _commit(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        async with self._using(arguments["sandbox"], user) as record:
            digest, size = await self.hub.store(
                record.member.link.read("download", {"sandbox": record.name, "path": "."})
            )
        entry = self.hub.register(
            arguments["name"], "environment", digest, user, tags=tuple(arguments.get("tags", ()))
        )
        return {"digest": entry.digest, "name": entry.name, "bytes": size}

    async def _keep_alive(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Which of them are not there (any more)?"""
        unknown, now = [], time.monotonic()
        for name in arguments["ids"]:
            record = self.records.get(name)
            if record is not None and record.user == user and record.state not in ENDED:
                record.used = now
            elif not self.snapshots.keep_alive(name, user):
                unknown.append(name)
        return {"unknown": unknown}

    async def _template_delete(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        for record in self.templates.delete(arguments["name"], user):
            await self._to_its_end(record, "its template was deleted")
        return {}

    def _start_ready(self, plan: Plan) -> Record:
        return self.admit(plan, POOL_USER, {})

    def running(self, user: str) -> list[Record]:
        return [
            record
            for record in self.records.values()
            if record.user == user and record.state not in ENDED
        ]

    # -- workers

    async def _register(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        resources = Resources(*(arguments[name] for name in Resources._fields))
        known = self.members.get(arguments["name"])
        if known is None or known.incarnation != arguments["incarnation"]:
            self.add_worker(
                arguments["name"],
                Client(arguments["url"], self._worker_token),
                arguments["kinds"],
                resources,
                arguments["incarnation"],
            )
        return {}

    async def _heartbeat(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        member = next(
            (
                member
                for member in self.members.values()
                if member.incarnation == arguments["incarnation"]
            ),
            None,
        )
        if member is None:
            raise Refusal(
                "not_found",
                "this worker is not known here, or was given up: end all sandboxes and register"
                " again",
            )
        member.seen = time.monotonic()
        self._note_ended(arguments.get("ended", []), member)
        return {
            "forgotten": [
                name for name in arguments.get("held", []) if self._is_forgotten(name, member)
            ]
        }

    def _is_forgotten(self, name: str, member: Member) -> bool:
        """A sandbox whose end did not reach its worker. One that holds its place is being ended."""
        record = self.records.get(name)
        return (
            record is None
            or record.member is not member
            or (record.state in ENDED and not record.holds_place)
        )

    def _note_ended(self, names: list[str], member: Member) -> None:
        for name in names:
            record = self.records.get(name)
            if record is not None and record.member is member and record.state == "running":
                self._background(
                    self._end(
                        record,
                        "failed",
                        Refusal("ended", "the sandbox ended by itself: its process died"),
                    )
                )

    async def _ping(self, member: Member) -> None:
        """Whether it is still there, and the same; if not, what it had is lost."""
        try:
            async with asyncio.timeout(PING_SECONDS):
                answer = await member.link.call("worker/ping", {})
            if answer.get("incarnation") == member.incarnation:
                return
        except (SandboxError, TimeoutError):
            pass
        self._bury(member, "it does not answer")

    def _bury(self, member: Member, why: str) -> None:
        """A worker is lost, and with it what ran there.

        What was only being started is started elsewhere.
        """
        if not member.alive:
            return
        member.alive = False
        if self.members.get(member.name) is member:
            del self.members[member.name]
        log.warning("worker %s is lost: %s", member.name, why)
        self.metrics.count("rock_workers_lost_total", "Workers that were lost.")
        self.snapshots.lose(member)
        for record in [
            record
            for record in self.records.values()
            if record.member is member and record.state not in ENDED
        ]:
            lost = Refusal(
                "worker_lost", f"worker {member.name}, which ran the sandbox, is lost: {why}"
            )
            if record.state == "starting" and record.tries < START_TRIES and not record.plan.pinned:
                record.member, record.state, record.holds_place = None, "queued", False
                self.queue.add(
                    record, record.user, record.experiment, 0.0, first=True
                )  # it has paid
            else:
                record.holds_place = False
                self._settle(record, "failed", lost)
        self._background(member.link.close())
        self._schedule()

    # -- what happens by itself

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self._sweep(time.monotonic())
            except Exception as error:
                log.error("a sweep failed", exc_info=error)

    def _sweep(self, now: float) -> None:
        for member in list(self.members.values()):
            if member.local:
                self._note_ended(member.link.ended(), member)
            elif now - member.seen > fleet.DEAD_SECONDS:
                self._bury(member, f"no sign of it for {now - member.seen:.0f} s")
        for record in list(self.records.values()):
            if (
                record.state == "running"
                and record.user != POOL_USER
                and not record.busy
                and now - record.used > record.auto_clear
            ):
                self.metrics.count(
                    "rock_auto_cleared_total", "Sandboxes removed since nobody used them."
                )
                self._background(
                    self._end(
                        record,
                        "stopped",
                        Refusal(
                            "ended",
                            f"the sandbox was removed after {record.auto_clear:g} s without use",
                        ),
                    )
                )
            elif record.state == "running" and record.expires is not None and now > record.expires:
                self._background(
                    self._end(
                        record, "stopped", Refusal("ended", "the sandbox's time to live is over")
                    )
                )
        ended = [
            record
            for record in self.records.values()
            if record.state in ENDED and not record.holds_place
        ]
        for number, record in enumerate(ended):
            if now - record.ended > REMEMBERED_SECONDS or len(ended) - number > MAX_REMEMBERED:
                del self.records[record.name]
                if record.key:
                    self._keys.pop(record.key, None)
        for name, user in self.snapshots.forsaken(now):
            self._background(self.snapshots.delete({"snapshot": name}, user))
        self.templates.refill(now)
        if now - self._collected > COLLECT_SECONDS:
            self._collected = now
            self._background(asyncio.to_thread(self.hub.collect))

    def _background(self, work: Awaitable[None]) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # told where it matters
        return task
