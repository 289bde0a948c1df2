"""The snapshots that the admin knows: whose each is, and the worker that has it."""

from __future__ import annotations

import time
from typing import Any

from envs.rock.service.fleet import PING_SECONDS, Member
from envs.rock.wire.api import Refusal
from envs.rock.wire.client import patiently

MAX_SNAPSHOTS = 1000  # of one user
SNAPSHOT_SECONDS = 24 * 3600.0  # without a sign of its user


class _Snapshot:
    def __init__(self, user: str, member: Member):
        self.user, self.member, self.used = user, member, time.monotonic()


class Snapshots:
    def __init__(self):
        self._known: dict[str, _Snapshot] = {}

    def __len__(self) -> int:
        return len(self._known)

    def check_room(self, user: str) -> None:
        """Refusal where a user may have no more."""
        if sum(one.user == user for one in self._known.values()) >= MAX_SNAPSHOTS:
            raise Refusal("busy", f"{user} has {MAX_SNAPSHOTS} snapshots; delete some")

    def add(self, name: str, user: str, member: Member) -> None:
        self._known.setdefault(name, _Snapshot(user, member))

    def find(self, name: str, user: str) -> _Snapshot:
        """Refusal for one that is not there, or another's."""
        snapshot = self._known.get(name)
        if snapshot is None or snapshot.user != user:
            raise Refusal(
                "start_failed",
                f"the snapshot {name[:80]!r} was deleted, lost with its worker, or never there",
            )
        snapshot.used = time.monotonic()
        return snapshot

    def keep_alive(self, name: str, user: str) -> bool:
        """Whether it is there and the user's; it is in use then."""
        snapshot = self._known.get(name)
        if snapshot is None or snapshot.user != user:
            return False
        snapshot.used = time.monotonic()
        return True

    async def delete(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        name = arguments["snapshot"]
        snapshot = self._known.get(name)
        if snapshot is not None and snapshot.user == user:
            del self._known[name]
            if snapshot.member.alive:
                await patiently(
                    lambda: snapshot.member.link.call("worker/forget_snapshot", {"snapshot": name}),
                    PING_SECONDS,
                )
        return {}

    def lose(self, member: Member) -> None:
        """With its worker."""
        self._known = {
            name: snapshot
            for name, snapshot in self._known.items()
            if snapshot.member is not member
        }

    def forsaken(self, now: float) -> list[tuple[str, str]]:
        """(name, user) of those that nobody has used for too long."""
        return [
            (name, one.user)
            for name, one in self._known.items()
            if now - one.used > SNAPSHOT_SECONDS
        ]
