"""Starting and ending sandboxes: the queue, the choice of a worker, and the workers themselves.

The admin (admin.py) decides what callers may ask for; this module carries it out.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from envs.rock.errors import SandboxClosedError, SandboxError, SandboxStartError
from envs.rock.images.hub import EnvHub
from envs.rock.service import fleet
from envs.rock.service.background import BackgroundTasks
from envs.rock.service.fair import FairQueue
from envs.rock.service.fleet import AGAIN_SECONDS, PING_SECONDS, Link, Member, Resources
from envs.rock.service.metrics import Metrics
from envs.rock.service.records import ENDED, WAITING, Record, StartRequest, State
from envs.rock.wire.client import retry_for
from envs.rock.wire.errors import Disconnected, Refusal

log = logging.getLogger("rock.admin")
MAX_WAITING = 50_000  # starts in the queue, of all users
MAX_WAITING_EACH = 20_000  # starts in the queue, of one user
MAX_START_TRIES = 3  # of a start whose worker is lost


class Provisioner:
    """The sandboxes of a fleet and the workers that run them. Use it in one event loop.

    Args:
      hub: holds the archives of environments, which are unpacked after a start.
      metrics: where starts, ends and lost workers are counted.
      auto_clear_seconds: idle time after which a sandbox is removed, if its caller names none.
      on_ended: called with each record when nothing of its sandbox runs any more.
      on_worker_lost: called with each worker that is lost.
    """

    def __init__(
        self,
        hub: EnvHub,
        metrics: Metrics,
        auto_clear_seconds: float,
        on_ended: Callable[[Record], None],
        on_worker_lost: Callable[[Member], None],
    ):
        self.members: dict[str, Member] = {}
        self.records: dict[str, Record] = {}
        self.queue: FairQueue[Record] = FairQueue()
        self.background = BackgroundTasks()
        self.refused: dict[str, str] = {}  # why workers of these names could not register
        self._hub = hub
        self._metrics = metrics
        self._auto_clear = auto_clear_seconds
        self._on_ended = on_ended
        self._on_worker_lost = on_worker_lost

    async def close(self) -> None:
        """End every sandbox and close the connections to the workers."""
        stopped = Refusal("ended", "the admin was stopped")
        ends = [self.end(record, "stopped", stopped) for record in list(self.records.values())]
        await asyncio.gather(*ends, return_exceptions=True)
        await self.background.close()
        for member in self.members.values():
            await member.link.close()

    # -- starting

    def admit(self, request: StartRequest, user: str, arguments: Mapping[str, Any]) -> Record:
        """Put a start into the queue.

        Args:
          request: what is to be started.
          user: whose sandbox it will be.
          arguments: see Record.

        Raises:
          Refusal: the queue is full, or no worker could ever take the sandbox.
        """
        self._check_possible(request)
        waiting = self.queue.waiting(user)
        if len(self.queue) >= MAX_WAITING or waiting >= MAX_WAITING_EACH:
            raise Refusal(
                "queue_full",
                f"{len(self.queue)} starts wait, {waiting} of them {user}'s; come again later",
            )
        name = f"sb-{secrets.token_hex(12)}"
        record = Record(name, user, request, arguments, self._auto_clear)
        self.records[name] = record
        self.queue.add(record, user, record.experiment, request.need.memory_mb)
        record.timer = asyncio.get_running_loop().call_later(
            request.config.start_timeout, self._time_out, record
        )
        self._schedule()
        return record

    def _check_possible(self, request: StartRequest) -> None:
        if request.pinned and not request.pinned.alive:
            raise Refusal(
                "start_failed", f"the snapshot was lost with worker {request.pinned.name}"
            )
        able = [member for member in self.members.values() if request.can_run_on(member)]
        has_room = any(request.need.within(member.total) for member in able)
        if has_room or not self.members:  # without workers the start waits for one
            return
        reason = f"no worker has {request.kind}"
        if able:
            largest = max(member.total for member in able)
            reason = f"the largest worker that could has {largest}"
        raise Refusal(
            "no_capacity",
            f"a sandbox of {request.need} for {request.kind} fits nowhere: {reason}",
        )

    def _time_out(self, record: Record) -> None:
        if record.state not in WAITING:
            return
        where = "in the queue" if record.state == "queued" else "while it was made"
        error = Refusal(
            "start_timeout",
            f"no sandbox within {record.request.config.start_timeout:g} s: the time ran out"
            f" {where}{self._why_no_worker()}",
        )
        self.background.start(self.end(record, "failed", error))

    def _why_no_worker(self) -> str:
        """Return what to add to the error of a start for which no worker was there."""
        if self.members:
            return ""
        return "; ".join(["; no worker is registered", *self.refused.values()])

    def _schedule(self) -> None:
        """Start all waiting sandboxes that fit now, in fair order."""
        placement = _Placement(self.members.values())
        while True:
            record = self.queue.take(placement.suits)
            member = placement.chosen
            if record is None or member is None:
                return
            member.take(record.request.need)
            record.holds_place = True
            record.member = member
            record.state = "starting"
            record.left_queue = time.monotonic()
            self._metrics.observe(
                "rock_queue_seconds",
                "From the request to a place on a worker.",
                record.left_queue - record.created,
            )
            record.provisioning = self.background.start(self._provision(record, member))

    async def _provision(self, record: Record, member: Member) -> None:
        record.tries += 1
        try:
            info = await self._create(record, member)
        except Disconnected as error:
            await self.ping(member)
            is_current = record.state == "starting" and record.member is member
            if is_current and member.alive:  # it may be there, half made
                message = f"worker {member.name} did not answer: {error}"
                await self.end(record, "failed", Refusal("start_failed", message))
        except Exception as error:
            if record.member is member:  # else it was lost meanwhile, and is started elsewhere
                await self._fail_start(record, member, error)
        else:
            if record.state == "starting" and record.member is member:
                record.run(info)
                self.count_start("cold")
                self._metrics.observe(
                    "rock_start_seconds",
                    "From the request to a sandbox that runs.",
                    time.monotonic() - record.created,
                )

    async def _create(self, record: Record, member: Member) -> dict[str, Any]:
        """Make the sandbox on a worker, with its files; return the worker's description of it."""
        request = record.request
        arguments = {
            "sandbox": record.name,
            "backend": request.config.backend,
            "config": request.wire,
        }
        if request.snapshot:
            arguments["snapshot"] = request.snapshot
        info = await member.finish("worker/create", arguments, call="create")
        if request.environment:
            target = {"sandbox": record.name, "path": "."}
            blob = request.environment
            await retry_for(
                AGAIN_SECONDS,
                lambda: member.link.write("upload", target, self._hub.fetch(blob)),
            )
        return info

    async def _fail_start(self, record: Record, member: Member, error: Exception) -> None:
        if not isinstance(error, SandboxError):
            log.error("a start failed", exc_info=error)
            error = Refusal("internal", "the service failed; its log says how")
        with contextlib.suppress(SandboxError):
            await member.ask("worker/stop", {"sandbox": record.name})
        if isinstance(error, SandboxClosedError):
            error = SandboxStartError(str(error))
        self._settle(record, "failed", error)

    def count_start(self, way: str) -> None:
        """Count a sandbox that was given out: "cold", or "ready" if it was kept for a template."""
        self._metrics.count("rock_starts_total", "Sandboxes given out, by way.", way=way)

    # -- ending

    async def end(self, record: Record, state: State, error: Exception) -> None:
        """End a sandbox in any state; return when nothing of it runs and its place is free.

        Args:
          record: the sandbox; nothing happens if it has ended.
          state: "stopped" or "failed".
          error: the answer to later requests for the sandbox.

        Raises:
          SandboxError: its worker did not end it. It counts as ended all the same.
        """
        if record.state in ENDED:
            return
        if record.state == "queued":
            self.queue.remove(record, record.user, record.experiment)
            self._settle(record, state, error)
            return
        member = record.placed_on
        record.end(state, error)
        await self._cancel_provisioning(record)
        try:
            if member.alive:
                await member.ask_for(PING_SECONDS, "worker/stop", {"sandbox": record.name})
        except SandboxError as failure:
            kind = type(failure).__name__
            log.warning("sandbox %s on worker %s did not end: %s", record.name, member.name, kind)
            raise
        finally:
            self._free(record)

    async def stop(self, record: Record, reason: str) -> None:
        """End a sandbox on request, also if the caller leaves meanwhile.

        A place counts as free only when nothing of the sandbox is left.
        """
        ending = self.end(record, "stopped", Refusal("ended", reason))
        await asyncio.shield(self.background.start(ending))

    def stop_later(self, record: Record, reason: str) -> None:
        """Start to end a sandbox and do not wait."""
        self.background.start(self.end(record, "stopped", Refusal("ended", reason)))

    async def _cancel_provisioning(self, record: Record) -> None:
        provisioning = record.provisioning
        if provisioning is None or provisioning.done():
            return
        if provisioning is not asyncio.current_task():
            provisioning.cancel()
            await asyncio.gather(provisioning, return_exceptions=True)

    def _settle(self, record: Record, state: State, error: Exception) -> None:
        """Note the end of a sandbox of which nothing runs."""
        if record.state not in ENDED:
            record.end(state, error)
        self._free(record)

    def _free(self, record: Record) -> None:
        if record.holds_place:
            record.holds_place = False
            record.placed_on.give_back(record.request.need)
        self._metrics.count("rock_ends_total", "Sandboxes that ended, by how.", how=record.state)
        self._on_ended(record)
        self._schedule()

    def forget(self, record: Record) -> None:
        """Drop the record of a sandbox that has ended."""
        del self.records[record.name]

    # -- workers

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

        Args: see Member.
        """
        old = self.members.get(name)
        if old:
            self.drop_worker(old, "its place was taken by a new process of that name")
        self.members[name] = Member(name, link, kinds, resources, incarnation, find_ended)
        usable = ", ".join(kinds) or "no backend works"
        log.info("worker %s is there: %s, %s", name, usable, resources)
        self._schedule()

    def worker_of(self, incarnation: str) -> Member | None:
        """Return the worker that runs as this process, if it is in use."""
        for member in self.members.values():
            if member.incarnation == incarnation:
                return member
        return None

    async def ping(self, member: Member) -> None:
        """Ask a worker whether it is still the same process; drop it if not."""
        try:
            async with asyncio.timeout(PING_SECONDS):
                answer = await member.ask_for(AGAIN_SECONDS / 4, "worker/ping", {})
            if answer.get("incarnation") == member.incarnation:
                return
        except (SandboxError, TimeoutError):
            pass
        self.drop_worker(member, "it does not answer")

    def drop_worker(self, member: Member, reason: str) -> None:
        """Count a worker as lost, with all that ran there.

        Sandboxes that were still starting go back to the queue.
        """
        if not member.alive:
            return
        member.alive = False
        if self.members.get(member.name) is member:
            del self.members[member.name]
        log.warning("worker %s is lost: %s", member.name, reason)
        self._metrics.count("rock_workers_lost_total", "Workers that were lost.")
        self._on_worker_lost(member)
        lost = [
            record
            for record in self.records.values()
            if record.member is member and record.state not in ENDED
        ]
        for record in lost:
            self._drop_sandbox(record, member, reason)
        self.background.start(member.link.close())
        self._schedule()

    def _drop_sandbox(self, record: Record, member: Member, reason: str) -> None:
        record.holds_place = False
        may_retry = record.tries < MAX_START_TRIES and not record.request.pinned
        if record.state == "starting" and may_retry:
            record.member = None
            record.state = "queued"
            # its user has paid for it already
            self.queue.add(record, record.user, record.experiment, cost=0.0, first=True)
            return
        message = f"worker {member.name}, which ran the sandbox, is lost: {reason}"
        self._settle(record, "failed", Refusal("worker_lost", message))

    def note_ended(self, names: Iterable[str], member: Member) -> None:
        """Note sandboxes whose process has died on a worker."""
        for name in names:
            record = self.records.get(name)
            if record is not None and record.member is member and record.state == "running":
                error = Refusal("ended", "the sandbox ended by itself: its process died")
                self.background.start(self.end(record, "failed", error))

    def is_forgotten(self, name: str, member: Member) -> bool:
        """Return whether a worker holds a sandbox whose end did not reach it.

        A sandbox that has ended and still holds its place is being ended right now.
        """
        record = self.records.get(name)
        if record is None or record.member is not member:
            return True
        return record.state in ENDED and not record.holds_place


class _Placement:
    """Chooses workers for the sandboxes in the queue, in one pass.

    A sandbox that does not fit yet reserves the workers that could take it for the rest of the
    pass: small sandboxes must not overtake a large one for ever.
    """

    def __init__(self, members: Iterable[Member]):
        self._members = list(members)
        self._reserved: set[Member] = set()
        self.chosen: Member | None = None

    def suits(self, record: Record) -> bool | None:
        """Choose a worker; return False if none has room, None if none has room for any other."""
        if len(self._reserved) == len(self._members):
            return None
        able = [
            member
            for member in self._members
            if member not in self._reserved and record.request.can_run_on(member)
        ]
        self.chosen = fleet.emptiest(able, record.request.need)
        if self.chosen is None:
            self._reserved.update(able)
        return self.chosen is not None
