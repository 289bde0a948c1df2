"""Adapters in the layout of PEFT, and added to the tensors of a checkpoint.

A directory holds adapter_config.json and adapter_model.safetensors. Each adapted tensor of the
checkpoint has two there, `lora_A.weight` [r, in] and `lora_B.weight` [out, r]; the checkpoint that
they are merged into has W + alpha / r * B A. Each expert is a matrix of its own.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from rome.files import sync
from rome.model.config import ModelConfig
from rome.model.hf.files import read_document, read_header, write_json
from rome.model.hf.names import checkpoint_tensors
from rome.model.lora import MATRICES, Lora, Target, adapter_shapes
from rome.model.ops.low_rank import SUFFIX

DIRECTORY = "adapter"  # in a run's final/ and in each of its published versions
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WEIGHT = ".weight"
# key of adapter_config.json -> the values that are understood; an absent key is fine
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
}


@dataclasses.dataclass(frozen=True)
class HostAdapters:
    """Adapters in host memory, by the checkpoint's tensors.

    Attributes:
      lora: what they are.
      pairs: name of a tensor -> its A [r, in] and B [out, r], float32.
    """

    lora: Lora
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, adapters: Any, config: ModelConfig, lora: Lora) -> HostAdapters:
        """Return the adapters of a pytree (`rome.model.lora`) of NumPy arrays, without a copy."""
        pairs = {}
        for tensor in checkpoint_tensors(config):
            if tensor.path[1:] not in lora.targets:
                continue
            pair = adapters["layers"][tensor.path[1]][tensor.path[2] + SUFFIX]
            a = pair["a"][tensor.index].reshape(-1, lora.rank)
            b = pair["b"][tensor.index].reshape(lora.rank, -1)
            pairs[tensor.name] = (a.T, b.T)
        return cls(lora, pairs)

    def stacked(self, config: ModelConfig) -> Any:
        """Return the adapters as a pytree of NumPy arrays: the inverse of `of`."""

        def fill(shape: Any) -> np.ndarray:
            return np.empty(shape.shape, np.float32)

        adapters = _map(fill, adapter_shapes(config, self.lora))
        for tensor in checkpoint_tensors(config):
            if tensor.path[1:] not in self.lora.targets:
                continue
            a, b = self.pairs[tensor.name]
            pair = adapters["layers"][tensor.path[1]][tensor.path[2] + SUFFIX]
            for array, value in ((pair["a"], a.T), (pair["b"], b.T)):
                array[tensor.index] = value.reshape(array[tensor.index].shape)
        return adapters

    def require_finite(self, origin: str) -> None:
        """Raise ValueError where a number is not finite.

        Args:
          origin: of the adapters, named in the error.
        """
        for name, pair in self.pairs.items():
            if not all(np.isfinite(array).all() for array in pair):
                raise ValueError(
                    f"{origin}: the adapter of {name} is not finite; write the adapters again"
                )

    def add(self, name: str, start: int, rows: np.ndarray) -> np.ndarray:
        """Return rows of a checkpoint's tensor, from row `start` on, with its product added.

        The sum is float32; rows of a tensor without an adapter are returned as they are.
        """
        if name not in self.pairs:
            return rows
        a, b = self.pairs[name]
        product = b[start : start + len(rows)] @ a
        return rows.astype(np.float32) + np.float32(self.lora.scale) * product


def save_peft(adapters: HostAdapters, base: str, directory: pathlib.Path) -> None:
    """Write adapters for PEFT, and for engines that load its layout.

    Args:
      adapters: to write, in float32.
      base: the model that they belong to: a directory or a name, which PEFT looks up.
      directory: made if absent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lora = adapters.lora
    tensors = {}
    for name, (a, b) in adapters.pairs.items():
        stem = _PREFIX + name.removesuffix(_WEIGHT)
        tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b)
    path = directory / TENSORS
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # an engine may be another user's
    sync(path)
    document = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({MATRICES[target].word for target in lora.targets}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_json(directory / CONFIG, document)


def load_peft(directory: pathlib.Path, config: ModelConfig) -> HostAdapters:
    """Read adapters of a model that PEFT or `save_peft` wrote, as float32.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, adapters are of another kind, or they are not this model's.
    """
    document = read_document(directory / CONFIG)
    rank = document.get("r")
    alpha = document.get("lora_alpha")
    refused = [
        f"{key}={document[key]!r}"
        for key, values in _SUPPORTED.items()
        if key in document and document[key] not in values
    ]
    if refused or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        found = ", ".join(refused) or f"r={rank!r}, lora_alpha={alpha!r}"
        raise ValueError(
            f"{directory / CONFIG} describes no plain LoRA ({found}); give adapters with one rank,"
            " without biases, DoRA or rsLoRA"
        )
    path = directory / TENSORS
    stored = read_header(path)
    shapes = {name: found.shape for name, found in stored.items()}
    targets = _targets_in(shapes, config, rank, path)
    read = safetensors.numpy.load_file(path)
    pairs = {}
    for tensor in checkpoint_tensors(config):
        if tensor.path[1:] in targets:
            a, b = tensor_names(tensor.name)
            pairs[tensor.name] = (read[a].astype(np.float32), read[b].astype(np.float32))
    return HostAdapters(Lora(rank, float(alpha), targets), pairs)


def _targets_in(
    shapes: dict[str, tuple[int, ...]], config: ModelConfig, rank: int, path: pathlib.Path
) -> tuple[Target, ...]:
    """Return the matrices that a file's tensors adapt.

    Raises:
      ValueError: lists tensors that are missing, unknown or of another shape.
    """
    wanted: dict[Target, dict[str, tuple[int, ...]]] = {}
    for tensor in checkpoint_tensors(config):
        if tensor.path[1:] in MATRICES:
            out, inputs = tensor.shape
            a, b = tensor_names(tensor.name)
            group, name = tensor.path[1:]
            wanted.setdefault((group, name), {}).update({a: (rank, inputs), b: (out, rank)})
    targets = tuple(target for target in MATRICES if shapes.keys() & wanted.get(target, {}).keys())
    expected = {name: shape for target in targets for name, shape in wanted[target].items()}
    names = sorted(expected.keys() | shapes.keys())
    wrong = [name for name in names if expected.get(name) != shapes.get(name)]
    if wrong or not targets:
        listed = "; ".join(
            f"{name} is {shapes.get(name, 'missing')}, not {expected.get(name, 'one of them')}"
            for name in wrong[:3]
        )
        raise ValueError(
            f"{path} does not hold adapters of this model ({listed or 'it is empty'}). Give those"
            " that were trained on it"
        )
    return targets


def tensor_names(tensor: str) -> tuple[str, str]:
    """Return the names in PEFT of the A and the B of a checkpoint's tensor."""
    stem = _PREFIX + tensor.removesuffix(_WEIGHT)
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _map(function: Any, tree: Any) -> Any:
    """Return the function of every leaf of nested dictionaries."""
    if not isinstance(tree, dict):
        return function(tree)
    return {key: _map(function, value) for key, value in tree.items()}
