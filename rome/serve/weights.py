"""The engine's weights: from a Hugging Face directory, whole or not at all, and what can be asked
about them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import load_hf, named_tensors
from rome.model.qwen3 import Params
from rome.model.stacking import unstack_layers

# What a forward pass does not read may differ between two checkpoints of one model.
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
    directory: str | os.PathLike[str], dtype: str, like: ModelConfig | None = None
) -> tuple[Params, ModelConfig]:
    """Parameters on the device, layers unstacked, and their config.

    Args:
      like: config of the weights that these shall replace.
    Raises: ValueError or OSError, in one sentence, for a directory that is incomplete, of another
    model, or not finite.
    """
    params, config = load_hf(directory, dtype=jnp.dtype(dtype))
    config = dataclasses.replace(config, dtype=dtype, remat="none")
    if like is not None:
        differences = [
            f"{field.name} {getattr(config, field.name)} (was {getattr(like, field.name)})"
            for field in dataclasses.fields(config)
            if field.name not in _UNREAD
            and getattr(config, field.name) != getattr(like, field.name)
        ]
        if differences:
            raise ValueError(
                f"{directory} holds another model: {', '.join(differences)}; start a server of its"
                " own for it"
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not np.isfinite(leaf.astype(np.float32, copy=False)).all():
            raise ValueError(
                f"{directory}: {jax.tree_util.keystr(path)} is not finite; publish the weights"
                " again"
            )
    return jax.block_until_ready(jax.device_put(unstack_layers(params, config))), config


def checksums(params: Params, config: ModelConfig) -> dict[str, str]:
    """SHA-256 of the bytes of every tensor as it would stand in a checkpoint of the server's dtype,
    by its Hugging Face name.
    """
    return {
        name: hashlib.sha256(tensor.tobytes()).hexdigest()
        for name, tensor in named_tensors(params, config)
    }


def find_tensor(params: Params, config: ModelConfig, name: str) -> np.ndarray | None:
    return next((tensor for _, tensor in named_tensors(params, config, only=name)), None)
