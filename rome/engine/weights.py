"""A version of the weights on its way to engines: where it is, and what verifies its arrival."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import safetensors

from rome.engine.handover import Handover
from rome.model.hf import peft

ADAPTER_PREFIX = "rome-step-"  # of the names of adapters that trainers publish


@dataclasses.dataclass(frozen=True)
class Weights:
    """A version of the weights, and the data that verifies it.

    Attributes:
      source: a Hugging Face directory that the engines or their mirrors can read, or arrays for the
        engine in this process.
      version: its number.
      probe_ids: tokens of the probe prompt, at least two.
      expected_logprobs: the trainer's log p(probe_ids[t] | probe_ids[:t]) at temperature 1; the
        entry of the first id is ignored.
      tolerance: largest accepted mean error of the probe's logprobs, in nats.
      changed: names of the tensors whose values differ from the version published before; None
        where that is not known.
      earlier_logprobs: `expected_logprobs` of the version published before, of the same probe; None
        where there is none.
      adapter: whether the source holds adapters alone, which engines load by name beside the
        weights that they were started with.
      base: with adapters, the directory of those weights, which an embedded engine proves too; None
        where the engine was started by other means.
    """

    source: pathlib.Path | Handover
    version: int
    probe_ids: Sequence[int]
    expected_logprobs: Sequence[float]
    tolerance: float
    changed: frozenset[str] | None = None
    earlier_logprobs: Sequence[float] | None = None
    adapter: bool = False
    base: pathlib.Path | None = None

    def __post_init__(self) -> None:
        num_ids = len(self.probe_ids)
        num_logprobs = len(self.expected_logprobs)
        if num_ids != num_logprobs or num_ids < 2:
            raise ValueError(
                f"{num_ids} probe ids and {num_logprobs} logprobs; give one logprob for each of at"
                " least two ids"
            )

    @property
    def path(self) -> pathlib.Path:
        """The directory of the weights.

        Raises:
          TypeError: they are arrays.
        """
        if isinstance(self.source, Handover):
            raise TypeError(
                "these weights are arrays for the engine inside the trainer; write them with"
                " write_checkpoint for an engine elsewhere"
            )
        return self.source

    @property
    def adapter_name(self) -> str:
        """The name by which engines know these adapters."""
        return f"{ADAPTER_PREFIX}{self.version:06d}"

    @property
    def adapter_path(self) -> pathlib.Path:
        """The directory of these adapters, in PEFT's layout."""
        return self.path / peft.DIRECTORY

    @property
    def arrays(self) -> Handover:
        """The arrays of the weights.

        Raises:
          TypeError: they are files.
        """
        if not isinstance(self.source, Handover):
            raise TypeError(
                f"these weights are files in {self.source}; an engine inside the trainer takes"
                " arrays (rome.engine.handover.hand_over)"
            )
        return self.source


def file_checksums(path: pathlib.Path, dtype: str) -> dict[str, str]:
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
