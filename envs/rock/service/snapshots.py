"""Snapshots that the admin knows: the owner of each, and the worker that has it."""

from __future__ import annotations

import time
from typing import Any

from envs.rock.service.fleet import PING_SECONDS, Member
from envs.rock.wire.errors import Refusal

MAX_SNAPSHOTS = 1000  # of one user
SNAPSHOT_SECONDS = 24 * 3600.0  # that an unused snapshot is kept


class _Snapshot:
    def __init__(self, user: str, member: Member):
        self.user = user
        self.member = member
        self.used = time.monotonic()


class Snapshots:
    """All snapshots of a fleet, by name."""

    def __init__(self) -> None:
        self._known: dict[str, _Snapshot] = {}

    def __len__(self) -> int:
        return len(self._known)

    def check_room(self, user: str) -> None:
        """Raise Refusal if a user may have no more snapshots."""
        owned = sum(snapshot.user == user for snapshot in self._known.values())
        if owned >= MAX_SNAPSHOTS:
            raise Refusal("busy", f"{user} has {MAX_SNAPSHOTS} snapshots; delete some")

    def add(self, name: str, user: str, member: Member) -> None:
        """Note a snapshot; a name that is known stays as it is."""
        self._known.setdefault(name, _Snapshot(user, member))

    def find(self, name: str, user: str) -> _Snapshot:
        """Return a user's snapshot and count it as used; Refusal if the user has none so named."""
        snapshot = self._owned(name, user)
        if snapshot is None:
            raise Refusal(
                "start_failed",
                f"the snapshot {name[:80]!r} was deleted, lost with its worker, or never there",
            )
        snapshot.used = time.monotonic()
        return snapshot

    def keep_alive(self, name: str, user: str) -> bool:
        """Count a user's snapshot as used; return False if the user has none so named."""
        snapshot = self._owned(name, user)
        if snapshot is None:
            return False
        snapshot.used = time.monotonic()
        return True

    async def delete(self, arguments: dict[str, Any], user: str) -> dict[str, Any]:
        """Delete a user's snapshot; nothing happens if the user has none so named."""
        name = arguments["snapshot"]
        snapshot = self._owned(name, user)
        if snapshot is not None:
            del self._known[name]
            if snapshot.member.alive:
                await snapshot.member.ask_for(
                    PING_SECONDS, "worker/forget_snapshot", {"snapshot": name}
                )
        return {}

    def lose(self, member: Member) -> None:
        """Forget the snapshots of a worker that is lost."""
        self._known = {
            name: snapshot
            for name, snapshot in self._known.items()
            if snapshot.member is not member
        }

    def unused(self, now: float) -> list[tuple[str, str]]:
        """Return (name, user) of the snapshots that were not used for SNAPSHOT_SECONDS."""
        return [
            (name, snapshot.user)
            for name, snapshot in self._known.items()
            if now - snapshot.used > SNAPSHOT_SECONDS
        ]

    def _owned(self, name: str, user: str) -> _Snapshot | None:
        snapshot = self._known.get(name)
        if snapshot is None or snapshot.user != user:
            return None
        return snapshot
