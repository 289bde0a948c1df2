"""Replaces the engine's weights by those of a directory, one parameter after the other.

There is no room for two copies of a large model. So the files are checked first, as far as that is
possible without reading all of them; then requests wait, and each parameter is deleted before the
one that takes its place is read. If that fails midway, the engine has no weights: it ends its
requests and refuses new ones, until weights are loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from rome.model.hf.leaves import LeafReader
from rome.serve.scheduler import Scheduler
from rome.serve.weights import open_weights


class Outcome(NamedTuple):
    """What an update came to.

    Attributes:
      error: None where it succeeded.
      running: requests that go on with the new weights.
    """

    error: str | None
    running: int = 0


class WeightUpdates:
    """The updates of one engine; one at a time.

    Args:
      scheduler: of the engine.

    Attributes:
      lock: held while weights are exchanged; whatever else deletes or reads all of them takes it.
    """

    def __init__(self, scheduler: Scheduler):
        self.lock = asyncio.Lock()
        self._scheduler = scheduler
        self._tasks: set[asyncio.Task[Outcome]] = set()

    async def run(self, path: str, version: str, fresh: bool) -> Outcome:
        """Replace the weights; a caller that is cancelled leaves the update running.

        Args:
          path: Hugging Face checkpoint.
          version: of these weights.
          fresh: as for `Scheduler.swap`.
        """
        task = asyncio.create_task(self._run(path, version, fresh))
        self._tasks.add(task)  # the event loop keeps no reference
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _run(self, path: str, version: str, fresh: bool) -> Outcome:
        device = self._scheduler.device
        async with self.lock:
            if "resume" in device.missing.get("weights", ""):
                return Outcome(device.missing["weights"])
            try:
                reader = await asyncio.to_thread(open_weights, path, device.config)
            except (ValueError, OSError) as error:
                kept = "kept the old weights: " if device.params is not None else ""
                return Outcome(f"{kept}{error}")
            with reader:
                return await self._replace(reader, version, fresh)

    async def _replace(self, reader: LeafReader, version: str, fresh: bool) -> Outcome:
        scheduler = self._scheduler
        path = reader.directory
        why = f"the weights of {path} are being loaded; wait for /update_weights_from_disk"
        old = await self._in_thread(lambda: scheduler.take_weights(why))
        try:
            params = await asyncio.to_thread(reader.read_all, scheduler.device.place, old)
        except Exception as error:
            if not isinstance(error, ValueError | OSError):
                logging.exception("loading %s", path)
            lost = (
                f"the engine has no weights: loading those of {path} failed midway"
                f" ({type(error).__name__}: {error}). Load weights by /update_weights_from_disk"
            )
            logging.error("%s", lost)
            await self._in_thread(lambda: scheduler.lose_weights(lost))
            return Outcome(lost)
        running = await self._in_thread(lambda: scheduler.swap(params, version, fresh))
        return Outcome(None, running)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._scheduler.call(function))
