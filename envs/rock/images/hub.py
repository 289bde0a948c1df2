"""EnvHub: names for container images and task environments, each with the digest of its content.

The names are kept in SQLite, the contents in files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.errors import Refusal

KINDS = ("environment", "image")
MAX_BLOB_BYTES = 16 << 30
UNNAMED_SECONDS = 24 * 3600.0  # that a blob is kept without a name
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:-]{0,199}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, digest TEXT NOT NULL, reference TEXT NOT NULL,
    owner TEXT NOT NULL, tags TEXT NOT NULL, bytes INTEGER NOT NULL, created REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_digest ON entries (digest);
"""
_Answer = Callable[[dict[str, Any], str], Awaitable[dict[str, Any]]]


class Entry(NamedTuple):
    """A name in the hub, and what it stands for."""

    name: str
    kind: str  # one of KINDS
    digest: str
    reference: str  # an image's name for its container engine; "" for an environment
    owner: str
    tags: tuple[str, ...]
    bytes: int  # size of an environment's archive; 0 for an image
    created: float  # seconds since 1970

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a JSON object."""
        return self._asdict() | {"tags": list(self.tags)}


class EnvHub:
    """A hub in a directory of its own: hub.sqlite and blobs/. Several processes may share it."""

    def __init__(self, directory: pathlib.Path):
        self._blobs = directory / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            directory / "hub.sqlite", check_same_thread=False, timeout=10.0
        )
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.executescript(_SCHEMA)
        self.collect()

    def collect(self) -> int:
        """Remove blobs that are a day old and have no name; return how many.

        Such blobs were never registered, or are left of a process that was killed.
        """
        removed = 0
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")  # nothing is registered meanwhile
            rows = self._database.execute("SELECT digest FROM entries")
            named = {digest.removeprefix("sha256:") for (digest,) in rows}
            oldest = time.time() - UNNAMED_SECONDS
            for blob in self._blobs.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if blob.name not in named and blob.stat().st_mtime < oldest:
                        blob.unlink()
                        removed += 1
        return removed

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def operations(self) -> dict[str, _Answer]:
        """Return the operations of wire.operations that have JSON responses, by name."""
        return {
            "hub/register": self._answer_register,
            "hub/get": self._answer_get,
            "hub/list": self._answer_list,
            "hub/delete": self._answer_delete,
        }

    async def _answer_register(self, given: dict[str, Any], user: str) -> dict[str, Any]:
        reference = given.get("reference", "")
        tags = tuple(given.get("tags", ()))
        entry = self.register(given["name"], given["kind"], given["digest"], user, reference, tags)
        return entry.to_json()

    async def _answer_get(self, given: dict[str, Any], user: str) -> dict[str, Any]:
        return self.get(given["name"]).to_json()

    async def _answer_list(self, given: dict[str, Any], user: str) -> dict[str, Any]:
        entries = self.list(given.get("tag"), given.get("owner"))
        return {"entries": [entry.to_json() for entry in entries]}

    async def _answer_delete(self, given: dict[str, Any], user: str) -> dict[str, Any]:
        self.delete(given["name"], user)
        return {}

    def register(
        self,
        name: str,
        kind: str,
        digest: str,
        owner: str,
        reference: str = "",
        tags: tuple[str, ...] = (),
    ) -> Entry:
        """Give a name to content, or move the owner's name to other content.

        Args:
          name: letters, digits and `_./:-`.
          kind: one of KINDS.
          digest: "sha256:" and 64 hexadecimal digits; an environment's blob must be stored first.
          owner: the user who may move or delete the name.
          reference: an image's name for its container engine; only for images.
          tags: any words, for `list`.

        Raises:
          ValueError: an argument is malformed.
          Refusal: the name is another user's, or there is no such blob.
        """
        _check_entry(name, kind, digest, reference)
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            size = 0
            if kind == "environment":
                blob = self._path(digest)
                if not blob.exists():
                    raise Refusal("not_found", f"there is no blob {digest}; store it first")
                size = blob.stat().st_size
            old = self._find(name)
            if old and old.owner != owner:
                raise Refusal("forbidden", f"the name {name} is {old.owner}'s")
            tags = tuple(tags)
            entry = Entry(name, kind, digest, reference, owner, tags, size, time.time())
            row = entry._asdict() | {"tags": json.dumps(tags)}
            self._database.execute(
                "INSERT OR REPLACE INTO entries VALUES (?,?,?,?,?,?,?,?)", tuple(row.values())
            )
            if old:
                self._drop_unused(old.digest)
        return entry

    def get(self, name: str) -> Entry:
        """Return an entry by name or by digest; Refusal if there is none."""
        with self._lock:
            found = self._find(name)
        if found is None:
            raise Refusal("not_found", f"the hub has no {name[:200]!r}")
        return found

    def list(self, tag: str | None = None, owner: str | None = None) -> list[Entry]:
        """Return the entries by name, those with a tag or of an owner only where given."""
        with self._lock:
            rows = self._database.execute(
                "SELECT * FROM entries WHERE owner = COALESCE(?, owner) ORDER BY name", (owner,)
            ).fetchall()
        return [entry for entry in map(_entry, rows) if tag is None or tag in entry.tags]

    def delete(self, name: str, user: str) -> None:
        """Remove a user's name, and the content with its last name.

        Raises:
          Refusal: there is no such name, or it is another user's.
        """
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            entry = self._find(name)
            if entry is None or entry.name != name:
                raise Refusal("not_found", f"the hub has no name {name[:200]!r}")
            if entry.owner != user:
                raise Refusal("forbidden", f"the name {name} is {entry.owner}'s")
            self._database.execute("DELETE FROM entries WHERE name = ?", (name,))
            self._drop_unused(entry.digest)

    async def store(self, pieces: AsyncIterator[bytes]) -> tuple[str, int]:
        """Store a blob and return its digest and size in bytes.

        The blob appears under its digest when it is complete, or not at all.

        Raises:
          Refusal: it has more than MAX_BLOB_BYTES.
        """
        part = self._blobs / f"{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        sha = hashlib.sha256()
        size = 0
        try:
            with open(os.open(part, flags, 0o600), "wb") as file:
                async for piece in pieces:
                    size += len(piece)
                    if size > MAX_BLOB_BYTES:
                        raise Refusal("too_large", f"a blob has at most {MAX_BLOB_BYTES} bytes")
                    sha.update(piece)
                    await asyncio.to_thread(file.write, piece)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            digest = f"sha256:{sha.hexdigest()}"
            os.replace(part, self._path(digest))
        finally:
            part.unlink(missing_ok=True)
        return digest, size

    async def fetch(self, digest: str) -> AsyncGenerator[bytes, None]:
        """Yield a blob; Refusal if there is none of that digest."""
        _check_digest(digest)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(self._path(digest), "rb"))
            except FileNotFoundError:
                raise Refusal("not_found", f"the hub has no blob {digest}") from None
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece

    def _path(self, digest: str) -> pathlib.Path:
        return self._blobs / digest.removeprefix("sha256:")

    def _find(self, name: str) -> Entry | None:
        column = "digest" if _DIGEST.fullmatch(name) else "name"
        row = self._database.execute(
            f"SELECT * FROM entries WHERE {column} = ? ORDER BY created LIMIT 1", (name,)
        ).fetchone()
        return _entry(row) if row else None

    def _drop_unused(self, digest: str) -> None:
        query = "SELECT 1 FROM entries WHERE digest = ?"
        if self._database.execute(query, (digest,)).fetchone() is None:
            self._path(digest).unlink(missing_ok=True)


def _check_entry(name: str, kind: str, digest: str, reference: str) -> None:
    if not _NAME.fullmatch(name) or _DIGEST.fullmatch(name):
        raise ValueError(f"the name {name[:200]!r} is not made of letters, digits and '_./:-'")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")
    _check_digest(digest)
    if bool(reference) != (kind == "image"):
        raise ValueError(
            "reference, an image's name for its engine, belongs to kind='image' and only to it"
        )


def _check_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"the digest {digest!r} is not sha256: and 64 hexadecimal digits")


def _entry(row: tuple[Any, ...]) -> Entry:
    entry = Entry(*row)
    return entry._replace(tags=tuple(json.loads(row[5])))
