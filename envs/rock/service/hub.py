"""EnvHub: names for images and for task environments, each by the digest of its content.

SQLite for the names, files for the content.
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
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

from envs.rock.transfer import PIECE_BYTES
from envs.rock.wire.api import Refusal

KINDS = ("environment", "image")
MAX_BLOB_BYTES = 16 << 30
UNNAMED_SECONDS = 24 * 3600.0  # that a blob is kept without a name
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./:-]{0,199}")
_SCHEMA = """CREATE TABLE IF NOT EXISTS entries (name TEXT PRIMARY KEY, kind TEXT NOT NULL, digest TEXT NOT NULL, reference TEXT NOT NULL, owner TEXT NOT NULL,
tags TEXT NOT NULL, bytes INTEGER NOT NULL, created REAL NOT NULL); CREATE INDEX IF NOT EXISTS by_digest ON entries (digest);"""


class Entry(NamedTuple):
    name: str
    kind: str  # of KINDS
    digest: str
    reference: str  # an image's name for its engine; "" for an environment
    owner: str
    tags: tuple[str, ...]
    bytes: int  # of an environment's archive; 0 for an image
    created: float  # seconds since 1970

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"tags": list(self.tags)}


class EnvHub:
    """In a directory of its own: hub.sqlite and blobs/. Several processes may use one."""

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
        """Remove blobs that are a day old and have no name (never registered, or of a process that
        was killed); returns how many.
        """
        removed = 0
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")  # nobody registers one meanwhile
            named = {
                row[0].removeprefix("sha256:")
                for row in self._database.execute("SELECT digest FROM entries")
            }
            for blob in self._blobs.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if (
                        blob.name not in named
                        and time.time() - blob.stat().st_mtime > UNNAMED_SECONDS
                    ):
                        blob.unlink()
                        removed += 1
        return removed

    def close(self) -> None:
        self._database.close()

    def operations(self) -> dict[str, Callable[[dict[str, Any], str], Awaitable[dict[str, Any]]]]:
        """What callers may ask of it over HTTP, but for the blobs: (arguments, user) -> answer."""

        async def register(given: dict[str, Any], user: str) -> dict[str, Any]:
            return self.register(
                given["name"],
                given["kind"],
                given["digest"],
                user,
                given.get("reference", ""),
                tuple(given.get("tags", ())),
            ).to_json()

        async def get(given: dict[str, Any], user: str) -> dict[str, Any]:
            return self.get(given["name"]).to_json()

        async def list_all(given: dict[str, Any], user: str) -> dict[str, Any]:
            return {
                "entries": [
                    entry.to_json() for entry in self.list(given.get("tag"), given.get("owner"))
                ]
            }

        async def delete(given: dict[str, Any], user: str) -> dict[str, Any]:
            self.delete(given["name"], user)
            return {}

        return {
            "hub/register": register,
            "hub/get": get,
            "hub/list": list_all,
            "hub/delete": delete,
        }

    def register(
        self,
        name: str,
        kind: str,
        digest: str,
        owner: str,
        reference: str = "",
        tags: tuple[str, ...] = (),
    ) -> Entry:
        """Give the name to that content.

        Its owner may move it to other content; ValueError for what makes no sense, Refusal for
        another's name.
        """
        if not _NAME.fullmatch(name) or _DIGEST.fullmatch(name):
            raise ValueError(f"the name {name[:200]!r} is not made of letters, digits and '_./:-'")
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it is one of {', '.join(KINDS)}")
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"the digest {digest!r} is not sha256: and 64 hexadecimal digits")
        if bool(reference) != (kind == "image"):
            raise ValueError(
                "reference, an image's name for its engine, belongs to kind='image' and only to it"
            )
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            blob = self._path(digest)
            if kind == "environment" and not blob.exists():
                raise Refusal("not_found", f"there is no blob {digest}; store it first")
            old = self._find(name)
            if old and old.owner != owner:
                raise Refusal("forbidden", f"the name {name} is {old.owner}'s")
            entry = Entry(
                name,
                kind,
                digest,
                reference,
                owner,
                tuple(tags),
                blob.stat().st_size if kind == "environment" else 0,
                time.time(),
            )
            self._database.execute(
                "INSERT OR REPLACE INTO entries VALUES (?,?,?,?,?,?,?,?)",
                entry._replace(tags=json.dumps(entry.tags)),
            )
            if old:
                self._drop_unused(old.digest)
        return entry

    def get(self, name: str) -> Entry:
        """By name, or by digest; Refusal if there is none."""
        with self._lock:
            found = self._find(name)
        if found is None:
            raise Refusal("not_found", f"the hub has no {name[:200]!r}")
        return found

    def list(self, tag: str | None = None, owner: str | None = None) -> list[Entry]:
        with self._lock:
            rows = self._database.execute(
                "SELECT * FROM entries WHERE owner = COALESCE(?, owner) ORDER BY name", (owner,)
            ).fetchall()
        return [entry for entry in map(_entry, rows) if tag is None or tag in entry.tags]

    def delete(self, name: str, user: str) -> None:
        """Only its owner may; the content goes with the last name that it has."""
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
        """(digest, bytes) of what comes. It is there whole, under its digest, or not at all."""
        part = self._blobs / f"{secrets.token_hex(8)}.part"
        sha, size = hashlib.sha256(), 0
        try:
            with open(
                os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb"
            ) as file:
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

    async def fetch(self, digest: str) -> AsyncIterator[bytes]:
        """The content; Refusal if it is not there."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"the digest {digest!r} is not sha256: and 64 hexadecimal digits")
        try:
            file = open(self._path(digest), "rb")
        except FileNotFoundError:
            raise Refusal("not_found", f"the hub has no blob {digest}") from None
        with file:
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
        if (
            self._database.execute("SELECT 1 FROM entries WHERE digest = ?", (digest,)).fetchone()
            is None
        ):
            self._path(digest).unlink(missing_ok=True)


def _entry(row: tuple) -> Entry:
    return Entry(*row)._replace(tags=tuple(json.loads(row[5])))
