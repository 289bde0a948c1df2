"""Models that a stage reads from files: the one it starts from, and those it published."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rome.model.config import PRESETS, SIZES, ModelConfig
from rome.model.hf import peft
from rome.model.hf.checkpoint import load_hf, read_config
from rome.model.hf.peft import load_peft
from rome.model.lora import Lora, adapter_shardings
from rome.model.params import param_shardings
from rome.stopping import ShouldStop, never, raise_if_stopped
from rome.train.feed import put
from rome.train.parameters import StoredParameters, saved_steps
from rome.train.workdir import ConfigError

# Fields of a ModelConfig that belong to the run, whatever the config of a checkpoint says.
RUN_SETTINGS = ("dtype", "remat", "scan_layers", "capacity_factor", "router_z_loss_coef")
TOKENIZER_FIELDS = ("eos_token_id", "pad_token_id")  # the run's tokenizer decides them
# Fields that say which parameters there are. Those that are in no tuple here say what is computed
# with them and belong to the checkpoint: rotary angles, epsilons, the longest context.
PARAMETER_FIELDS = (
    *(name for name in SIZES if name != "max_position"),
    "tie_embeddings",
    "attention_bias",
    "dense_layers",
    "intermediate_size",
)


def model_to_start(directory: pathlib.Path, preset: ModelConfig) -> ModelConfig:
    """Return the model of a directory that a run starts from, with the settings of the run.

    The releases of one architecture differ in their rotary angles, longest context and special
    tokens. These are the checkpoint's; only the parameters must be those of the preset.

    Args:
      directory: a Hugging Face directory, or what launch.convert made of one.
      preset: of --config.model, with the settings of the run.

    Raises:
      ConfigError: the parameters are not those of the preset; the message lists the fields.
      FileNotFoundError, ValueError: there is no config.json, or it cannot be read.
    """
    loaded = read_config(directory)
    different = differences(loaded, preset, PARAMETER_FIELDS)
    if different:
        fitting = [
            name
            for name, other in PRESETS.items()
            if not differences(loaded, other, PARAMETER_FIELDS)
        ]
        remedy = f"Set --config.model={fitting[0]}" if fitting else "No preset fits it"
        raise ConfigError(
            f"{directory} holds another model than --config.model asks for:"
            f" {', '.join(different)}. {remedy}, or name another --config.init_from."
        )
    return dataclasses.replace(loaded, **run_settings(preset))


def load_start(
    directory: pathlib.Path,
    model_config: ModelConfig,
    mesh: Mesh,
    should_stop: ShouldStop = never,
    dtype: Any = jnp.float32,
) -> dict:
    """Return the parameters of a directory, loaded straight to their places on the mesh.

    Args:
      directory: a Hugging Face directory, or what launch.convert made of one.
      model_config: the model that the run trains.
      mesh: where the parameters go.
      should_stop: polled while the tensors of a Hugging Face directory are read.
      dtype: of the parameters.

    Raises:
      ConfigError: the directory holds another model; the message lists the fields.
      Stopped: `should_stop` returned True.
    """
    loaded = model_to_start(directory, model_config)
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    compared = [name for name in names if name not in TOKENIZER_FIELDS]
    different = differences(loaded, model_config, compared)
    if different:
        raise ConfigError(
            f"{directory} does not hold the model that this run began with:"
            f" {', '.join(different)}. Bring that one back, or give another --workdir."
        )
    shardings = param_shardings(mesh, model_config)
    checkpoints = directory / "checkpoints"
    if checkpoints.is_dir():
        stored = StoredParameters(checkpoints, saved_steps(checkpoints)[-1], model_config)
        return stored.restore(shardings, dtype)

    def listen(done: int, total: int) -> None:
        raise_if_stopped(should_stop)

    return load_hf(directory, dtype, shardings, progress=listen)[0]


def load_published(
    directory: pathlib.Path, model_config: ModelConfig, mesh: Mesh, lora: Lora | None = None
) -> dict:
    """Return what was trained of a version that was published to the engines, on the mesh.

    It is all parameters, or with `lora` the adapters, which are kept beside the version.
    """
    if lora is not None:
        adapters = load_peft(directory / peft.DIRECTORY, model_config).stacked(model_config)
        return jax.tree.map(put, adapters, adapter_shardings(mesh, model_config, lora))
    shardings = param_shardings(mesh, model_config)
    return load_hf(directory, shardings=shardings)[0]


def run_settings(model_config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a model's config that a run chooses for itself."""
    return {name: getattr(model_config, name) for name in RUN_SETTINGS}


def differences(theirs: ModelConfig, ours: ModelConfig, names: Sequence[str]) -> list[str]:
    """Return the fields among `names` in which two models differ, with both values."""
    return [
        f"{name} ({getattr(theirs, name)} there, {getattr(ours, name)} wanted)"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
