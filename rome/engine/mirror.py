"""Brings checkpoints from the trainer's storage to the disk of an engine's host: by delta where the
chain holds, else in full.

`Mirror` does it on the host (`python -m launch.mirror` serves it); `MirrorClient` is what the
trainer's `Engine` has to ask it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import pathlib
import re
import shutil
import time
from typing import Literal

import aiohttp

from rome.engine.client import UPDATE_SECONDS, EngineError
from rome.engine.delta import (
    BrokenChain,
    apply_delta,
    copy_checkpoint,
    directory_digest,
    read_header,
)

KEPT = 2  # directories on the host: the newest, and the one that the engine may still be reading
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """How a checkpoint came. bytes: what was read from the trainer's storage; seconds: until it lay
    on the host's disk, verified.
    """

    path: pathlib.Path
    way: Literal["held", "delta", "full"]
    bytes: int
    seconds: float


class Mirror:
    """One host's copies. Not for several threads at once.

    Args:
      local: its directory, which nobody else writes to. What a killed predecessor left unfinished
        there is removed; whole copies are used again.
    """

    def __init__(self, local: pathlib.Path):
        self.local = local
        local.mkdir(parents=True, exist_ok=True)
        for torn in local.glob("*.tmp"):
            shutil.rmtree(torn)
        self._digests = {
            path.name: directory_digest(path) for path in self._copies()
        }  # hashed anew: a power cut may have torn them

    def fetch(self, source: pathlib.Path, fresh: bool = False) -> Transfer:
        """The copy of the checkpoint directory `source`; SOURCE.delta beside it is used where it
        begins from a copy that is here.

        Args:
          fresh: copy all of it, whatever is here.
        Raises: OSError when it cannot be read or written.
        """
        started, target, delta = (
            time.monotonic(),
            self.local / source.name,
            source.with_name(source.name + ".delta"),
        )
        way, size = None if fresh else self._by_delta(delta, target), 0
        if way == "delta":
            size = delta.stat().st_size
        if way is None:
            self._digests.pop(target.name, None)
            way, self._digests[target.name] = "full", copy_checkpoint(source, target)
            size = sum(path.stat().st_size for path in target.iterdir())
        for old in [path for path in self._copies() if path != target][: -(KEPT - 1) or None]:
            shutil.rmtree(old)
            self._digests.pop(old.name, None)
        return Transfer(target, way, size, time.monotonic() - started)

    def _by_delta(
        self, delta: pathlib.Path, target: pathlib.Path
    ) -> Literal["held", "delta"] | None:
        """None when the chain does not hold, whatever the reason: the full checkpoint is always a
        remedy.
        """
        if not delta.exists():
            return None
        try:
            header = read_header(delta)
            if self._digests.get(target.name) == header["result"]:
                return "held"
            base = next(
                (name for name, digest in self._digests.items() if digest == header["base"]), None
            )
            if base is None:
                log.info("%s begins from a checkpoint that is not here", delta)
                return None
            self._digests[target.name] = apply_delta(self.local / base, delta, target)
            return "delta"
        except (BrokenChain, OSError) as error:
            log.warning("%s", error)
            return None

    def _copies(self) -> list[pathlib.Path]:
        """Oldest first."""
        return sorted(
            (path for path in self.local.iterdir() if re.fullmatch(r"step_\d+", path.name)),
            key=lambda path: path.stat().st_mtime_ns,
        )


class MirrorClient:
    """Asks the mirror of an engine's host. `last`: the last transfer, None before the first."""

    def __init__(self, url: str, seconds: float = UPDATE_SECONDS):
        self.url, self.seconds = url.rstrip("/"), seconds
        self.last: Transfer | None = None
        self._asked: pathlib.Path | None = None

    async def fetch(self, path: pathlib.Path) -> pathlib.Path:
        """Where the engine finds the checkpoint.

        One that is asked for again did not prove itself, so it is copied anew. Raises EngineError.
        """
        path, fresh = path.resolve(), self._asked == path.resolve()
        self._asked = path
        try:
            async with (
                asyncio.timeout(self.seconds),
                aiohttp.ClientSession() as session,
                session.post(
                    self.url + "/fetch",
                    json={"path": str(path), "fresh": fresh},
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as response,
            ):
                answer = await response.json(content_type=None)
                if response.status != 200:
                    raise EngineError(
                        f"mirror {self.url} answered {response.status}: {answer.get('error')}"
                    )
        except TimeoutError:
            raise EngineError(
                f"mirror {self.url} did not bring {path} within {self.seconds:g} s; see its log"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EngineError(
                f"mirror {self.url} does not answer ({error!r}); start launch.mirror on the"
                " engine's host"
            ) from error
        self.last = Transfer(
            pathlib.Path(answer["path"]), answer["way"], answer["bytes"], answer["seconds"]
        )
        return self.last.path
