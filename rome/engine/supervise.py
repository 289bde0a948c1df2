"""Watches over a pool of engines: finds those that do not answer, starts dead ones again, and
brings all of them back with proven weights.

    task = asyncio.create_task(supervise(pool))     cancel it to end it

Each engine is cared for by itself, so one that hangs delays none of the others.
"""

from __future__ import annotations

import asyncio
import logging
import random

from rome.engine.client import HEALTH_SECONDS, Engine, EngineError
from rome.engine.pool import EnginePool

INTERVAL_SECONDS = 5.0
MOST_BUSY = 6  # answers of 429 or 503 in a row: back-pressure does not last that long
MOST_WAIT_SECONDS = 60.0  # between two attempts to bring one engine back
SILENT_PROBES = 2  # of a suspect engine, before one of our own is killed and started again
log = logging.getLogger(__name__)


async def supervise(
    pool: EnginePool, *, interval_s: float = INTERVAL_SECONDS, probe_s: float = HEALTH_SECONDS
) -> None:
    """Runs until it is cancelled.

    Args:
      interval_s: between two probes of an engine. One that hangs is found after at most interval_s
        + probe_s.
      probe_s: how long an engine may take to answer; real SGLang servers need more than 20 s when
        they are busy.
    """
    pool.supervised = True
    caring: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            for engine in pool.engines:  # also those that joined later
                if engine.url not in caring:
                    caring[engine.url] = asyncio.create_task(
                        _care(pool, engine, interval_s, probe_s)
                    )
            for url, task in list(caring.items()):
                if task.done():  # by an error that nobody foresaw: say it, and care again
                    log.error("care for engine %s ended", url, exc_info=task.exception())
                    del caring[url]
            await asyncio.sleep(interval_s)
    finally:
        pool.supervised = False
        for task in caring.values():
            task.cancel()
        await asyncio.gather(*caring.values(), return_exceptions=True)


async def _care(pool: EnginePool, engine: Engine, interval_s: float, probe_s: float) -> None:
    """One engine's probes and recoveries, for ever."""
    busy = failures = 0
    while True:
        match pool.states[engine.url]:
            case (
                "updating" | "lent"
            ):  # whoever updates it has a deadline; one whose memory is lent out has nothing to answer with
                busy = failures = 0
            case "ready":
                failures = 0
                health = await engine.health(probe_s)
                busy = busy + 1 if health == "busy" else 0
                if pool.states[engine.url] != "ready":  # changed meanwhile
                    continue
                if health == "gone":
                    pool.mark_dead(engine, f"nobody answers at {engine.url}; see its log")
                elif health == "hung" or busy == MOST_BUSY:
                    why = (
                        f"did not answer its health probe within {probe_s:g} s"
                        if health == "hung"
                        else f"said {MOST_BUSY} times in a row that it is busy"
                    )
                    pool.quarantine(
                        engine, f"{engine.url} {why}; is it stopped or stuck? See its log"
                    )
                if pool.states[engine.url] != "ready":
                    continue  # recovery begins at once
            case _:
                failures = 0 if await _recover(pool, engine, failures, probe_s) else failures + 1
        wait = min(interval_s * 2 ** min(failures, 10), max(interval_s, MOST_WAIT_SECONDS))
        await asyncio.sleep(
            wait * random.uniform(0.8, 1.2)
        )  # engines of one host are not all to be tried at the same moment


async def _recover(pool: EnginePool, engine: Engine, failures: int, probe_s: float) -> bool:
    """One attempt to bring a starting, suspect or dead engine back.

    Returns whether it serves again.
    """
    restart = pool.restart.get(engine.url)
    try:
        health = await engine.health(probe_s)
        if health == "gone" and pool.states[engine.url] != "dead":
            pool.mark_dead(engine, f"nobody answers at {engine.url}; see its log")
        if health == "busy":  # 503 also while it still loads: it will be well, or gone
            return False
        if restart is not None and (
            health == "gone" or (health == "hung" and failures + 1 >= SILENT_PROBES)
        ):
            pool.states[engine.url] = "starting"
            log.warning("starting engine %s again", engine.url)
            await asyncio.to_thread(restart)  # has a deadline of its own
        elif health != "well":
            return False
        if (
            pool.weights is None
        ):  # nothing was published yet: it runs the weights that it was started with, as the others do
            pool.admit(engine)
        else:
            await pool.bring(engine)
        return True
    except EngineError as error:
        log.warning("engine %s is not back: %s", engine.url, error)
        if pool.states[engine.url] == "starting":
            pool.quarantine(engine, str(error))
        return False
