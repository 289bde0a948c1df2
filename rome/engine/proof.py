"""Verifies that an engine samples from the weights that it was told to load.

An engine loads the weights and reports their version. Its word is not enough: SGLang reports
success for a checkpoint that lacks tensors, and failure for updates that it did make. Nor is one
look at its logprobs: a step of RL at a small learning rate changes them by less than bfloat16
rounds them. So an engine is asked for more, as far as its kind goes:

- Its hashes of the weights. The embedded engine hashes the tensors of the checkpoint, whose bytes
  they must be; inside the trainer, the arrays that it was handed. SGLang hashes fused and sharded
  tensors: they must differ from those of the version before wherever the checkpoint's tensors do,
  and equal those of the pool's other engines of one kind.
- Its logprobs of a long probe. Their mean error must be small; they must not lie nearer to the
  trainer's with the weights before than to the trainer's with these, by more than chance; and they
  must not be, to the last bit, the engine's own of before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors

from rome.engine.answers import blame_engine
from rome.engine.client import Engine
from rome.engine.control import PauseMode
from rome.engine.dialect import Dialect
from rome.engine.errors import EngineError, RequestRejected
from rome.engine.weights import Weights, file_checksums

Checksums = Sequence[Mapping[str, str]]  # by rank: tensor name -> hash
# How SGLang names the tensors that it fuses, by pattern of their names in a checkpoint.
FUSED = (
    (re.compile(r"\.experts\.\d+\.(gate|up)_proj\.weight$"), ".experts.w13_weight"),
    (re.compile(r"\.experts\.\d+\.down_proj\.weight$"), ".experts.w2_weight"),
    (re.compile(r"\.[qkv]_proj\."), ".qkv_proj."),
    (re.compile(r"\.(gate|up)_proj\."), ".gate_up_proj."),
)
# Standard errors by which the probe must be nearer to the weights before: beyond chance, also in a
# run of many steps and engines.
MAX_CHANCE = 5.0
MAX_NAMED = 3  # tensors in an error
FIRST_BLOCK_BYTES = 4096  # of a tensor that is compared; most differ within it
MAX_BLOCK_BYTES = 1 << 22
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Proof:
    """What an engine showed when its weights were verified.

    Attributes:
      version: of the weights.
      error: mean error of the probe's logprobs against the trainer's, in nats.
      logprobs: the engine's, of the probe.
      checksums: the server's own hashes by rank; None for servers that have none to compare.
      server: its version; only servers of one version are compared.
    """

    version: int
    error: float
    logprobs: Sequence[float]
    checksums: Checksums | None
    server: str


async def load_and_prove(
    engine: Engine, weights: Weights, mode: PauseMode = "abort", earlier: Proof | None = None
) -> Proof:
    """Pause an engine, load weights, verify them and resume.

    Args:
      engine: not used by anything else meanwhile, except for running requests.
      weights: to load.
      mode: what happens to running requests, see `Engine.pause`. Servers that cannot tell which
        weights sampled which token get "abort" instead, which is logged.
      earlier: this engine's last proof, where it has one.

    Raises:
      EngineError: the weights were not verified. The engine is then paused or in an unknown state.
    """
    dialect = await engine.dialect()
    if weights.adapter:
        return await _load_and_prove_adapter(engine, weights, mode, earlier, dialect)
    if mode != "abort" and not dialect.version_spans:
        log.warning(
            "%s runs SGLang %s, which does not tell which weights sampled a token: it is paused"
            " by abort, not by %s",
            engine.url,
            dialect.name,
            mode,
        )
        mode = "abort"
    await engine.pause(mode)
    held_before = await _held_before(engine, dialect, weights, earlier)
    await engine.load(weights, flush=mode != "in_place")
    info = await engine.model_info()
    if info.get("weight_version") != str(weights.version):
        raise EngineError(
            f"{engine.url} says weight_version {info.get('weight_version')!r} after the update to"
            f" {weights.version}; start it again and publish again"
        )
    checksums = None
    if dialect.embedded:
        await _require_bytes_of(engine, weights)
    elif dialect.checksums:
        checksums = await _read_checksums(engine)
        _require_change(engine, weights, held_before, checksums)
    error, logprobs = await _probe(engine, weights, earlier)
    proof = Proof(weights.version, error, logprobs, checksums, dialect.name)
    differing = disagreement(proof, earlier) if earlier is not None else ""
    if differing:
        await engine.pause("abort")
        raise EngineError(
            f"{engine.url} says that it has weights {weights.version}, but holds other bytes than"
            f" when it proved them before, in {differing}; start it again and publish again"
        )
    return proof


async def _load_and_prove_adapter(
    engine: Engine, weights: Weights, mode: PauseMode, earlier: Proof | None, dialect: Dialect
) -> Proof:
    """Load adapters by name beside those of running requests, and verify them and their base.

    Nothing is paused, unless the mode is "abort" or the server has no slot for them left.
    """
    if mode == "abort":
        await engine.pause("abort")
    try:
        is_known = await engine.load_adapter(weights)
    except RequestRejected as refusal:
        log.warning("running requests are aborted: %s", refusal)
        await engine.pause("abort")
        is_known = await engine.load_adapter(weights)
    if dialect.embedded:
        if weights.base is not None and not is_known:
            info = await engine.server_info()
            ours = await asyncio.to_thread(file_checksums, weights.base, info["dtype"])
            (theirs,) = await _read_checksums(engine)
            _require_same(engine, f"the base of adapters {weights.version}", ours, theirs)
        ours = await asyncio.to_thread(file_checksums, weights.adapter_path, "float32")
        (theirs,) = await _read_checksums(engine, weights.adapter_name)
        _require_same(engine, f"adapters {weights.version}", ours, theirs)
    error, logprobs = await _probe(engine, weights, earlier)
    return Proof(weights.version, error, logprobs, None, dialect.name)


# -- the probe
# -------------------------------------------------------------------------------------------------


async def _probe(
    engine: Engine, weights: Weights, earlier: Proof | None
) -> tuple[float, list[float]]:
    """Resume an engine; return the mean error of its logprobs of the probe, and these.

    Raises:
      EngineError: they are not those of the weights. The engine is paused then.
    """
    await engine.resume()  # a paused server would hold the probe too
    logprobs = await engine.score(list(weights.probe_ids))
    try:
        return judge_probe(weights, logprobs, earlier), logprobs
    except ValueError as reason:
        await engine.pause("abort")
        raise EngineError(
            f"{engine.url} says that it has weights {weights.version}, but {reason}"
        ) from None


def judge_probe(weights: Weights, logprobs: Sequence[float], earlier: Proof | None) -> float:
    """Return the mean error of an engine's logprobs of the probe, in nats.

    Args:
      weights: that the engine should have.
      logprobs: the engine's, one for each id of the probe.
      earlier: the engine's last proof, where it has one.

    Raises:
      ValueError: they are not the logprobs of these weights; says why.
    """
    actual = np.asarray(logprobs[1:], np.float64)
    expected = np.asarray(weights.expected_logprobs[1:], np.float64)
    error = float(np.mean(np.abs(actual - expected)))
    if not error <= weights.tolerance:  # also when it is NaN
        raise ValueError(
            f"its probe logprobs differ from the trainer's by {error:.3g} in the mean (tolerance"
            f" {weights.tolerance:g}); compare dtypes and model code, or start it again and publish"
            " again"
        )
    if weights.earlier_logprobs is None or weights.changed == frozenset():
        return error
    before = np.asarray(weights.earlier_logprobs[1:], np.float64)
    # Engine and trainer round: where that moves logprobs further than the step did, it is chance
    # which of two versions they are nearer to, and the hashes must tell.
    nearer_now = np.abs(actual - before) - np.abs(actual - expected)
    chance = MAX_CHANCE * float(np.std(nearer_now)) / math.sqrt(nearer_now.size)
    if float(np.mean(nearer_now)) < -chance:
        error_before = float(np.mean(np.abs(actual - before)))
        raise ValueError(
            f"its probe logprobs are nearer to the weights before (mean error {error_before:.3g})"
            f" than to these ({error:.3g}): it kept the old ones. Start it again and publish again"
        )
    is_same_version = earlier is None or earlier.version == weights.version
    if is_same_version or np.array_equal(expected, before):
        return error
    if earlier is not None and list(earlier.logprobs) == list(logprobs):
        raise ValueError(
            f"its probe logprobs are to the last bit those that it gave with weights"
            f" {earlier.version}: it kept the old ones. Start it again and publish again"
        )
    return error


# -- hashes of the weights
# -------------------------------------------------------------------------------------------------


async def _read_checksums(engine: Engine, adapter: str = "") -> Checksums:
    """Return the server's hashes of its weights, or of adapters by name, by rank."""
    answer = await engine.checksum(adapter)
    with blame_engine(engine.url, "/weights_checker"):
        ranks = [dict(rank["checksums"]) for rank in answer["ranks"]]
        if not ranks or not all(ranks):
            raise ValueError("no checksums")
        return ranks


async def _held_before(
    engine: Engine, dialect: Dialect, weights: Weights, earlier: Proof | None
) -> Checksums | None:
    """Return the hashes of what an engine held before an update; None where nothing must change.

    Those of its last proof count as long as the server has not been started anew since. They also
    count where it says that it has these weights already, since it may have claimed that before.
    """
    if dialect.embedded or not dialect.checksums or not weights.changed:
        return None
    if earlier is not None and earlier.version == weights.version:
        return None  # it is brought to the same weights once more
    info = await engine.model_info()
    if earlier is not None:
        known = (str(earlier.version), str(weights.version))
        if info.get("weight_version") in known:
            return earlier.checksums
    return await _read_checksums(engine)


def _require_change(
    engine: Engine, weights: Weights, before: Checksums | None, after: Checksums
) -> None:
    """Raise EngineError unless a server's tensors changed where those of the checkpoint did."""
    if before is None or not weights.changed:
        return
    names = {name for rank in after for name in rank}
    changed = {
        name
        for old, new in zip(before, after, strict=False)
        for name in new
        if old.get(name) != new[name]
    }
    must_change = {fused_name(name) for name in weights.changed} & names
    same = sorted(must_change - changed)
    if same or not changed:
        raise EngineError(
            f"{engine.url} says that it has weights {weights.version}, but"
            f" {len(same) or len(names)} tensors are those of the weights before"
            f" ({_listed(same or sorted(names))}): it did not load them. Start it again and publish"
            " again"
        )


def fused_name(name: str) -> str:
    """Return the name of the SGLang tensor that a checkpoint's tensor becomes a part of."""
    for pattern, fused in FUSED:
        if pattern.search(name):
            return pattern.sub(fused, name)
    return name


def disagreement(ours: Proof, theirs: Proof) -> str:
    """Return the tensors in which two proofs of the same weights differ; "" if they agree.

    They agree where they cannot be compared: other weights, another version of the server, or
    tensors that are cut differently. Two engines may have given them, or one at two times.
    """
    if ours.version != theirs.version or ours.server != theirs.server:
        return ""
    if ours.checksums is None or theirs.checksums is None:
        return ""
    if [rank.keys() for rank in ours.checksums] != [rank.keys() for rank in theirs.checksums]:
        return ""
    differing = {
        name
        for our_rank, their_rank in zip(ours.checksums, theirs.checksums, strict=True)
        for name in our_rank
        if our_rank[name] != their_rank[name]
    }
    return _listed(sorted(differing))


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


async def _require_bytes_of(engine: Engine, weights: Weights) -> None:
    """Raise EngineError unless the embedded engine holds the bytes of the published weights."""
    (theirs,) = await _read_checksums(engine)
    ours = await engine.expected_checksums(weights)
    _require_same(engine, f"weights {weights.version}", ours, theirs)


def _require_same(
    engine: Engine, what: str, ours: Mapping[str, str], theirs: Mapping[str, str]
) -> None:
    names = ours.keys() | theirs.keys()
    differing = sorted(name for name in names if ours.get(name) != theirs.get(name))
    if differing:
        raise EngineError(
            f"{engine.url} holds other bytes than {what} in {len(differing)}"
            f" tensors ({_listed(differing)}); start it again and publish again"
        )


# -- what a publication changes
# -------------------------------------------------------------------------------------------------


def changed_tensors(before: pathlib.Path, after: pathlib.Path) -> frozenset[str]:
    """Return the names of the tensors of checkpoint `after` whose bytes differ from `before`.

    A tensor that `before` lacks has changed. Only as much is read as it takes to find a difference.
    """
    old = _open_tensors(before)
    new = _open_tensors(after)
    return frozenset(
        name for name, tensor in new.items() if name not in old or _differ(old[name], tensor)
    )


def _open_tensors(path: pathlib.Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint, each to be read in slices of its rows."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        opened = safetensors.safe_open(file, framework="numpy")
        names = list(opened.keys())
        for name in names:
            tensors[name] = opened.get_slice(name)
    return tensors


def _differ(old: Any, new: Any) -> bool:
    """Return whether two tensors differ in shape, dtype or bytes."""
    shape = new.get_shape()
    if old.get_shape() != shape or old.get_dtype() != new.get_dtype():
        return True
    if not shape:
        return old[...].tobytes() != new[...].tobytes()
    if 0 in shape:
        return False
    row_bytes = new[0:1].nbytes
    start = 0
    block_bytes = FIRST_BLOCK_BYTES
    while start < shape[0]:
        stop = min(start + max(block_bytes // row_bytes, 1), shape[0])
        if old[start:stop].tobytes() != new[start:stop].tobytes():
            return True
        start = stop
        block_bytes = min(4 * block_bytes, MAX_BLOCK_BYTES)
    return False
