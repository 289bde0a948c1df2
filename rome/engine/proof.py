"""Verifies that an engine samples from the weights that it was told to load.

An engine loads the weights, reports their version (the embedded engine also a hash of every
tensor), and scores a probe prompt whose logprobs are compared with the trainer's. The server's own
success message is not enough: SGLang reports success for a checkpoint that lacks tensors, and
failure for updates that it did make.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import safetensors

from rome.engine.client import Engine
from rome.engine.errors import EngineError


@dataclasses.dataclass(frozen=True)
class Weights:
    """A version of the weights, and the data that verifies it.

    Attributes:
      path: a Hugging Face directory that the engines or their mirrors can read.
      version: its number.
      probe_ids: tokens of the probe prompt, at least two.
      expected_logprobs: the trainer's log p(probe_ids[t] | probe_ids[:t]) at temperature 1; the
        entry of the first id is ignored.
      tolerance: largest accepted error of a probe's logprob, in nats.
    """

    path: pathlib.Path
    version: int
    probe_ids: Sequence[int]
    expected_logprobs: Sequence[float]
    tolerance: float

    def __post_init__(self) -> None:
        num_ids = len(self.probe_ids)
        num_logprobs = len(self.expected_logprobs)
        if num_ids != num_logprobs or num_ids < 2:
            raise ValueError(
                f"{num_ids} probe ids and {num_logprobs} logprobs; give one logprob for each of at"
                " least two ids"
            )


async def load_and_prove(engine: Engine, weights: Weights, mode: str = "abort") -> float:
    """Pause an engine, load weights, verify them and resume.

    Args:
      engine: not used by anything else meanwhile, except for running requests.
      weights: to load.
      mode: what happens to running requests, see `Engine.pause`. Servers that cannot tell which
        weights sampled which token get "abort" instead.

    Returns:
      The largest error of the probe's logprobs, in nats.

    Raises:
      EngineError: the weights were not verified. The engine is then paused or in an unknown state.
    """
    dialect = await engine.dialect()
    if not dialect.version_spans:
        mode = "abort"
    await engine.pause(mode)
    path = weights.path
    if engine.mirror is not None:
        path = await engine.mirror.fetch(weights.path)
    await engine.update_weights(str(path.resolve()), weights.version, flush=mode != "in_place")
    info = await engine.model_info()
    if info.get("weight_version") != str(weights.version):
        raise EngineError(
            f"{engine.url} says weight_version {info.get('weight_version')!r} after the update to"
            f" {weights.version}; start it again and publish again"
        )
    if dialect.embedded:
        server_info = await engine.server_info()
        await _compare_checksums(engine, weights.path, server_info["dtype"])
    await engine.resume()  # a paused server would hold the probe too
    error = await _probe_error(engine, weights)
    if not error <= weights.tolerance:  # also when it is NaN
        await engine.pause("abort")
        raise EngineError(
            f"{engine.url} has weights {weights.version}, but its probe logprobs differ by"
            f" {error:.3g} from the trainer's (tolerance {weights.tolerance:g}); compare dtypes and"
            " model code, or start it again and publish again"
        )
    return error


async def _probe_error(engine: Engine, weights: Weights) -> float:
    """Return the largest difference between the engine's and the trainer's probe logprobs."""
    logprobs = await engine.score(list(weights.probe_ids))
    actual = np.asarray(logprobs[1:])
    expected = np.asarray(weights.expected_logprobs[1:], np.float64)
    return float(np.max(np.abs(actual - expected)))


async def _compare_checksums(engine: Engine, path: pathlib.Path, dtype: str) -> None:
    """Raise EngineError unless the embedded engine holds the bytes of the checkpoint at `path`."""
    answer = await engine.checksum()
    theirs = answer["ranks"][0]["checksums"]
    ours = await asyncio.to_thread(_checksums, path, dtype)
    names = ours.keys() | theirs.keys()
    differing = sorted(name for name in names if ours.get(name) != theirs.get(name))
    if differing:
        raise EngineError(
            f"{engine.url} holds other bytes than {path} in {len(differing)} tensors"
            f" ({', '.join(differing[:3])}, ...); start it again and publish again"
        )


def _checksums(path: pathlib.Path, dtype: str) -> dict[str, str]:
    """Return SHA-256 of every tensor on disk, as it is once loaded with `dtype`."""
    sums = {}
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            for name in names:
                loaded = opened.get_tensor(name).astype(jnp.dtype(dtype), copy=False)
                tensor = np.ascontiguousarray(loaded)
                sums[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return sums
