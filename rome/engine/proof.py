"""What makes an engine fit to serve: it has loaded the weights, and has proven that it samples from
them.

Load, compare the version (and, on the embedded engine, a hash of every tensor), compare the
logprobs of a probe prompt with the trainer's. SGLang says success for a checkpoint that lacks
tensors, and says failure for updates that it did make, so its own word proves nothing.
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

from rome.engine.client import Engine, EngineError


@dataclasses.dataclass(frozen=True)
class Weights:
    """A version of the weights, and what proves it.

    Args:
      path: a Hugging Face directory where the engines can read it.
      expected_logprobs: the trainer's log p(probe_ids[t] | before t) at temperature 1; the entry of
        the first id is ignored.
      tolerance: largest error of a probe's logprob, in nats.
    """

    path: pathlib.Path
    version: int
    probe_ids: Sequence[int]
    expected_logprobs: Sequence[float]
    tolerance: float

    def __post_init__(self) -> None:
        if len(self.probe_ids) != len(self.expected_logprobs) or len(self.probe_ids) < 2:
            raise ValueError(
                f"{len(self.probe_ids)} probe ids and {len(self.expected_logprobs)} logprobs; give"
                " one logprob for each of at least two ids"
            )


async def load_and_prove(engine: Engine, weights: Weights, mode: str = "abort") -> float:
    """Pauses the engine, loads, proves and lets it go on.

    Returns the largest error of the probe's logprobs, in nats.

    Args:
      mode: what happens to running requests; "abort" is taken where the server cannot tell which
        tokens are by which weights.
    Raises: EngineError. The engine then stands paused, or nobody knows how it stands.
    """
    dialect = await engine.dialect()
    if not dialect.spans:
        mode = "abort"
    await engine.pause(mode)
    path = weights.path if engine.mirror is None else await engine.mirror.fetch(weights.path)
    await engine.update_weights(str(path.resolve()), weights.version, flush=mode != "in_place")
    info = await engine.model_info()
    if info.get("weight_version") != str(weights.version):
        raise EngineError(
            f"{engine.url} says weight_version {info.get('weight_version')!r} after the update to"
            f" {weights.version}; start it again and publish again"
        )
    if dialect.embedded:
        await _compare_checksums(engine, weights.path, (await engine.server_info())["dtype"])
    await engine.resume()  # a paused server would hold the probe too
    logprobs = await engine.score(list(weights.probe_ids))
    error = float(
        np.max(
            np.abs(np.asarray(logprobs[1:]) - np.asarray(weights.expected_logprobs[1:], np.float64))
        )
    )
    if not error <= weights.tolerance:  # also when it is NaN
        await engine.pause("abort")
        raise EngineError(
            f"{engine.url} has weights {weights.version}, but its probe logprobs differ by"
            f" {error:.3g} from the trainer's (tolerance {weights.tolerance:g}); compare dtypes and"
            " model code, or start it again and publish again"
        )
    return error


async def _compare_checksums(engine: Engine, path: pathlib.Path, dtype: str) -> None:
    theirs = (await engine.checksum())["ranks"][0]["checksums"]
    ours = await asyncio.to_thread(_checksums, path, dtype)
    differing = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if differing:
        raise EngineError(
            f"{engine.url} holds other bytes than {path} in {len(differing)} tensors"
            f" ({', '.join(differing[:3])}, ...); start it again and publish again"
        )


def _checksums(path: pathlib.Path, dtype: str) -> dict[str, str]:
    """SHA-256 of every tensor on disk, as it is once loaded with `dtype`."""
    sums = {}
    for file in sorted(path.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="numpy") as opened:
            for name in opened.keys():
                tensor = np.ascontiguousarray(
                    opened.get_tensor(name).astype(jnp.dtype(dtype), copy=False)
                )
                sums[name] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return sums
