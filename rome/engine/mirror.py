"""Copies checkpoints from the trainer's storage to the disk of an engine's host.

A delta is used where the host has the checkpoint that it starts from, else the full checkpoint is
copied. `Mirror` runs on the engine's host (`python -m launch.mirror` serves it over HTTP);
`MirrorClient` is how the trainer's `Engine` asks it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pathlib
import re
import shutil
import time
from typing import Any, Literal

import aiohttp
from aiohttp import web

from envs.proxies import environment_proxy
from rome.engine.connection import UPDATE_SECONDS, error_text
from rome.engine.delta import (
    BrokenChain,
    apply_delta,
    copy_checkpoint,
    directory_digest,
    read_header,
)
from rome.engine.errors import EngineError

# Copies on the host: the newest, and the one that the engine may still be reading.
KEPT_COPIES = 2
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How a checkpoint came to the host.

    Attributes:
      path: the copy.
      way: "held" if it was there already, "delta" or "full".
      bytes: read from the trainer's storage.
      seconds: until the copy was verified and on the host's disk.
    """

    path: pathlib.Path
    way: Literal["held", "delta", "full"]
    bytes: int
    seconds: float


class Mirror:
    """The copies of one host. Not for several threads at once.

    Args:
      local: directory of the copies; no other program may write to it. Unfinished copies of a
        killed predecessor are removed, finished ones are used again.
    """

    def __init__(self, local: pathlib.Path):
        self.local = local
        local.mkdir(parents=True, exist_ok=True)
        for unfinished in local.glob("*.tmp"):
            shutil.rmtree(unfinished)
        # Hashed again at each start: a power cut may have damaged the copies.
        self._digests = {path.name: directory_digest(path) for path in self._copies()}

    def fetch(self, source: pathlib.Path, fresh: bool = False) -> Transfer:
        """Copy a checkpoint directory to this host.

        Args:
          source: the directory. SOURCE.delta beside it is used if it starts from a local copy.
          fresh: copy all of it, even if it is here.

        Raises:
          OSError: it cannot be read or written.
        """
        started = time.monotonic()
        target = self.local / source.name
        delta = source.with_name(source.name + ".delta")
        way: Literal["held", "delta", "full"] | None = None
        if not fresh:
            way = self._fetch_delta(delta, target)
        size = 0
        if way == "delta":
            size = delta.stat().st_size
        if way is None:
            way = "full"
            self._digests.pop(target.name, None)
            self._digests[target.name] = copy_checkpoint(source, target)
            size = sum(path.stat().st_size for path in target.iterdir())
        self._remove_old_copies(target)
        return Transfer(target, way, size, time.monotonic() - started)

    def _fetch_delta(
        self, delta: pathlib.Path, target: pathlib.Path
    ) -> Literal["held", "delta"] | None:
        """Make `target` by the delta, and return how; None if the full checkpoint is needed."""
        if not delta.exists():
            return None
        try:
            header = read_header(delta)
            if self._digests.get(target.name) == header["result"]:
                return "held"
            base = self._find_copy(header["base"])
            if base is None:
                log.info("%s begins from a checkpoint that is not here", delta)
                return None
            self._digests[target.name] = apply_delta(self.local / base, delta, target)
            return "delta"
        except (BrokenChain, OSError) as error:
            log.warning("%s", error)
            return None

    def _find_copy(self, digest: str) -> str | None:
        """Return the name of the copy with this digest, or None."""
        for name, digest_of_copy in self._digests.items():
            if digest_of_copy == digest:
                return name
        return None

    def _remove_old_copies(self, target: pathlib.Path) -> None:
        """Remove all copies but `target` and the newest others, KEPT_COPIES in all."""
        others = [path for path in self._copies() if path != target]
        num_surplus = max(len(others) - (KEPT_COPIES - 1), 0)
        for old in others[:num_surplus]:
            shutil.rmtree(old)
            self._digests.pop(old.name, None)

    def _copies(self) -> list[pathlib.Path]:
        """Return the finished copies, oldest first."""
        copies = [path for path in self.local.iterdir() if re.fullmatch(r"step_\d+", path.name)]
        return sorted(copies, key=lambda path: path.stat().st_mtime_ns)


class MirrorClient:
    """Client of the mirror on an engine's host.

    Attributes:
      last: the last transfer, None before the first.
    """

    def __init__(self, url: str, seconds: float = UPDATE_SECONDS):
        self.url = url.rstrip("/")
        self.seconds = seconds
        self.last: Transfer | None = None
        self._last_requested: pathlib.Path | None = None

    async def fetch(self, path: pathlib.Path) -> pathlib.Path:
        """Have a checkpoint copied, and return its path on the engine's host.

        A checkpoint that is requested twice in a row was not verified the first time, so the second
        request copies all of it again.

        Raises:
          EngineError: the mirror failed, took longer than `seconds`, or is something else.
        """
        path = path.resolve()
        fresh = self._last_requested == path
        self._last_requested = path
        try:
            async with asyncio.timeout(self.seconds):
                answer = await self._post({"path": str(path), "fresh": fresh})
        except TimeoutError:
            raise EngineError(
                f"mirror {self.url} did not bring {path} within {self.seconds:g} s; see its log"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineError(
                f"mirror {self.url} does not answer ({error!r}); start launch.mirror on the"
                " engine's host"
            ) from error
        try:
            copy = pathlib.Path(answer["path"])
            self.last = Transfer(copy, answer["way"], answer["bytes"], answer["seconds"])
        except (LookupError, TypeError) as error:
            raise EngineError(
                f"mirror {self.url} answered {str(answer)[:100]!r}, unlike a launch.mirror; does"
                " a proxy or another program answer there?"
            ) from error
        return copy

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=None)  # the caller has a deadline
        async with (
            aiohttp.ClientSession(proxy=environment_proxy(self.url)) as session,
            session.post(self.url + "/fetch", json=body, timeout=timeout) as response,
        ):
            answer = await response.json(content_type=None)
            if response.status != 200:
                raise EngineError(
                    f"mirror {self.url} answered {response.status}: {error_text(answer)}"
                )
            return answer


def make_app(mirror: Mirror, source: pathlib.Path) -> web.Application:
    """Return the HTTP application of a mirror, with the route POST /fetch.

    Args:
      mirror: makes the copies.
      source: only directories directly below it are copied, so that the port does not give access
        to the host's other files.
    """
    source = source.resolve()
    one_at_a_time = asyncio.Lock()

    async def fetch(http: web.Request) -> web.Response:
        try:
            body = json.loads(await http.text())
            path = pathlib.Path(body["path"]).resolve()
            fresh = bool(body.get("fresh"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return _error(400, f'send {{"path": DIRECTORY}}, not this: {error!r}')
        if path.parent != source:
            return _error(403, f"{path} does not lie directly in --source {source}")
        async with one_at_a_time:
            try:
                transfer = await asyncio.to_thread(mirror.fetch, path, fresh)
            except OSError as error:
                hint = f"is the trainer's storage mounted here, and is there room in {mirror.local}"
                return _error(500, f"{error}; {hint}?")
        name = transfer.path.name
        log.info(
            "%s by %s: %d bytes in %.2f s", name, transfer.way, transfer.bytes, transfer.seconds
        )
        return web.json_response(dataclasses.asdict(transfer) | {"path": str(transfer.path)})

    app = web.Application()
    app.router.add_post("/fetch", fetch)
    return app


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
