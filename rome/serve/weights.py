"""The engine's weights: loaded from a Hugging Face directory, hashed, and looked up by name."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import named_tensors
from rome.model.hf.leaves import LeafReader
from rome.model.qwen3 import Params

# Fields that a forward pass does not read; they may differ between checkpoints of one model.
_UNREAD = {
    "router_aux_loss_coef",
    "initializer_range",
    "remat",
    "scan_layers",
    "max_position",
    "eos_token_id",
    "pad_token_id",
}


def load_weights(
    directory: str | pathlib.Path, dtype: str, mesh: Mesh | None = None
) -> tuple[Params, ModelConfig]:
    """Return the parameters on their devices, layers unstacked, and their config.

    Args:
      directory: Hugging Face checkpoint.
      dtype: of weights and computation, such as "bfloat16".
      mesh: of the engine; None: one device.

    Raises:
      ValueError, OSError: the directory is incomplete, or holds numbers that are not finite. The
        message is one sentence.
    """
    with LeafReader(directory, dtype) as reader:
        return reader.read_all(mesh or jax.local_devices()[0]), reader.config


def open_weights(directory: str | pathlib.Path, like: ModelConfig) -> LeafReader:
    """Return the open checkpoint of weights that shall replace others.

    Args:
      directory: Hugging Face checkpoint.
      like: config of the weights that these replace; another model is refused.

    Raises:
      ValueError, OSError: the directory is incomplete or holds another model. The message is one
        sentence.
    """
    reader = LeafReader(directory, like.dtype)
    differences = _list_differences(reader.config, like)
    if differences:
        reader.close()
        raise ValueError(
            f"{directory} holds another model: {', '.join(differences)}; start a server of its own"
            " for it"
        )
    return reader


def _list_differences(config: ModelConfig, like: ModelConfig) -> list[str]:
    """Return the fields in which the models of two configs differ, with both values."""
    differences = []
    for field in dataclasses.fields(config):
        new = getattr(config, field.name)
        old = getattr(like, field.name)
        if field.name not in _UNREAD and new != old:
            differences.append(f"{field.name} {new} (was {old})")
    return differences


def checksums(params: Params, config: ModelConfig) -> dict[str, str]:
    """Return SHA-256 of every tensor, by the name that it has in a Hugging Face checkpoint.

    The bytes are those of a checkpoint of the server's dtype.
    """
    return {
        name: hashlib.sha256(tensor.tobytes()).hexdigest()
        for name, tensor in named_tensors(params, config)
    }


def find_tensor(params: Params, config: ModelConfig, name: str) -> np.ndarray | None:
    """Return the tensor with this name in a Hugging Face checkpoint, or None."""
    return next((tensor for _, tensor in named_tensors(params, config, only=name)), None)
