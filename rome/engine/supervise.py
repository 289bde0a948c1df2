"""Supervises a pool of engines.

It finds engines that do not answer, restarts dead ones, and brings all of them back with proven
weights.
"""

from __future__ import annotations

import asyncio
import logging
import random

from rome.engine.client import Engine
from rome.engine.control import HEALTH_SECONDS
from rome.engine.errors import EngineError
from rome.engine.pool import EnginePool

INTERVAL_SECONDS = 5.0
# Answers of 429 or 503 in a row after which an engine is taken out: back-pressure ends sooner.
MAX_BUSY_REPLIES = 6
MAX_WAIT_SECONDS = 60.0  # between two attempts to bring one engine back
MAX_DOUBLINGS = 10  # of that wait
# Unanswered probes of a suspect engine before it is killed and restarted, if the pool can do so.
SILENT_PROBES = 2
log = logging.getLogger(__name__)


async def supervise(
    pool: EnginePool,
    *,
    interval_seconds: float = INTERVAL_SECONDS,
    probe_seconds: float = HEALTH_SECONDS,
) -> None:
    """Supervise the engines of a pool until cancelled.

        task = asyncio.create_task(supervise(pool))

    Each engine has a task of its own, so one that hangs delays none of the others.

    Args:
      pool: engines that join later are supervised too.
      interval_seconds: between two probes of an engine. One that hangs is found after at most
        interval_seconds + probe_seconds.
      probe_seconds: how long an engine may take to answer. SGLang servers under load need more than
        20 s.
    """
    pool.supervised = True
    watchers: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            for engine in pool.engines:
                if engine.url not in watchers:
                    watch = _watch(pool, engine, interval_seconds, probe_seconds)
                    watchers[engine.url] = asyncio.create_task(watch)
            for url, task in list(watchers.items()):
                if task.done():  # by an unexpected error: log it, and start a new watcher
                    log.error("care for engine %s ended", url, exc_info=task.exception())
                    del watchers[url]
            await asyncio.sleep(interval_seconds)
    finally:
        pool.supervised = False
        for task in watchers.values():
            task.cancel()
        await asyncio.gather(*watchers.values(), return_exceptions=True)


async def _watch(
    pool: EnginePool, engine: Engine, interval_seconds: float, probe_seconds: float
) -> None:
    """Probe and recover one engine until cancelled."""
    busy_replies = 0
    failures = 0
    while True:
        match pool.states[engine.url]:
            case "updating" | "lent":
                # An update has a deadline of its own; a lent engine has no memory to answer with.
                busy_replies = 0
                failures = 0
            case "ready":
                failures = 0
                health = await engine.health(probe_seconds)
                busy_replies = busy_replies + 1 if health == "busy" else 0
                if pool.states[engine.url] != "ready":  # changed during the probe
                    continue
                if health == "gone":
                    pool.mark_dead(engine, f"nothing answers at {engine.url}; see its log")
                    continue  # recovery begins at once
                if health == "hung":
                    why = f"did not answer its health probe within {probe_seconds:g} s"
                    _quarantine_stuck(pool, engine, why)
                    continue
                if busy_replies == MAX_BUSY_REPLIES:
                    why = f"said {MAX_BUSY_REPLIES} times in a row that it is busy"
                    _quarantine_stuck(pool, engine, why)
                    continue
            case _:
                is_back = await _recover(pool, engine, failures, probe_seconds)
                failures = 0 if is_back else failures + 1
        # The first strike may be of chance; an engine that proves its weights and fails its
        # requests again is left alone for longer.
        repeated = max(failures, pool.strikes[engine.url] - 1)
        wait = interval_seconds * 2 ** min(repeated, MAX_DOUBLINGS)
        wait = min(wait, max(interval_seconds, MAX_WAIT_SECONDS))
        # Jitter: engines of one host must not all be tried at the same moment.
        await asyncio.sleep(wait * random.uniform(0.8, 1.2))


def _quarantine_stuck(pool: EnginePool, engine: Engine, why: str) -> None:
    pool.quarantine(engine, f"{engine.url} {why}; is it stopped or stuck? See its log")


async def _recover(pool: EnginePool, engine: Engine, failures: int, probe_seconds: float) -> bool:
    """Try once to bring a starting, suspect or dead engine back.

    Args:
      pool: that it belongs to.
      engine: to bring back.
      failures: attempts in a row that failed before this one.
      probe_seconds: how long it may take to answer.

    Returns:
      Whether it serves again.
    """
    restart = pool.restart.get(engine.url)
    try:
        health = await engine.health(probe_seconds)
        if health == "gone" and pool.states[engine.url] != "dead":
            pool.mark_dead(engine, f"nothing answers at {engine.url}; see its log")
        if health == "busy":  # also while it still loads: it will become well, or gone
            return False
        is_silent = health == "hung" and failures + 1 >= SILENT_PROBES
        if restart is not None and (health == "gone" or is_silent):
            pool.states[engine.url] = "starting"
            log.warning("starting engine %s again", engine.url)
            await asyncio.to_thread(restart)  # has a deadline of its own
        elif health != "well":
            return False
        if pool.weights is None:
            # Nothing was published yet: it runs its first weights, as the other engines do.
            pool.admit(engine)
        else:
            await pool.bring(engine)
        return True
    except EngineError as error:
        log.warning("engine %s is not back: %s", engine.url, error)
        if pool.states[engine.url] == "starting":
            pool.quarantine(engine, str(error))
        return False
