"""Parameters that a stage reads from files: those it starts from, and those it published."""

from __future__ import annotations

import pathlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import load_hf, read_config
from rome.model.params import param_shardings
from rome.train.parameters import StoredParameters, saved_steps

# Fields of a ModelConfig that belong to the run, whatever the config of a checkpoint says.
RUN_SETTINGS = ("dtype", "remat", "scan_layers", "capacity_factor", "router_z_loss_coef")


def load_start(directory: pathlib.Path, model_config: ModelConfig, mesh: Mesh) -> dict:
    """Return the float32 parameters of a directory, loaded straight to their places on the mesh.

    Args:
      directory: a Hugging Face directory, or what launch.convert made of one.
      model_config: the model that the run trains.
      mesh: where the parameters go.

    Raises:
      ValueError: where the directory holds another model.
    """
    settings = run_settings(model_config)
    loaded = read_config(directory, **settings)
    if loaded != model_config:
        raise ValueError(
            f"{directory} holds another model than --config.model asks for: {loaded}, not"
            f" {model_config}"
        )
    shardings = param_shardings(mesh, model_config)
    checkpoints = directory / "checkpoints"
    if checkpoints.is_dir():
        stored = StoredParameters(checkpoints, saved_steps(checkpoints)[-1], model_config)
        return stored.restore(shardings, jnp.float32)
    return load_hf(directory, shardings=shardings, **settings)[0]


def load_published(directory: pathlib.Path, model_config: ModelConfig, mesh: Mesh) -> dict:
    """Return the parameters of a version that was published to the engines, on the mesh."""
    shardings = param_shardings(mesh, model_config)
    return load_hf(directory, shardings=shardings, **run_settings(model_config))[0]


def run_settings(model_config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a model's config that a run chooses for itself."""
    return {name: getattr(model_config, name) for name in RUN_SETTINGS}
