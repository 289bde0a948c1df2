"""Models that a stage reads from files: the one it starts from, and those it published.

A model is a preset or a directory with a config.json. What a config.json says of the architecture
is taken as it is; what is training's business is the run's (config.learner).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from rome.model.config import DTYPES, EXPERT_SIZES, PRESETS, SIZES, ModelConfig
from rome.model.hf import peft
from rome.model.hf.checkpoint import load_hf, open_checkpoint, read_config
from rome.model.hf.files import read_document
from rome.model.hf.peft import load_peft
from rome.model.lora import Lora, adapter_shardings
from rome.model.params import param_shardings
from rome.model.rope import RopeScaling
from rome.stopping import ShouldStop, never, raise_if_stopped
from rome.train.feed import put
from rome.train.parameters import StoredParameters, saved_steps
from rome.train.workdir import ConfigError, experiment_before, model_directory

# A model of at most so many layers is unrolled: a fifth faster on a CPU, and compiled soon enough.
MAX_UNROLLED_LAYERS = 8
# Fields that say which parameters there are and what is computed with them; no run changes these.
FIXED_FIELDS = (
    *(name for name in SIZES if name != "max_position"),
    *EXPERT_SIZES,
    "tie_embeddings",
    "attention_bias",
    "dense_layers",
    "intermediate_size",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_theta",
)


def model_of(config: ml_collections.ConfigDict, start: pathlib.Path | None = None) -> ModelConfig:
    """Return the model that a run trains, with the settings of config.learner.

    Args:
      config: of the experiment.
      start: directory of the weights that the run starts from, whose model it then is; None: it is
        that of --config.model.

    Raises:
      ConfigError: config.model is neither a preset nor a directory with a config.json, or the
        settings do not fit the model.
      FileNotFoundError, ValueError: the config.json of the start cannot be read, or is of a model
        that is not supported.
    """
    directory = start or model_directory(config)
    model = PRESETS[config.model] if directory is None else read_config(directory)
    model = dataclasses.replace(model, dtype=_dtype_of(config, start))
    try:
        return with_settings(_with_yarn(model, config.learner.yarn_factor), config)
    except ValueError as error:
        raise ConfigError(f"config.learner does not fit the model: {error}.") from None


def with_settings(model: ModelConfig, config: ml_collections.ConfigDict) -> ModelConfig:
    """Return a model with the settings of config.learner, whatever its checkpoint says of them."""
    learner = config.learner
    settings: dict[str, Any] = {
        "remat": learner.remat,
        "scan_layers": model.num_layers > MAX_UNROLLED_LAYERS and not model.dense_layers,
        "capacity_factor": learner.capacity_factor,
        "router_z_loss_coef": learner.router_z_loss_coef,
    }
    if learner.router_aux_loss_coef != -1:
        settings["router_aux_loss_coef"] = learner.router_aux_loss_coef
    return dataclasses.replace(model, **settings)


def to_document(model: ModelConfig) -> dict[str, Any]:
    """Return the document of WORKDIR/model.json: a config.json, with the type of the run."""
    return model.to_hf() | {"dtype": model.dtype}


def from_document(document: dict[str, Any], config: ml_collections.ConfigDict) -> ModelConfig:
    """Return the model of a WORKDIR/model.json, with the settings of config.learner."""
    return with_settings(ModelConfig.from_hf(document, dtype=document["dtype"]), config)


def check_start(directory: pathlib.Path) -> None:
    """Check that a directory to start from holds all tensors of its model.

    Only headers of files are read.

    Raises:
      FileNotFoundError, ValueError: a file or a tensor is missing, or none of this model's.
    """
    model = read_config(directory)
    if not (directory / "checkpoints").is_dir():
        open_checkpoint(directory, model)


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
    different = differences(read_config(directory), model_config, FIXED_FIELDS)
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
    return load_hf(directory, shardings=param_shardings(mesh, model_config))[0]


def differences(theirs: ModelConfig, ours: ModelConfig, names: Sequence[str]) -> list[str]:
    """Return the fields among `names` in which two models differ, with both values."""
    return [
        f"{name} ({getattr(theirs, name)} there, {getattr(ours, name)} wanted)"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]


def _dtype_of(config: ml_collections.ConfigDict, start: pathlib.Path | None) -> str:
    """Return the type that a run computes in: config.learner's, else that of its checkpoint.

    A stage before this one leaves float32 weights, so that its result does not say.

    Raises:
      ConfigError: nothing is computed in the checkpoint's type.
    """
    if config.learner.dtype:
        return config.learner.dtype
    if start is None or experiment_before(config.init_from):
        start = model_directory(config)
    if start is None:
        return PRESETS[config.model].dtype
    document = read_document(start / "config.json")
    dtype = document.get("dtype") or document.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ConfigError(
            f"config.json says dtype={dtype!r}, and training computes in {' or '.join(DTYPES)}. Set"
            " --config.learner.dtype."
        )
    return dtype


def _with_yarn(model: ModelConfig, factor: float) -> ModelConfig:
    """Return a model whose context YaRN stretches; a factor of 0 leaves it as its checkpoint is.

    Raises:
      ValueError: the factor is below 1, or the angles are stretched in another way already.
    """
    if not factor:
        return model
    known = model.rope_scaling
    if factor < 1 or (known is not None and known.kind != "yarn"):
        raise ValueError(
            f"yarn_factor={factor:g} stretches a rope of kind"
            f" {'default' if known is None else known.kind}; it is 1 or more, of a default or yarn"
            " rope"
        )
    trained = known.original_max_position if known is not None else model.max_position
    return dataclasses.replace(
        model,
        rope_scaling=RopeScaling.yarn(factor, trained),
        max_position=int(trained * factor),
    )
