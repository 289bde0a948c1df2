"""The engine's weights: loaded from a Hugging Face directory, hashed, and looked up by name."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import load_hf, named_tensors
from rome.model.qwen3 import Params
from rome.model.stacking import unstack_layers

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
    directory: str | pathlib.Path, dtype: str, like: ModelConfig | None = None
) -> tuple[Params, ModelConfig]:
    """Return the parameters on the device, layers unstacked, and their config.

    Args:
      directory: Hugging Face checkpoint.
      dtype: of weights and computation, such as "bfloat16".
      like: config of the weights that these replace; another model is refused.

    Raises:
      ValueError, OSError: the directory is incomplete, holds another model, or numbers that are not
        finite. The message is one sentence.
    """
    params, config = load_hf(directory, dtype=jnp.dtype(dtype))
    config = dataclasses.replace(config, dtype=dtype, remat="none")
    if like is not None:
        differences = _list_differences(config, like)
        if differences:
            raise ValueError(
                f"{directory} holds another model: {', '.join(differences)}; start a server of its"
                " own for it"
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf).all():
            raise ValueError(
                f"{directory}: {jax.tree_util.keystr(path)} is not finite; publish the weights"
                " again"
            )
    on_device = jax.device_put(unstack_layers(params, config))
    return jax.block_until_ready(on_device), config


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
