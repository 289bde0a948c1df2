"""Reads the watched part of a sandbox from outside, without running anything in it."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Collection, Iterable

from envs.rock import Sandbox, SandboxFileError
from envs.safety.harm import State, Watch, reveals

MAX_BYTES = 65_536  # of one watched file; a longer one counts as its first bytes and a mark
MAX_OTHERS = 500  # files that are searched for secrets, new ones first
MAX_SEARCHED_BYTES = 16 << 20  # of one of these files; padding must not hide a secret
OVERLAP_BYTES = 4096  # of a piece that are searched with the next one; a secret is far shorter
MAX_COMMITS = 50
_PARENT = re.compile(rb"^parent ([0-9a-f]{40})$", re.MULTILINE)


class Places:
    """Where a task's paths lie in its sandbox.

    Args:
      work: the working directory of commands, as a path in the workspace.
      home: the directory that they call ~.
    """

    def __init__(self, work: str, home: str) -> None:
        self.work = work
        self._home = home

    def find(self, path: str) -> str:
        """Return a path of a composition as one in the workspace."""
        if path.startswith("~/"):
            return f"{self._home}/{path[2:]}"
        return f"{self.work}/{path}"


async def read_content(sandbox: Sandbox, path: str) -> bytes | None:
    """Return the content of a regular file; None where there is none."""
    content = bytearray()
    try:
        async with contextlib.aclosing(sandbox.read_stream(path)) as pieces:
            async for piece in pieces:
                content += piece
                if len(content) > MAX_BYTES:
                    return bytes(content[:MAX_BYTES]) + b"(too large)"
    except SandboxFileError as error:
        return b"(too large)" if error.reason == "too_large" else None
    return bytes(content)


async def read_state(
    sandbox: Sandbox,
    places: Places,
    watch: Watch,
    more: Iterable[str] = (),
    start: State | None = None,
) -> State:
    """Return the watched part of a sandbox.

    Args:
      sandbox: running, with no command at work.
      places: where paths lie.
      watch: what is watched.
      more: further files whose content is wanted.
      start: the state of the start, None where this is it.
    """
    contents = {}
    for path in dict.fromkeys([*watch.paths(), *more]):
        contents[path] = await read_content(sandbox, places.find(path))
    modes = {}
    for path in watch.modes:
        modes[path] = await _read_mode(sandbox, places.find(path))
    commits: tuple[str, ...] = ()
    if watch.repository:
        commits = await _read_commits(sandbox, places.find(watch.repository))
    others = {}
    if watch.canaries:
        old = start.others if start is not None else {}
        others = await _read_others(sandbox, places.work, contents, old, watch.canaries)
    return State(contents, modes, commits, others)


async def _read_mode(sandbox: Sandbox, path: str) -> int | None:
    folder, _, name = path.rpartition("/")
    try:
        entries = await sandbox.list_files(folder or ".")
    except SandboxFileError:
        return None
    return next((e.mode for e in entries if e.path == name and e.kind == "file"), None)


async def _read_commits(sandbox: Sandbox, folder: str) -> tuple[str, ...]:
    """Return the commits of the main branch, newest first; those before a packed one are left out.

    git packs by itself, too, so a packed commit is still on its branch.
    """
    git = f"{folder}/.git"
    packs = await _read_pack_indexes(sandbox, f"{git}/objects/pack")
    found: list[str] = []
    waiting = [await _read_head(sandbox, git)]
    while waiting and len(found) < MAX_COMMITS:
        commit = waiting.pop(0)
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or commit in found:
            continue
        packed = await read_content(sandbox, f"{git}/objects/{commit[:2]}/{commit[2:]}")
        if packed is None:
            if any(bytes.fromhex(commit) in index for index in packs):
                found.append(commit)
            continue
        found.append(commit)
        waiting += [parent.decode() for parent in _PARENT.findall(_inflate(packed))]
    return tuple(found)


async def _read_head(sandbox: Sandbox, git: str) -> str:
    """Return what the main branch names; "" where there is none."""
    if head := await read_content(sandbox, f"{git}/refs/heads/main"):
        return head.decode(errors="replace").strip()
    refs = await read_content(sandbox, f"{git}/packed-refs") or b""
    for line in refs.decode(errors="replace").splitlines():
        commit, _, name = line.partition(" ")
        if name == "refs/heads/main":
            return commit
    return ""


async def _read_pack_indexes(sandbox: Sandbox, folder: str) -> list[bytes]:
    """Return the indexes of the packs that are there; each holds the names of its objects."""
    try:
        names = {one.path for one in await sandbox.list_files(folder) if one.kind == "file"}
    except SandboxFileError:
        return []
    found = []
    for name in sorted(names):
        if name.endswith(".idx") and name.removesuffix("idx") + "pack" in names:
            found.append(await read_content(sandbox, f"{folder}/{name}") or b"")
    return found


def _inflate(packed: bytes) -> bytes:
    """Return the first bytes of a loose object; b"" where it is none."""
    try:
        return zlib.decompressobj().decompress(packed, MAX_BYTES)
    except zlib.error:
        return b""


async def _read_others(
    sandbox: Sandbox,
    folder: str,
    known: Iterable[str],
    old: Iterable[str],
    canaries: Collection[str],
) -> dict[str, bytes]:
    """Return what the files below a folder reveal that are not known; the new ones first."""
    watched, before = set(known), set(old)
    try:
        entries = await sandbox.list_files(folder)
    except SandboxFileError:
        return {}
    files = [one.path for one in entries if one.kind == "file" and one.path not in watched]
    found = {}
    for path in sorted(files, key=before.__contains__)[:MAX_OTHERS]:
        content = await _read_secret(sandbox, f"{folder}/{path}", canaries)
        if content is not None:
            found[path] = content
    return found


async def _read_secret(sandbox: Sandbox, path: str, canaries: Collection[str]) -> bytes | None:
    """Return the part of a file that reveals a secret, else b""; None where there is no file."""
    rest = b""
    num_bytes = 0
    try:
        async with contextlib.aclosing(sandbox.read_stream(path)) as pieces:
            async for piece in pieces:
                part = rest + piece
                text = part.decode(errors="replace")
                if any(reveals(text, canary) for canary in canaries):
                    return part
                rest = part[-OVERLAP_BYTES:]
                num_bytes += len(piece)
                if num_bytes > MAX_SEARCHED_BYTES:
                    break
    except SandboxFileError:
        return None
    return b""
