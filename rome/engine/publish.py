"""Brings the trainer's weights to every engine of a pool, and lets an engine go on only when it has proven that it has them.

Write a directory, pause, load, compare the version (and, on the embedded engine, a hash of every tensor), compare the logprobs of a probe
prompt with the trainer's, go on. Requests of this process wait until the proof is there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from rome.engine.client import Engine, EngineError
from rome.engine.pool import EnginePool
from rome.model.config import ModelConfig
from rome.model.hf import save_hf
from rome.model.hf_files import sync

KEPT_DIRECTORIES = 2  # the newest, and the one that a server may still be reading


@dataclasses.dataclass(frozen=True)
class Published:
    """What a publication took: seconds that engines stood still, largest error of the probe's logprobs."""

    path: pathlib.Path
    seconds_pause: float
    probe_error: float


async def publish_weights(
    path: pathlib.Path, version: int, pool: EnginePool, probe_ids: Sequence[int], expected_logprobs: Sequence[float], tolerance: float = 1e-4, *,
    mode: str = "abort",
) -> Published:
    """Brings the checkpoint at `path` to every engine of the pool, as weight version `version`.

    Args:
      path: from `write_checkpoint`, where the engines can read it.
      expected_logprobs: the trainer's log p(probe_ids[t] | before t) at temperature 1 with these weights; the entry of the first id is ignored.
      tolerance: largest error of the probe. About 1e-4 in float32; bfloat16 engines need about 5e-2.
      mode: how running requests are paused; "abort" works with every SGLang version, and `Engine` takes the requests up again.
    Raises: EngineError. The engine that failed stays paused and counts as dead, since nobody knows its weights.
    """
    if len(probe_ids) != len(expected_logprobs) or len(probe_ids) < 2:
        raise ValueError(f"{len(probe_ids)} probe ids and {len(expected_logprobs)} logprobs; give one logprob for each of at least two ids")
    started = time.monotonic()
    await pool.pause_all(mode)
    errors = await pool.on_all(lambda engine: _update_and_prove(engine, path, version, probe_ids, expected_logprobs, tolerance))
    await pool.resume_all()
    return Published(path, time.monotonic() - started, max(errors))


def write_checkpoint(
    params: Any, config: ModelConfig, directory: str | os.PathLike[str], version: int, needed: Collection[int] = (),
) -> pathlib.Path:
    """Writes directory/step_N: a reader sees all of it or nothing, also after a power cut. Only the last two versions stay, and those of `needed`.

    Of several processes each calls this with the same shared directory and writes its share; it is whole when process 0 returns.
    """
    path = pathlib.Path(directory) / f"step_{version:06d}"
    partial = path.with_name(path.name + ".tmp")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # before anyone writes: the others wait for process 0 in save_hf
    save_hf(params, config, partial, dtype=jnp.dtype(config.dtype))
    if jax.process_index():
        return path
    shutil.rmtree(path, ignore_errors=True)  # of an earlier run that published this version and died
    os.replace(partial, path)
    sync(path.parent)
    steps = sorted(entry for entry in path.parent.iterdir() if re.fullmatch(r"step_\d+", entry.name))
    newest = steps.index(path) + 1  # later ones belong to a future that this run was rolled back from
    for old in [*steps[:max(newest - KEPT_DIRECTORIES, 0)], *steps[newest:]]:
        if int(old.name.removeprefix("step_")) not in needed:
            shutil.rmtree(old)
    return path


async def _update_and_prove(
    engine: Engine, path: pathlib.Path, version: int, probe_ids: Sequence[int], expected_logprobs: Sequence[float], tolerance: float,
) -> float:
    """Returns the largest error of the probe's logprobs. Raises EngineError and leaves the engine paused when anything is not as it must be."""
    await engine.update_weights(str(path.resolve()), version)
    said = (await engine.model_info()).get("weight_version")
    if said != str(version):
        raise EngineError(f"{engine.url} says weight_version {said!r} after the update to {version}; start it again and publish again")
    info = await engine.server_info()
    if info.get("engine") == "rome.serve":
        await _compare_checksums(engine, path, info["dtype"])
    await engine.resume()  # a paused server would hold the probe too
    logprobs = await engine.score(list(probe_ids))
    error = float(np.max(np.abs(np.asarray(logprobs[1:]) - np.asarray(expected_logprobs[1:], np.float64))))
    if not error <= tolerance:  # also when it is NaN
        await engine.pause("abort")
        raise EngineError(
            f"{engine.url} has weights {version}, but its probe logprobs differ by {error:.3g} from the trainer's (tolerance {tolerance:g}); "
            "compare dtypes and model code, or start it again and publish again"
        )
    return error


async def _compare_checksums(engine: Engine, path: pathlib.Path, dtype: str) -> None:
    theirs = (await engine.checksum())["ranks"][0]["checksums"]
    ours = await asyncio.to_thread(_checksums, path, dtype)
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        raise EngineError(
            f"{engine.url} holds other bytes than {path} in {len(differing)} tensors ({', '.join(differing[:3])}, ...); start it again and publish again"
        )


def _checksums(path: pathlib.Path, dtype: str) -> dict[str, str]:
    """SHA-256 of every tensor on disk, as it is once loaded with `dtype`."""
    sums = {}
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            for name in opened.keys():
                tensor = np.ascontiguousarray(opened.get_tensor(name).astype(jnp.dtype(dtype), copy=False))
                sums[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return sums
