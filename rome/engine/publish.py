"""Brings the trainer's weights to every engine of a pool, and lets an engine go on only when it has
proven that it has them (`rome.engine.proof`).

Requests of this process wait until the proof is there. An engine that fails goes into quarantine
and the run goes on with the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import re
import shutil
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rome.data.files import sync
from rome.engine.client import Engine, EngineError
from rome.engine.delta import read_header, write_delta
from rome.engine.pool import EnginePool
from rome.engine.proof import Weights
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import save_hf

KEPT_DIRECTORIES = 2  # the newest, and the one that a server may still be reading
# what a slow engine gets after the first one has proven itself; then it is left to the supervisor
STRAGGLER_SECONDS = 60.0
RECOVERY_SECONDS = 300.0  # when all have failed: until the supervisor must have brought one back


@dataclasses.dataclass(frozen=True)
class Published:
    """What a publication took.

    Args:
      seconds_pause: from the first pause to the last proof.
      probe_error: largest error of the probe's logprobs, in nats.
      engines: how many serve the new weights.
      failed: why each of the others does not.
      seconds_transfer, bytes_transfer: of the slowest mirror and of all mirrors; 0 where engines
        read the trainer's directory themselves.
    """

    path: pathlib.Path
    seconds_pause: float
    probe_error: float
    engines: int = 1
    failed: tuple[str, ...] = ()
    seconds_transfer: float = 0.0
    bytes_transfer: int = 0


async def publish_weights(
    path: pathlib.Path,
    version: int,
    pool: EnginePool,
    probe_ids: Sequence[int],
    expected_logprobs: Sequence[float],
    tolerance: float = 1e-4,
    *,
    mode: str = "abort",
) -> Published:
    """Brings the checkpoint at `path` to every engine of the pool, as weight version `version`.

    Args:
      path: from `write_checkpoint`, where the engines (or their mirrors) can read it. It must stay
        until the next publication: engines that join or come back load it too.
      expected_logprobs: the trainer's log p(probe_ids[t] | before t) at temperature 1 with these
        weights; the entry of the first id is ignored.
      tolerance: largest error of the probe. About 1e-4 in float32; bfloat16 engines need about
        5e-2.
      mode: how running requests are paused; "abort" works with every SGLang version, and `Engine`
        takes the requests up again.
    Raises: EngineError when no engine has proven itself. Those that failed stay in quarantine,
    since nobody knows their weights.
    """
    weights = Weights(path, version, probe_ids, expected_logprobs, tolerance)
    started = time.monotonic()
    pool.weights = weights
    engines = pool.engines_in("ready", "updating", "starting", "suspect")
    errors = await _bring_all(pool, engines, mode)
    if not errors:
        await pool.wait_ready(RECOVERY_SECONDS if pool.supervised else 0.0)
    serving = pool.engines_in("ready")
    transfers = [
        engine.mirror.last
        for engine in serving
        if engine.mirror is not None and engine.mirror.last is not None
    ]
    return Published(
        path,
        time.monotonic() - started,
        max(errors.values(), default=0.0),
        len(serving),
        tuple(pool.causes.values()),
        max((one.seconds for one in transfers), default=0.0),
        sum(one.bytes for one in transfers),
    )


async def _bring_all(pool: EnginePool, engines: Sequence[Engine], mode: str) -> dict[str, float]:
    """The probe's error of each engine that has proven itself.

    The rest is in quarantine: those that failed, and those that were too slow.
    """
    tasks = {asyncio.create_task(pool.bring(engine, mode)): engine for engine in engines}
    pending, left_s = set(tasks), None
    try:
        while pending and left_s != 0.0:
            done, pending = await asyncio.wait(
                pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            if left_s is None and any(task.exception() is None for task in done):
                ends = time.monotonic() + STRAGGLER_SECONDS
            if left_s is not None or any(task.exception() is None for task in done):
                left_s = max(ends - time.monotonic(), 0.0)
    finally:
        for task in pending:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(
            outcome, (EngineError, asyncio.CancelledError)
        ):
            raise outcome
    return {
        engine.url: outcome
        for engine, outcome in zip(tasks.values(), outcomes)
        if isinstance(outcome, float)
    }


def write_checkpoint(
    params: Any,
    config: ModelConfig,
    directory: str | os.PathLike[str],
    version: int,
    needed: Collection[int] = (),
    *,
    delta: bool = False,
) -> pathlib.Path:
    """Writes directory/step_N: a reader sees all of it or nothing, also after a power cut.

    Only the last two versions stay, and those of `needed`.

    `delta`: beside it stands step_N.delta, which leads there from the version before
    (`rome.engine.mirror`).

    Of several processes each calls this with the same shared directory and writes its share; it is
    whole when process 0 returns.
    """
    path = pathlib.Path(directory) / f"step_{version:06d}"
    partial = path.with_name(path.name + ".tmp")
    if jax.process_index() == 0:
        shutil.rmtree(
            partial, ignore_errors=True
        )  # before anyone writes: the others wait for process 0 in save_hf
    save_hf(params, config, partial, dtype=jnp.dtype(config.dtype))
    if jax.process_index():
        return path
    place = path.with_name(path.name + ".delta")
    place.unlink(
        missing_ok=True
    )  # of an earlier run that published this version and died: it leads to other bytes
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    sync(path.parent)
    steps = sorted(
        entry for entry in path.parent.iterdir() if re.fullmatch(r"step_\d+", entry.name)
    )
    newest = (
        steps.index(path) + 1
    )  # later ones belong to a future that this run was rolled back from
    for old in [*steps[: max(newest - KEPT_DIRECTORIES, 0)], *steps[newest:]]:
        if int(old.name.removeprefix("step_")) not in needed:
            shutil.rmtree(old)
            old.with_name(old.name + ".delta").unlink(missing_ok=True)
    if delta and newest > 1:
        earlier = place.with_name(steps[newest - 2].name + ".delta")
        write_delta(
            steps[newest - 2],
            path,
            place,
            read_header(earlier)["result"] if earlier.exists() else None,
        )
    return path
