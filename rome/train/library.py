"""The learner for programs of one's own: from a checkpoint directory to updates on one's arrays."""

from __future__ import annotations

import pathlib
from typing import Any

import optax
from jax.sharding import Mesh

from rome.losses import Loss, LossConfig, build_loss
from rome.model.hf.checkpoint import load_hf, read_config
from rome.model.params import param_shardings
from rome.model.precision import use_full_precision
from rome.model.sharding import make_mesh
from rome.train.state import TrainState
from rome.train.step import Learner


def open_learner(
    directory: str | pathlib.Path,
    loss: str | Loss,
    optimizer: optax.GradientTransformation,
    *,
    loss_config: LossConfig | None = None,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    **settings: Any,
) -> tuple[Learner, TrainState]:
    """Return a learner for the model of a checkpoint directory, and the state it starts from.

    Args:
      directory: a Hugging Face directory of a Qwen3 model.
      loss: a function as those of rome.losses, or its name: of SPECS, or of own code.
      optimizer: of optax.
      loss_config: switches of the loss.
      temperature: of the sampling, which logits are divided by.
      mesh: None: all devices of this machine; a micro-batch has a multiple of their number of rows.
      settings: fields of ModelConfig that are training's, such as remat="full" or dtype="float32".

    Raises:
      FileNotFoundError, ValueError: the checkpoint, the loss or the mesh cannot be used.
    """
    config = read_config(directory, **settings)
    use_full_precision(config.dtype)
    function = build_loss(loss) if isinstance(loss, str) else loss
    mesh = make_mesh({"fsdp": -1}, config) if mesh is None else mesh
    learner = Learner(config, function, loss_config or LossConfig(), optimizer, mesh, temperature)
    params, _ = load_hf(directory, shardings=param_shardings(mesh, config))
    return learner, learner.start(params)
