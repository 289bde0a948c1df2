"""Publishes the trainer's weights: writes a checkpoint, and brings it to every engine of a pool.

An engine samples from new weights only once it has proven that it has them (`rome.engine.proof`);
requests of this process wait until then. An engine that fails goes into quarantine, and the run
continues with the others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import pathlib
import re
import shutil
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import safetensors

from rome.engine.client import Engine
from rome.engine.control import PauseMode
from rome.engine.delta import read_header, write_delta
from rome.engine.errors import EngineError
from rome.engine.handover import Handover
from rome.engine.pool import EnginePool
from rome.engine.proof import changed_tensors
from rome.engine.weights import Weights
from rome.files import sync
from rome.model.config import ModelConfig
from rome.model.hf import peft
from rome.model.hf.checkpoint import save_hf
from rome.model.hf.peft import HostAdapters, save_peft

# Checkpoints that stay: the newest, and the one that a server may still be reading.
KEPT_DIRECTORIES = 2
# Time for the other engines after the first one has proven itself; the supervisor does the rest.
STRAGGLER_SECONDS = 60.0
# Time that the supervisor gets to bring an engine back when all have failed.
RECOVERY_SECONDS = 300.0
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Published:
    """Costs and outcome of a publication.

    Attributes:
      seconds_pause: from the first pause to the last proof.
      probe_error: mean error of the probe's logprobs, in nats, of the engine with the largest.
      engines: how many engines serve the new weights.
      failed: for each other engine, why it does not.
      seconds_transfer: of the slowest mirror; 0 where engines read the trainer's directory.
      bytes_transfer: of all mirrors together.
    """

    seconds_pause: float
    probe_error: float
    engines: int = 1
    failed: tuple[str, ...] = ()
    seconds_transfer: float = 0.0
    bytes_transfer: int = 0


async def publish_weights(
    source: pathlib.Path | Handover,
    version: int,
    pool: EnginePool,
    probe_ids: Sequence[int],
    expected_logprobs: Sequence[float],
    tolerance: float = 1e-4,
    *,
    mode: PauseMode = "abort",
    adapter: bool = False,
    base: pathlib.Path | None = None,
) -> Published:
    """Bring a version of the weights to every engine of the pool.

    Args:
      source: from `write_checkpoint`, where the engines (or their mirrors) can read it. It must
        stay until the next publication: engines that join or come back load it too. For the engine
        inside the trainer, arrays from `hand_over`.
      version: its weight version.
      pool: engines in quarantine are tried too.
      probe_ids: tokens of the probe prompt.
      expected_logprobs: the trainer's log p(probe_ids[t] | probe_ids[:t]) at temperature 1 with
        these weights; the entry of the first id is ignored.
      tolerance: largest accepted mean error of the probe, in nats. About 1e-4 in float32; bfloat16
        engines need about 5e-2.
      mode: how running requests are paused, see `Engine.pause`. "abort" works with every version
        of SGLang; the requests are continued in every mode.
      adapter: whether the source is from `write_adapter`. In other modes than "abort" running
        requests then end with the adapters that they began with, and nothing is paused.
      base: see `Weights`.

    Returns:
      What the publication took, and which engines failed.

    Raises:
      EngineError: no engine has proven the weights. All of them stay in quarantine, since their
        weights are unknown.
    """
    started = time.monotonic()
    weights = Weights(
        source, version, probe_ids, expected_logprobs, tolerance, adapter=adapter, base=base
    )
    pool.weights = await _compared_to_earlier(weights, pool.weights)
    engines = pool.engines_in("ready", "updating", "starting", "suspect")
    errors = await _bring_all(pool, engines, mode)
    if not pool.engines_in("ready"):
        await pool.wait_ready(RECOVERY_SECONDS if pool.supervised else 0.0)
    serving = pool.engines_in("ready")
    transfers = [
        engine.mirror.last
        for engine in serving
        if engine.mirror is not None and engine.mirror.last is not None
    ]
    return Published(
        seconds_pause=time.monotonic() - started,
        probe_error=max(errors.values(), default=0.0),
        engines=len(serving),
        failed=tuple(pool.causes.values()),
        seconds_transfer=max((transfer.seconds for transfer in transfers), default=0.0),
        bytes_transfer=sum(transfer.bytes for transfer in transfers),
    )


async def _compared_to_earlier(weights: Weights, earlier: Weights | None) -> Weights:
    """Return the weights with what tells them from those that were published before."""
    if earlier is None or earlier.version == weights.version:
        return weights
    if weights.adapter and earlier.adapter:
        changed = await _changed(earlier.adapter_path, weights.adapter_path)
    elif weights.adapter or earlier.adapter:
        changed = None
    else:
        changed = await _changed(earlier.source, weights.source)
    earlier_logprobs = None
    if list(earlier.probe_ids) == list(weights.probe_ids):
        earlier_logprobs = earlier.expected_logprobs
    return dataclasses.replace(weights, changed=changed, earlier_logprobs=earlier_logprobs)


async def _changed(
    before: pathlib.Path | Handover, after: pathlib.Path | Handover
) -> frozenset[str] | None:
    """Return the names of the tensors that differ between two versions; None if not known."""
    if isinstance(after, Handover):
        return after.changed_since(before) if isinstance(before, Handover) else None
    if isinstance(before, Handover) or before == after or not before.is_dir():
        return None
    try:
        return await asyncio.to_thread(changed_tensors, before, after)
    except (OSError, safetensors.SafetensorError) as error:
        log.warning("%s is not compared with %s: %s", after, before, error)
        return None


async def _bring_all(
    pool: EnginePool, engines: Sequence[Engine], mode: PauseMode
) -> dict[str, float]:
    """Bring all engines to the pool's weights, and return the probe errors by URL.

    Engines that fail, or are too slow, are in quarantine afterwards.
    """
    tasks = [asyncio.create_task(pool.bring(engine, mode)) for engine in engines]
    try:
        await _wait_for_stragglers(tasks)
    finally:
        for task in tasks:
            task.cancel()  # without effect on those that have ended
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    errors = {}
    for engine, outcome in zip(engines, outcomes, strict=True):
        if isinstance(outcome, float):
            errors[engine.url] = outcome
        elif not isinstance(outcome, EngineError | asyncio.CancelledError):
            raise outcome
    return errors


async def _wait_for_stragglers(tasks: Sequence[asyncio.Task[float]]) -> None:
    """Wait for all tasks, but at most STRAGGLER_SECONDS after the first one that succeeds."""
    pending = set(tasks)
    ends: float | None = None
    while pending:
        remaining = None
        if ends is not None:
            remaining = max(ends - time.monotonic(), 0.0)
            if remaining == 0.0:
                return
        done, pending = await asyncio.wait(
            pending, timeout=remaining, return_when=asyncio.FIRST_COMPLETED
        )
        if ends is None and any(task.exception() is None for task in done):
            ends = time.monotonic() + STRAGGLER_SECONDS


def write_checkpoint(
    params: Any,
    config: ModelConfig,
    directory: str | os.PathLike[str],
    version: int,
    needed: Collection[int] = (),
    *,
    delta: bool = False,
    adapters: HostAdapters | None = None,
) -> pathlib.Path:
    """Write DIRECTORY/step_N: readers see all of it or nothing, also after a power cut.

    All processes of a run call this with the same shared directory, and each writes its share. The
    checkpoint is complete when process 0 returns. The last two versions stay, and those of
    `needed`; later ones, of a future that the run was rolled back from, are removed.

    Args:
      params: the model's parameters.
      config: its config; `config.dtype` is the dtype of the files.
      directory: of the checkpoints.
      version: N.
      needed: versions that must not be removed.
      delta: whether to write step_N.delta beside it, which leads there from the version before
        (`rome.engine.mirror`).
      adapters: to add to the parameters; step_N/adapter then holds them alone, for PEFT and for a
        run that is resumed.

    Returns:
      The checkpoint's path.
    """
    path = pathlib.Path(directory) / f"step_{version:06d}"
    partial = path.with_name(path.name + ".tmp")
    if jax.process_index() == 0:
        # Safe while others are here: they wait for process 0 in save_hf before they write.
        shutil.rmtree(partial, ignore_errors=True)
    save_hf(params, config, partial, dtype=jnp.dtype(config.dtype), adapters=adapters)
    if jax.process_index() != 0:
        return path
    if adapters is not None:
        save_peft(adapters, "", partial / peft.DIRECTORY)
    earlier = _put_in_place(partial, path, needed)
    if delta and earlier is not None:
        base_digest = None
        if _delta_of(earlier).exists():
            base_digest = read_header(_delta_of(earlier))["result"]
        write_delta(earlier, path, _delta_of(path), base_digest)
    return path


def write_adapter(
    adapters: HostAdapters,
    directory: str | os.PathLike[str],
    version: int,
    needed: Collection[int] = (),
) -> pathlib.Path:
    """Write DIRECTORY/step_N/adapter in PEFT's layout, and nothing else of the model.

    As `write_checkpoint`, which must not have written to the same directory before; one process
    calls this.

    Args:
      adapters: to write.
      directory: of the versions.
      version: N.
      needed: versions that must not be removed.

    Returns:
      The path of step_N.
    """
    path = pathlib.Path(directory) / f"step_{version:06d}"
    partial = path.with_name(path.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    save_peft(adapters, "", partial / peft.DIRECTORY)
    _put_in_place(partial, path, needed)
    return path


def _put_in_place(
    partial: pathlib.Path, path: pathlib.Path, needed: Collection[int]
) -> pathlib.Path | None:
    """Give a version that is written its name; return the version before, if it is there."""
    # A run that published this version and died may have left a delta that leads to other bytes.
    _delta_of(path).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    sync(path.parent)
    return _remove_old_checkpoints(path, needed)


def _remove_old_checkpoints(path: pathlib.Path, needed: Collection[int]) -> pathlib.Path | None:
    """Remove the checkpoints that are not needed any more, and return the one before `path`."""
    steps = [step for step in path.parent.iterdir() if re.fullmatch(r"step_\d+", step.name)]
    steps.sort()
    end = steps.index(path) + 1
    too_old = steps[: max(end - KEPT_DIRECTORIES, 0)]
    of_another_future = steps[end:]
    for old in too_old + of_another_future:
        if int(old.name.removeprefix("step_")) not in needed:
            shutil.rmtree(old)
            _delta_of(old).unlink(missing_ok=True)
    return steps[end - 2] if end > 1 else None


def _delta_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".delta")
